"""labelme's format: a JSON file of shapes for each image.

Shapes are drawn as `labelme.utils.shapes_to_label` does, and so as labelme's examples make label
maps (`labelme2voc.py`): https://github.com/wkentaro/labelme.
"""

import collections
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from nonlocal_jax.data.datasets import IGNORED_BY_LABELME
from nonlocal_jax.data.formats import shapes
from nonlocal_jax.data.formats.annotations import (
  BACKGROUND,
  Document,
  Entry,
  beginning,
  check_size,
  document,
  evidence_of,
  folders_of,
  found_annotations,
  ordered_classes,
  read_json,
  split_named,
)
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, read_text
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.wording import counted

LABELS = 'labels.txt'  # labelme's list of names, one a line
_BACKGROUND = '_background_'
_DRAWING = 'labelme 1'  # grows when the drawing changes
_LINE_WIDTH, _POINT_RADIUS = 10, 5  # of labelme.utils.shape_to_mask
_KINDS = {  # and how many points each has; None for three or more
  'polygon': ('polygons', None),
  'rectangle': ('rectangles', 2),
  'oriented_rectangle': ('oriented rectangles', 4),
  'circle': ('circles', 2),
  'line': ('lines', 2),
  'linestrip': ('linestrips', None),
  'point': ('points', 1),
  'mask': ('masks', 2),
}


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds JSON files with shapes, as labelme writes them."""
  del own
  files = [path for path in files_below(source) if path.suffix.lower() == '.json']
  files = [path for path in files if re.search(rb'"shapes"\s*:\s*\[', beginning(path))]
  if not files:
    return None
  evidence = evidence_of(source, files)
  return Candidate(evidence, lambda: _read(source, files, evidence))


def _read(source: Path, paths: Sequence[Path], evidence: str) -> Found:
  files = [document(path, _parse) for path in paths]
  used = {shape['label']: file.path for file in files for shape in file.content['shapes']}
  names = _names(source, paths, used)
  values = {name: value for value, name in enumerate(names)} | {IGNORED_BY_LABELME: IGNORE}
  entries = [
    Entry(
      _image_names(file),
      file.path,
      functools.partial(_draw, document=file, values=values),
      collections.Counter(_kinds(_kind(shape)) for shape in file.content['shapes']),
      split=split_named(file.path.relative_to(source).parts[:-1]),
    )
    for file in files
  ]
  return found_annotations(
    source,
    entries,
    title=f'labelme annotations ({evidence})',
    classes=names,
    drawing=_DRAWING,
  )


def _names(source: Path, files: Sequence[Path], used: Mapping[str, Path]) -> list[str]:
  """Orders the classes as labels.txt does, else as classes.txt does, else by name.

  Raises:
    UserError: If labels.txt lacks one or has it twice, or several folders have that file.
  """
  names = sorted(used.keys() - {IGNORED_BY_LABELME})
  lists = [folder / LABELS for folder in folders_of(source, files)]
  lists = [path for path in lists if path.is_file()]
  if not lists:
    return ordered_classes(source, files, names)
  if len({read_text(path) for path in lists}) > 1:
    raise UserError(f'Files {lists[0]} and {lists[1]} differ: take one away.')
  path = lists[0]
  lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
  twice = [name for name, count in collections.Counter(lines).items() if count > 1]
  if twice:
    raise UserError(f'File {path} has the name {twice[0]!r} twice: take one out.')
  missing = [name for name in names if name not in lines]
  if missing:
    raise UserError(
      f'File {used[missing[0]]} has the label {missing[0]!r}, which {path} lacks: add it there.'
    )
  first = next((name for name in (_BACKGROUND, BACKGROUND) if name in lines), BACKGROUND)
  return [first, *(name for name in lines if name not in (first, IGNORED_BY_LABELME))]


def _parse(path: Path) -> dict:
  """Reads and checks a file.

  Raises:
    UserError: If it is not of labelme.
  """
  content = read_json(path)
  if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
    raise UserError(f'File {path} is not of labelme: it has no list of shapes; move it away.')
  if not isinstance(content.get('imagePath'), str):
    raise UserError(f'File {path} is not of labelme: it has no imagePath; mend it.')
  for index, shape in enumerate(content['shapes']):
    name = shape.get('label') if isinstance(shape, dict) else None
    if not isinstance(name, str) or not name.strip():
      raise UserError(f'Shape {index + 1} in {path} has no label: mend it, or take it out.')
  content.pop('imageData', None)  # a copy of the image
  return content


def _image_names(file: Document) -> list[str]:
  """Returns how the image may be called: as the file says, or as the file itself is."""
  suffixes = [*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)]
  return [file.content['imagePath'], *(f'{file.path.stem}{suffix}' for suffix in suffixes)]


def _kinds(kind: str) -> str:
  return _KINDS[kind][0] if kind in _KINDS else f'{kind}s'


def _kind(shape: Mapping[str, Any]) -> str:
  return str(shape.get('shape_type') or 'polygon')  # old files have none


def _draw(h: int, w: int, *, document: Document, values: Mapping[str, int]) -> np.ndarray:
  """Draws the shapes of a file over each other, in their order there."""
  file, content = document.path, document.content
  stated = (content.get('imageHeight'), content.get('imageWidth'))
  check_size(stated, h, w, content['imagePath'], file)
  label = np.zeros((h, w), np.uint8)
  for index, shape in enumerate(content['shapes']):
    try:
      label[_mask(shape, (h, w))] = values[shape['label']]
    except ValueError as error:
      raise UserError(
        f'Shape {index + 1} in {file} ({_kind(shape)}, {shape["label"]!r}) {error}: mend it, '
        'or take it out.'
      ) from error
  return label


def _mask(shape: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
  """Draws a shape as `labelme.utils.shape_to_mask` does, lines with a width of 10 pixels.

  Args:
    shape: A shape of a file.
    size: (height, width) of the image.

  Returns:
    (h, w) bool.

  Raises:
    ValueError: If it is broken; the message says what it has.
  """
  kind = _kind(shape)
  if kind not in _KINDS:
    raise ValueError('is of a kind that labelme does not draw')
  points = shapes.points_in(shape.get('points'), size)
  wanted = _KINDS[kind][1]
  if len(points) != wanted and (wanted or len(points) < (3 if kind == 'polygon' else 2)):
    raise ValueError(f'has {counted(len(points), "point")}')
  if kind == 'mask':
    return _decoded_mask(shape.get('mask'), points, size)
  xy = [(x, y) for x, y in points.tolist()]
  image = Image.new('L', (size[1], size[0]))
  draw = ImageDraw.Draw(image)
  if kind == 'rectangle':
    draw.rectangle([*points.min(0).tolist(), *points.max(0).tolist()], outline=1, fill=1)
  elif kind in ('circle', 'point'):
    radius = math.dist(*xy) if kind == 'circle' else _POINT_RADIUS
    x, y = xy[0]
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=1, fill=1)
  elif kind in ('line', 'linestrip'):
    draw.line(xy, fill=1, width=_LINE_WIDTH)
  else:
    draw.polygon(xy, outline=1, fill=1)
  return np.asarray(image) == 1


def _decoded_mask(data: Any, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Decodes a mask, a PNG file in base64 that covers the image between two corners."""
  (left, top), (right, bottom) = corners.astype(np.int64).tolist()
  expected = (right - left + 1, bottom - top + 1)
  part = shapes.decoded_mask(shapes.bytes_in(data), size)
  if part.shape[::-1] != expected:
    raise ValueError(
      f'has a mask of {part.shape[1]}x{part.shape[0]} pixels, and not {expected[0]}x{expected[1]}'
    )
  mask = np.zeros(size, np.uint8)
  shapes.paint_mask(mask, part, left, top, 1)
  return mask == 1
