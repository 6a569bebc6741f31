"""Downloads the archives of Cityscapes, which need a login, through cityscapesscripts.

Its package and command `csDownload` are by the dataset's authors. Only its function to log in is
not used: it takes no user name, and reads or writes passwords in a file.
"""

import contextlib
import getpass
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import requests

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.addresses import (
  MIRROR,
  OFFLINE,
  address_error,
  has_mirror,
  is_offline,
)

PASSWORD = 'CITYSCAPES_PASSWORD'
_SITE = 'https://www.cityscapes-dataset.com'
_SECONDS = (15, 60)  # until there is a connection, and between two parts of an answer


def download_packages(files: Sequence[str], folder: Path, username: str) -> Iterator[str]:
  """Downloads archives of Cityscapes and compares the md5 that the site gives.

  A file appears when it is whole; the next call goes on where one was interrupted.

  Args:
    files: The archives' names.
    folder: Where they go.
    username: Of the login; '' for none.

  Yields:
    The name of each archive once it is there.

  Raises:
    UserError: If cityscapesscripts is not installed or there is no `username`, with what to do
      instead; if there is a mirror, which must not see the password; if the login is refused; or
      if an archive cannot be downloaded.
  """
  names = ' and '.join(files)
  try:
    downloader = importlib.import_module('cityscapesscripts.download.downloader')
  except ImportError:  # it is no dependency
    downloader = None
  if downloader is None or not username:
    raise UserError(_steps(names, folder, is_installed=downloader is not None))
  if is_offline():
    raise UserError(f'{OFFLINE} is set: unset it, or put {names} into {folder}.')
  if has_mirror():
    raise UserError(
      f'{MIRROR} is set, and your login is for {_SITE} alone: unset it for Cityscapes, or put '
      f'{names} into {folder}.'
    )
  try:
    with _login(username) as session, contextlib.redirect_stdout(sys.stderr):
      for file in files:
        part = folder / f'.{file}.part' / file  # its name is fixed
        part.parent.mkdir(exist_ok=True)
        _download(downloader, session, part)
        part.replace(folder / file)
        part.parent.rmdir()
        yield file
  except requests.RequestException as error:
    raise UserError(
      f'{names} cannot be downloaded from {_SITE} ({_reason(error)}): the same command '
      f'goes on from there, or put them into {folder}.'
    ) from error


def _download(downloader: ModuleType, session: requests.Session, part: Path) -> None:
  try:
    downloader.download_packages(
      session=session,
      package_names=[part.name],
      destination_path=str(part.parent),
      resume=part.exists(),
    )
  except OSError as error:  # of requests and of the disk
    response = getattr(error, 'response', None)
    if response is None or response.status_code != 416:
      raise
    # There is nothing after this part. It may be whole, but its md5 was not compared.
    part.unlink()
    _download(downloader, session, part)
  except Exception as error:
    if type(error) is Exception:  # so it says that the md5 differs
      part.unlink(missing_ok=True)
    reason = str(error) or 'the login has ended'
    raise UserError(
      f'cityscapesscripts cannot download {part.name} ({reason}): run the same command again.'
    ) from error


class _Session(requests.Session):
  """A session that does not wait forever."""

  def request(self, method: str | bytes, url: Any, *arguments: Any, **options: Any):
    """Sends a request."""
    options.setdefault('timeout', _SECONDS)
    try:
      return super().request(method, url, *arguments, **options)
    except requests.RequestException:
      raise
    except OSError as error:  # a file of certificates that is not there
      raise requests.ConnectionError(error) from error


def _login(username: str) -> requests.Session:
  fields = {'username': username, 'password': _password(username), 'submit': 'Login'}
  session = _Session()
  session.get(f'{_SITE}/login', allow_redirects=False).raise_for_status()  # sets a cookie
  answer = session.post(f'{_SITE}/login', data=fields, allow_redirects=False)
  answer.raise_for_status()
  if answer.status_code != 302:  # where it leads to if name and password are right
    raise UserError(
      f'{_SITE} refuses the login of {username}: check the name, and the password in {PASSWORD} or '
      'as you typed it.'
    )
  return session


def _password(username: str) -> str:
  if password := os.environ.get(PASSWORD):
    return password
  if not sys.stdin.isatty():
    raise UserError(
      f'There is no password for the login of {username}: set the environment variable {PASSWORD}, '
      'or run the command in a terminal.'
    )
  return getpass.getpass(f'Password of {username} at {_SITE}: ')


def _reason(error: requests.RequestException) -> str:
  if error.response is not None:
    return f'status {error.response.status_code}'
  return str(address_error(error))


def _steps(names: str, folder: Path, *, is_installed: bool) -> str:
  install = '' if is_installed else 'pip install cityscapesscripts, and '
  return (
    'Cityscapes can be downloaded with a login only:\n'
    f'  1. Register at {_SITE}/register/.\n'
    f'  2. Either {install}give your username (--username=NAME; the password is asked for, or read '
    f'from {PASSWORD});\n'
    f'     or download {names} from {_SITE}/downloads/\n'
    f'     into {folder}.\n'
    '  3. Run the same command again.'
  )
