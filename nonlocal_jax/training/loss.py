"""Losses over the pixels of upsampled logits (mmseg `CrossEntropyLoss`, `DiceLoss`)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nonlocal_jax.models.config import PixelLoss
from nonlocal_jax.ops.blocks import map_blocks
from nonlocal_jax.ops.resize import apply_axis_matrices, bilinear_matrix
from nonlocal_jax.ops.upsampling import (
  neighbor,
  upsample_transpose_of,
  upsampled_columns,
  upsampling_factor,
)

_PARTS = 8  # number of row blocks that the loss of an image is computed in
_COLUMNS = 8  # of upsampled logits that one kernel reduces, of which each has several sums
_DICE_EPSILON = 2e-3  # mmseg adds half of it to each sum of squares


class Ohem(NamedTuple):
  """Online hard example mining, which sums the loss of hard pixels (mmseg `OHEMPixelSampler`).

  Attributes:
    thresh: Keeps pixels whose class has a predicted probability below this, and at least the
      `min_kept * n` least probable pixels of a batch of n images. None to keep exactly the
      `min_kept * n` pixels with the largest weighted losses.
    min_kept: Number of pixels per image, counted over the whole batch.
  """

  thresh: float | None = 0.7
  min_kept: int = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Loss of a training step.

  Attributes:
    auxiliary_weight: Factor of the auxiliary head's loss.
    avg_non_ignore: Whether to average over labeled pixels only, see `loss_divisor`.
    class_weights: Weight of each class; None for 1 each.
    ohem: Selection of hard pixels; None to use all pixels.
    focal_gamma: Exponent of the focal loss, see `sum_of_losses`; 0 for cross-entropy.
    dice_weight: Factor of the Dice loss, which is added, see `dice_losses`.
    ignore_index: Label of pixels without a class.
  """

  auxiliary_weight: float = 0.4
  avg_non_ignore: bool = False
  class_weights: tuple[float, ...] | None = None
  ohem: Ohem | None = None
  focal_gamma: float = 0.0
  dice_weight: float = 0.0
  ignore_index: int = 255


def loss_divisor(
  labels: jax.Array,
  *,
  ignore_index: int = 255,
  avg_non_ignore: bool = False,
  class_weights: Sequence[float] | None = None,
) -> jax.Array:
  """Computes the divisor of the sum of pixel losses (mmseg `cross_entropy`).

  It is the number of all pixels, including ignored ones; with `avg_non_ignore` the number of
  labeled pixels; with `class_weights` the sum of the weights of all labels. Ignored pixels add
  nothing to that sum; mmseg fails on them, since it uses the label as an index into the weights.

  Args:
    labels: (n, h, w) integers in [0, c) or `ignore_index`.
    ignore_index: Label of pixels without a class.
    avg_non_ignore: Whether to count labeled pixels only; has no effect with class weights.
    class_weights: c non-negative factors, or None.

  Returns:
    Scalar float32, or of JAX's default float dtype with class weights; 1 instead of 0.
  """
  valid = labels != ignore_index
  if class_weights is not None:
    divisor = jnp.sum(_label_weights(labels, valid, jnp.asarray(class_weights, float)))
  elif avg_non_ignore:
    divisor = jnp.sum(valid).astype(jnp.float32)
  else:
    divisor = jnp.float32(labels.size)
  return jnp.where(divisor > 0, divisor, 1)


class PixelLosses(NamedTuple):
  """Losses and hits of the pixels of a batch.

  Attributes:
    losses: (n, h, w) float32 (float64 for float64 logits), cross-entropy; 0 for ignored pixels.
    hits: (n, h, w) bool, whether the prediction is the pixel's class.
    squares: (n, h, w) floats, the sum of the squared class probabilities, also of ignored pixels;
      None if they were not asked for.
  """

  losses: jax.Array
  hits: jax.Array
  squares: jax.Array | None = None


