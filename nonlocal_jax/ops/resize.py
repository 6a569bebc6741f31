"""Bilinear resizing with one matrix product per axis."""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_taps(
  in_size: int, out_size: int, *, align_corners: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes the two input samples that each output sample interpolates, and their weights.

  Source coordinates are float32, as in `torch.nn.functional.interpolate`: half-pixel centers
  clamped at 0, or aligned corners.

  Args:
    in_size: Length of the input axis.
    out_size: Length of the output axis.
    align_corners: Whether the first and last samples of input and output coincide.

  Returns:
    Indices of the lower and the upper sample, (out_size,) int64 each, and the weight of the upper
    one, (out_size,) float32.
  """
  positions = np.arange(out_size, dtype=np.float32)
  if align_corners:
    step = np.float32((in_size - 1) / (out_size - 1)) if out_size > 1 else np.float32(0)
    source = positions * step
  else:
    step = np.float32(in_size / out_size)
    source = np.maximum((positions + np.float32(0.5)) * step - np.float32(0.5), 0)
  lower = np.minimum(source.astype(np.int64), in_size - 1)
  upper = np.minimum(lower + 1, in_size - 1)
  return lower, upper, source - lower.astype(np.float32)


def bilinear_matrix(in_size: int, out_size: int, *, align_corners: bool) -> np.ndarray:
  """Builds the matrix that resizes one axis bilinearly, without antialiasing.

  Args:
    in_size: Length of the input axis.
    out_size: Length of the output axis.
    align_corners: See `bilinear_taps`.

  Returns:
    (out_size, in_size) float32; each row sums to 1.
  """
  lower, upper, share = bilinear_taps(in_size, out_size, align_corners=align_corners)
  matrix = np.zeros((out_size, in_size), np.float32)
  rows = np.arange(out_size)
  np.add.at(matrix, (rows, lower), 1 - share)
  np.add.at(matrix, (rows, upper), share)
  return matrix


def apply_axis_matrices(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Multiplies the rows of `x` by one matrix and its columns by another.

  Unlike gather and scatter, dense products are deterministic in the forward and backward pass.

  Args:
    x: (n, h, w, c) float32.
    rows: (out_h, h) float32.
    columns: (out_w, w) float32.

  Returns:
    (n, out_h, out_w, c) float32.
  """
  highest = jax.lax.Precision.HIGHEST
  x = jnp.einsum('oh,nhwc->nowc', rows, x, precision=highest)
  return jnp.einsum('pw,nowc->nopc', columns, x, precision=highest)


def resize_bilinear(x: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
  """Resizes feature maps bilinearly, like `torch.nn.functional.interpolate`.

  Args:
    x: (n, h, w, c) float32.
    size: (out_h, out_w).
    align_corners: See `bilinear_matrix`.

  Returns:
    (n, out_h, out_w, c) float32.
  """
  _, height, width, _ = x.shape
  if size == (height, width):
    return x
  return apply_axis_matrices(
    x,
    bilinear_matrix(height, size[0], align_corners=align_corners),
    bilinear_matrix(width, size[1], align_corners=align_corners),
  )
