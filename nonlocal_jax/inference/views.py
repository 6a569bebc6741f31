"""What a protocol makes of an image: sizes, windows, and the matrices that join their logits."""

import dataclasses
import functools

import numpy as np
import scipy.sparse

from nonlocal_jax.data.transforms import rescaled_size
from nonlocal_jax.ops.resize import bilinear_taps
from nonlocal_jax.protocol import EvalProtocol, Size


@dataclasses.dataclass(frozen=True)
class View:
  """One resized version of an image, and its windows.

  Attributes:
    size: (height, width) that the image is resized to.
    crop: (height, width) of the part of the image in a window.
    network: (height, width) of the network's input: `crop`, or larger where small windows or whole
      images are padded.
    tops: First row of the windows, from the first to the last.
    lefts: First column of the windows.
  """

  size: Size
  crop: Size
  network: Size
  tops: tuple[int, ...]
  lefts: tuple[int, ...]


def views_of(protocol: EvalProtocol, size: Size) -> list[View]:
  """The sizes and windows at which an image of (height, width) `size` is tested."""
  return [_view(protocol, _resized(protocol, size, ratio)) for ratio in protocol.ratios]


def _resized(protocol: EvalProtocol, size: Size, ratio: float) -> Size:
  factor = protocol.scale_factor
  if protocol.ratios_of_image or (protocol.scale is None and factor is None and ratio != 1):
    target = (max(int(size[0] * ratio + 0.5), 1), max(int(size[1] * ratio + 0.5), 1))
  elif factor is not None:
    height, width = size[0] * factor[1] * ratio, size[1] * factor[0] * ratio
    target = (max(int(height + 0.5), 1), max(int(width + 0.5), 1))
  elif protocol.scale is None:
    return size
  else:
    width, height = protocol.scale
    target = (max(int(height * ratio), 1), max(int(width * ratio), 1))
  return rescaled_size(size, target) if protocol.keep_ratio else target


def _view(protocol: EvalProtocol, size: Size) -> View:
  window, stride = protocol.window_crop or size, protocol.window_stride or size
  crop = (min(window[0], size[0]), min(window[1], size[1]))
  network = window if protocol.pad_windows else crop
  if protocol.pad_size is not None:
    network = (max(network[0], protocol.pad_size[0]), max(network[1], protocol.pad_size[1]))
  if protocol.pad_multiple is not None:
    multiple = protocol.pad_multiple
    network = (-(-network[0] // multiple) * multiple, -(-network[1] // multiple) * multiple)
  return View(
    size=size,
    crop=crop,
    network=network,
    tops=window_starts(size[0], crop[0], stride[0]),
    lefts=window_starts(size[1], crop[1], stride[1]),
  )


def window_starts(size: int, crop: int, stride: int) -> tuple[int, ...]:
  """First pixels of the windows along an axis; the last window is shifted back inside."""
  count = max(size - crop + stride - 1, 0) // stride + 1
  return tuple(max(min(i * stride, size - crop), 0) for i in range(count))


def feature_size(pixels: int, output_stride: int = 8) -> int:
  """Length of the feature map along an axis of `pixels`."""
  return -(-pixels // output_stride)


@functools.lru_cache(maxsize=512)
def axis_matrix(
  starts: tuple[int, ...],
  *,
  crop: int,
  network: int,
  size: int,
  out_size: int,
  align_corners: bool,
  output_stride: int = 8,
) -> scipy.sparse.csr_array:
  """The matrix from the logits of all windows along one axis to the scores of the label map.

  It composes the linear steps after the network, which act on each axis separately: upsampling a
  window's logits to pixels, cropping the padding, averaging where windows overlap, and resizing to
  the size of the label map.

  Args:
    starts: First pixels of the windows.
    crop: Pixels of the image in a window.
    network: Pixels that the network sees, at least `crop`.
    size: Pixels of the resized image.
    out_size: Pixels of the label map.
    align_corners: See `resize.bilinear_taps`.
    output_stride: Of the network.

  Returns:
    (out_size, windows * features) float64; each row sums to 1.
  """
  features = feature_size(network, output_stride)
  upsample = _bilinear(features, network, align_corners=align_corners)[:crop]
  upsample = scipy.sparse.coo_array(upsample)
  window_rows, window_columns = upsample.coords
  rows = np.concatenate([window_rows + start for start in starts])
  columns = np.concatenate([window_columns + i * features for i in range(len(starts))])
  values = np.tile(upsample.data, len(starts))
  placed = scipy.sparse.csr_array((values, (rows, columns)), (size, len(starts) * features))
  # Rows of `upsample` sum to 1, so the row sums of `placed` count the windows over a pixel.
  covered = scipy.sparse.diags_array(1 / placed.sum(axis=1))
  resize = _bilinear(size, out_size, align_corners=align_corners)
  return scipy.sparse.csr_array(resize @ covered @ placed)


def _bilinear(in_size: int, out_size: int, *, align_corners: bool) -> scipy.sparse.csr_array:
  lower, upper, share = bilinear_taps(in_size, out_size, align_corners=align_corners)
  rows = np.arange(out_size)
  share = share.astype(np.float64)
  return scipy.sparse.csr_array(
    (np.concatenate([1 - share, share]), (np.tile(rows, 2), np.concatenate([lower, upper]))),
    (out_size, in_size),
  )
