"""Bilinear upsampling by an integer factor, as weighted sums of neighbors that XLA fuses."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np


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


def upsample(x: jax.Array, factor: int, *, align_corners: bool) -> jax.Array:
  """Upsamples feature maps by an integer factor, like `torch.nn.functional.interpolate`.

  Args:
    x: (n, h, w, c) floats.
    factor: Output pixels per feature, along both axes.
    align_corners: Whether the first and last samples of input and output coincide. The last
      `factor - 1` rows and columns of the result are then outside the image.

  Returns:
    (n, h, factor, w, factor, c), with pixel (i, j) at [:, i // factor, i % factor, j // factor,
    j % factor].
  """
  weights = _tap_weights(factor, align_corners=align_corners).astype(x.dtype)
  x = _axis_upsampled(x, weights, axis=1)  # (n, h, factor, w, c)
  return _axis_upsampled(x, weights, axis=3)


def upsample_transpose_of(
  function: Callable[[int, jax.Array], jax.Array],
  x: jax.Array,
  factor: int,
  *,
  align_corners: bool,
) -> jax.Array:
  """Applies the transpose of `upsample` to a function of the upsampled features.

  Neither the upsampled features nor the function's values are materialized as a whole: pixel
  columns are computed and accumulated one by one.

  Args:
    function: Takes a column j in [0, factor) and the upsampled features of pixel column j of each
      feature, (n, h, factor, w, c). Returns an array of that shape, zero outside the image.
    x: (n, h, w, c) floats.
    factor: See `upsample`.
    align_corners: See `upsample`.

  Returns:
    (n, h, w, c).
  """
  weights = _tap_weights(factor, align_corners=align_corners)
  rows = _axis_upsampled(x, weights.astype(x.dtype), axis=1)  # (n, h, factor, w, c)
  taps = _neighbors(rows, axis=3)
  sums = [jnp.zeros_like(rows)] * 3
  for column in range(factor):
    weight = weights[column].tolist()
    of_column = function(column, _weighted_sum(taps, weight))
    sums = [total + of_column * w if w else total for total, w in zip(sums, weight, strict=True)]
  gathered = _to_neighbors(sums, axis=3)
  of_rows = [
    _weighted_sum([gathered[:, :, row] for row in range(factor)], weight)
    for weight in weights.T.tolist()
  ]
  return _to_neighbors(of_rows, axis=1)


def _neighbors(x: jax.Array, *, axis: int) -> list[jax.Array]:
  """Returns each feature's predecessor, itself and its successor, with edges repeated."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (1, 1)
  padded = jnp.pad(x, padding, mode='edge')
  return [
    jax.lax.slice_in_dim(padded, start, start + x.shape[axis], axis=axis) for start in range(3)
  ]


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


def _axis_upsampled(x: jax.Array, weights: np.ndarray, *, axis: int) -> jax.Array:
  """Upsamples one axis; the pixels of a feature become a new axis after `axis`."""
  shape = [1] * (x.ndim + 1)
  shape[axis + 1] = len(weights)
  terms = (
    jnp.expand_dims(tap, axis + 1) * weight.reshape(shape)
    for tap, weight in zip(_neighbors(x, axis=axis), weights.T, strict=True)
    if weight.any()
  )
  return cast(jax.Array, sum(terms))


def _tap_weights(factor: int, *, align_corners: bool) -> np.ndarray:
  """Returns (factor, 3) weights of predecessor, feature and successor for each pixel."""
  pixels = np.arange(factor)
  offset = pixels / factor if align_corners else (pixels + 0.5) / factor - 0.5
  before, after = np.maximum(-offset, 0), np.maximum(offset, 0)
  return np.stack([before, 1 - before - after, after], axis=1)
