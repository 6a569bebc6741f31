"""What a prepared copy keeps of the folders that it was made from: their paths and `dataset.json`.

One copy may have several origins, because a folder that was moved or duplicated with the times of
its files has the same fingerprint.
"""

import dataclasses
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from nonlocal_jax.data.paths import as_path, is_remote
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import parse_object, sealed, unsealed, write_whole

ORIGINS = 'origins.json'
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # what damaged JSON files lead to
_METADATA = 'metadata.json'  # TFDS's
_CHECKED = ('dataset_info.json', 'features.json', _METADATA)


@dataclasses.dataclass(frozen=True)
class Origin:
  """A folder that a prepared copy was made from.

  Attributes:
    source: The folder's absolute path, or the URL of a bucket.
    description: Its `dataset.json`, {} if it had none; None if an earlier version, which did not
      keep it, prepared the copy.
    used: When the copy was last prepared or opened from it, in nanoseconds since 1970.
  """

  source: str
  description: Mapping[str, Any] | None
  used: int


def absolute(source_dir: str | os.PathLike[str]) -> str:
  """Returns the absolute path of a folder, or the URL of a bucket."""
  path = as_path(source_dir)
  return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def read_origins(directory: Path) -> list[Origin]:
  """Reads the origins of a prepared copy, last used last.

  Raises:
    DAMAGED: If files of the copy are damaged, also by their checksums.
    OSError: If they cannot be read.
  """
  path = directory / ORIGINS
  if not path.exists():  # of an earlier version
    metadata = directory / _METADATA
    source = parse_object(metadata.read_bytes())['source']
    return [Origin(source, None, (directory / 'dataset_info.json').stat().st_mtime_ns)]
  saved = unsealed(parse_object(path.read_bytes()))
  for name, checksum in saved['files'].items():
    if zlib.crc32((directory / name).read_bytes()) != checksum:
      raise ValueError(f'the checksum of {name} differs')
  origins = [Origin(source, **values) for source, values in saved['origins'].items()]
  return sorted(origins, key=lambda origin: origin.used)


def record_origin(directory: Path, source: str, description: Mapping[str, Any]) -> None:
  """Records that a copy was just prepared or opened from a folder.

  Forgets folders that do not exist any more: they were moved. Without permission to write nothing
  is recorded.

  Args:
    directory: The copy.
    source: See `Origin.source`.
    description: See `Origin.description`.
  """
  now = Origin(source, description, time.time_ns())
  before: Origin | None = None
  try:
    with filelock.FileLock(directory.parent / '.lock'):
      origins = read_origins(directory)
      before = next((origin for origin in origins if origin.source == source), None)
      others = [origin for origin in origins if origin.description is not None and _exists(origin)]
      recorded = {origin.source: origin for origin in (*others, now)}
      fields = {
        'files': {name: zlib.crc32((directory / name).read_bytes()) for name in _CHECKED},
        'origins': {
          key: {'description': origin.description, 'used': origin.used}
          for key, origin in recorded.items()
        },
      }
      write_whole(directory / ORIGINS, json.dumps(sealed(fields), indent=2) + '\n')
  except DAMAGED:
    pass  # opening the copy reports it
  except (OSError, NotImplementedError, UserError) as error:  # e.g. without locks
    if before is not None and before.description not in (None, description):
      print(
        f'warning: {directory} keeps another dataset.json of {source} and cannot be written '
        f'({error}): go on giving that folder as source_dir.',
        file=sys.stderr,
      )


def _exists(origin: Origin) -> bool:
  path = as_path(origin.source)
  return is_remote(path) or path.is_dir()
