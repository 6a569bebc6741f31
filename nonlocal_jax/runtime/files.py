"""Atomic file writes: a file is written completely or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nonlocal_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """Yields a temporary path that is renamed to `path` at the end, or deleted after an error.

  Args:
    path: Path of the file. Missing parent folders are created; an existing file is replaced.

  Raises:
    UserError: If the file cannot be written.
  """
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield partial
      partial.replace(path)
    finally:
      partial.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error


def write_whole(path: Path, text: str) -> None:
  """Writes a text file atomically, see `whole_file`."""
  with whole_file(path) as partial:
    partial.write_text(text)
