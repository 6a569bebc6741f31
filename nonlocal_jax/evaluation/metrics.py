"""Computes segmentation metrics from a confusion matrix, as mmseg's `IoUMetric` does."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from nonlocal_jax.runtime.wording import counted


@dataclasses.dataclass(frozen=True)
class Scores:
  """Segmentation metrics in [0, 1], NaN where undefined.

  For a class with I correct, L labeled and P predicted pixels.

  Attributes:
    iou: (num_classes,) float64: I / (L + P - I); NaN for a class neither labeled nor predicted.
    accuracy: (num_classes,) float64: I / L; NaN for a class not labeled.
    dice: (num_classes,) float64: 2 I / (L + P); NaN for a class neither labeled nor predicted.
    precision: (num_classes,) float64: I / P; NaN for a class not predicted.
    all_accuracy: The share of labeled pixels whose prediction is correct (aAcc).
  """

  iou: np.ndarray
  accuracy: np.ndarray
  dice: np.ndarray
  precision: np.ndarray
  all_accuracy: float

  @property
  def recall(self) -> np.ndarray:
    """Returns `accuracy`, under the name that goes with `precision`."""
    return self.accuracy

  @property
  def f_score(self) -> np.ndarray:
    """Returns the harmonic mean of precision and recall, (num_classes,) float64.

    It is NaN for every class without a correct pixel, where `dice` can be 0.
    """
    with np.errstate(invalid='ignore'):
      return 2 * self.precision * self.recall / (self.precision + self.recall)

  @property
  def mean_iou(self) -> float:
    """Returns the mean IoU over the classes for which it is defined (mIoU)."""
    return _mean_of_defined(self.iou)

  @property
  def mean_accuracy(self) -> float:
    """Returns the mean accuracy over the classes for which it is defined (mAcc)."""
    return _mean_of_defined(self.accuracy)

  def by_class(self, *, more: bool = False) -> dict[str, np.ndarray]:
    """Returns the metrics of each class, by name.

    Args:
      more: Whether to add Dice, Fscore, Precision and Recall to IoU and Acc.

    Returns:
      (num_classes,) float64 in [0, 1] or NaN for each metric.
    """
    found = {'IoU': self.iou, 'Acc': self.accuracy}
    if more:
      found |= {
        'Dice': self.dice,
        'Fscore': self.f_score,
        'Precision': self.precision,
        'Recall': self.recall,
      }
    return found

  def summary(self, *, more: bool = False) -> dict[str, float]:
    """Returns aAcc and the mean of each metric over the classes, in percent.

    A mean leaves out classes for which the metric is undefined; it is NaN if all are.

    Args:
      more: See `by_class`.
    """
    means = {
      f'm{name}': 100 * _mean_of_defined(values)
      for name, values in self.by_class(more=more).items()
    }
    return {'aAcc': 100 * self.all_accuracy, **means}

  def table(self, classes: Sequence[str], *, more: bool = False) -> str:
    """Returns a text table in percent, with a line for each class and one for the means.

    Args:
      classes: The name of each class.
      more: See `by_class`.
    """
    names = distinct_names(classes)
    columns = self.by_class(more=more)
    width = max(map(len, ('class', *names)))
    widths = [max(6, len(column)) for column in columns]
    lines = [_table_line('class', width, columns, widths)]
    for name, *values in zip(names, *columns.values(), strict=True):
      lines.append(_table_line(name, width, [f'{100 * value:.2f}' for value in values], widths))
    summary = '  '.join(f'{name} {value:.2f}' for name, value in self.summary(more=more).items())
    return '\n'.join([*lines, summary])


def scores(confusion: np.ndarray) -> Scores:
  """Computes the scores of a confusion matrix.

  Args:
    confusion: (c, c) integers, rows by label, columns by prediction.
  """
  intersection, labeled, predicted = _areas(confusion)
  with np.errstate(invalid='ignore'):
    return Scores(
      iou=intersection / (labeled + predicted - intersection),
      accuracy=intersection / labeled,
      dice=2 * intersection / (labeled + predicted),
      precision=intersection / predicted,
      all_accuracy=float(intersection.sum() / labeled.sum()),
    )


def undefined_reasons(
  confusion: np.ndarray, classes: Sequence[str], *, more: bool = False
) -> dict[str, str]:
  """Explains the undefined scores of each class and their effect on the means.

  Args:
    confusion: (c, c) integers, rows by label, columns by prediction.
    classes: The name of each class.
    more: See `Scores.by_class`.

  Returns:
    A sentence for each class with an undefined score, by its `distinct_names`, such as 'Absent from
    the labels, predicted in 3 pixels: Acc is undefined and left out of mAcc; IoU is 0 and counts in
    mIoU.'
  """
  _, labeled, predicted = _areas(confusion)
  columns = scores(confusion).by_class(more=more)
  reasons = {}
  for index, name in enumerate(distinct_names(classes)):
    undefined = [score for score, values in columns.items() if np.isnan(values[index])]
    if not undefined:
      continue
    reason = _why_undefined(int(labeled[index]), int(predicted[index]))
    reasons[name] = f'{reason}: {_each(undefined, "undefined", "left out of")}'
    zero = [score for score in columns if score not in undefined]
    if zero:
      reasons[name] += f'; {_each(zero, "0", "counts in" if len(zero) == 1 else "count in")}'
    reasons[name] += '.'
  return reasons


def without_hits(confusion: np.ndarray, classes: Sequence[str]) -> str:
  """Explains the IoU of 0 of labeled classes.

  Args:
    confusion: (c, c) integers, rows by label, columns by prediction.
    classes: The name of each class.

  Returns:
    A sentence, such as 'No labeled pixel is right of apple (never predicted): its IoU of 0 counts
    in mIoU.'; empty if each labeled class has pixels that are right.
  """
  right, labeled, predicted = _areas(confusion)
  wrong = [
    f'{name} ({counted(count, "predicted pixel") if count else "never predicted"})'
    for name, hits, size, count in zip(
      distinct_names(classes), right.tolist(), labeled.tolist(), predicted.tolist(), strict=True
    )
    if size and not hits
  ]
  if not wrong:
    return ''
  listed = ', '.join(wrong[:10]) + (f' and {len(wrong) - 10} more' if len(wrong) > 10 else '')
  whose = 'its' if len(wrong) == 1 else 'their'
  return f'No labeled pixel is right of {listed}: {whose} IoU of 0 counts in mIoU.'


def distinct_names(classes: Sequence[str]) -> list[str]:
  """Returns the class names, with the index appended where several share one: 'tree (4)'."""
  names = list(classes)
  while shared := {name for name, count in collections.Counter(names).items() if count > 1}:
    names = [f'{name} ({index})' if name in shared else name for index, name in enumerate(names)]
  return names


def _areas(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the correct, labeled and predicted pixels of each class, (c,) int64."""
  confusion = confusion.astype(np.int64)
  return np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)


def _mean_of_defined(values: np.ndarray) -> float:
  defined = values[~np.isnan(values)]
  return float(defined.mean()) if defined.size else float('nan')


def _table_line(name: str, width: int, cells: Iterable[str], widths: Iterable[int]) -> str:
  aligned = (f'{cell:>{size}}' for cell, size in zip(cells, widths, strict=True))
  return '  '.join([f'{name:<{width}}', *aligned])


def _why_undefined(labeled: int, predicted: int) -> str:
  """Explains why a class without a correct pixel has undefined scores."""
  if labeled and predicted:
    return f'Labeled in {labeled} and predicted in {predicted} pixels, none of them the same'
  if labeled:
    return f'Labeled in {labeled} pixels, never predicted'
  if predicted:
    return f'Absent from the labels, predicted in {predicted} pixels'
  return 'Absent from labels and predictions'


def _each(names: Sequence[str], value: str, effect: str) -> str:
  """Returns e.g. 'IoU and Acc are undefined and left out of mIoU and mAcc'."""
  verb = 'is' if len(names) == 1 else 'are'
  return f'{_listed(names)} {verb} {value} and {effect} {_listed([f"m{name}" for name in names])}'


def _listed(names: Sequence[str]) -> str:
  return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
