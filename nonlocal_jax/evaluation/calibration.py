"""How well the confidence of a network agrees with the share of pixels that it gets right."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

BINS = 15  # as in https://arxiv.org/abs/1706.04599


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Labeled pixels in bins of equal width by confidence, see `ops.calibration`.

  Attributes:
    wrong: (bins,) int64, the number of pixels whose prediction is wrong.
    correct: (bins,) int64, the number of pixels whose prediction is right.
    confidence: (bins,) float64, the sum of their confidences.
  """

  wrong: np.ndarray
  correct: np.ndarray
  confidence: np.ndarray

  @property
  def pixels(self) -> np.ndarray:
    """Returns the number of pixels in each bin, (bins,) int64."""
    return self.wrong + self.correct

  @property
  def accuracy(self) -> np.ndarray:
    """Returns the share of correct pixels in each bin, (bins,) float64; NaN in empty bins."""
    with np.errstate(invalid='ignore'):
      return self.correct / self.pixels

  @property
  def mean_confidence(self) -> np.ndarray:
    """Returns the mean confidence in each bin, (bins,) float64; NaN in empty bins."""
    with np.errstate(invalid='ignore'):
      return self.confidence / self.pixels

  @property
  def error(self) -> float:
    """Returns the expected calibration error in [0, 1]; NaN if no pixel is labeled.

    The mean over pixels of abs(accuracy - confidence) of their bins.
    """
    pixels = self.pixels.sum()
    gaps = np.abs(self.correct - self.confidence).sum()
    return float(gaps / pixels) if pixels else float('nan')

  @property
  def bias(self) -> float:
    """Returns mean confidence minus accuracy over all pixels; NaN if no pixel is labeled."""
    pixels = self.pixels.sum()
    return float((self.confidence - self.correct).sum() / pixels) if pixels else float('nan')

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values: counts and sums by bin, and the error in percent."""
    return {
      'ECE': round(100 * self.error, 4),
      'wrong': self.wrong.tolist(),
      'correct': self.correct.tolist(),
      'confidence': [round(value, 3) for value in self.confidence.tolist()],
    }

  @classmethod
  def from_dict(cls, fields: Mapping[str, Sequence[float]]) -> Self:
    """Reads what `to_dict` returned."""
    return cls(
      np.array(fields['wrong'], np.int64),
      np.array(fields['correct'], np.int64),
      np.array(fields['confidence'], np.float64),
    )
