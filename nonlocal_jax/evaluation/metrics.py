"""The scores read off a confusion matrix (mmseg `IoUMetric`)."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores in [0, 1]; NaN where 0 / 0.

  Attributes:
    iou: (num_classes,) float64: intersection over union; NaN for a class neither labelled nor
      predicted.
    accuracy: (num_classes,) float64: share of a class's pixels that are found; NaN for a class not
      labelled.
    dice: (num_classes,) float64: twice the intersection over the sum of labelled and predicted
      pixels; NaN for a class neither labelled nor predicted.
    precision: (num_classes,) float64: share of the pixels predicted as a class that are of it; NaN
      for a class not predicted.
    all_accuracy: Share of all labelled pixels that are right (aAcc).
  """

  iou: np.ndarray
  accuracy: np.ndarray
  dice: np.ndarray
  precision: np.ndarray
  all_accuracy: float

  @property
  def recall(self) -> np.ndarray:
    """`accuracy` by the name that it has beside `precision`."""
    return self.accuracy

  @property
  def f_score(self) -> np.ndarray:
    """Harmonic mean of precision and recall, (num_classes,) float64.

    It is NaN where one of them is, or both are 0: other than `dice`, for every class of which no
    pixel is right.
    """
    with np.errstate(invalid='ignore'):
      return 2 * self.precision * self.recall / (self.precision + self.recall)

  @property
  def mean_iou(self) -> float:
    """Mean over the classes whose IoU is defined (mIoU)."""
    return _mean_of_defined(self.iou)

  @property
  def mean_accuracy(self) -> float:
    """Mean over the classes whose accuracy is defined (mAcc)."""
    return _mean_of_defined(self.accuracy)

  def by_class(self, *, more: bool = False) -> dict[str, np.ndarray]:
    """IoU and Acc of each class; with `more`, Dice, Fscore, Precision and Recall too.

    Returns:
      (num_classes,) float64 in [0, 1] or NaN, by name.
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
    """aAcc, mIoU and mAcc in percent; with `more`, mDice, mFscore, mPrecision and mRecall too.

    The means are over the classes whose score is defined, NaN if there is none.
    """
    means = {
      f'm{name}': 100 * _mean_of_defined(values)
      for name, values in self.by_class(more=more).items()
    }
    return {'aAcc': 100 * self.all_accuracy, **means}

  def table(self, classes: Sequence[str], *, more: bool = False) -> str:
    """A table in percent, a line for each class and one for the means.

    Args:
      classes: Name of each class.
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
  """Scores of a confusion matrix.

  Args:
    confusion: (c, c) integers, rows by label, columns by prediction.
  """
  intersection, labelled, predicted = _areas(confusion)
  with np.errstate(invalid='ignore'):
    return Scores(
      iou=intersection / (labelled + predicted - intersection),
      accuracy=intersection / labelled,
      dice=2 * intersection / (labelled + predicted),
      precision=intersection / predicted,
      all_accuracy=float(intersection.sum() / labelled.sum()),
    )


def undefined_reasons(
  confusion: np.ndarray, classes: Sequence[str], *, more: bool = False
) -> dict[str, str]:
  """Says of each class with an undefined (NaN) score why it is so, and what that does to the means.

  Args:
    confusion: (c, c) integers, rows by label, columns by prediction.
    classes: Name of each class.
    more: Whether to look at all scores; else at IoU and Acc.

  Returns:
    A sentence for each such class by its `distinct_names`, e.g. 'Absent from the labels, predicted
    in 3 pixels: Acc is undefined and left out of mAcc; IoU is 0 and counts in mIoU.'
  """
  _, labelled, predicted = _areas(confusion)
  columns = scores(confusion).by_class(more=more)
  reasons = {}
  for index, name in enumerate(distinct_names(classes)):
    undefined = [score for score, values in columns.items() if np.isnan(values[index])]
    if not undefined:
      continue
    reason = _why_undefined(int(labelled[index]), int(predicted[index]))
    reasons[name] = f'{reason}: {_each(undefined, "undefined", "left out of")}'
    zero = [score for score in columns if score not in undefined]
    if zero:
      reasons[name] += f'; {_each(zero, "0", "counts in" if len(zero) == 1 else "count in")}'
    reasons[name] += '.'
  return reasons


def distinct_names(classes: Sequence[str]) -> list[str]:
  """The names of classes; where several share one, each with its index behind: 'tree (4)'."""
  names = list(classes)
  while shared := {name for name, count in collections.Counter(names).items() if count > 1}:
    names = [f'{name} ({index})' if name in shared else name for index, name in enumerate(names)]
  return names


def _areas(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pixels of each class that are right, labelled, and predicted; (c,) int64 each."""
  confusion = confusion.astype(np.int64)
  return np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)


def _mean_of_defined(values: np.ndarray) -> float:
  defined = values[~np.isnan(values)]
  return float(defined.mean()) if defined.size else float('nan')


def _table_line(name: str, width: int, cells: Iterable[str], widths: Iterable[int]) -> str:
  aligned = (f'{cell:>{size}}' for cell, size in zip(cells, widths, strict=True))
  return '  '.join([f'{name:<{width}}', *aligned])


def _why_undefined(labelled: int, predicted: int) -> str:
  """Of a class that has no pixel right."""
  if labelled and predicted:
    return f'Labelled in {labelled} and predicted in {predicted} pixels, none of them the same'
  if labelled:
    return f'Labelled in {labelled} pixels, never predicted'
  if predicted:
    return f'Absent from the labels, predicted in {predicted} pixels'
  return 'Absent from labels and predictions'


def _each(names: Sequence[str], value: str, effect: str) -> str:
  """E.g. 'IoU and Acc are undefined and left out of mIoU and mAcc'."""
  verb = 'is' if len(names) == 1 else 'are'
  return f'{_listed(names)} {verb} {value} and {effect} {_listed([f"m{name}" for name in names])}'


def _listed(names: Sequence[str]) -> str:
  return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
