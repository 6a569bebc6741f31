"""Descriptions of datasets: classes, colors, and how label values are read."""

import colorsys
import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np

from nonlocal_jax.data import classes as tables
from nonlocal_jax.data import transforms
from nonlocal_jax.data.paths import as_path
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import parse_object
from nonlocal_jax.runtime.wording import counted

Split = Literal['train', 'val']
Color = tuple[int, int, int]
DESCRIPTION = 'dataset.json'
IGNORED_BY_LABELME = '__ignore__'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A dataset: its classes, how its label values are read, and how its folders are laid out.

  Attributes:
    name: Short name, used in folder names and messages.
    classes: Name of each class.
    palette: RGB color of each class, 0..255.
    layout: Which of the folder layouts of `layouts.list_samples` it comes in.
    reduce_zero_label: See `transforms.label_lookup`.
    ignore_labels: See `transforms.label_lookup`.
    label_map: See `transforms.label_lookup`.
    published_sizes: Images of each split as its authors published it; empty where unknown.
  """

  name: str
  classes: tuple[str, ...]
  palette: tuple[Color, ...]
  layout: Literal['cityscapes', 'ade20k', 'voc12aug', 'custom']
  reduce_zero_label: bool = False
  ignore_labels: tuple[int, ...] = ()
  label_map: tuple[int, ...] = ()
  published_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)

  @property
  def label_lookup(self) -> np.ndarray:
    """The table from values in label files to class indices, (256,) uint8; 255 has no class."""
    return transforms.label_lookup(
      reduce_zero_label=self.reduce_zero_label,
      ignore_labels=self.ignore_labels,
      label_map=self.label_map,
    )


def _published(
  name: Literal['cityscapes', 'ade20k', 'voc12aug'],
  table: Sequence[tuple[str, Color]],
  *,
  train: int,
  val: int,
  reduce_zero_label: bool = False,
) -> Dataset:
  classes, palette = zip(*table, strict=True)
  return Dataset(
    name,
    classes,
    palette,
    layout=name,
    reduce_zero_label=reduce_zero_label,
    published_sizes={'train': train, 'val': val},
  )


PUBLISHED = {
  'cityscapes': _published('cityscapes', tables.CITYSCAPES, train=2975, val=500),
  'ade20k': _published('ade20k', tables.ADE20K, train=20210, val=2000, reduce_zero_label=True),
  'voc12aug': _published('voc12aug', tables.VOC12AUG, train=10582, val=1449),
}


def custom_dataset(
  num_classes: int | None = None,
  *,
  name: str = 'custom',
  classes: Sequence[str] = (),
  palette: Sequence[Color] = (),
  reduce_zero_label: bool = False,
  ignore_labels: Sequence[int] = (),
  label_map: Sequence[int] = (),
  layout: Literal['cityscapes', 'ade20k', 'voc12aug', 'custom'] = 'custom',
) -> Dataset:
  """Describes a custom dataset, or another set of classes for a published one.

  Args:
    num_classes: Number of classes; None for that of the names, what the label map leads to, or the
      colors.
    name: Short name, used in folder names and messages.
    classes: Name of each class; none for 'class 0', 'class 1', ...
    palette: RGB color of each class; none for `distinct_colors`.
    reduce_zero_label: See `transforms.label_lookup`.
    ignore_labels: See `transforms.label_lookup`.
    label_map: See `transforms.label_lookup`.
    layout: The folder layout.

  Returns:
    The dataset.

  Raises:
    UserError: If the number of classes is not given, out of range, or not that of the names,
      colors and label map.
  """
  mapped = [index for index in label_map if index != transforms.IGNORE]
  num_classes = num_classes or len(classes) or max(mapped, default=-1) + 1 or len(palette)
  if not num_classes:
    raise UserError(
      f'The number of classes of dataset {name} is not known: set num_classes, or "classes" in '
      f'{DESCRIPTION} beside its images.'
    )
  if not 2 <= num_classes <= transforms.IGNORE:
    raise UserError(
      f'Dataset {name} has {counted(num_classes, "class")}; from 2 to 255 are possible.'
    )
  if mapped and max(mapped) >= num_classes:
    raise UserError(
      f'The label_map of dataset {name} leads to class {max(mapped)}, but there are '
      f'{num_classes} classes: lead to 0..{num_classes - 1}, or to 255 for none.'
    )
  names = tuple(classes) or tuple(f'class {index}' for index in range(num_classes))
  colors = tuple((r, g, b) for r, g, b in palette) or distinct_colors(num_classes)
  for given, what in ((names, 'class names'), (colors, 'colors')):
    if len(given) != num_classes:
      raise UserError(
        f'Dataset {name} has {num_classes} classes but {len(given)} {what}: give one for each.'
      )
  dataset = Dataset(
    name,
    names,
    colors,
    layout=layout,
    reduce_zero_label=reduce_zero_label,
    ignore_labels=tuple(ignore_labels),
    label_map=tuple(label_map),
  )
  _check_no_class_of_labelme(dataset)
  return dataset


def _check_no_class_of_labelme(dataset: Dataset) -> None:
  """Checks that the names are no list of labelme's, which begins with a name for 255."""
  if IGNORED_BY_LABELME not in dataset.classes:
    return
  index = dataset.classes.index(IGNORED_BY_LABELME)
  values = np.flatnonzero(dataset.label_lookup == index).tolist()
  if values:
    raise UserError(
      f'Class {index} of dataset {dataset.name} is called {IGNORED_BY_LABELME!r}, which labelme '
      'writes into label files as 255 and does not count as a class: take the name out of classes, '
      f'or, if the label files have {values[0]} there, add {values[0]} to ignore_labels.'
    )


