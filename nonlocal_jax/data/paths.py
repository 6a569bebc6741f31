"""Paths of sources, local folders and buckets, and the names of the files in them."""

import codecs
import contextlib
import contextvars
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from etils import epath

from nonlocal_jax.errors import UserError

# How names of image files end: the formats that OpenCV reads.
IMAGE_SUFFIXES = (
  *('.jpg', '.jpeg', '.jpe', '.png', '.bmp', '.dib', '.webp', '.tif', '.tiff', '.jp2', '.avif'),
  *('.gif', '.ppm', '.pgm', '.pbm', '.pnm'),
)


def as_path(path: str | os.PathLike[str]) -> Path:
  """Returns a path for a local folder or a bucket's URL.

  Args:
    path: A folder, perhaps below ~, or gs://, s3://, az:// or hf:// with a path.

  Returns:
    A `pathlib.Path`, or an `epath.Path`, which has the same methods.
  """
  text = os.fspath(path)
  return cast(Path, epath.Path(text)) if '://' in text else Path(text).expanduser()


def is_remote(path: Path) -> bool:
  """Whether a path from `as_path` is in a bucket."""
  return '://' in os.fspath(path)


def is_utf8(path: str | os.PathLike[str]) -> bool:
  """Whether a path is UTF-8, as libraries in C++ take it; file systems allow any bytes."""
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError:
    return False
  return True


def files_below(folder: Path) -> list[Path]:
  """Lists the files below a folder recursively, sorted by name.

  Hidden files and folders are left out, and links to a folder above, which have no end. Within
  `listed_once`, each folder is listed once.

  Args:
    folder: A path of `as_path`; links are followed.

  Returns:
    The files' paths, sorted; none if there is no such folder.

  Raises:
    UserError: If a folder cannot be read.
  """
  known = _listed.get()
  if known is not None and folder in known:
    return list(known[folder])
  if not is_remote(folder):
    found = sorted(_files_below(folder, ()), key=lambda path: path.parts)
  else:
    found, pattern = [], '*'
    while level := list(folder.glob(pattern)):  # may include folders
      found += [path for path in level if not _is_hidden(path.relative_to(folder))]
      pattern = f'*/{pattern}'
    found.sort()
  if known is not None:
    known[folder] = list(found)
  return found


_listed: contextvars.ContextVar[dict[Path, list[Path]] | None] = contextvars.ContextVar(
  'listed', default=None
)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
  """Context in which `files_below` lists each folder once, although files may come and go."""
  token = _listed.set({})
  try:
    yield
  finally:
    _listed.reset(token)


def _files_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
  real = os.path.realpath(folder)
  if real in above or not folder.is_dir():
    return
  try:
    with os.scandir(folder) as entries:
      found = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != '.']
  except OSError as error:
    raise UserError(f'Folder {folder} cannot be read: {error.strerror}; see to it.') from error
  for name, is_folder in found:
    path = folder / name
    if is_folder:
      yield from _files_below(path, (*above, real))
    else:
      yield path


def _is_hidden(path: Path) -> bool:
  return any(part.startswith('.') for part in path.parts)


def in_one_form(name: str) -> str:
  r"""Returns a name in the composed form of Unicode (NFC), in which equal names are equal.

  >>> in_one_form('e\u0301.jpg') == '\u00e9.jpg'  # as macOS writes it, and Linux
  True
  """
  return unicodedata.normalize('NFC', name)


def without_suffix(name: str, suffixes: Iterable[str]) -> str | None:
  """Removes from a name the first of some suffixes that it ends with, in any case.

  >>> without_suffix('a.b.JPG', ['.jpeg', '.jpg'])
  'a.b'

  Args:
    name: A file's name.
    suffixes: Such as '.jpg' or '_labelIds.png'.

  Returns:
    The rest; None if it ends with none of them.
  """
  found = (s for s in suffixes if name[-len(s) :].lower() == s.lower())
  suffix = next(found, None)
  return None if suffix is None else name[: -len(suffix)]


def read_text(path: Path) -> str:
  """Reads a text file in UTF-8, or in UTF-16 with a byte-order mark.

  Raises:
    UserError: If it is neither.
    OSError: If it cannot be read.
  """
  data = path.read_bytes()
  is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  try:
    text = data.decode('utf-16' if is_utf16 else 'utf-8-sig')
  except UnicodeDecodeError:
    text = '\0'
  if '\0' in text:
    raise UserError(f'File {path} is no text in UTF-8: save it as that.')
  return text


def not_a_file(path: Path) -> str | None:
  """Says what a path is that must not be opened as a file, which can wait forever.

  Args:
    path: A path of `as_path`.

  Returns:
    What it is; None for files, what is missing, and what is in buckets.
  """
  if is_remote(path) or path.is_file():
    return None
  if path.exists():
    return 'a folder, no file' if path.is_dir() else 'a pipe or device, no file'
  return 'a link to a file that does not exist' if path.is_symlink() else None


def version_of(path: Path) -> tuple[int, int]:
  """Size in bytes and modification time, which differ when a file was rewritten.

  Args:
    path: A path of `as_path`.

  Returns:
    The size, and the time in the finest unit that its file system tells; 0 where it does not.
  """
  stat: Any = path.stat()  # epath's names differ
  return (stat.length, stat.mtime) if is_remote(path) else (stat.st_size, stat.st_mtime_ns)
