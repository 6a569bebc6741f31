"""The weights of the best evaluation of a run, in the folder `best` of its workdir."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from nonlocal_jax.weights.run_checkpoints import RunCheckpoints


class BestWeights:
  """Keeps the weights with the best mIoU until there are better ones.

  A run may go back to an older checkpoint, and its next evaluations may be lower. The weights of
  the later step then stay.
  """

  KEEP = 2  # checkpoints: the old one is deleted once the new one is complete

  def __init__(self, checkpoints: RunCheckpoints, evaluations: Sequence[Mapping[str, Any]]):
    """Finds the weights that were saved before, and their mIoU.

    Args:
      checkpoints: Those in `best`, opened to keep `KEEP`.
      evaluations: The evaluations in the log up to the step that the run resumes at.
    """
    self._checkpoints = checkpoints
    scores = {step: self._saved_score(step, evaluations) for step in checkpoints.steps()}
    self.step: int | None = max(scores, key=lambda step: (scores[step], step), default=None)
    self._score = -math.inf if self.step is None else scores[self.step]
    self._delete_others()

  def are_worse_than(self, summary: Mapping[str, float]) -> bool:
    """Whether the mIoU of an evaluation exceeds that of the saved weights, if there are any."""
    return self.step is None or _number(summary['mIoU']) > self._score

  def save(self, step: int, model: nnx.State, summary: Mapping[str, float]) -> None:
    """Saves other weights and waits until they are written.

    Args:
      step: Steps taken.
      model: Parameters and running statistics.
      summary: The scores of the weights in percent, with 'mIoU'.
    """
    if step == self.step:  # the run went back, and its steps were not deterministic
      self._checkpoints.delete(step)
    score = summary['mIoU']
    self._checkpoints.save(step, model=model, data={'mIoU': None if math.isnan(score) else score})
    self._checkpoints.wait()
    self.step, self._score = step, _number(score)
    self._delete_others()

  def _saved_score(self, step: int, evaluations: Sequence[Mapping[str, Any]]) -> float:
    """The mIoU of saved weights; if none was saved with them, at least that of those before."""
    data = self._checkpoints.data_of(step)
    if 'mIoU' in data:
      return _number(data['mIoU'])
    before = [_number(line['mIoU']) for line in evaluations if line['step'] <= step]
    return max(before, default=-math.inf)

  def _delete_others(self) -> None:
    for step in self._checkpoints.steps():
      if step != self.step:
        self._checkpoints.delete(step)


def _number(score: float | None) -> float:
  """A score that can be compared: undefined ones are lower than all others."""
  return -math.inf if score is None or math.isnan(score) else score
