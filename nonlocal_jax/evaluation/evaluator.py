"""Evaluates a network on a dataset split."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from nonlocal_jax.data.loader import EvalSample, eval_batches
from nonlocal_jax.data.pixel_formats import PixelFormat, displayable
from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.evaluation.details import Collector, Details, Statistics, image_statistics
from nonlocal_jax.evaluation.metrics import Scores, scores
from nonlocal_jax.inference.batches import batches_of, images_at_once
from nonlocal_jax.inference.buckets import shapes_for
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.views import views_of
from nonlocal_jax.models.folding import fold_batch_norms
from nonlocal_jax.ops.confusion import confusion_matrix
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import (
  local_rows,
  over_batch,
  platform_of_mesh,
  replicated,
  shard_batch,
)
from nonlocal_jax.runtime.pipeline import one_behind
from nonlocal_jax.runtime.progress import progress_bar

_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The results of an evaluation.

  Attributes:
    confusion: (classes, classes) int64, rows by label, columns by prediction.
    scores: The scores computed from `confusion`.
    examples: Image, label and prediction of a few images, evenly spaced over the split; those that
      this process evaluated.
    seconds: The duration of the evaluation.
    details: What a report shows beyond the scores; None if it was not asked for.
  """

  confusion: np.ndarray
  scores: Scores
  examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
  seconds: float
  details: Details | None = None


class _Evaluated(NamedTuple):
  """A batch that is being evaluated.

  Attributes:
    indices: The indices of its images in the split, over all processes.
    samples: The samples of this process.
    predictions: (n, h, w) uint8, over all processes; see `Predictor`.
    confusion: (classes, classes) int32, summed over all processes; None with `statistics`.
    statistics: Of each image, over all processes; None if they are not asked for.
  """

  indices: Sequence[int]
  samples: list[EvalSample]
  predictions: jax.Array
  confusion: jax.Array | None
  statistics: Statistics | None


