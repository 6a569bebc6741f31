"""Batches for training and samples for evaluation, loaded in the background by Grain.

A source is any sequence of `{'id': str, 'image': bytes, 'label': bytes}`, such as a
`prepared.PreparedSplit`.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags

from nonlocal_jax.data import transforms
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat, decode
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.pipeline import num_cores

Source = Sequence[dict[str, str | bytes]]
_DIED = re.compile(r'Worker process was terminated unexpectedly with exit code (-?\d+)')  # Grain's


class TrainIterator(grain.DatasetIterator):
  """Grain iterator whose state is the number of the next batch.

  A run can therefore resume with another number of workers or processes, and seeking to a state
  takes constant time. Grain's checkpoint handlers save and restore it.
  """

  def __init__(self, batches: grain.MapDataset, *, num_workers: int, num_threads: int):
    """Creates the iterator at the first batch; reads nothing yet.

    Args:
      batches: All batches, by index.
      num_workers: Worker processes; 0 for threads of this process.
      num_threads: Threads in each process that loads.
    """
    super().__init__()
    self._batches = batches
    self._num_workers = num_workers
    self._read_options = grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads)
    self._next_batch = 0
    self._workers: set[int | None] = set()  # ids of the worker processes
    self._running = []  # the iterator in use, if any
    self._close_for_good = weakref.finalize(self, _close, self._running)

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next batch.

    Raises:
      UserError: If a record is damaged or a worker process was killed.
    """
    self.start_prefetch()
    self._note_workers()
    try:
      batch = next(self._running[0])
    except RuntimeError as error:
      if died := _DIED.search(str(error)):
        raise self._explained(int(died[1])) from error
      raise
    self._next_batch += 1
    if not self._num_workers:
      return batch
    return {key: np.array(value) for key, value in batch.items()}  # out of Grain's shared memory

  def get_state(self) -> dict[str, int]:
    """Returns `{'next_batch': number of batches returned so far}`."""
    return {'next_batch': self._next_batch}

  def set_state(self, state: dict[str, int]) -> None:
    """Seeks to a state from `get_state` without reading the batches in between."""
    _close(self._running)
    self._next_batch = state['next_batch']

  def start_prefetch(self) -> None:
    """Starts loading in the background if it has not started."""
    if self._running:
      return
    if self._num_workers and not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, outside of absl apps too
    _use_one_thread_in_opencv()
    self._workers.clear()
    workers = grain.MultiprocessingOptions(self._num_workers)
    running = iter(
      self._batches.slice(slice(self._next_batch, None))
      .to_iter_dataset(self._read_options)
      .mp_prefetch(workers, worker_init_fn=_prepare_worker)
    )
    if self._num_workers:
      _start_quiet_tracker()
      running.get_state()  # makes Grain's iterators, whose workers the next line starts
    running.start_prefetch()
    self._running.append(running)

  def _note_workers(self) -> None:
    """Keeps the ids of the worker processes, which threads of Grain start."""
    if len(self._workers) < self._num_workers:
      self._workers |= {process.pid for process in multiprocessing.active_children()}

  def _explained(self, exit_code: int) -> UserError:
    """Returns the error for a worker process that ended."""
    dead = self._workers - {process.pid for process in multiprocessing.active_children()}
    by = f'with status {exit_code}'
    if exit_code < 0:
      by = f'by {signal.Signals(-exit_code).name}'
    likely = {
      -signal.SIGKILL: ', as the system does when memory runs out',
      -signal.SIGBUS: ', as the system does when /dev/shm is full (docker run --shm-size)',
    }.get(exit_code, '')
    return UserError(
      f'One of the {self._num_workers} worker processes that load batches'
      f'{"".join(f" (process {pid})" for pid in dead)} was ended {by}{likely}: use a '
      'smaller num_workers, batch or crop.'
    )

  def close(self) -> None:
    """Stops the background work; otherwise it stops with the program."""
    self._close_for_good()
    super().close()


