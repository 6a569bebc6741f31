"""The results of each image of an evaluation, and the CSV file that holds them."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Self

import numpy as np

from nonlocal_jax.evaluation.metrics import distinct_names

CERTAIN = 0.9  # the confidence from which on a wrong prediction contradicts its label

_FIXED = (
  *('image', 'height', 'width', 'labeled_pixels', 'mIoU', 'aAcc', 'confidence'),
  *('contradicted_pixels', 'contradicted_label', 'contradicted_prediction'),
)


@dataclasses.dataclass(frozen=True)
class ImageResults:
  """The results of each image, in the order of the split. Only labeled pixels count.

  Attributes:
    names: The name of each image.
    sizes: (images, 2) int64, height and width.
    labeled: (images,) int64, the number of labeled pixels.
    iou: (images, classes) float64 in [0, 1]; NaN for a class neither labeled nor predicted.
    accuracy: (images,) float64, the share of correct pixels; NaN if none is labeled.
    confidence: (images,) float64, the mean confidence; NaN if no pixel is labeled.
    contradicted: (images,) int64, the number of pixels whose prediction is not their label, with a
      confidence of at least `CERTAIN`.
    pairs: (images, 2) int64, the label and the prediction of most of these; -1 where there are
      none.
  """

  names: tuple[str, ...]
  sizes: np.ndarray
  labeled: np.ndarray
  iou: np.ndarray
  accuracy: np.ndarray
  confidence: np.ndarray
  contradicted: np.ndarray
  pairs: np.ndarray

  @property
  def mean_iou(self) -> np.ndarray:
    """Returns the mean IoU of each image over the classes in it, (images,) float64 or NaN."""
    return _mean_of_defined(self.iou, axis=1)

  @property
  def mean_iou_of_classes(self) -> np.ndarray:
    """Returns the mean IoU of each class over the images that it is in, (classes,) or NaN."""
    return _mean_of_defined(self.iou, axis=0)

  @property
  def contradicted_share(self) -> np.ndarray:
    """Returns `contradicted` relative to the labeled pixels, (images,) float64; 0 if none is."""
    return self.contradicted / np.maximum(self.labeled, 1)

  def to_csv(self, classes: Sequence[str]) -> str:
    """Returns a CSV table with a line for each image; scores and confidence in percent.

    Fields are empty where a score is undefined.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    names = distinct_names(classes)
    writer.writerow([*_FIXED, *(f'IoU {name}' for name in names)])
    for place, name in enumerate(self.names):
      label, prediction = self.pairs[place].tolist()
      writer.writerow(
        [
          name,
          *self.sizes[place].tolist(),
          int(self.labeled[place]),
          _percent(self.mean_iou[place]),
          _percent(self.accuracy[place]),
          _percent(self.confidence[place]),
          int(self.contradicted[place]),
          *(names[index] if index >= 0 else '' for index in (label, prediction)),
          *map(_percent, self.iou[place]),
        ]
      )
    return file.getvalue()

  @classmethod
  def from_csv(cls, text: str, classes: Sequence[str]) -> Self:
    """Reads what `to_csv` returned.

    Raises:
      ValueError: If it is no such table, or one of other classes.
    """
    names = distinct_names(classes)
    lines = list(csv.reader(io.StringIO(text)))
    columns = [*_FIXED, *(f'IoU {name}' for name in names)]
    if not lines or lines[0] != columns or any(len(line) != len(columns) for line in lines):
      raise ValueError('not the table of these classes')
    number_of = {'': -1, **{name: index for index, name in enumerate(names)}}
    rows = lines[1:]
    try:
      return cls(
        names=tuple(row[0] for row in rows),
        sizes=np.array([row[1:3] for row in rows], np.int64).reshape(-1, 2),
        labeled=np.array([row[3] for row in rows], np.int64),
        iou=np.array([[_share(x) for x in row[len(_FIXED) :]] for row in rows], np.float64).reshape(
          -1, len(names)
        ),
        accuracy=np.array([_share(row[5]) for row in rows]),
        confidence=np.array([_share(row[6]) for row in rows]),
        contradicted=np.array([row[7] for row in rows], np.int64),
        pairs=np.array([[number_of[x] for x in row[8:10]] for row in rows], np.int64).reshape(
          -1, 2
        ),
      )
    except KeyError as error:
      raise ValueError(f'unknown class {error}') from error


