"""Counts pixels by their confidence, to compare it with the share that is right."""

import jax
import jax.numpy as jnp

# Confidence is summed in whole multiples of 2^-14: integers have no order in which they are added.
_FRACTION_BITS = 14


def calibration_counts(
  confidence: jax.Array, correct: jax.Array, counted: jax.Array, *, bins: int
) -> tuple[jax.Array, jax.Array]:
  """Counts the pixels of images in bins of equal width by confidence.

  >>> confidence = jnp.array([[[0.125, 0.875, 0.75]]])
  >>> correct = jnp.array([[[True, True, False]]])
  >>> counts, sums = calibration_counts(confidence, correct, correct | True, bins=2)
  >>> counts.tolist(), sums.tolist()
  ([[[0, 1], [1, 1]]], [[0.125, 1.625]])

  Args:
    confidence: (n, h, w) float32 in [0, 1]; w is at most 2**17.
    correct: (n, h, w) bool.
    counted: (n, h, w) bool, whether a pixel counts.
    bins: Bin b holds confidences in [b / bins, (b + 1) / bins), the last one 1 as well.

  Returns:
    The number of wrong and of correct pixels of each bin, (n, 2, bins) int32, and the sum of their
    confidences, (n, bins) float32.
  """
  n, height, _ = confidence.shape
  places = jnp.minimum((confidence * bins).astype(jnp.int32), bins - 1)
  # Of each row by itself, so that sums stay small, and threads of a GPU do not wait for each other.
  rows = jnp.arange(n * height).reshape(n, height, 1)
  outside = n * height * bins
  of_sums = jnp.where(counted, rows * bins + places, outside)
  shares = jnp.rint(confidence * 2**_FRACTION_BITS).astype(jnp.int32)
  sums = jnp.zeros(outside + 1, jnp.int32).at[of_sums.ravel()].add(shares.ravel())
  of_counts = jnp.where(counted, (rows * 2 + correct) * bins + places, 2 * outside)
  counts = jnp.bincount(of_counts.ravel(), length=2 * outside + 1)
  sums = sums[:-1].reshape(n, height, bins).astype(jnp.float32).sum(axis=1)
  return (
    counts[:-1].astype(jnp.int32).reshape(n, height, 2, bins).sum(axis=1),
    sums / 2**_FRACTION_BITS,
  )
