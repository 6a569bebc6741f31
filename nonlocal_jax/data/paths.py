"""Paths of sources: local folders and buckets."""

import os
from pathlib import Path
from typing import Any, cast

from etils import epath


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
  """Lists the files below a folder recursively, without hidden ones, sorted by name.

  Args:
    folder: A path of `as_path`; links are followed.

  Returns:
    The files' paths, sorted; none if there is no such folder.
  """
  if is_remote(folder):
    found, pattern = [], '*'
    while level := list(folder.glob(pattern)):  # may include folders
      found += [path for path in level if not path.name.startswith('.')]
      pattern = f'*/{pattern}'
  else:
    found = [
      Path(parent, name)
      for parent, _, names in os.walk(folder, followlinks=True)
      for name in names
      if not name.startswith('.')
    ]
  return sorted(found)


def version_of(path: Path) -> tuple[int, int]:
  """Size in bytes and modification time, which differ when a file was rewritten.

  Args:
    path: A path of `as_path`.

  Returns:
    The size, and the time in the finest unit that its file system tells; 0 where it does not.
  """
  stat: Any = path.stat()  # epath's names differ
  return (stat.length, stat.mtime) if is_remote(path) else (stat.st_size, stat.st_mtime_ns)