class ImageCounts:
  """Collects the counts of images in any order.

  Attributes:
    names: The names of the images that are known so far, by index.
  """

  def __init__(self, sizes: Sequence[tuple[int, int]], num_classes: int):
    """Starts with zeros.

    Args:
      sizes: (height, width) of each image.
      num_classes: The number of classes.
    """
    images = len(sizes)
    self.names: dict[int, str] = {}
    self._sizes = np.array(sizes, np.int64).reshape(-1, 2)
    self._areas = np.zeros((images, 3, num_classes), np.int64)  # correct, labeled, predicted
    self._confidence = np.zeros(images)
    self._contradicted = np.zeros(images, np.int64)
    self._pairs = np.full((images, 2), -1, np.int64)

  def add(
    self, indices: Sequence[int], confusions: np.ndarray, confidence: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Adds the counts of some images.

    Args:
      indices: Which images.
      confusions: (images, 2, classes, classes) integers: pixels by confidence (below `CERTAIN`, or
        not), label and prediction.
      confidence: (images,) floats, the sum of the pixels' confidences.

    Returns:
      The mean IoU of each image and the share of its pixels that contradict their labels, (images,)
      float64.
    """
    places = list(indices)
    whole = confusions.sum(axis=1, dtype=np.int64)
    correct = np.diagonal(whole, axis1=1, axis2=2)
    self._areas[places] = np.stack([correct, whole.sum(axis=2), whole.sum(axis=1)], axis=1)
    self._confidence[places] = confidence
    num_classes = whole.shape[-1]
    wrong = np.where(np.eye(num_classes, dtype=bool), 0, confusions[:, 1])
    wrong = wrong.reshape(len(places), -1)
    self._contradicted[places] = wrong.sum(axis=1)
    pairs = np.stack(np.divmod(wrong.argmax(axis=1), num_classes), axis=1)
    self._pairs[places] = np.where(wrong.any(axis=1, keepdims=True), pairs, -1)
    labeled = np.maximum(self._areas[places, 1].sum(axis=-1), 1)
    mean_iou = _mean_of_defined(_iou(self._areas[places]), axis=1)
    return mean_iou, self._contradicted[places] / labeled

  def results(self, names: Sequence[str]) -> ImageResults:
    """Returns the results of all images, which have these names."""
    labeled = self._areas[:, 1].sum(axis=-1)
    with np.errstate(invalid='ignore'):
      return ImageResults(
        names=tuple(names),
        sizes=self._sizes,
        labeled=labeled,
        iou=_iou(self._areas),
        accuracy=self._areas[:, 0].sum(axis=-1) / labeled,
        confidence=self._confidence / labeled,
        contradicted=self._contradicted,
        pairs=self._pairs,
      )


def _iou(areas: np.ndarray) -> np.ndarray:
  """(images, 3, classes) correct, labeled and predicted pixels -> (images, classes) or NaN."""
  correct, labeled, predicted = areas[:, 0], areas[:, 1], areas[:, 2]
  with np.errstate(invalid='ignore'):
    return correct / (labeled + predicted - correct)


def _mean_of_defined(values: np.ndarray, *, axis: int) -> np.ndarray:
  defined = ~np.isnan(values)
  with np.errstate(invalid='ignore'):
    return np.where(defined, values, 0).sum(axis=axis) / defined.sum(axis=axis)


def _percent(share: float) -> str:
  return '' if np.isnan(share) else f'{100 * share:.4f}'


def _share(percent: str) -> float:
  return float(percent) / 100 if percent else float('nan')