class Evaluator:
  """Evaluates a network on one split, on all devices of all processes.

  Each image counts exactly once, whatever the number of devices and processes. Images are padded to
  a few shapes, each of which is compiled once.
  """

  def __init__(
    self,
    predictor: Predictor,
    split: PreparedSplit,
    *,
    num_classes: int,
    label_lookup: np.ndarray,
    images_per_device: int | None = None,
    most_shapes: int,
    details: bool = False,
  ):
    """Plans the evaluation.

    Args:
      predictor: Predicts on the devices of its mesh; its network's `Execution.batch_norm` must be
        'folded'.
      split: The prepared images and labels.
      num_classes: The number of classes.
      label_lookup: Maps label values to classes, see `transforms.label_lookup`.
      images_per_device: The largest number of images per device and batch; None for what is fast,
        see `batches.images_at_once`.
      most_shapes: The largest number of padded shapes, see `buckets.shapes_for`.
      details: Whether to collect what a report shows beyond the scores.
    """
    self._predictor = predictor
    options = compiler_options(platform_of_mesh(predictor.mesh))
    self._fold = jax.jit(
      functools.partial(fold_batch_norms, predictor.graphdef),
      out_shardings=replicated(predictor.mesh),
      compiler_options=options,
    )
    # Replicated, so that each process can read the sum over all images.
    self._count = jax.jit(
      functools.partial(confusion_matrix, num_classes=num_classes, ignore_index=IGNORE),
      out_shardings=replicated(predictor.mesh),
      compiler_options=options,
    )
    everywhere = replicated(predictor.mesh)
    self._statistics = jax.jit(
      functools.partial(image_statistics, num_classes=num_classes),
      out_shardings=Statistics._make([*[everywhere] * 3, over_batch(predictor.mesh)]),
      compiler_options=options,
    )
    self._details = details
    self._split = split
    self._num_classes = num_classes
    self._label_lookup = label_lookup
    shape_of = shapes_for(split.sizes, predictor.protocol, most=most_shapes)
    self._batches = batches_of(
      [shape_of[size] for size in split.sizes],
      most=lambda shape: (
        images_per_device or images_at_once(shape, predictor.protocol, predictor.mesh)
      ),
      num_devices=predictor.mesh.size,
    )

  @property
  def num_images(self) -> int:
    """Number of images that are evaluated."""
    return len(self._split)

  def prepared(self, state: nnx.State) -> nnx.State:
    """Folds batch normalization into the convolutions and replicates the result over the devices.

    This is a separate step so that the caller can free `state` before the evaluation.

    Args:
      state: Parameters and running statistics, on the devices or on the host.

    Returns:
      The weights that `__call__` takes.
    """
    return self._fold(state)

  def __call__(
    self, weights: nnx.State, *, after_batch: Callable[[], object] = lambda: None
  ) -> Evaluation:
    """Evaluates weights on the whole split.

    Args:
      weights: What `prepared` returned.
      after_batch: Called after each batch; may raise an error that ends the evaluation.
    """
    started = time.perf_counter()
    examples = np.linspace(0, len(self._split) - 1, _EXAMPLES, dtype=int).tolist()
    confusion = np.zeros((self._num_classes, self._num_classes), np.int64)
    collected = Collector(self._split, self._num_classes) if self._details else None
    shown = {}
    with progress_bar(len(self._split), 'Evaluating', unit='img', leave=False) as bar:
      for evaluated in one_behind(self._evaluated(weights)):
        indices, samples, predictions, counts, statistics = evaluated
        if counts is not None:
          confusion += np.asarray(counts)
        if collected is not None and statistics is not None:
          confusion += collected.add(evaluated.indices, samples, predictions, statistics)
        wanted = [place for place, sample in enumerate(samples) if sample.index in examples]
        if wanted:
          labels = local_rows(predictions)
          for place in wanted:
            sample = samples[place]
            height, width = sample.label.shape
            predicted = labels[place, :height, :width]
            shown[sample.index] = (displayable(sample.views[0]), sample.label, predicted)
        bar.set_postfix(mIoU=f'{scores(confusion).summary()["mIoU"]:.2f}', refresh=False)
        bar.update(len(indices))
        after_batch()
    seconds = time.perf_counter() - started
    in_order = [shown[index] for index in sorted(shown)]
    details = None if collected is None else collected.details()
    return Evaluation(confusion, scores(confusion), in_order, seconds, details)

  def _evaluated(self, weights: nnx.State) -> Iterator[_Evaluated]:
    """Yields the batches; their arrays may still be computing."""
    process, processes = jax.process_index(), jax.process_count()
    local_sizes = [batch.size // processes for batch in self._batches]
    loaded = eval_batches(
      self._split,
      [
        batch.indices[process * size : (process + 1) * size]
        for batch, size in zip(self._batches, local_sizes, strict=True)
      ],
      view_sizes=lambda size: [view.size for view in views_of(self._predictor.protocol, size)],
      label_lookup=self._label_lookup,
      pixels=PixelFormat.of_protocol(self._predictor.protocol),
    )
    for batch, size, samples in zip(self._batches, local_sizes, loaded, strict=True):
      logits = self._predictor.logits(
        weights,
        batch.shape,
        [sample.views for sample in samples],
        [sample.label.shape for sample in samples],
        batch_size=size,
      )
      labels = np.full((size, *batch.shape.result), IGNORE, np.uint8)
      for padded, sample in zip(labels, samples, strict=False):
        padded[: sample.label.shape[0], : sample.label.shape[1]] = sample.label
      on_devices = shard_batch({'labels': labels}, self._predictor.mesh)['labels']
      if self._details:
        predictions, confidence = self._predictor.confident_labels(logits)
        statistics = self._statistics(predictions, confidence, on_devices)
        yield _Evaluated(batch.indices, samples, predictions, None, statistics)
      else:
        predictions = self._predictor.labels(logits)
        counts = self._count(predictions, on_devices)
        yield _Evaluated(batch.indices, samples, predictions, counts, None)
