"""Paths of sources: local folders and buckets."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from etils import epath

from nonlocal_jax.errors import UserError


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


def files_below(folder: Path) -> list[Path]:
  """Lists the files below a folder recursively, sorted by name.

  Hidden files and folders are left out, and links to a folder above, which have no end.

  Args:
    folder: A path of `as_path`; links are followed.

  Returns:
    The files' paths, sorted; none if there is no such folder.

  Raises:
    UserError: If a folder cannot be read.
  """
  if not is_remote(folder):
    return sorted(_files_below(folder, ()))
  found, pattern = [], '*'
  while level := list(folder.glob(pattern)):  # may include folders
    found += [path for path in level if not _is_hidden(path.relative_to(folder))]
    pattern = f'*/{pattern}'
  return sorted(found)


def _files_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
  real = os.path.realpath(folder)
  if real in above or not folder.is_dir():
    return
  try:
    names = os.listdir(folder)
  except OSError as error:
    raise UserError(f'Folder {folder} cannot be read: {error.strerror}; see to it.') from error
  for name in names:
    path = folder / name
    if name.startswith('.'):
      continue
    if path.is_dir():
      yield from _files_below(path, (*above, real))
    else:
      yield path


def _is_hidden(path: Path) -> bool:
  return any(part.startswith('.') for part in path.parts)


def not_a_file(path: Path) -> str | None:
  """Says what a path is that cannot be read as a file is; None for files and what is in buckets.

  Args:
    path: A path from `files_below`.
  """
  if is_remote(path) or path.is_file():
    return None
  return 'a pipe or device, no file' if path.exists() else 'a link to a file that does not exist'


def version_of(path: Path) -> tuple[int, int]:
  """Size in bytes and modification time, which differ when a file was rewritten.

  Args:
    path: A path of `as_path`.

  Returns:
    The size, and the time in the finest unit that its file system tells; 0 where it does not.
  """
  stat: Any = path.stat()  # epath's names differ
  return (stat.length, stat.mtime) if is_remote(path) else (stat.st_size, stat.st_mtime_ns)
