"""Whole and intact files: atomic writes, and checksums in JSON files."""

import collections
import contextlib
import glob
import json
import operator
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nonlocal_jax.errors import UserError

CHECKSUM = 'crc32'  # the field of a JSON file's checksum


def given_path(text: str) -> Path:
  """Converts a path that a user gave, in an option or a config, where ~ is the home folder."""
  return Path(os.path.expanduser(text))


def cache_folder() -> Path:
  """Returns the folder for what can be made or downloaded again.

  `NONLOCAL_JAX_HOME`, else `nonlocal_jax` in `XDG_CACHE_HOME`, else `~/.cache/nonlocal_jax`.
  """
  if home := os.environ.get('NONLOCAL_JAX_HOME'):
    return given_path(home).absolute()
  return given_path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').absolute() / 'nonlocal_jax'


def make_folder(path: Path) -> None:
  """Makes a folder and those above it, where they are missing.

  Raises:
    UserError: If it cannot be made.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = f'{error.strerror}{elsewhere(path)}'
    raise UserError(f'Folder {path} cannot be made: {reason}.') from error


def check_absent(path: Path) -> None:
  """Raises a `UserError` if there is something at `path`."""
  if os.path.lexists(path):
    raise UserError(f'{path} exists; remove it or choose another name.')


def elsewhere(path: Path) -> str:
  """Says, as the end of a sentence, how to move what is in the cache folder; else ''."""
  is_cached = path.absolute().is_relative_to(cache_folder())
  return '; set NONLOCAL_JAX_HOME to another folder' if is_cached else ''


def check_writable(folder: Path) -> None:
  """Checks that a folder can be made or written to, and writes nothing.

  Raises:
    UserError: If it cannot.
  """
  existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
  if not existing.is_dir():
    raise UserError(f'{folder} cannot be a folder, as {existing} is a file; give another one.')
  if not os.access(existing, os.W_OK | os.X_OK):
    raise UserError(f'{existing} cannot be written: see to it, or give another folder.')


@contextlib.contextmanager
def unfinished(directory: str | os.PathLike[str], pattern: str) -> Iterator[None]:
  """Context in which files and folders are removed if a signal ends the program.

  Args:
    directory: Where they are.
    pattern: Their names, as in `glob`.
  """
  found = os.path.join(glob.escape(os.path.abspath(directory)), pattern)
  _unfinished.append(found)
  try:
    yield
  finally:
    _unfinished.remove(found)


_unfinished: list[str] = []


def unfinished_patterns() -> list[str]:
  """Returns the patterns of `unfinished` that apply now, with absolute paths."""
  return list(_unfinished)


@contextlib.contextmanager
def whole_file(path: Path, *, ending: str = '') -> Iterator[Path]:
  """Yields a temporary path that is renamed to `path` at the end, or deleted after an error.

  Write through Python's own file objects, which raise an error if the disk is full. Libraries that
  write through a file's descriptor, as Pillow does, may not: give their bytes to `write_whole`.

  Args:
    path: Path of the file. Missing parent folders are created; an existing file is replaced.
    ending: What the temporary name ends in, for libraries that tell the format by it.

  Raises:
    UserError: If the file cannot be written.
  """
  # Shorter than some names are, which may be as long as the file system allows.
  partial = path.with_name(f'.{path.name[:20]}.{secrets.token_hex(4)}.partial{ending}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(partial.parent, glob.escape(partial.name)):
      try:
        yield partial
        partial.replace(path)
      finally:
        partial.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
  """Yields a temporary folder that is renamed to `path` at the end, or deleted after an error.

  Args:
    path: Path of the folder, where nothing is yet. Missing parent folders are created.

  Raises:
    UserError: If the folder cannot be written.
  """
  partial = path.with_name(f'.{path.name[:20]}.{secrets.token_hex(4)}.partial')
  try:
    partial.mkdir(parents=True)
    with unfinished(partial.parent, glob.escape(partial.name)):
      try:
        yield partial
        partial.rename(path)
      finally:
        shutil.rmtree(partial, ignore_errors=True)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error


def write_whole(path: Path, contents: str | bytes) -> None:
  """Writes a file atomically, see `whole_file`; text as UTF-8."""
  with whole_file(path) as partial:
    partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def remove_partial_files(folder: Path) -> None:
  """Removes what killed processes left of `whole_file` in a folder where nobody else writes."""
  for path in folder.glob('.*.????????.partial'):
    path.unlink(missing_ok=True)


def parse_object(data: str | bytes) -> dict[str, Any]:
  """Parses a JSON object, in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

  Raises:
    ValueError: If it is none, or has a name twice in an object.
  """
  value = parse_json(data)
  if not isinstance(value, dict):
    raise ValueError('no JSON object')
  return value


def parse_json(
  data: str | bytes, keep: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Any:
  """Parses JSON, in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

  Args:
    data: The contents of a file.
    keep: Replaces each object by what is kept of it, to save memory.

  Returns:
    The value.

  Raises:
    ValueError: If it is none, or has a name twice in an object.
  """
  if not data:
    raise ValueError('empty')

  def kept(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return keep(_distinct(pairs)) if keep else _distinct(pairs)

  try:
    return json.loads(data, object_pairs_hook=kept)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
    raise ValueError(f'it has {name!r} twice')
  return values


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the checksum 'crc32' to the fields of a JSON file."""
  return {**fields, CHECKSUM: _crc32(fields)}


def unsealed(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields without the checksum of `sealed`, if there is one.

  Raises:
    ValueError: If the checksum differs, or its name is damaged.
  """
  for key in fields:
    if len(key) == len(CHECKSUM) and sum(map(operator.ne, key, CHECKSUM)) == 1:
      raise ValueError(f'{key!a} stands where its checksum should')
  rest = {key: value for key, value in fields.items() if key != CHECKSUM}
  if CHECKSUM in fields and fields[CHECKSUM] != _crc32(rest):
    raise ValueError(f'its checksum differs; if you edited it, take out {CHECKSUM!r}')
  return rest


def _crc32(fields: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
