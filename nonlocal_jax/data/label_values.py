"""Statistics of the values in label files, and checks for common mistakes."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError

_NAMES_OF_NONE = {'void', 'ignore', 'ignored', 'unlabeled', 'unlabelled', 'unknown', 'undefined'}


class LabelValue(NamedTuple):
  """Counts of one raw value in the label files of a split.

  Attributes:
    pixels: In how many pixels.
    first_file: The first label file that has it.
  """

  pixels: int
  first_file: str


@dataclasses.dataclass(frozen=True)
class ClassShares:
  """Pixels of a split by class.

  Attributes:
    pixels: Number of pixels of each class, (classes,) int64.
    ignored: Number of pixels without a class.
  """

  pixels: np.ndarray
  ignored: int

  def balanced_weights(self) -> tuple[float, ...]:
    """Weights inverse to the pixels of each class, whose mean over the labeled pixels is 1.

    >>> ClassShares(np.array([30, 10, 0]), ignored=5).balanced_weights()
    (0.6666666666666666, 2.0, 0.0)

    Returns:
      A weight for each class, 0 for those without pixels.
    """
    present = np.count_nonzero(self.pixels)
    total = self.pixels.sum()
    return tuple(float(total / (present * pixels)) if pixels else 0.0 for pixels in self.pixels)

  def table(self, dataset: Dataset) -> str:
    """Lists each class with its share of the labeled pixels, and the share of ignored ones."""
    total = self.pixels.sum()
    width = max(len('ignored'), *map(len, dataset.classes))
    lines = [f'{"class":>{width}}  share of labeled pixels']
    lines += [
      f'{name:>{width}}  {_percent(pixels, total):>8}'
      for name, pixels in zip(dataset.classes, self.pixels, strict=True)
    ]
    share = _percent(self.ignored, total + self.ignored)
    return '\n'.join([*lines, f'{"ignored":>{width}}  {share:>8} of all pixels'])


def class_shares(values: Mapping[int, LabelValue], dataset: Dataset) -> ClassShares:
  """Sums counts of label values by class.

  Args:
    values: The raw values of a split that passed `check_label_values`.
    dataset: What they mean.

  Returns:
    The shares.
  """
  lookup = dataset.label_lookup
  pixels = np.zeros(IGNORE + 1, np.int64)
  for value, found in values.items():
    pixels[lookup[value]] += found.pixels
  return ClassShares(pixels[: dataset.num_classes], int(pixels[IGNORE]))


def check_label_values(values: Mapping[int, LabelValue], dataset: Dataset, *, split: str) -> None:
  """Checks that every value in the label files of a split is a class or is ignored.

  Args:
    values: The raw values of the split.
    dataset: What they mean.
    split: Its name, for the message.

  Raises:
    UserError: If a value is neither; the message names it and a file that has it.
  """
  lookup, count = dataset.label_lookup, dataset.num_classes
  is_own = dataset.layout == 'custom' and not dataset.label_map
  is_black_and_white = set(values) == {0, IGNORE} and IGNORE not in dataset.ignore_labels
  if is_own and is_black_and_white and lookup[0] != IGNORE and split.endswith('train'):
    raise UserError(
      f'The label files of {split} have the values 0 and 255 only, and 255 is ignored, so that one '
      f'of the {count} classes is left: name two classes for black and white, or write class '
      'indices.'
    )
  first = int(dataset.reduce_zero_label)
  for value, found in sorted(values.items()):
    if count <= lookup[value] < IGNORE:
      raise UserError(
        f'Label value {value} ({found.pixels} pixels of {split}, first in {found.first_file}) is '
        f'none of the {count} classes {first}..{first + count - 1}: add it to ignore_labels, '
        'correct num_classes, or, where 0 means unlabeled and classes start at 1, set '
        'reduce_zero_label=True in the config or in dataset.json.'
      )


def usual_mistakes(values: Mapping[int, LabelValue], dataset: Dataset, *, split: str) -> list[str]:
  """Looks for label values that are allowed but usually a mistake.

  Args:
    values: The raw values of a split.
    dataset: What they are taken to mean.
    split: Its name, for the messages.

  Returns:
    A sentence on each.
  """
  found = []
  shares = class_shares(values, dataset)
  total = sum(value.pixels for value in values.values())
  share = {value: _percent(entry.pixels, total) for value, entry in values.items()}
  if not shares.pixels.any():
    found.append(f'No pixel of {split} has a class.')
  own = dataset.layout == 'custom' and not dataset.label_map
  if own and dataset.reduce_zero_label and 0 in values and dataset.num_classes not in values:
    found.append(
      f'Label value 0 ({share[0]} of the pixels of {split}) is ignored and value '
      f'{dataset.num_classes} does not occur: if 0 is a class, leave out reduce_zero_label.'
    )
  if own and set(values) == {0, IGNORE}:
    found.append(
      f'The label files of {split} have the values 0 and 255 only, and 255 ({share[IGNORE]} of '
      'the pixels) is ignored: if it is a class, give names to two classes, and no other values.'
    )
  elif own and IGNORE in values and values[IGNORE].pixels > shares.pixels[1:].sum():
    found.append(
      f'Value 255 is ignored and has more pixels of {split} ({share[IGNORE]}) than all classes but '
      f'{dataset.classes[0]!r}: if it is a class, write it as the next index.'
    )
  for index, name in enumerate(dataset.classes):
    if name.strip().lower() in _NAMES_OF_NONE and shares.pixels[index]:
      found.append(
        f'Class {index} is called {name!r}, and yet counts in training and mIoU: add its value to '
        'ignore_labels if it means that there is no class.'
      )
  absent = [name for name, pixels in zip(dataset.classes, shares.pixels, strict=True) if not pixels]
  if absent and shares.pixels.any():
    more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
    found.append(f'No pixel of {split} is {", ".join(absent[:5])}{more}.')
  return found


def _percent(part: int, whole: int) -> str:
  return f'{100 * part / whole:.2f} %' if whole else '-'
