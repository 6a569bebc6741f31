"""Unpacks zip and tar archives from elsewhere: only wanted files, all of them, or none.

An archive is read twice. The first time, names, kinds, numbers and sizes of its members are
checked, and nothing is written. The second time, wanted files are written as new, plain files:
links, devices, owners and modes in the archive have no effect.
"""

import contextlib
import dataclasses
import fnmatch
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.download import check_free_space
from nonlocal_jax.runtime.progress import progress_bar

_CHUNK = 1 << 20
_MOST_AT_ONCE = 16 << 20  # no name in a tar archive is longer, but its header may say so
_BLOCK = 4096  # of the disk, which a small file takes up
# What damaged archives make the libraries raise. `gzip.BadGzipFile` is an OSError.
_DAMAGED = (
  *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
  *(EOFError, RuntimeError, ValueError, struct.error, IndexError),
)


@dataclasses.dataclass(frozen=True)
class Contents:
  """What an archive holds.

  Attributes:
    inside: The folder in the archive that counts.
    files: The number of files below it for each pattern of names that is wanted, where * stands for
      a part of a folder's or a file's name. All other files are left out.
    most_members: How many members the archive may have, wanted or not.
    most_bytes: How many bytes they may unpack to, wanted or not.
  """

  inside: str
  files: Mapping[str, int]
  most_members: int
  most_bytes: int


