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

  Holds a lock on the file `.lock` in the folder, which stays there. Where the file system has no
  locks, a warning says so.

  Args:
    folder: The folder, made if it is missing.
    otherwise: The error where another process uses the folder.

  Raises:
    UserError: If another process uses the folder, or the file cannot be written.
  """
  make_folder(folder)
  path = folder / LOCK
  try:
    # Programs that this one starts do not inherit the descriptor: none outlives it with the lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}.') from error
  try:
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
    os.close(descriptor)


def _lock(descriptor: int) -> None:
  """Locks a file or raises `OSError`; `ImportError` on systems without `fcntl`."""
  import fcntl

  fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
