"""COCO's format: polygons and run-length masks in JSON files, each for many images.

Described in https://cocodataset.org/#format-data. Roboflow writes it as `_annotations.coco.json` in
train, valid and test; CVAT as annotations/instances_SUBSET.json; Label Studio as result.json.
"""

import array
import collections
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
  read_json,
  split_named,
)
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.paths import files_below
from nonlocal_jax.errors import UserError

_LISTS = ('images', 'annotations', 'categories')
_DRAWING = 'COCO 1'  # grows when the drawing changes
_KEPT = ('id', 'image_id', 'category_id', 'segmentation')
_OTHER_TASKS = {  # a field of annotations: what such a file is for, and what to do
  'segments_info': 'panoptic segmentation, whose labels are PNG files: convert these to label maps',
  'caption': 'captions: take the one of instances',
}


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds JSON files with lists of images, annotations and categories."""
  del own
  files = [path for path in files_below(source) if path.suffix.lower() == '.json']
  files = [path for path in files if _looks_like_coco(beginning(path))]
  instances = [path for path in files if path.name.startswith('instances')]
  files = instances or files  # COCO's own archive has keypoints and captions beside them
  if not files:
    return None
  evidence = evidence_of(source, files)
  return Candidate(evidence, lambda: _read(source, files, evidence))


def _looks_like_coco(data: bytes) -> bool:
  text = data.decode('utf-8', 'replace')
  return text.lstrip('\ufeff \t\r\n').startswith('{') and bool(
    re.search(r'"(images|annotations)"\s*:\s*\[', text)
  )


class _File(NamedTuple):
  """The contents of a COCO file.

  Attributes:
    path: The file.
    images: Its images.
    annotations: The annotations of each image, by its id.
    categories: Its categories, in the order of their ids.
  """

  path: Path
  images: Sequence[dict]
  annotations: Mapping[Any, Sequence[dict]]
  categories: Sequence[dict]

  def all_annotations(self) -> Iterator[dict]:
    return itertools.chain.from_iterable(self.annotations.values())


def _read(source: Path, paths: Sequence[Path], evidence: str) -> Found:
  documents = [document(path, _parse) for path in paths]
  files: list[_File] = [found.content for found in documents]
  kinds = collections.Counter(
    _kind(annotation) for file in files for annotation in file.all_annotations()
  )
  without = kinds.pop('', 0)
  if without and not kinds:
    raise UserError(
      f'File {paths[0]} is for detection: its {without} annotations have no segmentation, only '
      'boxes or keypoints: export polygons or masks.'
    )
  names_of = _names(files)
  listed = dict.fromkeys(name for names in names_of for name in names.values())
  classes = ordered_classes(source, paths, listed)
  values = {name: value for value, name in enumerate(classes)}
  entries = [
    Entry(
      [image['file_name']],
      file.path,
      functools.partial(_draw, image=image, values=values_of, document=found),
      collections.Counter(filter(None, map(_kind, file.annotations[image['id']]))),
      split=split_named(file.path.relative_to(source).parts),
    )
    for found, file, names in zip(documents, files, names_of, strict=True)
    for values_of in [{id_: values[name] for id_, name in names.items()}]
    for image in file.images
  ]
  return found_annotations(
    source,
    entries,
    title=f'COCO annotations ({evidence})',
    classes=classes,
    drawing=_DRAWING,
  )


def _names(files: Sequence[_File]) -> list[dict[Any, str]]:
  """Names the categories of each file by their ids.

  Roboflow puts a category first that only groups the others and that no annotation has. It is left
  out, as Roboflow's own trainers do (https://github.com/roboflow/rf-detr/pull/1303).

  Raises:
    UserError: If two categories of a file have the same name.
  """
  used = {annotation['category_id'] for file in files for annotation in file.all_annotations()}
  found = []
  for file in files:
    groups = [category.get('supercategory') for category in file.categories]
    ids: dict[str, Any] = {}
    for category in file.categories:
      id_, name = category['id'], category['name']
      if id_ not in used and category.get('supercategory') == 'none' and name in groups:
        continue
      if name in ids:
        raise UserError(
          f'In {file.path} the categories {ids[name]!r} and {id_!r} are both called {name!r}: '
          'rename one, or give their annotations the same category_id.'
        )
      ids[name] = id_
    found.append({id_: name for name, id_ in ids.items()})
  return found


def _parse(path: Path) -> _File:
  """Reads and checks a file.

  Raises:
    UserError: If it is not a file of COCO's instances, or its parts contradict each other.
  """
  data = read_json(path, _kept)
  lists: dict[str, list[dict]] = {}
  for key in _LISTS:
    items = data.get(key) if isinstance(data, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
      raise UserError(
        f'File {path} is not of COCO: {key!r} is no list of objects; mend it, or move it away.'
      )
    lists[key] = items
    other = [what for field, what in _OTHER_TASKS.items() if any(field in i for i in items[:1])]
    if other:
      raise UserError(f'File {path} is of COCO, but for {other[0]}.')
  categories = _checked(path, lists['categories'], 'categories', 'name')
  images = _checked(path, lists['images'], 'images', 'file_name')
  annotations: dict[Any, list[dict]] = {image['id']: [] for image in images}
  ids = {category['id'] for category in categories}
  for annotation in lists['annotations']:
    for field, known in (('image_id', annotations), ('category_id', ids)):
      value = annotation.get(field)
      if not isinstance(value, int | str) or value not in known:
        raise UserError(
          f'Annotation {annotation.get("id")!r} in {path} has the {field} {value!r}, which is not '
          'listed there: add it to the list, or take the annotation out.'
        )
    annotations[annotation['image_id']].append(annotation)
  return _File(path, images, annotations, sorted(categories, key=_order))


def _checked(path: Path, items: list[dict], what: str, name: str) -> list[dict]:
  """Checks that objects have an id of their own and a name."""
  ids = set()
  for item in items:
    if not isinstance(item.get('id'), int | str) or not isinstance(item.get(name), str):
      raise UserError(f'In {path} one of the {what} lacks its id or {name}: mend it.')
    if item['id'] in ids:
      raise UserError(f'In {path} the id {item["id"]!r} is of two {what}: give one another.')
    ids.add(item['id'])
  return items


def _order(category: dict) -> tuple[bool, Any]:
  return isinstance(category['id'], str), category['id']


def _kept(item: dict) -> dict:
  """Leaves out what is not needed of an annotation, and packs its polygons.

  A list of numbers takes 32 bytes for each in Python, an array 8.
  """
  if 'image_id' not in item or 'category_id' not in item:
    return item
  kept = {key: item[key] for key in _KEPT if key in item}
  parts = item.get('segmentation')
  if isinstance(parts, list):
    kept['segmentation'] = [_packed(part) for part in parts]
  return kept


def _packed(numbers: Any) -> Any:
  try:
    return array.array('d', numbers) if isinstance(numbers, list) else numbers
  except (TypeError, OverflowError):  # complained about where it is drawn
    return numbers


def _kind(annotation: dict) -> str:
  segmentation = annotation.get('segmentation')
  if isinstance(segmentation, dict):
    return 'masks'
  return 'polygons' if segmentation else ''


def _draw(
  h: int,
  w: int,
  *,
  image: dict,
  values: Mapping[Any, int],
  document: Document,
) -> np.ndarray:
  """Draws the annotations of an image over each other, in their order in the file.

  So does pycocotools' `cocostuffhelper.cocoSegmentationToSegmentationMap`. Crowds are drawn, too.
  """
  file = document.path
  check_size((image.get('height'), image.get('width')), h, w, image['file_name'], file)
  label = shapes.empty_label((h, w))
  for annotation in document.content.annotations[image['id']]:
    try:
      _paint(label, annotation.get('segmentation'), values[annotation['category_id']])
    except ValueError as error:
      raise UserError(
        f'Annotation {annotation.get("id")!r} of image {image["file_name"]} in {file} {error}: '
        'mend it, or take it out.'
      ) from error
  return label


def _paint(label: np.ndarray, segmentation: Any, value: int) -> None:
  """Paints a segmentation as `pycocotools.coco.COCO.annToMask` does.

  Raises:
    ValueError: If it is none; the message says what it has.
  """
  if not segmentation:
    raise ValueError('has no segmentation, perhaps only a box')
  if isinstance(segmentation, dict):
    size = segmentation.get('size')
    if size != [*label.shape]:
      raise ValueError(f'has run lengths of (height, width) {size}, and not {[*label.shape]}')
    shapes.paint_counts(label, shapes.counts_in(segmentation.get('counts')), value)
    return
  if not isinstance(segmentation, list):
    raise ValueError('has a segmentation that is no list of polygons')
  for part in segmentation:
    if not isinstance(part, array.array) or len(part) % 2:
      raise ValueError('has a polygon that is no list of numbers x, y, x, y, ...')
    shapes.paint_polygon(label, shapes.points_in(np.reshape(part, (-1, 2)), label.shape), value)
