"""Opens an address on the web at any byte; a mirror and an offline switch from the environment."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from nonlocal_jax.errors import UserError

if TYPE_CHECKING:
  import requests

MIRROR = 'NONLOCAL_JAX_MIRROR'
OFFLINE = 'NONLOCAL_JAX_OFFLINE'

_CHUNK = 1 << 16  # what a lost connection may lose
_SECONDS = (15, 60)  # until there is a connection, and between two parts of an answer
_TEMPORARY = frozenset((408, 425, 429, 500, 502, 503, 504))  # HTTP statuses


class AddressError(Exception):
  """Raised where an address cannot be read; the message is the reason, part of a sentence.

  Attributes:
    is_temporary: Whether the server asks for another attempt, or the connection was lost.
    is_unreachable: Whether there was no connection at all.
  """

  def __init__(self, reason: str, *, is_temporary: bool = False, is_unreachable: bool = False):
    """Creates the error."""
    super().__init__(reason)
    self.is_temporary = is_temporary
    self.is_unreachable = is_unreachable


@dataclasses.dataclass(frozen=True)
class Contents:
  """What an address answers.

  Attributes:
    start: Position of the first byte of `chunks` in the file; may be 0 though more was asked.
    length: Number of bytes of the whole file; None if the server does not say.
    version: Changes when the file does; '' if the server says nothing that does.
    chunks: The bytes. Raises `AddressError` where they end too early.
  """

  start: int
  length: int | None
  version: str
  chunks: Iterator[bytes]


def mirrored(address: str) -> str:
  """Returns the address that stands for another, by the environment variable NONLOCAL_JAX_MIRROR.

  The mirror takes the place of scheme and host.

  >>> os.environ['NONLOCAL_JAX_MIRROR'] = 'http://localhost:8000'
  >>> mirrored('https://example.org/weights/a.pth')
  'http://localhost:8000/weights/a.pth'
  >>> del os.environ['NONLOCAL_JAX_MIRROR']

  Raises:
    UserError: If the mirror is no address.
  """
  if not has_mirror():
    return address
  mirror = os.environ[MIRROR].strip()
  wrong = UserError(f'{MIRROR} is {mirror!r}; set it to http://HOST:PORT or file:///FOLDER.')
  try:
    parts = urlsplit(mirror)
    _ = parts.port
  except ValueError as error:  # brackets or a port that are none
    raise wrong from error
  is_folder = parts.scheme == 'file' and parts.netloc in ('', 'localhost') and parts.path
  is_server = parts.scheme in ('http', 'https') and parts.hostname
  if not (is_folder or is_server) or parts.query or parts.fragment:
    raise wrong
  found = urlsplit(address)
  query = f'?{found.query}' if found.query and not is_folder else ''
  return f'{mirror.rstrip("/")}{found.path}{query}'


def has_mirror() -> bool:
  """Returns whether the environment variable NONLOCAL_JAX_MIRROR names a mirror."""
  return bool(os.environ.get(MIRROR, '').strip())


def without_password(address: str) -> str:
  """Returns an address as it may be printed.

  >>> without_password('https://me:secret@example.org/a.pth')
  'https://example.org/a.pth'
  """
  parts = urlsplit(address)
  return parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()


def is_offline() -> bool:
  """Returns whether the environment variable NONLOCAL_JAX_OFFLINE forbids to use the network."""
  return os.environ.get(OFFLINE, '').strip().lower() not in ('', '0', 'false', 'no')


@contextlib.contextmanager
def open_address(address: str, *, start: int = 0, version: str = '') -> Iterator[Contents]:
  """Opens an http, https or file address.

  Proxies come from the environment (`https_proxy`, `http_proxy`, `no_proxy`).

  Args:
    address: The address, already `mirrored`.
    start: Position of the first byte that is wanted. A server may answer with the whole file.
    version: `Contents.version` of the bytes before `start`. If the file is another one by now, the
      answer is the whole file.

  Raises:
    AddressError: If the address cannot be read.
  """
  if urlsplit(address).scheme == 'file':
    with _open_file(address, start, version) as contents:
      yield contents
    return
  if is_offline():
    raise AddressError(f'{OFFLINE} is set')
  import requests  # takes 0.1 s

  headers = {'Accept-Encoding': 'identity'}
  if start:
    headers['Range'] = f'bytes={start}-'
    if version:
      headers['If-Range'] = version
  with contextlib.ExitStack() as stack:
    try:
      session = stack.enter_context(requests.Session())
      response = session.get(address, headers=headers, stream=True, timeout=_SECONDS)
      stack.enter_context(response)
    except requests.RequestException as error:
      raise address_error(error) from error
    except OSError as error:  # a file of certificates that is not there
      raise AddressError(str(error)) from error
    found = _start_of(response, start, version)
    if found is None:
      stack.close()
      with open_address(address) as contents:
        yield contents
      return
    length = _length_of(response, found)
    is_over = response.status_code == 416
    chunks = iter(()) if is_over else _chunks(response)
    yield Contents(found, length, _version_of(response.headers) or version, chunks)


@contextlib.contextmanager
def _open_file(address: str, start: int, version: str) -> Iterator[Contents]:
  path = Path(unquote(urlsplit(address).path))
  try:
    file = open(path, 'rb')  # noqa: SIM115, closed below
  except OSError as error:
    raise AddressError(error.strerror or str(error)) from error
  with file:
    facts = os.fstat(file.fileno())
    found = f'{facts.st_size} {facts.st_mtime_ns}'
    position = file.seek(start if found == version and start <= facts.st_size else 0)

    def chunks() -> Iterator[bytes]:
      try:
        while chunk := file.read(_CHUNK):
          yield chunk
      except OSError as error:
        raise AddressError(error.strerror or str(error), is_temporary=True) from error

    yield Contents(position, facts.st_size, found, chunks())


def _start_of(response: 'requests.Response', start: int, version: str) -> int | None:
  """Returns where the body begins; None if it is not what was asked, and the rest is to be left.

  Raises:
    AddressError: If the answer is an error.
  """
  status = response.status_code
  if status == 200:
    return 0
  if status == 206 and start:
    is_same = not version or _version_of(response.headers) in ('', version)
    return start if is_same and _range_of(response)[0] == start else None
  if status == 416 and start:  # nothing is left, or the file has become shorter
    return start if _range_of(response)[1] == start else None
  reason = f'the server answers {status} {response.reason or ""}'.rstrip()
  raise AddressError(reason, is_temporary=status in _TEMPORARY)


def _length_of(response: 'requests.Response', start: int) -> int | None:
  if response.status_code in (206, 416):
    return _range_of(response)[1]
  try:
    return start + int(response.headers['Content-Length'])
  except (KeyError, ValueError):
    return None


def _range_of(response: 'requests.Response') -> tuple[int | None, int | None]:
  """Returns the first position and the file's length, which a Content-Range names."""
  text = response.headers.get('Content-Range', '')
  match = re.fullmatch(r'bytes\s+(?:(\d+)-\d+|\*)/(\d+|\*)', text.strip())
  if match is None:
    return None, None
  first, length = match.groups()
  return int(first) if first else None, int(length) if length != '*' else None