def pixel_losses(
  logits: jax.Array,
  labels: jax.Array,
  *,
  method: PixelLoss = 'row_blocks',
  align_corners: bool = False,
  ignore_index: int = 255,
  with_squares: bool = False,
) -> PixelLosses:
  """Computes the cross-entropy of each pixel from logits upsampled to the size of the labels.

  >>> labels = jnp.array([[[0, 1], [255, 1]]])
  >>> losses, hits, _ = pixel_losses(jnp.zeros((1, 1, 1, 2)), labels)
  >>> losses.round(3).tolist()
  [[[0.6930000185966492, 0.6930000185966492], [0.0, 0.6930000185966492]]]
  >>> hits.tolist()
  [[[True, False], [False, False]]]

  With many classes, upsampled logits are the largest array of a training step. The backward pass
  recomputes them. 'row_blocks' materializes them for one block of rows at a time. 'reductions'
  fuses upsampling into reductions over classes and pixels, which never materialize them and are
  faster on GPUs. This needs an upsampling factor that is a power of two, as the published crops
  have; other sizes use row blocks.

  Args:
    logits: (n, h, w, c) floats; cast to float32 if narrower.
    labels: (n, out_h, out_w) integers in [0, c) or `ignore_index`.
    method: 'row_blocks' or 'reductions'.
    align_corners: See `resize.bilinear_matrix`.
    ignore_index: Label of pixels without a class.
    with_squares: Whether to compute `squares`.

  Returns:
    Losses, hits and squares, (n, out_h, out_w) each.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  (_, height, width, _), (_, out_height, out_width) = logits.shape, labels.shape
  factor = upsampling_factor((height, width), (out_height, out_width), align_corners=align_corners)
  if factor is not None and method == 'reductions':
    return reduced_pixel_losses(logits, labels, factor, align_corners, ignore_index, with_squares)
  rows, columns = (
    bilinear_matrix(before, after, align_corners=align_corners)
    for before, after in zip(logits.shape[1:3], labels.shape[1:], strict=True)
  )

  def of_rows(rows_and_labels: tuple[jax.Array, jax.Array]) -> PixelLosses:
    (rows,), labels = rows_and_labels
    upsampled = apply_axis_matrices(logits, rows, columns)
    valid = labels != ignore_index
    targets = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(upsampled, targets)
    hits = (jnp.argmax(upsampled, axis=-1) == targets) & valid
    squares = jnp.square(jax.nn.softmax(upsampled)).sum(axis=-1) if with_squares else None
    return PixelLosses(jnp.where(valid, losses, 0), hits, squares)

  few = -(-labels.shape[1] // _PARTS)
  return map_blocks(of_rows, (jnp.asarray(rows)[None], labels), few, recompute=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def reduced_pixel_losses(
  logits: jax.Array,
  labels: jax.Array,
  factor: int,
  align_corners: bool,
  ignore_index: int,
  with_squares: bool = False,
) -> PixelLosses:
  """Computes `pixel_losses` in one reduction over the classes of upsampled logits.

  Upsampled logits are never materialized. Reverse mode only.

  Args:
    logits: (n, h, w, c) floats.
    labels: (n, out_h, out_w) integers in [0, c) or `ignore_index`.
    factor: See `ops.upsampling.upsampling_factor`.
    align_corners: See `pixel_losses`.
    ignore_index: Label of pixels without a class.
    with_squares: Whether to compute `squares`.

  Returns:
    Losses and squares of the dtype of `logits`, and hits.
  """
  return _reduced_forwards(logits, labels, factor, align_corners, ignore_index, with_squares)[0]


def _reduced_forwards(logits, labels, factor, align_corners, ignore_index, with_squares):
  # Keeps XLA from fusing the losses of both heads, which would materialize upsampled logits.
  logits, labels = jax.lax.optimization_barrier((logits, labels))
  columns = upsampled_columns(logits, factor, align_corners=align_corners)
  valid = labels != ignore_index
  targets = jnp.where(valid, labels, -1).astype(jnp.int32)
  blocks = _in_blocks(targets, logits.shape[1:3], factor, fill=-1)
  reduced = []
  for start in range(0, factor, _COLUMNS):
    places = range(start, min(start + _COLUMNS, factor))
    reduced += _reduce_classes(
      [columns[place] for place in places],
      [blocks[..., place, None] for place in places],
      with_squares=with_squares,
    )
  largest, total, first, of_target, *of_squares = (
    jnp.stack(of_columns, axis=-1) for of_columns in zip(*reduced, strict=True)
  )
  log_sum = largest + jnp.log(total)
  squares = of_squares[0] / total**2 if with_squares else None
  size = labels.shape[1:]
  found = PixelLosses(
    jnp.where(valid, _from_blocks(log_sum - of_target, size), 0),
    _from_blocks(first == blocks, size) & valid,
    None if squares is None else _from_blocks(squares, size),
  )
  return found, (logits, blocks, log_sum, squares)


def _reduce_classes(
  columns: Sequence[jax.Array], targets: Sequence[jax.Array], *, with_squares: bool
) -> list[Sequence[jax.Array]]:
  """Reduces pixel columns (n, h, f, w, c) over the classes, all in one kernel.

  Args:
    columns: Logits.
    targets: The class of each pixel, (n, h, f, w, 1).
    with_squares: Whether to compute the last of the elements of `_add_classes`.

  Returns:
    For each column what `_add_classes` merges, (n, h, f, w) each.
  """
  dtype = columns[0].dtype
  ones = jnp.ones_like(columns[0])
  classes = jax.lax.broadcasted_iota(jnp.int32, ones.shape, 4)
  start = [jnp.finfo(dtype).min, dtype.type(0), jnp.int32(jnp.iinfo(jnp.int32).max), dtype.type(0)]
  start += [dtype.type(0)] * with_squares
  operands = []
  for logits, target in zip(columns, targets, strict=True):
    operands += [logits, ones, classes, jnp.where(classes == target, logits, 0)]
    operands += [ones] * with_squares
  each = len(start)

  def merge(a, b):
    pairs = ((a[first : first + each], b[first : first + each]) for first in range(0, len(a), each))
    return [value for pair in pairs for value in _add_classes(*pair)]

  found = jax.lax.reduce(operands, start * len(columns), merge, dimensions=(4,))
  return [found[first : first + each] for first in range(0, len(found), each)]


def _add_classes(a, b):
  """Merges two tuples (max logit, sum of exp(logit - max), class of the max, target logit).

  A fifth element is the sum of exp(2 * (logit - max)).
  """
  largest = jnp.maximum(a[0], b[0])
  scales = [jnp.exp(x[0] - largest) for x in (a, b)]
  candidates = (jnp.where(x[0] == largest, x[2], jnp.iinfo(jnp.int32).max) for x in (a, b))
  merged = [
    largest,
    a[1] * scales[0] + b[1] * scales[1],
    jnp.minimum(*candidates),
    a[3] + b[3],
  ]
  if len(a) > 4:
    merged.append(a[4] * scales[0] ** 2 + b[4] * scales[1] ** 2)
  return merged


def _reduced_backwards(factor, align_corners, ignore_index, with_squares, residuals, cotangents):
  del ignore_index
  logits, blocks, log_sum, squares = residuals
  # Keeps XLA from storing the upsampled logits of the forward pass.
  logits = jax.lax.optimization_barrier(logits)
  weights = _in_blocks(cotangents.losses, logits.shape[1:3], factor, fill=0)
  weights = jnp.where(blocks >= 0, weights, 0)
  of_pixel = [blocks, weights, log_sum]
  if with_squares:
    of_pixel += [_in_blocks(cotangents.squares, logits.shape[1:3], factor, fill=0), squares]

  def gradients(column: int, shift: int, upsampled: jax.Array) -> jax.Array:
    target, weight, log_of_sum, *of_squares = (
      neighbor(x[..., column, None], shift, axis=3) for x in of_pixel
    )  # (n, h, factor, w, 1)
    classes = jax.lax.broadcasted_iota(jnp.int32, upsampled.shape, 4)
    probabilities = jnp.exp(upsampled - log_of_sum)
    gradient = (probabilities - (classes == target)) * weight
    if of_squares:
      weight, sum_of_squares = of_squares
      gradient += 2 * weight * probabilities * (probabilities - sum_of_squares)
    return gradient

  gradient = upsample_transpose_of(gradients, logits, factor, align_corners=align_corners)
  return gradient, None


reduced_pixel_losses.defvjp(_reduced_forwards, _reduced_backwards)


def _in_blocks(x: jax.Array, size: tuple[int, int], factor: int, *, fill: int) -> jax.Array:
  """(n, out_h, out_w) -> (n, h, factor, w, factor), padded at the bottom and right."""
  n, height, width = x.shape
  missing = [(0, side * factor - out) for side, out in zip(size, (height, width), strict=True)]
  x = jnp.pad(x, ((0, 0), *missing), constant_values=fill)
  return x.reshape(n, size[0], factor, size[1], factor)


def _from_blocks(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Inverts `_in_blocks`."""
  n, rows, factor, columns, _ = x.shape
  return x.reshape(n, rows * factor, columns * factor)[:, : size[0], : size[1]]


