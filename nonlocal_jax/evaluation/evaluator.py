"""Evaluation of a network on a split: images in, scores out."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from nonlocal_jax.data.builders import PreparedSplit
from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.loader import eval_batches
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.inference import Windows, predict_labels
from nonlocal_jax.evaluation.metrics import Scores, confusion_matrix, scores
from nonlocal_jax.evaluation.pictures import write_comparison
from nonlocal_jax.experiment import architecture_of, dataset_of, open_splits, windows_of
from nonlocal_jax.progress import progress_bar
from nonlocal_jax.weights.loading import read_weights

METRICS = 'metrics.json'
PICTURE = 'predictions.png'
_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation found.

  Attributes:
    confusion: (classes, classes) int64, rows by label, columns by prediction.
    scores: The scores read off it.
    examples: Image, truth and prediction of a few images, evenly spread over the split.
  """

  confusion: np.ndarray
  scores: Scores
  examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]


class Evaluator:
  """Evaluates a network on one split; compiles once for each size of image."""

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    split: PreparedSplit,
    *,
    num_classes: int,
    label_lookup: np.ndarray,
    scale: tuple[int, int] | None,
    windows: Windows | None = None,
    precision: str = 'highest',
  ):
    """Prepares the evaluation.

    Args:
      graphdef: Static part of the network.
      split: The prepared images and labels.
      num_classes: Number of classes.
      label_lookup: See `transforms.label_lookup`.
      scale: (width, height) of the box that images are resized into; None leaves them at their own
        size.
      windows: How to slide; None for whole images.
      precision: Of matrix products, see `jax_default_matmul_precision`.
    """
    self._split = split
    self._samples = {'scale': scale, 'label_lookup': label_lookup}
    self._num_classes = num_classes

    def predict_and_count(state: nnx.State, image: jax.Array, label: jax.Array):
      with jax.default_matmul_precision(precision):
        model = nnx.merge(graphdef, state)
        labels = predict_labels(model, image[None], size=label.shape, windows=windows)[0]
      return labels, confusion_matrix(labels, label, num_classes=num_classes)

    self._predict_and_count = jax.jit(predict_and_count)

  def __call__(self, state: nnx.State) -> Evaluation:
    """Evaluates parameters and running statistics on the whole split, with a progress bar."""
    confusion = np.zeros((self._num_classes, self._num_classes), np.int64)
    examples = []
    shown = set(np.linspace(0, len(self._split) - 1, _EXAMPLES, dtype=int).tolist())
    samples = eval_batches(self._split, **self._samples)
    with progress_bar(len(self._split), 'Evaluating', unit='img', leave=False) as bar:
      for index, batch in enumerate(samples):
        image, label = batch['image'][0], batch['label'][0]
        prediction, counts = self._predict_and_count(state, image, label)
        if index in shown:
          examples.append((image, label, np.asarray(prediction)))
        confusion += np.asarray(counts)
        bar.update()
    return Evaluation(confusion, scores(confusion), examples)


def evaluator_for(
  config: ConfigDict, graphdef: nnx.GraphDef, split: PreparedSplit, dataset: Dataset
) -> Evaluator:
  """The evaluator that a config describes."""
  return Evaluator(
    graphdef,
    split,
    num_classes=dataset.num_classes,
    label_lookup=dataset.label_lookup,
    scale=tuple(config.eval.scale),
    windows=windows_of(config),
    precision=config.eval.precision,
  )


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, workdir: Path) -> Evaluation:
  """Evaluates saved weights as a config says; prints the scores and writes them to `workdir`.

  Args:
    config: Network, data and test sizes.
    checkpoint: A .pth file, a converted directory or the workdir of a training run.
    workdir: Gets `metrics.json` and `predictions.png`.

  Raises:
    UserError: If the weights are of another network than the config's, or the data is not as it
      should be.
  """
  architecture = architecture_of(config)
  description, state = read_weights(checkpoint, align_corners=config.model.align_corners)
  if description.architecture != architecture:
    raise UserError(
      f'{checkpoint} holds {description.architecture}, but the config describes {architecture}; '
      'give its own config, or set config.model and config.data.num_classes to match.'
    )
  dataset = dataset_of(config)
  split = open_splits(config, dataset, workdir, ['val'])['val']
  graphdef = nnx.graphdef(architecture.abstract(align_corners=config.model.align_corners))
  evaluation = evaluator_for(config, graphdef, split, dataset)(jax.device_put(state))
  print(evaluation.scores.table(dataset.classes))
  write_evaluation(
    workdir, evaluation, dataset, images=len(split), config=config.name, checkpoint=str(checkpoint)
  )
  return evaluation


def write_evaluation(workdir: Path, evaluation: Evaluation, dataset: Dataset, **facts: Any) -> None:
  """Writes `metrics.json` (percent; null where undefined) and `predictions.png`.

  Args:
    workdir: Where to; made if it is not there.
    evaluation: What was found.
    dataset: Names and colours of the classes.
    **facts: Further entries of `metrics.json`.
  """
  found = evaluation.scores
  classes = {
    name: {'IoU': _percent(iou), 'Acc': _percent(accuracy)}
    for name, iou, accuracy in zip(dataset.classes, found.iou, found.accuracy, strict=True)
  }
  summary = {name: _percent(value / 100) for name, value in found.summary().items()}
  workdir.mkdir(parents=True, exist_ok=True)
  partial = workdir / f'{METRICS}.{os.getpid()}.partial'
  partial.write_text(json.dumps({**facts, **summary, 'classes': classes}, indent=2) + '\n')
  partial.replace(workdir / METRICS)
  write_comparison(
    workdir / PICTURE, evaluation.examples, classes=dataset.classes, palette=dataset.palette
  )


def _percent(share: float) -> float | None:
  return None if math.isnan(share) else round(100 * float(share), 4)
