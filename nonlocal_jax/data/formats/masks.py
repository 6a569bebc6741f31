"""Label maps that are image files of their own: indices, colors, or black and white."""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.data.datasets import DESCRIPTION, Color, Split
from nonlocal_jax.data.formats.class_tables import ClassTable, find_table
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.formats.mask_folders import (
  Pair,
  Places,
  list_pair,
  locate,
  lonely_labels,
)
from nonlocal_jax.data.formats.mask_pixels import (
  MOST_COLORS,
  count_colors,
  describe_colors,
  read_binary,
  read_colors,
  read_gray,
)
from nonlocal_jax.data.formats.mask_scan import (
  Conflict,
  Scan,
  all_colors,
  conflict_of_palettes,
  scan,
)
from nonlocal_jax.data.formats.split_lists import SPLIT_NAMES
from nonlocal_jax.data.samples import Listing, Sample
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.wording import counted

# Smoothed edges have many colors, and leave most of the pixels as they were.
_SMOOTHED_COLORS, _MOST_PIXELS = 8, 0.95
_BLACK, _WHITE = 'background', 'foreground'


class _Reading(NamedTuple):
  """How label files are read.

  Attributes:
    what: In words.
    names: Name of each class, if known.
    colors: Color of each class, if label files have them.
    read: Makes the label map of a file; None to take files as they are.
    key: What decides the pixels beyond the files, see `Found.reading`.
  """

  what: str
  names: Sequence[str] = ()
  colors: Sequence[Color] = ()
  read: Callable[[Path], np.ndarray] | None = None
  key: str = ''


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds folders of images and label maps; see `formats`.

  Args:
    source: The folder or bucket.
    own: What its `dataset.json` says.

  Returns:
    The candidate, if there are images with label maps.
  """
  places = locate(source)
  if places is None:
    labels = lonely_labels(source)
    if labels is None:
      return None
    return Candidate(labels.name, functools.partial(_refuse_lonely, labels))
  return Candidate(
    _relative(source, [pair for pairs in places.pairs.values() for pair in pairs], 'labels'),
    lambda: _read(source, own, places),
  )


def _refuse_lonely(labels: Path) -> Found:
  raise UserError(
    f'Folder {labels} has label maps, but there is no folder of images beside it: put them into a '
    'folder images there, or export the dataset with its images.'
  )


def _read(source: Path, own: Mapping[str, Any], places: Places) -> Found:
  listings: dict[Split | None, Listing] = {}
  wrong: dict[Split | None, UserError] = {}  # told when the split is used
  for split, of_split in places.pairs.items():
    try:
      listings[split] = _joined([list_pair(pair) for pair in of_split])
    except UserError as error:
      wrong[split] = error
  samples = [sample for listing in listings.values() for sample in listing.samples]
  if len({pair.labels for pairs in places.pairs.values() for pair in pairs}) < len(places.pairs):
    # Label maps of one split have no images in the other.
    listings = {split: listing._replace(unused_labels=0) for split, listing in listings.items()}
  pairs = [pair for pairs in places.pairs.values() for pair in pairs]
  parents = dict.fromkeys(folder for pair in pairs for folder in (pair.labels, pair.labels.parent))
  table = _own_table(own, source) or find_table([source, *(f for f in parents if f != source)])
  reading = _reading([sample.label for sample in samples], table, own, source)
  description: dict[str, Any] = {}
  if reading.names:
    description['classes'] = list(reading.names)
  if reading.colors:
    description['palette'] = [list(color) for color in reading.colors]

  def listed(split: Split | None) -> Listing:
    if split in wrong:
      raise wrong[split]
    if split not in listings:
      raise UserError(_no_split(source, places, split))
    listing = listings[split]
    if reading.read is None:
      return listing
    samples = [_with_reader(sample, reading.read) for sample in listing.samples]
    return listing._replace(samples=samples)

  return Found(
    sentence=_sentence(source, pairs, places, reading, table),
    description=description,
    listing=listed(None) if None in places.pairs else listed,
    reading=reading.key,
  )


def _joined(listings: Sequence[Listing]) -> Listing:
  if len(listings) == 1:
    return listings[0]
  return Listing(
    [sample for listing in listings for sample in listing.samples],
    {name: reason for listing in listings for name, reason in listing.incomplete.items()},
    sum(listing.unused_labels for listing in listings),
    [name for listing in listings for name in listing.passed_over],
  )


def _with_reader(sample: Sample, read: Callable[[Path], np.ndarray]) -> Sample:
  path = sample.label
  return sample._replace(read_label=lambda h, w: read(path))


def _no_split(source: Path, places: Places, split: Split | None) -> str:
  """A sentence on the split that has no folder, where the other one has."""
  pair = next(iter(places.pairs.values()))[0]
  there = pair.images.relative_to(source).parts
  (other,) = (found for found in places.pairs if found)
  name, rest = next(
    (part, part[len(word) :])
    for part in there
    for word in sorted(SPLIT_NAMES[other], key=len, reverse=True)
    if part.lower().startswith(word)
  )
  missing = '/'.join(f'{split}{rest}' if part == name else part for part in there)
  if places.unused:
    remedy = f'or rename {places.unused[0]}, which is not used'
  else:
    remedy = f'or take all out of the folder {name}, to have them divided'
  return f'There is no folder {missing} in {source}: add the {split} images there, {remedy}.'


def _relative(source: Path, pairs: Sequence[Pair], which: str) -> str:
  folders = [getattr(pair, which).relative_to(source).as_posix() for pair in pairs]
  names = list(dict.fromkeys(folders))
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _sentence(
  source: Path, pairs: Sequence[Pair], places: Places, reading: _Reading, table: ClassTable | None
) -> str:
  labels, images = (_relative(source, pairs, which) for which in ('labels', 'images'))
  where = f'in {labels}'
  if labels == images:
    where = 'beside their images' + (f' in {images}' if images != '.' else '')
  parts = [f'{reading.what} {where}', '' if labels == images else f'images in {images}']
  if table and reading.names:
    parts.append(f'{counted(len(reading.names), "class")} of {os.path.relpath(table.file, source)}')
  if places.unused:
    parts.append(f'{" and ".join(places.unused)} is not used')
  return '; '.join(part for part in parts if part)


def _own_table(own: Mapping[str, Any], source: Path) -> ClassTable | None:
  """The table of `dataset.json`, if it has colors."""
  palette = own.get('palette', ())
  if not palette:
    return None
  colors = tuple((r, g, b) for r, g, b in palette)
  names = own.get('classes', ())
  if len(names) != len(colors):
    if names and not own.get('label_map'):
      raise UserError(
        f'{source / DESCRIPTION} has {counted(len(names), "class")} and '
        f'{counted(len(colors), "color")}: give one color for each class.'
      )
    names = [f'color {index}' for index in range(len(colors))]
  return ClassTable(tuple(names), colors, str(source / DESCRIPTION))


def _reading(
  paths: Sequence[Path], table: ClassTable | None, own: Mapping[str, Any], source: Path
) -> _Reading:
  """Decides how label files are read.

  Raises:
    UserError: If they are in colors and there is no table of them.
  """
  found = scan(paths)
  names = table.names if table else ()
  conflict = conflict_of_palettes(paths) if found.palette else None
  if conflict and not (table and table.colors):
    raise UserError(_palettes_differ(conflict, source))
  if table and (conflict or _is_by_color(found, table)):
    _check_distinct(table)
    key = f'colors {json.dumps(table.colors)}'
    read = functools.partial(read_colors, palette=table.colors, where=table.file)
    return _Reading('label maps in colors', names, table.colors, read, key)
  if found.kind == 'colors':
    raise UserError(_palette_to_paste(paths, source, table))
  # The palette of `dataset.json` is for pictures then, and its classes are joined later.
  is_own = table is not None and table.file == str(source / DESCRIPTION)
  names = () if is_own else names
  if len(names) == 1 and set(found.values) <= {0, 1, IGNORE}:  # a background goes without saying
    names = (_BLACK, *names)
  colors = table.colors if table and len(table.colors) == len(names) else ()
  if found.kind == 'binary' and _may_be_binary(own, names):
    names = names or (_BLACK, _WHITE)
    what = f'black-and-white label maps (0 is {names[0]}, 255 is {names[1]})'
    return _Reading(what, names, colors, read_binary, 'binary')
  if found.is_colored or found.kind == 'gray':
    what = 'label maps of class indices in three equal channels or 16 bits'
    return _Reading(what, names, colors, read_gray, 'gray')
  return _Reading('label maps of class indices', names, colors)


def _is_by_color(found: Scan, table: ClassTable) -> bool:
  """Whether label files show classes by the colors of a table.

  Gray files and palettes do if some color but black is in the table, unless indices mean the same.
  """
  if found.kind == 'colors' or not table.colors:
    return bool(table.colors)
  if not found.is_colored and table.file.endswith(DESCRIPTION):
    return False  # for pictures
  seen = found.palette or [(value, value, value) for value in found.values]
  if not found.is_colored and all(
    table.colors[value : value + 1] == (color,)
    for value, color in zip(found.values, seen, strict=True)
    if value != IGNORE
  ):
    return False
  shown = set(seen) - {(0, 0, 0)} or set(seen)
  return not shown.isdisjoint(table.colors)


def _may_be_binary(own: Mapping[str, Any], names: Sequence[str]) -> bool:
  """Whether 255 is not known to have no class, and there may be two classes."""
  wanted = own.get('classes', names)
  counts = {len(wanted) or 2, own.get('num_classes') or 2}
  return (
    counts <= {1, 2}
    and IGNORE not in own.get('ignore_labels', ())
    and not own.get('reduce_zero_label')
    and not own.get('label_map')
  )


def _check_distinct(table: ClassTable) -> None:
  twice = next((list(color) for color in table.colors if table.colors.count(color) > 1), None)
  if twice:
    raise UserError(f'Two classes have the color {twice} in {table.file}: give each its own.')


def _palettes_differ(conflict: Conflict, source: Path) -> str:
  (first, second), (one, other) = conflict.colors, conflict.paths
  return (
    f'The palettes of label maps differ: value {conflict.value} is {list(first)} in {one} and '
    f'{list(second)} in {other}: if colors tell the classes, list them in {source / DESCRIPTION} '
    '("palette") or classes.txt (name r g b); if values do, write the files anew without palettes.'
  )


def _palette_to_paste(paths: Sequence[Path], source: Path, table: ClassTable | None) -> str:
  counts = all_colors(paths)
  if not counts:  # none can be read, which an error tells
    counts.update(count_colors(paths[0]))
  folder = paths[0].parent
  if len(counts) > MOST_COLORS:
    return (
      f'The label maps in {folder} have more than {MOST_COLORS} colors, such as '
      f'{describe_colors(dict(counts.most_common(3)))}: they are no label maps, or smoothed '
      'or compressed; export them as PNG files of class indices or of one color for each class.'
    )
  listed = f'There are {describe_colors(dict(counts.most_common()))}.'
  usual, usual_pixels = _usual(counts)
  if 2 * len(usual) <= len(counts) >= _SMOOTHED_COLORS:
    share = usual_pixels / counts.total()
    listed += (
      f' {len(usual)} of them have {share:.0%} of the pixels: if the others are smoothed edges or '
      'due to compression, export the files without.'
    )
  if table:
    return (
      f'The label maps in {folder} are in colors, and {table.file} names classes without colors: '
      f'write the color behind each name there, as in "road 128 64 128".\n{listed}'
    )
  colors = [color for color, _ in counts.most_common()]
  description = {
    'classes': [f'color {index}' for index in range(len(colors))],
    'palette': [list(color) for color in colors],
  }
  return (
    f'The label maps in {folder} are in colors, and no file beside them says which class each is: '
    f'name the classes, in the order that you want, in {source / DESCRIPTION}, as in\n  '
    f'{json.dumps(description)}\n{listed}'
  )


def _usual(counts: Counter[Color]) -> tuple[list[Color], int]:
  """The fewest colors that have most of the pixels, and how many pixels they have."""
  usual: list[Color] = []
  pixels = 0
  for color, count in counts.most_common():
    if pixels >= _MOST_PIXELS * counts.total():
      break
    usual.append(color)
    pixels += count
  return usual, pixels
