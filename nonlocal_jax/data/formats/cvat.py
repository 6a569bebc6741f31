"""CVAT's own format, "CVAT for images 1.1": polygons, boxes, ellipses and masks in an XML file.

Described in https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/ and
https://docs.cvat.ai/docs/dataset_management/formats/xml_format/. Shapes are drawn as CVAT does for
masks: `cvat/apps/dataset_manager/formats/transformations.py` in https://github.com/cvat-ai/cvat.
"""

import collections
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import cv2
import numpy as np

from nonlocal_jax.data.formats import shapes
from nonlocal_jax.data.formats.annotations import (
  Document,
  Entry,
  beginning,
  check_size,
  document,
  evidence_of,
  found_annotations,
  ordered_classes,
  split_named,
)
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.paths import files_below
from nonlocal_jax.errors import UserError

_DRAWING = 'CVAT 1'  # grows when the drawing changes
_KINDS = {'polygon': 'polygons', 'box': 'boxes', 'ellipse': 'ellipses', 'mask': 'masks'}
_NO_AREA = {
  'polyline': 'polylines',
  'points': 'point sets',
  'cuboid': 'cuboids',
  'skeleton': 'skeletons',
  'tag': 'tags',
}


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds XML files whose root is `annotations`, as CVAT writes them."""
  del own
  files = [path for path in files_below(source) if path.suffix.lower() == '.xml']
  files = [path for path in files if b'<annotations>' in beginning(path)]
  if not files:
    return None
  evidence = evidence_of(source, files)
  return Candidate(evidence, lambda: _read(source, files, evidence))


def _read(source: Path, files: Sequence[Path], evidence: str) -> Found:
  documents = [document(path, _parse) for path in files]
  colors: dict[str, str] = {}
  for path, root in ((found.path, found.content) for found in documents):
    if root.find('track') is not None:
      raise UserError(
        f'File {path} has tracks, which are of CVAT for video: export "CVAT for images 1.1" or '
        '"Segmentation mask 1.1".'
      )
    for label in root.iterfind('meta//labels/label'):
      if label.find('parent') is None:  # else it is a part of a skeleton
        colors.setdefault(label.findtext('name') or '', label.findtext('color') or '')
  classes = ordered_classes(source, files, colors)
  values = {name: value for value, name in enumerate(classes)}
  entries = []
  for found in documents:
    folders = found.path.relative_to(source).parts
    for image in found.content.iterfind('image'):
      name = image.get('name') or ''
      draw = functools.partial(_draw, image=image, values=values, document=found)
      split = split_named([image.get('subset') or '']) or split_named(folders)
      drawn = collections.Counter(_KINDS[shape.tag] for shape in image if shape.tag in _KINDS)
      other = collections.Counter(_NO_AREA[shape.tag] for shape in image if shape.tag in _NO_AREA)
      entries.append(Entry([name], found.path, draw, drawn, other, split))
  return found_annotations(
    source,
    entries,
    title=f'CVAT annotations of images ({evidence})',
    classes=classes,
    palette=_palette([colors.get(name, '#000000') for name in classes]),
    drawing=_DRAWING,
  )


def _palette(colors: Sequence[str]) -> list[list[int]]:
  """Converts colors such as '#ff0080'; returns none if one is not like this."""
  try:
    found = [list(bytes.fromhex(color.removeprefix('#'))) for color in colors]
  except ValueError:
    return []
  return found if all(len(color) == 3 for color in found) else []


def _parse(path: Path) -> Element:
  """Parses an XML file, without declarations of a document type, which could be endless.

  Raises:
    UserError: If it cannot be read, or is broken.
  """
  builder = TreeBuilder()
  parser = expat.ParserCreate()
  parser.buffer_text = True
  parser.StartElementHandler = builder.start
  parser.EndElementHandler = builder.end
  parser.CharacterDataHandler = builder.data
  parser.StartDoctypeDeclHandler = _refuse_document_type
  try:
    with path.open('rb') as file:
      parser.ParseFile(file)
    return builder.close()
  except OSError as error:
    reason = error.strerror or str(error)
    raise UserError(f'File {path} cannot be read ({reason}): replace it.') from error
  except (expat.ExpatError, ValueError, LookupError) as error:  # the last of unknown encodings
    raise UserError(
      f'File {path} is no XML file of CVAT, or broken ({error}): replace it.'
    ) from error


def _refuse_document_type(*_: object) -> None:
  raise ValueError('it declares a document type, which CVAT does not')


def _draw(
  h: int, w: int, *, image: Element, values: Mapping[str, int], document: Document
) -> np.ndarray:
  """Draws the shapes of an image over each other: from low to high z_order, then in their order."""
  name, file = image.get('name') or '', document.path
  stated = [image.get(key) for key in ('height', 'width')]
  sizes = [int(value) if value and value.isdecimal() else value for value in stated]
  check_size(sizes, h, w, name, file)
  label = shapes.empty_label((h, w))
  shapes_of_image = [shape for shape in image if shape.tag not in _NO_AREA]
  order = sorted(range(len(shapes_of_image)), key=lambda i: _z_order(shapes_of_image[i]))
  for index in order:
    shape = shapes_of_image[index]
    try:
      _paint(label, shape, values)
    except ValueError as error:
      raise UserError(
        f'Shape {index + 1} of image {name} in {file} ({shape.tag}, {shape.get("label")!r}) '
        f'{error}: mend it, or take it out.'
      ) from error
  return label


def _z_order(shape: Element) -> float:
  try:
    return _number(shape, 'z_order', default='0')
  except ValueError:
    return 0.0  # complained about where it is drawn


def _paint(label: np.ndarray, shape: Element, values: Mapping[str, int]) -> None:
  """Paints a shape.

  Raises:
    ValueError: If it is broken; the message says what it has.
  """
  if shape.tag not in _KINDS:
    raise ValueError('is of a kind that is not known')
  if shape.get('label') not in values:
    raise ValueError('has a label that the file does not list')
  _number(shape, 'z_order', default='0')
  value = values[shape.get('label', '')]
  if shape.tag == 'polygon':
    pairs = [_numbers(pair, 'points') for pair in (shape.get('points') or '').split(';')]
    shapes.paint_polygon(label, shapes.points_in(pairs, label.shape), value)
  elif shape.tag == 'box':
    _paint_box(label, shape, value)
  elif shape.tag == 'ellipse':
    _paint_ellipse(label, shape, value)
  else:
    _paint_mask(label, shape, value)


def _paint_box(label: np.ndarray, shape: Element, value: int) -> None:
  """Paints a box, turned clockwise about its center (`RotatedBoxesToPolygons`)."""
  left, top, right, bottom = (_number(shape, key) for key in ('xtl', 'ytl', 'xbr', 'ybr'))
  corners = np.array([[left, top], [left, bottom], [right, bottom], [right, top]])
  if angle := math.radians(_number(shape, 'rotation', default='0')):
    center = (corners[0] + corners[2]) / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = (corners - center) @ np.array([[cosine, sine], [-sine, cosine]]) + center
  shapes.paint_polygon(label, shapes.points_in(corners, label.shape), value)


def _paint_ellipse(label: np.ndarray, shape: Element, value: int) -> None:
  """Paints an ellipse as CVAT does (`EllipsesToMasks`), whole pixels."""
  x, y, across, down = (_number(shape, key) for key in ('cx', 'cy', 'rx', 'ry'))
  angle = _number(shape, 'rotation', default='0') % 360
  shapes.points_in([[x - across, y - down], [x + across, y + down]], label.shape)
  mask = np.zeros(label.shape, np.uint8)
  center, axes = (round(x), round(y)), (round(abs(across)), round(abs(down)))
  cv2.ellipse(mask, center, axes, angle, 0, 360, 1, thickness=-1)
  label[mask == 1] = value


def _paint_mask(label: np.ndarray, shape: Element, value: int) -> None:
  """Paints a mask: lengths of runs along the rows of a part of the image, first those outside."""
  left, top, width, height = (
    round(_number(shape, key)) for key in ('left', 'top', 'width', 'height')
  )
  if not (0 < width <= label.shape[1] and 0 < height <= label.shape[0]):
    raise ValueError(f'has {width}x{height} pixels, which are not in the image')
  counts = np.array(_numbers(shape.get('rle') or '', 'rle'), np.float64)
  if not (np.isfinite(counts) & (counts == counts.round())).all() or (counts > label.size).any():
    raise ValueError('has run lengths that are no whole numbers')
  mask = shapes.runs_as_mask(counts.astype(np.int64), width * height).reshape(height, width)
  shapes.paint_mask(label, mask, left, top, value)


def _number(shape: Element, key: str, default: str | None = None) -> float:
  numbers = _numbers(shape.get(key) or default or '', key)
  if len(numbers) != 1 or not math.isfinite(numbers[0]):
    raise ValueError(f'has no number as {key}')
  return numbers[0]


def _numbers(text: str, key: str) -> list[float]:
  try:
    return [float(number) for number in text.split(',')]
  except ValueError as error:
    raise ValueError(f'has something else than numbers as {key}') from error
