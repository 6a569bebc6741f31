"""Confusion matrix and the scores read off it (mmseg `IoUMetric`)."""

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def confusion_matrix(
  predictions: jax.Array, labels: jax.Array, *, num_classes: int, ignore_index: int = 255
) -> jax.Array:
  """Counts pixels by class and predicted class.

  Args:
    predictions: Integers in [0, num_classes), any shape.
    labels: Integers in [0, num_classes) or `ignore_index`, the same shape; at most 2**31 - 1
      pixels.
    num_classes: Number of classes.
    ignore_index: Label of the pixels to leave out.

  Returns:
    (num_classes, num_classes) int32, rows by label, columns by prediction.
  """
  valid = labels != ignore_index
  cells = labels.astype(jnp.int32) * num_classes + predictions.astype(jnp.int32)
  cells = jnp.where(valid, cells, num_classes**2)
  counts = jnp.bincount(cells.ravel(), length=num_classes**2 + 1)
  return counts[:-1].astype(jnp.int32).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores in [0, 1]; NaN where 0 / 0.

  Attributes:
    iou: (num_classes,) float64: intersection over union; NaN for a class neither labelled nor
      predicted.
    accuracy: (num_classes,) float64: share of a class's pixels that are found; NaN for a class not
      labelled.
    all_accuracy: Share of all labelled pixels that are right (aAcc).
  """

  iou: np.ndarray
  accuracy: np.ndarray
  all_accuracy: float

  @property
  def mean_iou(self) -> float:
    """Mean over the classes whose IoU is defined (mIoU)."""
    return _nanmean(self.iou)

  @property
  def mean_accuracy(self) -> float:
    """Mean over the classes whose accuracy is defined (mAcc)."""
    return _nanmean(self.accuracy)

  def summary(self) -> dict[str, float]:
    """aAcc, mIoU and mAcc in percent."""
    return {
      'aAcc': 100 * self.all_accuracy,
      'mIoU': 100 * self.mean_iou,
      'mAcc': 100 * self.mean_accuracy,
    }

  def table(self, classes: Sequence[str]) -> str:
    """A table in percent, a line for each class and one for the means."""
    width = max(map(len, ('class', *classes)))
    lines = [f'{"class":<{width}}     IoU     Acc']
    for name, iou, accuracy in zip(classes, self.iou, self.accuracy, strict=True):
      lines.append(f'{name:<{width}}  {100 * iou:6.2f}  {100 * accuracy:6.2f}')
    summary = '  '.join(f'{name} {value:.2f}' for name, value in self.summary().items())
    return '\n'.join([*lines, summary])


def scores(confusion: np.ndarray) -> Scores:
  """Scores of a confusion matrix.

  Args:
    confusion: (c, c) integers, rows by label, columns by prediction.
  """
  confusion = confusion.astype(np.int64)
  intersection = np.diag(confusion)
  labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
  with np.errstate(invalid='ignore'):
    iou = intersection / (labelled + predicted - intersection)
    accuracy = intersection / labelled
    all_accuracy = float(intersection.sum() / labelled.sum())
  return Scores(iou, accuracy, all_accuracy)


def _nanmean(values: np.ndarray) -> float:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', RuntimeWarning)  # NaN for no value is what is meant
    return float(np.nanmean(values))
