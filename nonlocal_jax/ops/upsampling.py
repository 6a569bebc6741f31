"""Bilinear upsampling by an integer factor, as weighted sums of neighbors that XLA fuses."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

_SHIFTS = (-1, 0, 1)  # from a feature to those that its pixels are interpolated from


def upsampling_factor(
  size: tuple[int, int], out_size: tuple[int, int], *, align_corners: bool
) -> int | None:
  """Returns the integer upsampling factor of both axes, if the interpolation weights repeat.

  Args:
    size: (h, w) of the input.
    out_size: (out_h, out_w) of the output.
    align_corners: See `upsample`.

  Returns:
    A power of two, so that the weights are exact in float32; None for other sizes.
  """
  corner = 1 if align_corners else 0
  if min(size) <= corner:
    return None
  factor, rest = divmod(out_size[0] - corner, size[0] - corner)
  fits = rest == 0 and out_size[1] - corner == factor * (size[1] - corner)
  return factor if fits and factor > 1 and factor & (factor - 1) == 0 else None


def upsampled_columns(x: jax.Array, factor: int, *, align_corners: bool) -> list[jax.Array]:
  """Upsamples feature maps by an integer factor, like `torch.nn.functional.interpolate`.

  Args:
    x: (n, h, w, c) floats.
    factor: Output pixels per feature, along both axes.
    align_corners: Whether the first and last samples of input and output coincide. The last
      `factor - 1` rows and columns of the result are then outside the image.

  Returns:
    `factor` arrays (n, h, factor, w, c), with pixel (i, j) in array j % factor at [:, i // factor,
    i % factor, j // factor].
  """
  weights = _tap_weights(factor, align_corners=align_corners)
  rows = _rows_upsampled(x, weights)
  return [_column(rows, weight) for weight in weights.tolist()]


def upsample_transpose_of(
  function: Callable[[int, int, jax.Array], jax.Array],
  x: jax.Array,
  factor: int,
  *,
  align_corners: bool,
) -> jax.Array:
  """Applies the transpose of `upsample` to a function of the upsampled features.

  Neither the upsampled features nor the function's values are materialized: a feature's gradient is
  a sum over its own pixels and those of its neighbors, for which the function is computed again, so
  that XLA can fuse all of it.

  Args:
    function: Takes a column j in [0, factor), a shift in (-1, 0, 1) and the upsampled features of
      pixel column j of the feature at that distance, (n, h, factor, w, c). Returns an array of that
      shape, zero outside the image but for the features that the shift leads to beyond the edges.
    x: (n, h, w, c) floats.
    factor: See `upsample`.
    align_corners: See `upsample`.

  Returns:
    (n, h, w, c).
  """
  weights = _tap_weights(factor, align_corners=align_corners)
  rows = _rows_upsampled(x, weights)
  place, last = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 3), rows.shape[3] - 1
  gathered = jnp.zeros_like(rows)
  for column, weight in enumerate(weights.tolist()):
    before, own, after = weight
    own_pixel = function(column, 0, _column(rows, weight))
    at_edges = jnp.where(place == 0, before, 0) + jnp.where(place == last, after, 0)
    gathered += own_pixel * (own + at_edges.astype(rows.dtype))
    # The next feature's pixels weigh what is before them, and the previous one's what is after.
    for shift, share, is_inside in ((1, before, place < last), (-1, after, place > 0)):
      if share:
        pixel = function(column, shift, _column(rows, weight, shift))
        gathered += jnp.where(is_inside, pixel, 0) * share
  # One kernel for all rows of a feature: fused with the next, each of them would be compiled again.
  gathered = jax.lax.optimization_barrier(gathered)
  of_rows = [
    _weighted_sum([gathered[:, :, row] for row in range(factor)], weight)
    for weight in weights.T.tolist()
  ]
  return _to_neighbors(of_rows, axis=1)


def neighbor(x: jax.Array, shift: int, *, axis: int) -> jax.Array:
  """Returns the element at a distance of each one along an axis, with edges repeated."""
  if not shift:
    return x
  padding = [(0, 0)] * x.ndim
  padding[axis] = (max(-shift, 0), max(shift, 0))
  padded = jnp.pad(x, padding, mode='edge')
  return jax.lax.slice_in_dim(padded, max(shift, 0), max(shift, 0) + x.shape[axis], axis=axis)


def _rows_upsampled(x: jax.Array, weights: np.ndarray) -> jax.Array:
  """Upsamples the rows: (n, h, w, c) -> (n, h, factor, w, c)."""
  shape = (1, 1, len(weights), 1, 1)
  terms = (
    jnp.expand_dims(neighbor(x, shift, axis=1), 2) * weight.astype(x.dtype).reshape(shape)
    for shift, weight in zip(_SHIFTS, weights.T, strict=True)
    if weight.any()
  )
  return cast(jax.Array, sum(terms))


def _column(rows: jax.Array, weight: Sequence[float], shift: int = 0) -> jax.Array:
  """Computes a pixel column of the features at a distance of each one."""
  return _weighted_sum([neighbor(rows, shift + tap, axis=3) for tap in _SHIFTS], weight)


def _to_neighbors(sums: Sequence[jax.Array], *, axis: int) -> jax.Array:
  """Applies the transpose of `_neighbors`."""
  before, own, after = sums
  size = own.shape[axis]
  take = functools.partial(jax.lax.slice_in_dim, axis=axis)
  nothing = jnp.zeros_like(take(own, 0, 1))
  index = jax.lax.broadcasted_iota(jnp.int32, own.shape, axis)
  edges = jnp.where(index == 0, before, 0) + jnp.where(index == size - 1, after, 0)
  to_before = jnp.concatenate([take(before, 1, size), nothing], axis)
  to_after = jnp.concatenate([nothing, take(after, 0, size - 1)], axis)
  return own + to_before + to_after + edges


def _weighted_sum(arrays: Sequence[jax.Array], weights: Sequence[float]) -> jax.Array:
  terms = [array * weight for array, weight in zip(arrays, weights, strict=True) if weight]
  return sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(arrays[0])


def _tap_weights(factor: int, *, align_corners: bool) -> np.ndarray:
  """Returns (factor, 3) weights of predecessor, feature and successor for each pixel."""
  pixels = np.arange(factor)
  offset = pixels / factor if align_corners else (pixels + 0.5) / factor - 0.5
  before, after = np.maximum(-offset, 0), np.maximum(offset, 0)
  return np.stack([before, 1 - before - after, after], axis=1)
