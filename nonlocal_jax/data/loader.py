"""Batches for training and samples for evaluation, by Grain: deterministic, seekable, off the main thread.

A source is any sequence of `{'id': str, 'image': bytes, 'label': bytes}`, for instance a `builders.PreparedSplit`.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from nonlocal_jax.data import transforms
from nonlocal_jax.errors import UserError

Source = Sequence[dict[str, str | bytes]]


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  scale: tuple[int, int] | None,
  crop_size: tuple[int, int],
  ratio_range: tuple[float, float] | None = (0.5, 2.0),
  cat_max_ratio: float = 0.75,
  flip_prob: float = 0.5,
  photometric: bool = True,
  reduce_zero_label: bool = False,
  ignore_labels: Sequence[int] = (),
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int | None = None,
) -> 'TrainIterator':
  """Makes the endless stream of training batches.

  Every epoch is shuffled anew; the last batch of an epoch is filled up from the next. What sample number n of the stream is,
  and how it is augmented, depends on `seed` and n alone. Process p of P gets the samples p, p + P, ... of each global batch.

  Args:
    source: encoded samples.
    batch_size: samples in a global batch, over all processes.
    seed: 0 .. 2**32 - 1.
    scale: see `transforms.train_sample`, as all up to `photometric`.
    crop_size: (crop_h, crop_w).
    ratio_range: see `transforms.train_sample`.
    cat_max_ratio: see `transforms.train_sample`.
    flip_prob: see `transforms.train_sample`.
    photometric: see `transforms.train_sample`.
    reduce_zero_label: see `transforms.label_lookup`.
    ignore_labels: see `transforms.label_lookup`.
    process_index: this process.
    process_count: number of processes that share each batch.
    num_workers: worker processes (spawned, so the main module must be importable); 0: threads of this process.
    num_threads: threads per process that makes batches; None: one per core, shared between the workers.

  Returns:
    An iterator over dicts of arrays, n = batch_size / process_count: `image` (n, crop_h, crop_w, 3) uint8, `label`
    (n, crop_h, crop_w) uint8, `size` (n, 2) int32 (see `transforms.train_sample`), and `index` (n,) int32, the sample's
    place in `source`.

  Raises:
    UserError: `batch_size` is not divisible by `process_count`, or `source` is empty.
  """
  if batch_size % process_count:
    raise UserError(
      f'Batch size {batch_size} cannot be shared by {process_count} processes: make it a multiple.'
    )
  if not len(source):
    raise UserError('There are no training images: check the train split of the source folder.')
  lookup = transforms.label_lookup(reduce_zero_label=reduce_zero_label, ignore_labels=ignore_labels)

  def load(index: int, rng: np.random.Generator) -> dict[str, Any]:
    image, label = _decode(source[index], lookup)
    sample = transforms.train_sample(
      rng,
      image,
      label,
      scale=scale,
      crop_size=crop_size,
      ratio_range=ratio_range,
      cat_max_ratio=cat_max_ratio,
      flip_prob=flip_prob,
      photometric=photometric,
    )
    return {**sample, 'index': np.int32(index)}

  batches = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(load)
    .slice(slice(process_index, None, process_count))
    .batch(batch_size // process_count)
  )
  return TrainIterator(batches, num_workers=num_workers, num_threads=num_threads)


def eval_samples(
  source: Source,
  *,
  scale: tuple[int, int] | None,
  reduce_zero_label: bool = False,
  ignore_labels: Sequence[int] = (),
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
) -> Iterator[dict[str, Any]]:
  """Decodes and scales the samples of a source once, in order, a few ahead of the reader.

  Args:
    source: encoded samples.
    scale: see `transforms.eval_sample`.
    reduce_zero_label: see `transforms.label_lookup`.
    ignore_labels: see `transforms.label_lookup`.
    process_index: this process.
    process_count: number of processes; process p of P gets the samples p, p + P, ...
    num_threads: decoding threads; None: one per core.

  Returns:
    An iterator over dicts: `id` str, `image` (h', w', 3) uint8, `label` (h, w) uint8 of the original size.
  """
  lookup = transforms.label_lookup(reduce_zero_label=reduce_zero_label, ignore_labels=ignore_labels)

  def load(index: int) -> dict[str, Any]:
    record = source[index]
    image, label = _decode(record, lookup)
    return {'id': record['id'], **transforms.eval_sample(image, label, scale=scale)}

  num_threads = num_threads or _num_cores()
  cv2.setNumThreads(0)
  samples = grain.MapDataset.range(process_index, len(source), process_count).map(load)
  return iter(
    samples.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=2 * num_threads))
  )


class TrainIterator(grain.DatasetIterator):
  """Grain iterator whose state is the number of the next batch.

  So a run may be resumed with another number of workers or processes, and going to a state costs
  the same wherever it lies. Grain's checkpoint handlers save and restore it. Close it after use.
  """

  def __init__(self, batches: grain.MapDataset, *, num_workers: int, num_threads: int | None):
    """Starts before the first batch; nothing is read yet. For the arguments see `train_batches`."""
    super().__init__()
    self._batches = batches
    self._num_workers = num_workers
    self._num_threads = num_threads or max(1, _num_cores() // max(1, num_workers))
    self._next_batch = 0
    self._running = None

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next batch."""
    self.start_prefetch()
    batch = next(self._running)
    self._next_batch += 1
    if (
      self._num_workers
    ):  # out of the memory shared with the worker, whose owner must not outlive Grain
      batch = {key: np.array(value) for key, value in batch.items()}
    return batch

  def get_state(self) -> dict[str, int]:
    """Returns `{'next_batch': how many batches were given out}`."""
    return {'next_batch': self._next_batch}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a state that `get_state` returned, without reading what lies between."""
    self._stop()
    self._next_batch = state['next_batch']

  def start_prefetch(self) -> None:
    """Starts to prepare batches in the background, unless that is under way."""
    if self._running is None:
      cv2.setNumThreads(
        0
      )  # parallelism is over batches: OpenCV's own threads would compete with it
      if self._num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, also where no absl app is running
      self._running = iter(
        self._batches.slice(slice(self._next_batch, None))
        .to_iter_dataset(grain.ReadOptions(self._num_threads, self._num_threads))
        .mp_prefetch(
          grain.MultiprocessingOptions(self._num_workers),
          worker_init_fn=_start_worker,
        )
      )
      self._running.start_prefetch()

  def close(self) -> None:
    """Ends the background work."""
    self._stop()
    super().close()

  def _stop(self) -> None:
    if self._running is not None:
      self._running.close()
      self._running = None


def _decode(record: dict[str, Any], lookup: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  label = transforms.decode_label(record['label'])
  return transforms.decode_image(record['image']), cv2.LUT(label, lookup)


def _num_cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _start_worker(worker_index: int, worker_count: int) -> None:
  cv2.setNumThreads(0)
