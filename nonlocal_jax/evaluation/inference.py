"""From images to class labels: whole or in sliding windows (mmseg `EncoderDecoder`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.models import NonLocalNet, normalize
from nonlocal_jax.models.layers import apply_axis_matrices, bilinear_matrix

OUTPUT_STRIDE = 8


@dataclasses.dataclass(frozen=True)
class Windows:
  """Sliding windows.

  Attributes:
    crop: (height, width) of a window, in pixels; smaller images are one window of their own size.
    stride: (vertical, horizontal) step between windows, in pixels.
  """

  crop: tuple[int, int]
  stride: tuple[int, int]


def predict_labels(
  model: NonLocalNet, images: jax.Array, *, size: tuple[int, int], windows: Windows | None = None
) -> jax.Array:
  """Predicts the class of each pixel.

  Args:
    model: The network.
    images: (n, h, w, 3) RGB in [0, 255].
    size: (height, width) of the prediction.
    windows: How to slide; None for the whole image at once.

  Returns:
    (n, *size) int32.
  """
  logits = logits_at_size(model, images, size=size, windows=windows)
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def logits_at_size(
  model: NonLocalNet, images: jax.Array, *, size: tuple[int, int], windows: Windows | None = None
) -> jax.Array:
  """Logits resized first to the image and then to `size`; where windows overlap, their mean.

  All that happens after the network, placing, averaging and both resizes, is linear and acts on
  rows and columns by themselves: one matrix for each axis does it all, and logits at the size of
  the image are never held.

  Args:
    model: The network.
    images: (n, h, w, 3) RGB in [0, 255].
    size: (height, width) of the result.
    windows: How to slide; None for the whole image at once.

  Returns:
    (n, *size, num_classes) float32.
  """
  n, height, width, _ = images.shape
  windows = windows or Windows(crop=(height, width), stride=(height, width))
  tops, rows = _axis(height, size[0], windows.crop[0], windows.stride[0], model.align_corners)
  lefts, columns = _axis(width, size[1], windows.crop[1], windows.stride[1], model.align_corners)
  crop = (min(windows.crop[0], height), min(windows.crop[1], width))
  images = normalize(images)

  def window_logits(corner: jax.Array) -> jax.Array:
    start = (0, corner[0], corner[1], 0)
    return model.encode_decode(jax.lax.dynamic_slice(images, start, (n, *crop, 3)))

  if len(tops) == len(lefts) == 1:
    return apply_axis_matrices(model.encode_decode(images), rows, columns)
  corners = np.stack(np.meshgrid(tops, lefts, indexing='ij'), axis=-1).astype(np.int32)
  logits = jax.lax.map(window_logits, corners.reshape(-1, 2))  # (windows, n, h, w, c)
  logits = logits.reshape(len(tops), len(lefts), *logits.shape[1:])
  mosaic = logits.transpose(2, 0, 3, 1, 4, 5)  # (n, tops, h, lefts, w, c)
  mosaic = mosaic.reshape(n, rows.shape[1], columns.shape[1], -1)
  return apply_axis_matrices(mosaic, rows, columns)


def window_starts(size: int, crop: int, stride: int) -> list[int]:
  """First pixels of the windows along an axis; the last window is shifted back inside."""
  count = max(size - crop + stride - 1, 0) // stride + 1
  return [max(min(i * stride, size - crop), 0) for i in range(count)]


def _axis(
  size: int, out_size: int, crop: int, stride: int, align_corners: bool
) -> tuple[list[int], np.ndarray]:
  """Window starts along one axis, and the matrix from their logits to the resized axis."""
  crop = min(crop, size)
  starts = window_starts(size, crop, stride)
  features = -(-crop // OUTPUT_STRIDE)
  upsample = bilinear_matrix(features, crop, align_corners=align_corners).astype(np.float64)
  placed = np.zeros((size, len(starts), features))
  for window, start in enumerate(starts):
    placed[start : start + crop, window] = upsample
  placed = placed.reshape(size, -1)
  covered = placed.sum(
    axis=1, keepdims=True
  )  # each row of `upsample` sums to 1: the number of windows
  resize = bilinear_matrix(size, out_size, align_corners=align_corners).astype(np.float64)
  return starts, (resize @ (placed / covered)).astype(np.float32)
