"""Label Studio's formats "JSON" and "JSON-MIN": regions of polygons, rectangles, ellipses, brushes.

Described in https://labelstud.io/guide/export and https://labelstud.io/tags/brushlabels. Regions
are read as `label_studio_sdk.converter` does where it exports COCO and masks.
"""

import collections
import functools
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from nonlocal_jax.data.formats import brushes, shapes
from nonlocal_jax.data.formats.annotations import (
  Document,
  Entry,
  beginning,
  check_size,
  document,
  evidence_of,
  found_annotations,
  ordered_classes,
  read_json,
  split_named,
)
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, without_suffix
from nonlocal_jax.errors import UserError

_DRAWING = 'Label Studio 1'  # grows when the drawing changes
_LABELS = ('polygonlabels', 'brushlabels', 'rectanglelabels', 'ellipselabels', 'labels')
_NO_AREA = {
  'keypointlabels': 'keypoints',
  'choices': 'choices',
  'taxonomy': 'choices',
  'textarea': 'texts',
  'rating': 'ratings',
  'number': 'numbers',
  'datetime': 'dates',
  'relation': 'relations',
}
_PREFIX = re.compile(r'^[0-9a-f]{8}-')  # of uploaded files


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds JSON files with lists of tasks; refuses brushes exported as images."""
  del own
  files = files_below(source)
  images = [path for path in files if re.match(r'task-\d+-annotation-\d+-by-', path.name)]
  files = [path for path in files if path.suffix.lower() == '.json']
  files = [path for path in files if _looks_like_tasks(beginning(path))]
  if images and not files:
    return Candidate(images[0].name, functools.partial(_refuse_brushes, images[0]))
  if not files:
    return None
  evidence = evidence_of(source, files)
  return Candidate(evidence, lambda: _read(source, files, evidence))


def _looks_like_tasks(data: bytes) -> bool:
  text = data.decode('utf-8', 'replace').lstrip('\ufeff \t\r\n')
  keys = r'"(annotations|completions|original_width|polygonlabels|brushlabels)"\s*:'
  return text.startswith('[') and re.search(keys, text) is not None


def _refuse_brushes(path: Path) -> Found:
  raise UserError(
    f'File {path} is a brush of Label Studio as an image, which does not say of which image it is: '
    'export "JSON" and put the file beside the images.'
  )


class _Region(NamedTuple):
  """A region of a task.

  Attributes:
    type: What the file calls it.
    labels: Its labels; None if it is of a kind that has none.
    value: Its geometry, in percent of the image.
    size: (height, width) of the image.
    rotation: By how much the image was turned, in degrees.
  """

  type: str
  labels: list[str] | None
  value: dict
  size: tuple[Any, Any]
  rotation: Any

  def kind(self) -> str:
    """Returns what is drawn of it, in the plural; '' if nothing."""
    if self.labels is None or self.type in _NO_AREA:
      return ''
    fields = {'points': 'polygons', 'rle': 'brushes', 'radiusX': 'ellipses', 'width': 'rectangles'}
    return next((kind for field, kind in fields.items() if field in self.value), self.type)


class _Task(NamedTuple):
  names: list[str]  # of its image
  regions: list[_Region]
  problem: str


def _read(source: Path, files: Sequence[Path], evidence: str) -> Found:
  documents = [document(path, _parse) for path in files]
  tasks: list[tuple[Document, _Task]] = [(f, task) for f in documents for task in f.content]
  regions = [region for _, task in tasks for region in task.regions]
  labels = {label for region in regions if region.kind() for label in region.labels or ()}
  classes = ordered_classes(source, files, sorted(labels))
  values = {name: value for value, name in enumerate(classes)}
  entries = [
    Entry(
      task.names,
      file.path,
      functools.partial(_draw, task=task, values=values, document=file),
      collections.Counter(region.kind() for region in task.regions if region.kind()),
      collections.Counter(_NO_AREA[r.type] for r in task.regions if r.type in _NO_AREA),
      split_named(file.path.relative_to(source).parts),
      task.problem,
    )
    for file, task in tasks
  ]
  return found_annotations(
    source,
    entries,
    title=f'Label Studio tasks ({evidence})',
    classes=classes,
    drawing=_DRAWING,
  )


def _parse(path: Path) -> list[_Task]:
  return list(_tasks(path))


def _tasks(path: Path) -> Iterator[_Task]:
  """Reads the tasks of a file.

  Raises:
    UserError: If it has no list of tasks.
  """
  content = read_json(path)
  if not isinstance(content, list) or not all(isinstance(task, dict) for task in content):
    raise UserError(f'File {path} is not of Label Studio: it is no list of tasks; move it away.')
  for index, task in enumerate(content):
    what = f'Task {task.get("id", index + 1)} in {path}'
    whole = isinstance(task.get('data'), dict)
    names, problem = _image_names(task['data'] if whole else task)
    results: list[dict] = []
    if not problem and whole:
      results, problem = _results(task)
    elif not problem:  # of JSON-MIN, which has regions by the name of their control
      lists = [value for value in task.values() if isinstance(value, list)]
      results = [item for items in lists for item in items if isinstance(item, dict)]
    if names and isinstance(task.get('file_upload'), str):
      names.append(task['file_upload'])
    regions = [_region(result) for result in results]
    ids = [str(result.get('id')) for result in results]
    labeled = {id_ for id_, region in zip(ids, regions, strict=True) if region.labels}
    regions = [  # a shape and its labels may be two results of one id
      region
      for id_, region in zip(ids, regions, strict=True)
      if region.labels or f'{region.type}labels' not in _LABELS or id_ not in labeled
    ]
    yield _Task(names or [what], regions, problem and f'{what} {problem}.')


def _results(task: Mapping[str, Any]) -> tuple[list[dict], str]:
  """Returns the results of the annotation of a task, or why there is none."""
  annotations = task.get('annotations', task.get('completions'))
  if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
    return [], 'has no list of annotations: export "JSON"'
  annotations = [a for a in annotations if not (a.get('was_cancelled') or a.get('skipped'))]
  if len(annotations) > 1:
    annotations = [a for a in annotations if a.get('ground_truth')] or annotations
  if len(annotations) > 1:
    return [], f'has {len(annotations)} annotations: mark one as ground truth, or delete the others'
  if not annotations:
    return [], 'is not annotated, or was skipped: annotate it, or take it out'
  results = annotations[0].get('result')
  if not isinstance(results, list) or not all(isinstance(item, dict) for item in results):
    return [], 'has an annotation without a list of results: export it anew'
  return results, ''


def _region(result: Mapping[str, Any]) -> _Region:
  value = result.get('value')
  value = value if isinstance(value, dict) else dict(result)
  key = next((key for key in _LABELS if isinstance(value.get(key), list)), None)
  labels = None if key is None else [str(label) for label in value[key]]
  size = (result.get('original_height'), result.get('original_width'))
  return _Region(
    str(result.get('type') or key or 'result'), labels, value, size, result.get('image_rotation')
  )


def _image_names(data: Mapping[str, Any]) -> tuple[list[str], str]:
  """Returns the paths that a task may mean by its image, or why there are none."""
  found = {key: names for key, value in data.items() if (names := _paths_in(value))}
  if len(found) > 1 and 'image' in found:
    found = {'image': found['image']}
  if len(found) != 1:
    return [], f'has {len(found)} images in its data: give it one, called "image"'
  return next(iter(found.values())), ''


def _paths_in(value: Any) -> list[str]:
  """Returns the paths that an address may mean: decoded, and without the prefix of uploads."""
  if not isinstance(value, str) or value.startswith('data:'):
    return []
  try:
    address = urllib.parse.urlsplit(value)
  except ValueError:
    return []
  local = urllib.parse.parse_qs(address.query).get('d', [''])[0]  # of local storage
  paths = [local or urllib.parse.unquote(address.path), value]
  paths = [path for path in paths if without_suffix(path, IMAGE_SUFFIXES) is not None]
  names = [re.split(r'[/\\]', path)[-1] for path in paths]
  return [*paths, *(_PREFIX.sub('', name) for name in names)]


def _draw(
  h: int, w: int, *, task: _Task, values: Mapping[str, int], document: Document
) -> np.ndarray:
  """Draws the regions of a task over each other, in their order."""
  file = document.path
  label = shapes.empty_label((h, w))
  for index, region in enumerate(task.regions):
    if region.type in _NO_AREA:
      continue
    check_size(region.size, h, w, task.names[0], file)
    try:
      _paint(label, region, values)
    except ValueError as error:
      raise UserError(
        f'Region {index + 1} of image {task.names[0]} in {file} ({region.type}, '
        f'{"/".join(region.labels or ["no label"])}) {error}: mend it, or take it out.'
      ) from error
  return label


def _paint(label: np.ndarray, region: _Region, values: Mapping[str, int]) -> None:
  """Paints a region.

  Raises:
    ValueError: If it is broken; the message says what it has.
  """
  if region.labels is None:
    raise ValueError('is of a kind that is not read')
  if len(region.labels) != 1:
    raise ValueError(f'has {len(region.labels)} labels, and not one')
  if region.rotation:
    raise ValueError(f'is of an image turned by {region.rotation} degrees, which is not read')
  value, kind = values[region.labels[0]], region.kind()
  if kind == 'polygons':
    if region.value.get('closed') is False:
      raise ValueError('has a polygon that is not closed')
    shapes.paint_polygon(label, _pixels(region.value['points'], label.shape), value)
  elif kind == 'brushes':
    label[brushes.alpha_in(region.value['rle'], label.size).reshape(label.shape)] = value
  elif kind == 'rectangles':
    x, y, across, down, angle = _fields(region.value, 'x', 'y', 'width', 'height')
    h, w = label.shape
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    sides = np.array([[0, 0], [0, down * h], [across * w, down * h], [across * w, 0]]) / 100
    corners = sides @ np.array([[cosine, sine], [-sine, cosine]]) + [x * w / 100, y * h / 100]
    shapes.paint_polygon(label, shapes.points_in(corners, label.shape), value)
  elif kind == 'ellipses':
    _paint_ellipse(label, region.value, value)
  else:
    raise ValueError('is of a kind that is not read')


def _paint_ellipse(label: np.ndarray, fields: Mapping[str, Any], value: int) -> None:
  """Paints an ellipse of whole pixels."""
  x, y, across, down, angle = _fields(fields, 'x', 'y', 'radiusX', 'radiusY')
  points = _pixels([[x - across, y - down], [x + across, y + down]], label.shape)
  center, radii = points.mean(0), np.abs(points[1] - points[0]) / 2
  mask = np.zeros(label.shape, np.uint8)
  center, radii = [tuple(round(number) for number in pair.tolist()) for pair in (center, radii)]
  cv2.ellipse(mask, center, radii, angle, 0, 360, 1, thickness=-1)
  label[mask == 1] = value


def _pixels(percent: Any, size: tuple[int, ...]) -> np.ndarray:
  points = shapes.numbers_in(percent)
  if points.ndim != 2 or points.shape[1] != 2:
    raise ValueError('has coordinates that are no pairs of x and y')
  return shapes.points_in(points * [size[1], size[0]] / 100, (size[0], size[1]))


def _fields(value: Mapping[str, Any], *keys: str) -> list[float]:
  """Returns the values of some fields, and the rotation in degrees."""
  found: list[Any] = [*(value.get(key) for key in keys), value.get('rotation', 0)]
  if not all(type(number) in (int, float) and math.isfinite(number) for number in found):
    raise ValueError(f'has something else than numbers as {", ".join(keys)} or rotation')
  *numbers, angle = map(float, found)
  return [*numbers, angle % 360]