def sum_of_losses(
  losses: jax.Array,
  labels: jax.Array,
  *,
  ignore_index: int = 255,
  class_weights: Sequence[float] | None = None,
  ohem: Ohem | None = None,
  focal_gamma: float = 0.0,
) -> jax.Array:
  """Sums the pixel losses, weighted by class and restricted to hard pixels if asked for.

  With `focal_gamma`, the loss of a pixel is (1 - p)^gamma times its cross-entropy, where p is the
  probability of its class (Lin et al., Focal Loss for Dense Object Detection, section 3.2, with a
  softmax over the classes; mmseg's `FocalLoss` has a sigmoid for each class).

  Args:
    losses: (n, h, w) floats, see `PixelLosses`.
    labels: (n, h, w) integers in [0, c) or `ignore_index`.
    ignore_index: Label of pixels without a class.
    class_weights: c factors of the pixel losses by label, or None.
    ohem: Selection of hard pixels, which is not differentiated; None to sum over all pixels.
    focal_gamma: The exponent, at least 0.

  Returns:
    Scalar, the dtype of `losses`.
  """
  valid = labels != ignore_index
  weighted = losses
  if focal_gamma:
    # Where the loss is 0, as of ignored pixels, a power below 1 has no finite derivative.
    wrong = -jnp.expm1(-jnp.where(losses > 0, losses, 1))
    weighted = jnp.where(losses > 0, wrong**focal_gamma, 0) * losses
  if class_weights is not None:
    weighted = weighted * _label_weights(labels, valid, jnp.asarray(class_weights, losses.dtype))
  if ohem is None:
    return jnp.sum(weighted)
  min_kept = ohem.min_kept * len(labels)
  if ohem.thresh is None:
    kept = _largest(jax.lax.stop_gradient(weighted), valid, count=min_kept)
  else:
    probabilities = jnp.exp(-jax.lax.stop_gradient(losses))
    kept = _improbable(probabilities, valid, thresh=ohem.thresh, min_kept=min_kept)
  return jnp.sum(jnp.where(kept, weighted, 0))


