"""Locks on folders that the system releases when their process ends, however it ends."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import make_folder

LOCK = '.lock'


@contextlib.contextmanager
def used_alone(folder: Path, otherwise: str) -> Iterator[None]:
  """Keeps other processes from using a folder at the same time.

  Holds a lock on the file `.lock` in the folder. Where the file system has no locks, a warning says
  so. If nothing else was written, the file and folders that were made are removed at the end.

  Args:
    folder: The folder, made if it is missing.
    otherwise: The error where another process uses the folder.

  Raises:
    UserError: If another process uses the folder, or the file cannot be written.
  """
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  make_folder(folder)
  path = folder / LOCK
  descriptor = _open(path)
  try:
    _lock(descriptor)
    while not os.fstat(descriptor).st_nlink:  # another process has just removed it
      os.close(descriptor)
      descriptor = _open(path)
      _lock(descriptor)
  except (BlockingIOError, PermissionError) as error:
    os.close(descriptor)
    raise UserError(otherwise) from error
  except (OSError, ImportError) as error:
    print(
      f'warning: {folder} cannot be locked ({error}): a second run in it would not be noticed.',
      file=sys.stderr,
    )
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      if os.listdir(folder) == [LOCK]:
        path.unlink()
        for parent in made:
          parent.rmdir()
    os.close(descriptor)


def _open(path: Path) -> int:
  """Opens a lock file; programs that this one starts do not inherit the descriptor."""
  try:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}.') from error


def _lock(descriptor: int) -> None:
  """Locks a file or raises `OSError`; `ImportError` on systems without `fcntl`."""
  import fcntl

  fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
