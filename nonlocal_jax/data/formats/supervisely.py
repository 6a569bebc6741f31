"""Supervisely's format: meta.json, and in folders of images (img) JSON files of shapes (ann).

Described in https://developer.supervisely.com/getting-started/supervisely-annotation-format. Shapes
are drawn as the package `supervisely` does (`supervisely/geometry`).
"""

import collections
import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nonlocal_jax.data.formats import shapes
from nonlocal_jax.data.formats.annotations import (
  Document,
  Entry,
  beginning,
  check_size,
  document,
  found_annotations,
  ordered_classes,
  read_json,
  split_named,
)
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.paths import files_below
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.wording import counted

_META = 'meta.json'
_DRAWING = 'Supervisely 1'  # grows when the drawing changes
_KINDS = {'polygon': 'polygons', 'rectangle': 'rectangles', 'bitmap': 'bitmaps'}
_NO_AREA = {'point': 'points', 'line': 'polylines', 'graph': 'keypoint graphs', 'cuboid': 'cuboids'}


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds meta.json with classes, in the folder or in one below it."""
  del own
  below = sorted(source.iterdir()) if source.is_dir() else []
  for path in (source / _META, *(folder / _META for folder in below)):
    if re.search(rb'"classes"\s*:\s*\[', beginning(path)):
      evidence = path.relative_to(source).as_posix()
      return Candidate(evidence, lambda path=path: _read(source, path))
  return None


def _read(source: Path, meta: Path) -> Found:
  colors = _classes(meta)
  classes = ordered_classes(source, [meta], colors)
  values = {name: value for value, name in enumerate(classes)}
  files = [
    document(path, _parse)
    for path in files_below(meta.parent)
    if path.suffix.lower() == '.json' and path.parent.name == 'ann'
  ]
  entries = [
    Entry(
      [(file.path.parent.parent / 'img' / file.path.stem).relative_to(source).as_posix()],
      file.path,
      functools.partial(_draw, document=file, values=values),
      *_counts(file.content['objects']),
      split=split_named(file.path.relative_to(meta.parent).parts[:-2]),
    )
    for file in files
  ]
  return found_annotations(
    source,
    entries,
    title=f'Supervisely annotations ({meta.relative_to(source).as_posix()})',
    classes=classes,
    palette=[colors.get(name, (0, 0, 0)) for name in classes],
    drawing=_DRAWING,
  )


def _parse(path: Path) -> dict:
  """Reads the annotations of an image.

  Raises:
    UserError: If they are not of Supervisely.
  """
  content = read_json(path)
  objects = content.get('objects') if isinstance(content, dict) else None
  if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
    raise UserError(f'File {path} is not of Supervisely: it has no list of objects; move it away.')
  return content


def _counts(objects: Sequence[dict]) -> tuple[Mapping[str, int], Mapping[str, int]]:
  """Counts objects by kind: those that are drawn, and those without an area."""
  kinds = collections.Counter(str(item.get('geometryType')) for item in objects)
  drawn = {_KINDS.get(kind, f'{kind}s'): n for kind, n in kinds.items() if kind not in _NO_AREA}
  return drawn, {_NO_AREA[kind]: n for kind, n in kinds.items() if kind in _NO_AREA}


def _classes(path: Path) -> dict[str, tuple[int, ...]]:
  """Reads the names and colors of the classes.

  Raises:
    UserError: If they are missing, or two are the same.
  """
  content = read_json(path)
  listed = content.get('classes') if isinstance(content, dict) else None
  found = {}
  for item in listed if isinstance(listed, list) else [None]:
    title = item.get('title') if isinstance(item, dict) else None
    if not isinstance(title, str) or title in found:
      raise UserError(f'In {path} a class has no title, or the same as another: mend it.')
    color = re.fullmatch('#?([0-9a-fA-F]{6})', str(item.get('color')))
    found[title] = tuple(bytes.fromhex(color[1] if color else '000000'))
  return found


def _draw(h: int, w: int, *, document: Document, values: Mapping[str, int]) -> np.ndarray:
  """Draws the objects of an image over each other, in their order in the file."""
  file, content = document.path, document.content
  size = content.get('size')
  size = size if isinstance(size, dict) else {}
  check_size((size.get('height'), size.get('width')), h, w, file.stem, file)
  label = np.zeros((h, w), np.uint8)
  for index, item in enumerate(content['objects']):
    kind, title = str(item.get('geometryType')), str(item.get('classTitle'))
    if kind in _NO_AREA:
      continue
    try:
      if title not in values:
        raise ValueError(f'has a class that {_META} lacks')
      _paint(label, item, values[title])
    except ValueError as error:
      raise UserError(
        f'Object {index + 1} in {file} ({kind}, {title!r}) {error}: mend it, or take it out.'
      ) from error
  return label


def _paint(label: np.ndarray, item: Mapping[str, Any], value: int) -> None:
  """Paints an object; coordinates are rounded down, and both ends belong to it.

  Raises:
    ValueError: If it is broken; the message says what it has.
  """
  kind = str(item.get('geometryType'))
  if kind == 'bitmap':
    bitmap = item.get('bitmap')
    if not isinstance(bitmap, dict):
      raise ValueError('has no bitmap')
    left, top = _whole([bitmap.get('origin')], label.shape)[0].tolist()
    shapes.paint_mask(label, _decoded_bitmap(bitmap.get('data'), label.shape), left, top, value)
    return
  points = item.get('points')
  if kind not in _KINDS or not isinstance(points, dict):
    raise ValueError('is of a kind that is not read' if kind not in _KINDS else 'has no points')
  exterior = _whole(points.get('exterior'), label.shape)
  if kind == 'rectangle':
    if len(exterior) != 2:
      raise ValueError(f'has {counted(len(exterior), "corner")}, and not 2')
    (left, top), (right, bottom) = exterior.min(0).clip(0), exterior.max(0)
    label[top : bottom + 1, left : right + 1] = value
    return
  interior = points.get('interior') or []
  if len(exterior) < 3 or not isinstance(interior, list):
    raise ValueError(f'has {counted(len(exterior), "point")}')
  mask = np.zeros(label.shape, np.uint8)
  cv2.fillPoly(mask, [exterior], 1)
  for hole in interior:
    cv2.fillPoly(mask, [_whole(hole, label.shape)], 0)
  label[mask == 1] = value


def _whole(points: Any, size: tuple[int, ...]) -> np.ndarray:
  return np.floor(shapes.points_in(points, (size[0], size[1]))).astype(np.int32)


def _decoded_bitmap(data: Any, size: tuple[int, ...]) -> np.ndarray:
  """Decodes a bitmap: a PNG file, packed with zlib, in base64.

  Raises:
    ValueError: If it is none, or larger than the image.
  """
  limit = 4096 + 8 * size[0] * size[1]  # bytes, more than a PNG file of the image can have
  try:
    unpacked = zlib.decompressobj().decompress(shapes.bytes_in(data), limit)
  except zlib.error as error:
    raise ValueError('has a mask that is not packed with zlib') from error
  return shapes.decoded_mask(unpacked, size)