def _version_of(headers: Mapping[str, str]) -> str:
  """Returns what an If-Range may name: an ETag, unless it is a weak one, else the date."""
  tag = headers.get('ETag', '')
  return tag if tag.startswith('"') else headers.get('Last-Modified', '')


def _chunks(response: 'requests.Response') -> Iterator[bytes]:
  import requests

  # Some servers call a .tgz file a compressed answer, and urllib3 would decompress it.
  response.raw.headers.pop('Content-Encoding', None)
  try:
    yield from response.iter_content(_CHUNK)
  except requests.RequestException as error:
    raise address_error(error) from error


def address_error(error: 'requests.RequestException') -> AddressError:
  """Says why there is no answer, in the system's words and without names of Python's classes."""
  import requests

  if isinstance(error, requests.ConnectTimeout):
    return AddressError(f'no connection within {_SECONDS[0]} seconds', is_unreachable=True)
  if isinstance(error, requests.Timeout) or 'Read timed out' in str(error):
    return AddressError(f'no answer within {_SECONDS[1]} seconds', is_temporary=True)
  if isinstance(error, requests.TooManyRedirects):
    return AddressError('it redirects in a circle')
  if isinstance(error, requests.exceptions.ChunkedEncodingError):
    return AddressError('the connection was cut off', is_temporary=True)
  if isinstance(error, requests.exceptions.InvalidSchema) and 'SOCKS' in str(error):
    return AddressError("the proxy needs a package: pip install 'requests[socks]'")
  causes: list[BaseException] = [error]
  while cause := causes[-1].__cause__ or causes[-1].__context__:
    causes.append(cause)
  reasons = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
  reason = reasons[-1] if reasons else ' '.join(str(error).split())
  if isinstance(error, requests.exceptions.ProxyError):
    reason = f'the proxy: {reason}'
  # A server that hangs up was reached: its http.client.RemoteDisconnected is a reset, too.
  is_reset = any(isinstance(cause, ConnectionResetError | BrokenPipeError) for cause in causes)
  return AddressError(
    reason,
    is_temporary=is_reset,
    is_unreachable=isinstance(error, requests.ConnectionError) and not is_reset,
  )