def merge_classes(dataset: Dataset, label_map: Sequence[int]) -> Dataset:
  """Selects, reorders or merges classes of a dataset.

  Args:
    dataset: The dataset.
    label_map: See `transforms.label_lookup`; empty for all classes as they are.

  Returns:
    The dataset; a merged class has the names of its parts and the color of the first.

  Raises:
    UserError: If the map is longer than the classes, or leads to fewer than two without a gap.
  """
  if not label_map:
    return dataset
  wanted = sorted(set(label_map) - {transforms.IGNORE})
  if len(label_map) > dataset.num_classes or len(wanted) < 2 or wanted != list(range(len(wanted))):
    raise UserError(
      f'The label_map of dataset {dataset.name} has {len(label_map)} entries that lead to classes '
      f'{wanted}: give one for each of the first of its {dataset.num_classes} classes, leading to '
      '0, 1, ... without a gap, or to 255 for none.'
    )
  parts = [[old for old, new in enumerate(label_map) if new == index] for index in wanted]
  return dataclasses.replace(
    dataset,
    classes=tuple('/'.join(dataset.classes[old] for old in olds) for olds in parts),
    palette=tuple(dataset.palette[olds[0]] for olds in parts),
    label_map=tuple(label_map),
  )


def read_description(source_dir: str | PathLike[str]) -> dict[str, Any]:
  """Reads the optional `dataset.json` beside the images of a custom dataset.

  Args:
    source_dir: The folder of the dataset.

  Returns:
    Some of the arguments of `custom_dataset`, and perhaps 'format', see `formats.detection`; none
    if there is no such file.

  Raises:
    UserError: If the file is not a JSON object, or a value is not of its type.
  """
  path = as_path(source_dir) / DESCRIPTION
  if not path.exists():
    return {}
  try:
    values = parse_object(path.read_bytes())
  except ValueError as error:
    raise UserError(
      f'File {path} is no JSON object ({error}): mend it, as in {{"classes": [...]}}.'
    ) from error
  for key, value in values.items():
    if key not in _FIELDS:
      raise UserError(
        f'File {path} has a field {key!r}, which means nothing: it may have {", ".join(_FIELDS)}.'
      )
    expected, holds = _FIELDS[key]
    if not holds(value):
      raise UserError(f'In {path}, {key!r} is {json.dumps(value)}; it must be {expected}.')
  return values


def _is_byte(value: Any) -> bool:
  return type(value) is int and 0 <= value <= 255


def _are_bytes(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_byte, value))


# Fields of the description: what each must be, in words and as a test.
_FIELDS = {
  'num_classes': ('a number from 2 to 255', lambda value: _is_byte(value) and value >= 2),
  'classes': (
    'a list of names',
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
  ),
  'palette': (
    'a list of [red, green, blue] from 0 to 255',
    lambda value: (
      isinstance(value, list) and all(_are_bytes(color) and len(color) == 3 for color in value)
    ),
  ),
  'reduce_zero_label': ('true or false', lambda value: isinstance(value, bool)),
  'ignore_labels': ('a list of numbers from 0 to 255', _are_bytes),
  'label_map': ('a list of numbers from 0 to 255', _are_bytes),
  'format': ('a name', lambda value: isinstance(value, str)),
}


def distinct_colors(count: int) -> tuple[Color, ...]:
  """Returns up to 255 distinct colors: hues in golden-ratio steps, cycling through four shades.

  Args:
    count: How many.

  Returns:
    RGB colors, 0..255.
  """
  shades = ((0.85, 0.95), (0.55, 0.75), (0.95, 0.55), (0.35, 0.95))
  colors = (
    colorsys.hsv_to_rgb(index * 0.618034 % 1, *shades[index % len(shades)])
    for index in range(count)
  )
  return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colors)
