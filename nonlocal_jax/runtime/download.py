"""Downloads a file whole, checked and once: parts are resumed, and several processes wait."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.addresses import (
  MIRROR,
  AddressError,
  Contents,
  mirrored,
  open_address,
  without_password,
)
from nonlocal_jax.runtime.files import elsewhere, make_folder, parse_object, write_whole
from nonlocal_jax.runtime.progress import progress_bar

_PAUSES = (1, 2, 4, 8)  # seconds before each further attempt
_GAIN = 1 << 20  # bytes of an attempt after which failures are counted anew
_MARGIN = 64 << 20  # bytes of the disk that are left free


@dataclasses.dataclass(frozen=True)
class Checks:
  """What is known of a file before it is downloaded.

  Attributes:
    length: Its number of bytes; None if unknown.
    sha256: The hex digits that its sha256 begins with, or all; '' if unknown.
    md5: Its md5 in hex digits; '' if unknown.
  """

  length: int | None = None
  sha256: str = ''
  md5: str = ''

  def difference(self, path: Path) -> str:
    """Returns how a file differs, as part of a sentence; '' if it does not.

    Raises:
      OSError: If the file cannot be read.
    """
    size = path.stat().st_size
    if self.length is not None and size != self.length:
      return f'has {size:,} bytes, not {self.length:,}'
    for name in ('sha256', 'md5'):
      wanted = getattr(self, name)
      if wanted:
        with open(path, 'rb') as file:
          found = hashlib.file_digest(file, name).hexdigest()
        if not found.startswith(wanted):
          return f'has the {name} {found[: len(wanted)]}..., not {wanted}'
    return ''

  def __str__(self) -> str:
    """What a user can compare, e.g. 'its sha256 begins with 5ae0aa33'."""
    if self.sha256:
      return f'its sha256 {"is" if len(self.sha256) == 64 else "begins with"} {self.sha256}'
    if self.md5:
      return f'its md5 is {self.md5}'
    return f'it has {self.length:,} bytes' if self.length is not None else ''


def download(
  address: str,
  *,
  folder: Path,
  name: str = '',
  length: int | None = None,
  sha256: str = '',
  md5: str = '',
) -> Path:
  """Returns a file of that address, from `folder` if it is there, else downloaded.

  A file appears in `folder` under its name only when it is whole and checked. What an interrupted
  download left lies beside it, as NAME.part, and the next one goes on from there if the server
  still has the same file. Several processes that want the same file download it once.

  Environment variables: see `addresses.mirrored`, `addresses.is_offline`, and requests for proxies.

  Args:
    address: An http, https or file address.
    folder: Where the file belongs; made if it is missing.
    name: The file's name there; '' for the last part of the address.
    length: The file's number of bytes, if it is known.
    sha256: The digits that the file's sha256 begins with, or all, if they are known.
    md5: The file's md5, if it is known.

  Returns:
    The path of the file.

  Raises:
    UserError: If it cannot be downloaded, has another checksum, or does not fit on the disk.
  """
  path = folder / (name or address.rpartition('/')[2])
  checks = Checks(length, sha256.lower(), md5.lower())
  if _is_here(path, checks):  # without the lock, whose folder may be read-only
    return path
  make_folder(folder)
  with lock_of(path):
    if not _is_here(path, checks):
      _download(address, path, checks)
  return path


def remove_downloaded(path: Path) -> None:
  """Deletes a file that was downloaded, and what is recorded of it."""
  path.unlink(missing_ok=True)
  _beside(path, 'checked').unlink(missing_ok=True)


def check_free_space(
  folder: Path,
  size: int,
  *,
  what: str,
  remedy: str = 'set NONLOCAL_JAX_HOME to a folder on another disk',
) -> None:
  """Checks that a file system has room.

  Args:
    folder: An existing folder on it.
    size: The number of bytes that are needed.
    what: What needs them, for the message.
    remedy: What to do about it besides freeing space, for the message.

  Raises:
    UserError: If there are fewer bytes, and some to spare.
  """
  free = shutil.disk_usage(folder).free
  if free < size + _MARGIN:
    raise UserError(
      f'{what} needs {as_size(size)} in {folder}, and {as_size(_MARGIN)} to spare, where '
      f'{as_size(free)} are free: free some space, or {remedy}.'
    )


def as_size(count: int) -> str:
  """Formats a number of bytes.

  >>> as_size(123_456_789)
  '123.5 MB'
  """
  if count >= 10**9:
    return f'{count / 10**9:.1f} GB'
  return f'{count / 10**6:.1f} MB' if count >= 10**5 else f'{count:,} bytes'


def _is_here(path: Path, checks: Checks) -> bool:
  """Returns whether the file is there, checked now or since it was last changed.

  Raises:
    UserError: If it is another file.
  """
  try:
    if _read_record(_beside(path, 'checked')) == _facts(path, checks):
      return True
    difference = checks.difference(path)
  except (FileNotFoundError, NotADirectoryError) as error:
    if path.is_symlink():
      raise UserError(f'{path} is a link that leads nowhere: mend or delete it.') from error
    return False
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error
  if difference:
    raise UserError(f'{path} {difference}: delete it, and it is downloaded anew.')
  with contextlib.suppress(UserError):  # of a folder that others maintain
    _remember(path, checks)
  return True


def _remember(path: Path, checks: Checks) -> None:
  """Records that a file was checked, so that it need not be read again until it changes."""
  if checks != Checks():
    write_whole(_beside(path, 'checked'), json.dumps(_facts(path, checks)) + '\n')


def _facts(path: Path, checks: Checks) -> dict[str, Any]:
  facts = path.stat()
  return {'size': facts.st_size, 'changed': facts.st_mtime_ns, **dataclasses.asdict(checks)}


@contextlib.contextmanager
def lock_of(path: Path) -> Iterator[None]:
  """Holds the lock of what is downloaded, which is a hidden file beside it; says if it must wait.

  Args:
    path: A file or folder, perhaps not there yet, in a folder that is.

  Raises:
    UserError: If there cannot be a lock.
  """
  lock = filelock.FileLock(_beside(path, 'lock'))
  try:
    try:
      lock.acquire(blocking=False)
    except filelock.Timeout:
      print(f'Another process downloads {path.name}: waiting for it.', file=sys.stderr)
      lock.acquire(poll_interval=0.2)
  except OSError as error:
    reason = f'{error.strerror or error}{elsewhere(path)}'
    raise UserError(f'{path.parent} cannot be written: {reason}.') from error
  try:
    yield
  finally:
    lock.release()


def _download(address: str, path: Path, checks: Checks) -> None:
  """Downloads a file that is not there; the lock is held."""
  part, source = path.with_name(f'{path.name}.part'), mirrored(address)
  where = without_password(source)
  print(f'Downloading {where} to {path}', file=sys.stderr)
  remedy = f'put it at {path}' + (f'; {checks}.' if str(checks) else '.')
  if source != address:
    where = f'{where}, the mirror of {address},'
    remedy = f'see to {MIRROR}, or {remedy}'
  failures, has_gained, is_second = 0, False, False
  while True:
    before = _size(part)
    try:
      _continue(source, part, checks)
    except AddressError as error:
      gained = _size(part) - before
      has_gained |= gained > 0
      failures = 1 if gained >= _GAIN else failures + 1
      may_succeed = error.is_temporary or (error.is_unreachable and has_gained)
      if not may_succeed or failures > len(_PAUSES):
        raise UserError(
          f'{path.name} cannot be downloaded from {where} ({error}): {remedy}'
        ) from error
      pause = _PAUSES[failures - 1]
      print(f'{path.name}: {error}; trying again in {pause} s.', file=sys.stderr)
      time.sleep(pause)
      continue
    difference = checks.difference(part)
    if not difference:
      part.replace(path)
      _beside(part, 'source').unlink(missing_ok=True)
      _remember(path, checks)
      return
    part.unlink()
    _beside(part, 'source').unlink(missing_ok=True)
    if before == 0 or is_second:
      raise UserError(
        f'{path.name} cannot be downloaded from {where} (what comes {difference}): {remedy}'
      )
    is_second = True  # the parts may be of two files: once more in one piece
    print(f'{path.name}: what came {difference}; downloading it anew.', file=sys.stderr)


def _continue(source: str, part: Path, checks: Checks) -> None:
  """Downloads what a part lacks, or the whole file if the part may be of another one.

  Raises:
    AddressError: If the file cannot be read to its end.
  """
  record = _read_record(_beside(part, 'source'))
  version, start = str(record.get('version', '')), _size(part)
  is_verifiable = version or checks.sha256 or checks.md5
  if record.get('address') != without_password(source) or not is_verifiable:
    version, start = '', 0
  with open_address(source, start=start, version=version) as contents:
    if contents.length is not None and checks.length not in (None, contents.length):
      raise AddressError(f'it has {contents.length:,} bytes there, not {checks.length:,}')
    length = checks.length if contents.length is None else contents.length
    check_free_space(part.parent, (length or 0) - contents.start, what=part.stem)
    record = {'address': without_password(source), 'version': contents.version}
    write_whole(_beside(part, 'source'), json.dumps(record) + '\n')
    try:
      _write(part, contents, length)
    except OSError as error:
      raise UserError(
        f'{part} cannot be written ({error.strerror or error}): the same command goes on from '
        'there, once it can be.'
      ) from error


def _write(part: Path, contents: Contents, length: int | None) -> None:
  with (
    progress_bar(length, part.stem, unit='B', unit_scale=True, initial=contents.start) as bar,
    open(part, 'r+b' if contents.start else 'wb') as file,
  ):
    file.seek(contents.start)
    file.truncate()
    for chunk in contents.chunks:
      file.write(chunk)
      bar.update(len(chunk))
    file.flush()
    os.fsync(file.fileno())
    if length is not None and file.tell() < length:
      raise AddressError('the connection was cut off', is_temporary=True)


def _beside(path: Path, ending: str) -> Path:
  """Returns the hidden file with what is known of a file."""
  return path.with_name(f'.{path.name}.{ending}')


def _read_record(path: Path) -> dict[str, Any]:
  try:
    return parse_object(path.read_bytes())
  except (OSError, ValueError):  # missing, or damaged
    return {}


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0
