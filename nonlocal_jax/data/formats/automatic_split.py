"""Chooses images for validation, so that both parts have every class where that is possible."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from nonlocal_jax.data.paths import is_remote
from nonlocal_jax.data.pixel_formats import decode_any
from nonlocal_jax.data.samples import Sample
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.data.validation import decoded, read_file, read_label
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.progress import progress_bar

_SEED = 0
_VAL_SHARE = 0.2
_ATTEMPTS = 20
_READERS = 32  # threads that read from a bucket, where latency dominates


def choose_val(names: Sequence[str], present: np.ndarray, *, seed: int = _SEED) -> np.ndarray:
  """Chooses a fifth of the images, so that both parts have every class where that is possible.

  Depends on the names, the labels and the seed alone, not on the order of the images. A class of
  one image stays in training. More than a fifth are chosen where fewer do not have all classes, but
  at most half.

  Args:
    names: Their names.
    present: Which classes each has, (images, classes) bool.
    seed: Seed of the order in which images are considered.

  Returns:
    Which images are for validation, (images,) bool; at least one is, and not all.
  """
  repeated = present.sum(0) > 1
  best, most = np.zeros(len(names), bool), -1
  for attempt in range(_ATTEMPTS):
    is_val = _choose(names, present, f'{seed} {attempt}', greedy=attempt == 0)
    in_both = int((present[is_val].any(0) & present[~is_val].any(0)).sum())
    if in_both > most:
      best, most = is_val, in_both
    if most == repeated.sum():
      break
  return best


def _choose(names: Sequence[str], present: np.ndarray, salt: str, *, greedy: bool) -> np.ndarray:
  """Chooses in an order that the salt decides; if greedy, first what has most classes."""
  digests = [hashlib.sha256(f'{salt} {name}'.encode()).digest() for name in names]
  order = np.array(sorted(range(len(names)), key=digests.__getitem__))
  present = present[order]
  is_val = np.zeros(len(names), bool)
  in_train = present.sum(0)
  total = in_train.copy()

  def take(index: int) -> None:
    is_val[index] = True
    in_train[present[index]] -= 1

  while is_val.sum() < len(names) // 2:
    covered = present[is_val].any(0)
    wanted = np.flatnonzero((total > 1) & ~covered)
    free = ~is_val & ~present[:, in_train == 1].any(1)
    wanted = [c for c in wanted[np.argsort(total[wanted], kind='stable')] if present[free, c].any()]
    if not wanted:
      break
    candidates = np.flatnonzero(free & present[:, wanted[0]])
    gain = present[candidates][:, wanted].sum(1) * greedy
    take(candidates[np.argmax(gain)])
  count = max(1, round(_VAL_SHARE * len(names)))
  for index in range(len(names)):
    if is_val.sum() < count and not is_val[index] and (in_train[present[index]] > 1).all():
      take(index)
  if not is_val.any():
    take(int(np.argmin(present[:, in_train == 1].sum(1))))
  chosen = np.zeros(len(names), bool)
  chosen[order] = is_val
  return chosen


def present_classes(samples: Sequence[Sample]) -> np.ndarray:
  """Reads label maps and returns the values that they have.

  Args:
    samples: At least one.

  Returns:
    Which values but 255 each has, (samples, 255) bool; none for broken ones.

  Raises:
    UserError: If all are broken.
  """
  present = np.zeros((len(samples), IGNORE), bool)
  errors = []
  pool = ThreadPoolExecutor(_READERS if is_remote(samples[0].label) else os.cpu_count())
  try:
    with progress_bar(len(samples), 'Reading label maps', unit='img', leave=False) as bar:
      for index, found in enumerate(pool.map(_values, samples)):
        if isinstance(found, UserError):  # told when the sample is prepared
          errors.append(found)
        else:
          present[index] = found
        bar.update()
  finally:
    pool.shutdown(cancel_futures=True)
  if len(errors) == len(samples):
    raise errors[0]
  return present


def _values(sample: Sample) -> np.ndarray | UserError:
  try:
    h, w = _size(sample.image) if sample.read_label else (0, 0)
    label = sample.read_label(h, w) if sample.read_label else read_label(sample, h, w)[0]
  except UserError as error:
    return error
  return np.bincount(label.ravel(), minlength=IGNORE + 1)[:IGNORE] > 0


def _size(path: Path) -> tuple[int, int]:
  """The height and width of an image once it is turned as its EXIF orientation says."""
  try:
    with path.open('rb') as file, Image.open(file) as image:
      (w, h), orientation = image.size, image.getexif().get(0x0112, 1)
  except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
    image = decoded(path, read_file(path), lambda data: decode_any(data)[0])
    return image.shape[:2]
  return (w, h) if orientation > 4 else (h, w)