def dice_losses(pixels: PixelLosses, labels: jax.Array, *, ignore_index: int = 255) -> jax.Array:
  """Computes the Dice loss of each image (mmseg `DiceLoss` with a softmax, not naive).

  It is 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)) over the pixels and classes of an image, with the
  probabilities p and the one-hot labels t (Milletari et al., V-Net, section 3). As in mmseg,
  ignored pixels have no label, but their probabilities count.

  Args:
    pixels: Of `pixel_losses` with squares.
    labels: (n, h, w) integers in [0, c) or `ignore_index`.
    ignore_index: Label of pixels without a class.

  Returns:
    (n,) of the dtype of the losses, in [0, 1].
  """
  assert pixels.squares is not None
  valid = labels != ignore_index
  overlap = jnp.sum(jnp.where(valid, jnp.exp(-pixels.losses), 0), axis=(1, 2))
  total = jnp.sum(pixels.squares, axis=(1, 2)) + jnp.sum(valid, axis=(1, 2)) + _DICE_EPSILON
  return 1 - 2 * overlap / total


def pixel_accuracy(hits: jax.Array, labels: jax.Array, *, ignore_index: int = 255) -> jax.Array:
  """Computes the share of labeled pixels that are hits, float32; 0 without labeled pixels."""
  return jnp.sum(hits) / jnp.maximum(jnp.sum(labels != ignore_index), 1)


def _label_weights(labels: jax.Array, valid: jax.Array, class_weights: jax.Array) -> jax.Array:
  """Returns the class weight of each pixel, 0 for ignored pixels: (n, h, w)."""
  targets = jnp.where(valid, labels, 0).astype(jnp.int32)
  return jnp.where(valid, class_weights[targets], 0)


def _improbable(
  probabilities: jax.Array, valid: jax.Array, *, thresh: float, min_kept: int
) -> jax.Array:
  """Selects valid pixels below the maximum of `thresh` and the `min_kept`-th lowest probability.

  `min_kept` counts from 0. With fewer valid pixels, the highest probability is used instead.
  """
  ascending = jnp.sort(jnp.where(valid, probabilities, jnp.inf), axis=None)
  last_valid = jnp.maximum(jnp.sum(valid) - 1, 0)
  limit = jnp.maximum(ascending[jnp.minimum(min_kept, last_valid)], thresh)
  return valid & (probabilities < limit)


def _largest(losses: jax.Array, valid: jax.Array, *, count: int) -> jax.Array:
  """Selects the `count` valid pixels with the largest losses, or all if there are fewer."""
  descending = jnp.argsort(jnp.where(valid, losses, -jnp.inf), axis=None, descending=True)
  kept = jnp.zeros(losses.size, bool).at[descending[:count]].set(True)
  return valid & kept.reshape(losses.shape)