def unpack(archive: Path, folder: Path, contents: Contents) -> None:
  """Unpacks the wanted files of a .zip, .tar, .tar.gz or .tgz archive into a new folder.

  The folder appears when it is whole. What an interrupted call left beside it is deleted first.

  Args:
    archive: The archive.
    folder: Where the files below `contents.inside` go; must not exist.
    contents: What the archive must hold.

  Raises:
    UserError: If the archive is damaged, holds something else, or names a path outside, a link or a
      device, or if the folder exists or cannot be written.
  """
  if folder.exists() or folder.is_symlink():
    raise UserError(f'{folder} is there already: move it away, or give another folder.')
  partial = folder.with_name(f'.{folder.name}.partial')
  try:
    wanted = _survey(archive, contents)
    if partial.exists():
      shutil.rmtree(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    blocks = sum(-(-size // _BLOCK) for size in wanted.values())
    check_free_space(
      folder.parent,
      blocks * _BLOCK,
      what=f'Unpacking {archive.name}',
      remedy='give a folder on another disk',
    )
    try:
      _copy(archive, partial, wanted, contents.inside)
      partial.rename(folder)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  except _DAMAGED as error:
    raise UserError(
      f'Archive {archive} is damaged ({error}): delete it, and it is downloaded anew.'
    ) from error
  except OSError as error:
    raise UserError(
      f'{archive} cannot be unpacked into {folder}: {error.strerror or error}.'
    ) from error


def missing_files(folder: Path, contents: Contents) -> list[str]:
  """Compares an unpacked folder with what its archive holds.

  Returns:
    For each kind of file of which there are fewer or more, how many there are and should be.
  """
  found = {
    pattern: sum(not path.name.startswith('.') for path in folder.glob(pattern))
    for pattern in contents.files
  }
  return _differences(found, contents)


class _Member(NamedTuple):
  name: str
  size: int
  kind: Literal['file', 'folder', 'link', 'device']
  open: Callable[[], IO[bytes]]


def _survey(archive: Path, contents: Contents) -> dict[str, int]:
  """Checks all members; returns the sizes of the wanted files by their path below `inside`."""
  wanted: dict[str, int] = {}
  others: set[str] = set()
  found: Counter[str] = Counter()
  members = total = 0
  with _members_of(archive) as listed:
    for member in listed:
      members, total = members + 1, total + member.size
      if members > contents.most_members:
        raise _refused(archive, f'has more than {contents.most_members:,} members')
      if member.size < 0 or total > contents.most_bytes:
        raise _refused(archive, f'unpacks to more than {contents.most_bytes:,} bytes')
      path = _below(archive, member.name, contents.inside)
      if path is None:
        continue
      if member.kind in ('link', 'device'):
        raise _refused(archive, f'holds a {member.kind}, {member.name!r}')
      pattern = next((key for key in contents.files if _matches(path, key)), None)
      if member.kind == 'folder' or pattern is None:
        if member.kind == 'folder' and pattern is not None:
          raise _refused(archive, f'has a folder where a file belongs, {member.name!r}')
        if member.kind == 'file':
          others.add(path)
        continue
      if path in wanted:
        raise _refused(archive, f'holds {member.name!r} twice')
      wanted[path] = member.size
      found[pattern] += 1
  folders = {parent for path in wanted for parent in _parents(path)}
  if wrong := next(iter(sorted(folders & (others | wanted.keys()))), None):
    raise _refused(archive, f'has a file where a folder belongs, {wrong!r}')
  if differences := _differences(found, contents):
    raise _refused(archive, f'holds {", ".join(differences)}')
  return wanted


def _copy(archive: Path, partial: Path, wanted: Mapping[str, int], inside: str) -> None:
  """Writes the wanted files."""
  partial.mkdir()
  with (
    progress_bar(len(wanted), f'Unpacking {archive.name}', unit='file') as bar,
    _members_of(archive) as listed,
  ):
    for member in listed:
      path = _below(archive, member.name, inside)
      if path not in wanted or member.kind != 'file':
        continue
      target = partial / path
      target.parent.mkdir(parents=True, exist_ok=True)
      with member.open() as source, open(target, 'xb') as file:
        shutil.copyfileobj(source, file, _CHUNK)
        if file.tell() != wanted[path]:
          raise EOFError(f'{member.name} is cut off')
      bar.update()


def _below(archive: Path, name: str, inside: str) -> str | None:
  """The path of a member below a folder of the archive; None if it is elsewhere in it."""
  parts = [part for part in name.split('/') if part not in ('', '.')]
  outside = name.startswith('/') or '..' in parts or '\\' in name or '\0' in name
  if outside or (parts and parts[0][1:2] == ':'):  # the latter as in C:
    raise _refused(archive, f'names a path outside, {name!r}')
  above = inside.split('/')
  if parts[: len(above)] != above:
    return None
  return '/'.join(parts[len(above) :])


def _matches(path: str, pattern: str) -> bool:
  parts, patterns = path.split('/'), pattern.split('/')
  if any(part.startswith('.') for part in parts):  # ._ID.jpg, which macOS packs beside ID.jpg
    return False
  return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _parents(path: str) -> Iterator[str]:
  while path := path.rpartition('/')[0]:
    yield path


def _differences(found: Mapping[str, int], contents: Contents) -> list[str]:
  return [
    f'{found[pattern]:,} of {count:,} {contents.inside}/{pattern}'
    for pattern, count in contents.files.items()
    if found[pattern] != count
  ]


def _refused(archive: Path, reason: str) -> UserError:
  return UserError(
    f'Archive {archive} {reason}, so that nothing of it was unpacked: it is not the one that was '
    'published, delete it.'
  )


@contextlib.contextmanager
def _members_of(archive: Path) -> Iterator[Iterator[_Member]]:
  if archive.suffix == '.zip':
    with zipfile.ZipFile(archive) as file:
      yield map(_zip_member, [file] * len(file.infolist()), file.infolist())
  else:
    opener: Any = gzip.open if archive.suffix in ('.gz', '.tgz') else open
    with opener(archive, 'rb') as stream, tarfile.open(fileobj=_Bounded(stream), mode='r:') as file:
      yield (_tar_member(file, info) for info in file)


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
  kind: Any = 'folder' if info.is_dir() else 'file'
  match stat.S_IFMT(info.external_attr >> 16):  # 0 if it was not packed on Unix
    case 0 | stat.S_IFREG | stat.S_IFDIR:
      pass
    case stat.S_IFLNK:
      kind = 'link'
    case _:
      kind = 'device'
  # `filename` ends at a zero byte; `orig_filename` is what the archive has.
  return _Member(info.orig_filename, info.file_size, kind, lambda: file.open(info))


def _tar_member(file: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
  kind: Any = 'device'
  if info.isreg():
    kind = 'file'
  elif info.isdir():
    kind = 'folder'
  elif info.issym() or info.islnk():
    kind = 'link'
  return _Member(info.name, info.size, kind, lambda: _opened(file, info))


def _opened(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
  source = file.extractfile(info)
  assert source is not None  # of a regular file
  return source


class _Bounded(io.RawIOBase):
  """A file that reads no more at once than tarfile should ask for; it holds that in memory."""

  def __init__(self, file: IO[bytes]):
    """Wraps a file."""
    self._file = file

  def read(self, size: int = -1, /) -> bytes:
    """Reads at most `size` bytes."""
    if not 0 <= size <= _MOST_AT_ONCE:
      raise tarfile.ReadError('a header that is too long')
    return self._file.read(size)

  def seek(self, offset: int, whence: int = 0, /) -> int:
    """Moves to a position."""
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    """Returns the position."""
    return self._file.tell()