def train_batches(
  source: Source,
  augment: transforms.AugmentConfig,
  *,
  batch_size: int,
  seed: int,
  label_lookup: np.ndarray | None = None,
  pixels: PixelFormat = RGB,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int | None = None,
) -> TrainIterator:
  """Returns the infinite stream of training batches.

  Every epoch is shuffled anew; its last batch is filled up from the next epoch. Which image comes
  n-th, and how it is augmented, depends on `seed` and n alone. Process p of P gets the p-th of P
  equal parts of each global batch.

  Args:
    source: Encoded samples, at least one.
    augment: How samples are augmented.
    batch_size: Samples in a global batch, over all processes.
    seed: 0 .. 2**32 - 1.
    label_lookup: See `transforms.label_lookup`; None where label files hold class indices.
    pixels: The format of the images, see `pixel_formats.decode`.
    process_index: This process.
    process_count: How many processes share each batch.
    num_workers: Worker processes, which import the main module anew; 0 for threads of this one.
    num_threads: Threads in each process that makes batches; None for one per core in all.

  Returns:
    An iterator over dicts of arrays, where n is batch_size / process_count: `image` (n, crop_h,
    crop_w, channels) uint8 or uint16, `label` (n, crop_h, crop_w) uint8, `size` (n, 2) int32 (see
    `transforms.train_sample`) and `index` (n,) int32, the sample's place in `source`.

  Raises:
    UserError: If `batch_size` is not a multiple of `process_count`.
  """
  if batch_size % process_count:
    raise UserError(
      f'A batch of {batch_size} cannot be shared by {process_count} processes: make it a multiple.'
    )

  def load(index: int, rng: np.random.Generator) -> dict[str, Any]:
    image, label = _decode(source[index], label_lookup, pixels)
    sample = transforms.train_sample(rng, image, label, augment)
    return {**sample, 'index': np.int32(index)}

  batches = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(load)
    .pipe(_PartOfEachBatch, batch_size // process_count, process_index, process_count)
    .batch(batch_size // process_count)
  )
  num_threads = num_threads or max(1, num_cores() // max(1, num_workers))
  return TrainIterator(batches, num_workers=num_workers, num_threads=num_threads)


class EvalSample(NamedTuple):
  """A decoded sample of an evaluation.

  Attributes:
    index: Its place in the source.
    name: Its id there.
    views: The image at each size of the protocol, (h', w', channels) uint8 or uint16.
    label: (h, w) uint8, as in its file but for the lookup.
  """

  index: int
  name: str
  views: list[np.ndarray]
  label: np.ndarray


def eval_batches(
  source: Source,
  batches: Sequence[Sequence[int]],
  *,
  view_sizes: Callable[[tuple[int, int]], Sequence[tuple[int, int]]],
  label_lookup: np.ndarray | None = None,
  pixels: PixelFormat = RGB,
  num_threads: int | None = None,
) -> Iterator[list[EvalSample]]:
  """Decodes and resizes the samples of batches, a few batches ahead.

  Args:
    source: Encoded samples.
    batches: The indices of each batch; a batch may be empty.
    view_sizes: From an image's (h, w) to the (h', w') at which it is tested.
    label_lookup: See `transforms.label_lookup`; None where label files hold class indices.
    pixels: The format of the images, see `pixel_formats.decode`.
    num_threads: Decoding threads; None for one per core.

  Returns:
    An iterator over the samples of each batch.
  """

  def load(number: int) -> list[EvalSample]:
    return [load_sample(index) for index in batches[number]]

  def load_sample(index: int) -> EvalSample:
    record = source[index]
    image, label = _decode(record, label_lookup, pixels)
    views = [transforms.resize_to(image, size) for size in view_sizes(image.shape[:2])]
    return EvalSample(index, str(record['id']), views, label)

  _use_one_thread_in_opencv()
  num_threads = num_threads or num_cores()
  loaded = grain.MapDataset.range(len(batches)).map(load)
  return iter(loaded.to_iter_dataset(grain.ReadOptions(num_threads, num_threads)))


class _PartOfEachBatch(grain.MapDataset):
  """Of every `count` runs of `size` samples, the one with number `index`."""

  def __init__(self, parent: grain.MapDataset, size: int, index: int, count: int):
    super().__init__(parent)
    self._size, self._index, self._count = size, index, count

  def __len__(self) -> int:
    return len(self._parent) // self._count

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    batch, place = divmod(index, self._size)
    return self._parent[(batch * self._count + self._index) * self._size + place]


def _close(iterators: list[grain.DatasetIterator]) -> None:
  while iterators:
    iterators.pop().close()


def _decode(
  record: dict[str, Any], lookup: np.ndarray | None, pixels: PixelFormat
) -> tuple[np.ndarray, np.ndarray]:
  label = transforms.decode_label(record['label'])
  if lookup is not None:
    label = cv2.LUT(label, lookup)
  return decode(record['image'], pixels), label


def _prepare_worker(*_) -> None:
  """Lets the main process decide when a worker stops; without one it stops at once."""
  for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_leave_with_parent, daemon=True).start()
  _use_one_thread_in_opencv()


def _start_quiet_tracker() -> None:
  """Starts the process that removes shared memory which others leave when they are killed.

  It would warn of what it removes.
  """
  option = 'ignore::UserWarning:multiprocessing.resource_tracker'
  sys.warnoptions.append(option)
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.remove(option)


def _leave_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(0)  # Python's own end would wait for queues that nobody reads


def _use_one_thread_in_opencv() -> None:
  """Disables OpenCV's own threads: samples are loaded in parallel."""
  cv2.setNumThreads(0)


@contextlib.contextmanager
def restored_opencv_threads() -> Iterator[None]:
  """Gives OpenCV back the threads that loading took from it, in programs that do other things."""
  before = cv2.getNumThreads()
  try:
    yield
  finally:
    cv2.setNumThreads(before)
