"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nonlocal_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """Gives a path to write to, which becomes `path` at the end; after an error nothing is left.

  Args:
    path: Where the file is to be; its folder is made, an older file replaced.

  Raises:
    UserError: If it cannot be written.
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
  """Writes a text file, see `whole_file`."""
  with whole_file(path) as partial:
    partial.write_text(text)
