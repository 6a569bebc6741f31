"""Draws annotated shapes into label maps: polygons and run lengths as pycocotools does."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from nonlocal_jax.errors import needs_packages

_CHARACTERS_PER_COUNT = 7  # of 5 bits each; pycocotools keeps counts in 32 bits


def empty_label(size: tuple[int, int]) -> np.ndarray:
  """Makes a label map of class 0, in the column-major order that `paint_counts` needs.

  Args:
    size: (height, width).

  Returns:
    (h, w) uint8.
  """
  return np.zeros(size, np.uint8, order='F')


def points_in(values: Any, size: tuple[int, int]) -> np.ndarray:
  """Converts coordinates from a file to an array.

  They may leave the image, as where a hand slipped, but by no more than its size: further away
  they belong to an image of another size.

  Args:
    values: A list of [x, y], in pixels.
    size: (height, width) of the image.

  Returns:
    (n, 2) float64, x and y.

  Raises:
    ValueError: If they are no finite numbers, all of them or some far outside the image, or their
      outline is longer than one through all pixels, for which drawing takes endless memory.
  """
  points = numbers_in(values)
  if points.ndim != 2 or points.shape[1] != 2:
    raise ValueError('has coordinates that are no pairs of x and y')
  limit = np.array([size[1], size[0]], np.float64)
  if not np.isfinite(points).all():
    raise ValueError('has a coordinate that is no finite number')
  far = ((points < -limit) | (points > 2 * limit)).any(1)
  beside = ((points < 0).all(0) | (points > limit).all(0)).any()
  if len(points) and (far.any() or beside):
    x, y = points[far][0] if far.any() else points[0]
    where = 'far outside' if far.any() else 'as all its points beside'
    raise ValueError(
      f'has the point ({x:g}, {y:g}), {where} the image of {size[1]}x{size[0]} pixels'
    )
  outline = np.abs(points - np.roll(points, 1, 0)).max(1).sum()
  if outline > size[0] * size[1] + 10 * (size[0] + size[1]):
    raise ValueError(f'has an outline of {outline:,.0f} pixels, longer than one through all pixels')
  return points


def numbers_in(values: Any) -> np.ndarray:
  """Converts numbers from a file to an array of float64, perhaps with NaN and infinity.

  Args:
    values: A list of numbers, or of lists of the same length.

  Raises:
    ValueError: If they are something else.
  """
  try:
    array = np.array(values)
  except (ValueError, OverflowError) as error:  # lists of different lengths
    raise ValueError('has coordinates that are no pairs of x and y') from error
  if array.size and array.dtype.kind not in 'iuf':
    raise ValueError('has a coordinate that is no number')
  return array.astype(np.float64)


def paint_polygon(label: np.ndarray, points: np.ndarray, value: int) -> None:
  """Paints a polygon as `pycocotools.coco.COCO.annToMask` does.

  Args:
    label: (h, w) uint8 of `empty_label`, painted in place.
    points: Its points, (n, 2) float64 of `points_in`.
    value: The new value inside.

  Raises:
    ValueError: If there are fewer than three points.
  """
  with needs_packages('labels drawn from polygons', extra='train'):
    from pycocotools import mask as coco_mask

  if len(points) < 3:
    raise ValueError('has a polygon of fewer than three points')
  (encoded,) = coco_mask.frPyObjects([points.ravel().tolist()], *label.shape)
  paint_counts(label, counts_in(encoded['counts']), value)


def paint_counts(label: np.ndarray, counts: np.ndarray, value: int) -> None:
  """Paints run lengths, which run down the columns and begin with pixels outside.

  Args:
    label: (h, w) uint8 of `empty_label`, painted in place.
    counts: Lengths of the runs, (n,) int64.
    value: Its new value in every second run.

  Raises:
    ValueError: If the runs do not cover the image exactly.
  """
  inside = runs_as_mask(counts, label.size)
  label.reshape(-1, order='F')[inside] = value


def runs_as_mask(counts: np.ndarray, pixels: int) -> np.ndarray:
  """Converts lengths of runs, outside and inside in turn, to a mask.

  >>> runs_as_mask(np.array([1, 2, 1]), 4)
  array([False,  True,  True, False])

  Args:
    counts: (n,) int64.
    pixels: How many there must be.

  Returns:
    (pixels,) bool.

  Raises:
    ValueError: If there are more or fewer.
  """
  if (counts < 0).any() or counts.sum() != pixels:
    raise ValueError(f'has run lengths for {counts.sum()} pixels, and not {pixels}')
  return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def counts_in(counts: Any) -> np.ndarray:
  r"""Converts the `counts` of COCO's run-length encoding, a list or a compressed string.

  In a string, each character holds 5 bits, least significant first, and whether another follows;
  from the fourth on, counts are stored as differences to the last but one. pycocotools reads
  beyond the end of strings that break off, so they are not given to it.

  >>> counts_in('031')  # 2x2 pixels, of which the first three are inside
  array([0, 3, 1])

  Args:
    counts: A list of numbers, or the string or bytes that pycocotools writes.

  Returns:
    (n,) int64.

  Raises:
    ValueError: If they are neither.
  """
  if isinstance(counts, list):
    if not all(type(count) is int and 0 <= count < 2**32 for count in counts):
      raise ValueError('has run lengths that are no whole numbers')
    return np.array(counts, np.int64)
  if isinstance(counts, str):
    counts = counts.encode('ascii', 'replace')
  if not isinstance(counts, bytes):
    raise ValueError('has no run lengths')
  codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
  ends = np.flatnonzero(codes & 0x20 == 0)
  starts = np.append(0, ends + 1)[:-1]
  lengths = ends - starts + 1
  if (
    not codes.size
    or not ((codes >= 0) & (codes < 64)).all()
    or codes[-1] & 0x20
    or lengths.max() > _CHARACTERS_PER_COUNT
  ):
    raise ValueError('has run lengths that are no compressed string of COCO')
  places = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
  values = np.add.reduceat((codes & 0x1F) << places, starts)
  values -= (codes[ends] >> 4 & 1) << 5 * lengths  # the highest bit is the sign
  decoded = values.copy()
  decoded[1::2] = np.cumsum(values[1::2])
  decoded[2::2] = np.cumsum(values[2::2])
  return decoded


def paint_mask(label: np.ndarray, mask: np.ndarray, left: int, top: int, value: int) -> None:
  """Paints a mask that covers a part of the image.

  Args:
    label: (h, w) uint8, painted in place.
    mask: (rows, columns) bool.
    left: Column of the label map where the mask begins.
    top: Row where it begins.
    value: Its new value where the mask is true.

  Raises:
    ValueError: If the mask reaches beyond the image.
  """
  rows, columns = mask.shape
  height, width = label.shape
  if left < 0 or top < 0 or top + rows > height or left + columns > width:
    raise ValueError(
      f'has a mask of {columns}x{rows} pixels at ({left}, {top}), which reaches beyond the image '
      f'of {width}x{height}'
    )
  label[top : top + rows, left : left + columns][mask] = value


def bytes_in(data: Any) -> bytes:
  """Decodes base64.

  Raises:
    ValueError: If it is none.
  """
  try:
    return base64.b64decode(data, validate=True)
  except (TypeError, ValueError) as error:
    raise ValueError('has a mask that is not in base64') from error


def decoded_mask(data: bytes, size: tuple[int, ...]) -> np.ndarray:
  """Decodes a mask that is a PNG file.

  Args:
    data: The file.
    size: (height, width) of the image, which it may not exceed.

  Returns:
    (rows, columns) bool: where its opacity, or without that its value, is not 0.

  Raises:
    ValueError: If it is none, larger, or has colors without opacity.
  """
  pixels = None
  try:
    with Image.open(io.BytesIO(data), formats=['PNG']) as image:
      width, height, mode = *image.size, image.mode
      if height <= size[0] and width <= size[1]:
        pixels = np.asarray(image)
  except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
    raise ValueError('has a mask that is no PNG file, or broken') from error
  if pixels is None:
    raise ValueError(f'has a mask of {width}x{height} pixels, which is larger than the image')
  if mode not in ('1', 'L', 'P', 'LA', 'RGBA'):
    raise ValueError(f'has a mask of mode {mode}, not of one channel')
  return (pixels[..., -1] if pixels.ndim == 3 else pixels).astype(bool)
