"""Whole and intact files: atomic writes, and checksums in JSON files."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the checksum 'crc32' to the fields of a JSON file."""
  return {**fields, _CHECKSUM: _crc32(fields)}


def unsealed(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields without the checksum of `sealed`, if there is one.

  Raises:
    ValueError: If the checksum differs.
  """
  rest = {key: value for key, value in fields.items() if key != _CHECKSUM}
  if _CHECKSUM in fields and fields[_CHECKSUM] != _crc32(rest):
    raise ValueError('its checksum differs')
  return rest


_CHECKSUM = 'crc32'


def _crc32(fields: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
