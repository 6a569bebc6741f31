"""Collects what a report shows beyond the scores, while images are evaluated."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.data.pixel_formats import displayable
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.evaluation.calibration import BINS, Calibration
from nonlocal_jax.evaluation.image_results import CERTAIN, ImageCounts, ImageResults
from nonlocal_jax.evaluation.showcase import Example, Showcase
from nonlocal_jax.ops.calibration import calibration_counts
from nonlocal_jax.ops.confusion import confusion_matrices
from nonlocal_jax.runtime.parallel import local_rows

if TYPE_CHECKING:  # the core installation, which writes reports again, cannot import them
  from nonlocal_jax.data.loader import EvalSample
  from nonlocal_jax.data.prepared import PreparedSplit


@dataclasses.dataclass(frozen=True)
class Details:
  """What a report shows beyond the scores.

  Attributes:
    images: The results of each image.
    calibration: How confident the predictions were.
    examples: Some images by their index, reduced; those that this process evaluated.
  """

  images: ImageResults
  calibration: Calibration
  examples: Mapping[int, Example]


class Statistics(NamedTuple):
  """What a report needs to know of the images of a batch.

  Attributes:
    confusions: (n, 2, classes, classes) int32, pixels by confidence (below `CERTAIN`, or not),
      label and prediction.
    pixels: (n, 2, BINS) int32, wrong and correct pixels by confidence.
    confidence: (n, BINS) float32, the sum of these pixels' confidences.
    levels: (n, h, w) uint8, the confidence of each pixel, 255 for certain.
  """

  confusions: jax.Array
  pixels: jax.Array
  confidence: jax.Array
  levels: jax.Array


def image_statistics(
  predictions: jax.Array, confidence: jax.Array, labels: jax.Array, *, num_classes: int
) -> Statistics:
  """Counts the pixels of each image by confidence, label and prediction."""
  confusions = confusion_matrices(
    predictions,
    labels,
    confidence >= CERTAIN,
    num_groups=2,
    num_classes=num_classes,
    ignore_index=IGNORE,
  )
  pixels, sums = calibration_counts(confidence, predictions == labels, labels != IGNORE, bins=BINS)
  levels = jnp.rint(255 * confidence).astype(jnp.uint8)
  return Statistics(confusions, pixels, sums, levels)


class Collector:
  """Collects what a report shows, from batches of images."""

  def __init__(self, split: 'PreparedSplit', num_classes: int):
    self._split = split
    self._counts = ImageCounts(split.sizes, num_classes)
    self._wrong, self._correct = np.zeros((2, BINS), np.int64)
    self._confidence = np.zeros(BINS)
    self._showcase = Showcase()

  def add(
    self,
    indices: Sequence[int],
    samples: Sequence['EvalSample'],
    predictions: jax.Array,
    statistics: Statistics,
  ) -> np.ndarray:
    """Adds a batch; returns its confusion matrix, (classes, classes) int64."""
    count = len(indices)  # the rest of the batch is padding
    confusions, pixels, confidence = (np.asarray(x)[:count] for x in statistics[:3])
    mean_iou, contradicted = self._counts.add(
      indices, confusions, confidence.sum(axis=1, dtype=np.float64)
    )
    self._wrong += pixels[:, 0].sum(axis=0, dtype=np.int64)
    self._correct += pixels[:, 1].sum(axis=0, dtype=np.int64)
    self._confidence += confidence.sum(axis=0, dtype=np.float64)
    rank = {index: place for place, index in enumerate(indices)}
    wanted = []
    for place, sample in enumerate(samples):
      self._counts.names[sample.index] = sample.name
      row = rank[sample.index]
      if self._showcase.wants(
        sample.index, mean_iou=float(mean_iou[row]), contradicted=float(contradicted[row])
      ):
        wanted.append((place, sample))
    if wanted:
      labels, levels = local_rows(predictions), local_rows(statistics.levels)
      for place, sample in wanted:
        inside = (place, *map(slice, sample.label.shape))
        image = displayable(sample.views[0])
        example = Example(image, sample.label, labels[inside], levels[inside])
        self._showcase.keep(sample.index, example)
    return confusions.sum(axis=(0, 1), dtype=np.int64)

  def details(self) -> Details:
    """Returns what was collected."""
    known = self._counts.names  # those of this process; the others' are read
    names = [known.get(i) or str(self._split[i]['id']) for i in range(len(self._split))]
    return Details(
      images=self._counts.results(names),
      calibration=Calibration(self._wrong, self._correct, self._confidence),
      examples=self._showcase.examples,
    )
