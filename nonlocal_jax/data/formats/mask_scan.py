"""Which kind of label files a folder has: indices, colors, or black and white."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from nonlocal_jax.data.datasets import Color
from nonlocal_jax.data.formats.mask_pixels import (
  MOST_COLORS,
  Contents,
  contents,
  count_colors,
  palette_chunk,
)
from nonlocal_jax.data.paths import is_remote, version_of
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import cache_folder, parse_object, sealed, unsealed, write_whole
from nonlocal_jax.runtime.progress import progress_bar

_READERS = 32  # threads that read from a bucket, where latency dominates
_FIRST = 8  # files that are read before what was found in all of them earlier is looked up
T = TypeVar('T')


class Scan(NamedTuple):
  """What label files have in common.

  Attributes:
    kind: 'index' for files of one channel of 8 bits, 'gray' for those of equal channels or of 16
      bits, 'colors' for others; 'binary' if all values of all files are 0 and 255.
    values: The values that were seen, sorted; empty for 'colors'.
    palette: Color of each of these values, if the files have palettes.
    is_colored: Whether files have several channels.
  """

  kind: Literal['index', 'gray', 'colors', 'binary'] = 'index'
  values: Sequence[int] = ()
  palette: Sequence[Color] = ()
  is_colored: bool = False


def scan(paths: Sequence[Path]) -> Scan:
  """Finds the kind of label files, from as few of them as tell it.

  Files of indices mostly tell it at once, black-and-white ones only all together. Files that cannot
  be read are left out. What all files were needed for is kept in the cache folder, until one of
  them changes.

  Args:
    paths: The label files, PNG.

  Returns:
    The kind; 'gray' if no file can be read.
  """
  with ThreadPoolExecutor(_FIRST) as pool:
    first = _of_most(list(pool.map(_contents, paths[:_FIRST])))
  found = _summary(first, is_all=len(paths) <= _FIRST)
  if paths and not first and found is not None:
    return Scan('gray')  # whose reader says what is wrong with them
  if found is not None:
    return found
  kept = cache_folder() / 'label_kinds' / f'{_fingerprint(paths)}.json'
  with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
    fields = unsealed(parse_object(kept.read_bytes()))
    return Scan(fields['kind'], fields['values'], (), fields['is_colored'])
  with contextlib.closing(_read_all(paths, _contents)) as read:
    found = _summary(read, is_all=True) or Scan()
  if not found.palette:
    with contextlib.suppress(UserError):  # it is read again
      write_whole(kept, json.dumps(sealed(found._asdict())) + '\n')
  return found


def all_colors(paths: Sequence[Path]) -> Counter[Color]:
  """Counts the colors of label files, until there are more than classes can have.

  Files that cannot be read are left out.
  """
  counts: Counter[Color] = Counter()
  with contextlib.closing(_read_all(paths, _colors)) as read:
    for colors in read:
      counts.update(colors)
      if len(counts) > MOST_COLORS:
        break
  return counts


class Conflict(NamedTuple):
  """An index that two label files show in different colors.

  Attributes:
    value: The index.
    colors: Its color in each file.
    paths: The files.
  """

  value: int
  colors: tuple[Color, Color]
  paths: tuple[Path, Path]


def conflict_of_palettes(paths: Sequence[Path]) -> Conflict | None:
  """Finds an index that label files show in different colors, as programs do that sort palettes.

  Reads the pixels of the files only if their palettes differ: what differs may not be used.

  Args:
    paths: The label files, PNG.

  Returns:
    The first conflict, None if there is none. Files without a palette have none.
  """
  with contextlib.closing(_read_all(paths, _palette_or_none)) as read:
    if len(set(read) - {None}) < 2:
      return None
  seen: dict[int, tuple[Color, Path]] = {}
  with contextlib.closing(_read_all(paths, _contents)) as read:
    for path, found in zip(paths, read, strict=True):
      for value, color in found.palette.items() if found else ():
        first, where = seen.setdefault(value, (color, path))
        if first != color:
          return Conflict(value, (first, color), (where, path))
  return None


def _of_most(read: Sequence[Contents | None]) -> list[Contents]:
  """Leaves out files in colors among files of indices, or the other way round: the fewer."""
  known = [found for found in read if found is not None]
  in_colors = [found for found in known if found.is_color]
  of_indices = [found for found in known if not found.is_colored and _tells_indices(found)]
  fewer = of_indices if len(of_indices) < len(in_colors) else in_colors
  return [found for found in known if not (in_colors and of_indices) or found not in fewer]


def _tells_indices(found: Contents) -> bool:
  return not found.is_deep and not set(found.values) <= {0, IGNORE}


def _summary(read: Iterable[Contents | None], *, is_all: bool) -> Scan | None:
  """Sums up files, up to the first that tells their kind; None if none does and more follow."""
  values: set[int] = set()
  palette: dict[int, Color] = {}
  is_colored = is_deep = False
  for found in read:
    if found is None:
      continue
    if found.is_color:
      return Scan('colors', is_colored=True)
    values.update(found.values)
    palette.update(found.palette)
    is_colored |= found.is_colored
    is_deep |= found.is_deep
    if not is_colored and not is_deep and not values <= {0, IGNORE}:
      is_all = True
      break
  if not is_all:
    return None
  seen = sorted(values)
  colors = [palette[value] for value in seen] if palette.keys() >= values else []
  if values <= {0, IGNORE} and IGNORE in values:
    return Scan('binary', seen, colors, is_colored)
  return Scan('gray' if is_colored or is_deep else 'index', seen, colors, is_colored)


def _contents(path: Path) -> Contents | None:
  try:
    return contents(path)
  except UserError:  # told when the sample is prepared
    return None


def _palette_or_none(path: Path) -> bytes | None:
  try:
    return palette_chunk(path)
  except OSError:  # told when the sample is prepared
    return None


def _colors(path: Path) -> dict[Color, int]:
  try:
    return count_colors(path)
  except UserError:
    return {}


def _read_all(paths: Sequence[Path], read: Callable[[Path], T]) -> Generator[T]:
  pool = ThreadPoolExecutor(_READERS if is_remote(paths[0]) else os.cpu_count())
  try:
    with progress_bar(len(paths), 'Reading label maps', unit='img', leave=False) as bar:
      for found in pool.map(read, paths):
        bar.update()
        yield found
  finally:
    pool.shutdown(cancel_futures=True)


def _fingerprint(paths: Sequence[Path]) -> str:
  with ThreadPoolExecutor(_READERS) as pool:
    versions = pool.map(version_of, paths) if is_remote(paths[0]) else map(version_of, paths)
    listed = [(path.name, *version) for path, version in zip(paths, versions, strict=True)]
  return hashlib.sha256(repr(listed).encode('utf-8', 'surrogateescape')).hexdigest()[:16]
