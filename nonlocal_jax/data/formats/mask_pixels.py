"""From the pixels of label files in colors, in gray and in black and white to class indices."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from nonlocal_jax.data.datasets import Color
from nonlocal_jax.data.transforms import IGNORE, decode_label
from nonlocal_jax.data.validation import decoded, read_file
from nonlocal_jax.errors import UserError

MOST_COLORS = 255
_PNG_BITS = 24  # where the first chunk of a file has the bits of a sample
T = TypeVar('T')


def read_colors(path: Path, palette: Sequence[Color], where: str) -> np.ndarray:
  """Reads a label map in colors.

  Args:
    path: A PNG file.
    palette: The RGB color of each class, 0..255.
    where: Where they stand, for messages.

  Returns:
    The class whose color each pixel has exactly, (h, w) uint8.

  Raises:
    UserError: If the file cannot be read, or has other colors: the message counts them.
  """
  codes = _decoded(path, _color_codes)
  known = np.array([_code(color) for color in palette])
  order = np.argsort(known)
  place = np.searchsorted(known, codes, sorter=order)
  index = order[np.minimum(place, len(known) - 1)]
  unknown = known[index] != codes
  if unknown.any():
    listed = describe_colors(_counted(codes[unknown]))
    raise UserError(
      f'Label map {path} has colors of no class, {listed}: add them to {where}, or export the file '
      'anew, without smoothing and without compression that changes colors.'
    )
  return index.astype(np.uint8)


def read_gray(path: Path) -> np.ndarray:
  """Reads a label map whose class indices are repeated in each channel, or have 16 bits.

  Args:
    path: A PNG file of gray or equal channels.

  Returns:
    The values, (h, w) uint8.

  Raises:
    UserError: If the file cannot be read, channels differ, or a value is over 255.
  """
  return _decoded(path, _gray)


def read_binary(path: Path) -> np.ndarray:
  """Reads a label map of 0 and 255, which become 0 and 1.

  Args:
    path: A PNG file of one channel, or equal ones.

  Returns:
    The indices, (h, w) uint8.

  Raises:
    UserError: If the file cannot be read, or has other values.
  """
  gray = read_gray(path)
  other = np.setdiff1d(np.unique(gray), (0, 255))
  if other.size:
    raise UserError(f'Label map {path} has the value {other[0]}, but all others have 0 and 255.')
  return (gray == 255).astype(np.uint8)


class Contents(NamedTuple):
  """What tells the kind of a label file.

  Attributes:
    values: The distinct values of a gray file; empty for one in colors.
    is_color: Whether a color is not gray.
    is_colored: Whether there are several channels.
    is_deep: Whether a sample has 16 bits.
    palette: The color of each value in the file's palette, if it has one.
  """

  values: Sequence[int]
  is_color: bool = False
  is_colored: bool = False
  is_deep: bool = False
  palette: Mapping[int, Color] = {}


def contents(path: Path) -> Contents:
  """Reads what tells the kind of a label file.

  Raises:
    UserError: If the file cannot be read.
  """
  return _decoded(path, _contents)


def _contents(data: bytes) -> Contents:
  mode, colors = _opened(data, lambda image: (image.mode, image.getpalette('RGB')))
  if mode in ('1', 'L', 'P'):
    values = np.unique(decode_label(data)).tolist()
    of_value = np.reshape(colors or [], (-1, 3)).tolist()
    palette = {v: (r, g, b) for v, (r, g, b) in enumerate(of_value) if v in values}
    return Contents(values, palette=palette)
  if mode.startswith('I'):
    values = np.unique(_opened(data, np.asarray))
    return Contents(values[values <= IGNORE].tolist(), is_deep=True)
  rgb = _opened(data, lambda image: np.asarray(image.convert('RGB')))
  if (rgb != rgb[..., :1]).any():
    return Contents((), is_color=True, is_colored=True)
  return Contents(np.unique(rgb[..., 0]).tolist(), is_colored=True)


def count_colors(path: Path) -> dict[Color, int]:
  """Counts the colors of a label map, the most frequent ones first.

  Raises:
    UserError: If the file cannot be read.
  """
  return _counted(_decoded(path, _color_codes))


def _counted(codes: np.ndarray) -> dict[Color, int]:
  """Counts colors that are given as 65536 r + 256 g + b."""
  values, counts = np.unique(codes, return_counts=True)
  order = np.argsort(-counts, kind='stable')
  return {
    (int(code >> 16), int(code >> 8 & 255), int(code & 255)): int(count)
    for code, count in zip(values[order], counts[order], strict=True)
  }


def describe_colors(counts: dict[Color, int]) -> str:
  """Lists the first colors with their numbers of pixels."""
  listed = ', '.join(f'{list(color)} ({count:,} pixels)' for color, count in [*counts.items()][:5])
  return f'{listed} and {len(counts) - 5:,} more' if len(counts) > 5 else listed


def _code(color: Color) -> int:
  r, g, b = color
  return r << 16 | g << 8 | b


def _color_codes(data: bytes) -> np.ndarray:
  """Colors as 65536 r + 256 g + b, (h, w) int32."""
  rgb = _opened(data, lambda image: np.asarray(_opaque(image).convert('RGB'), np.int32))
  return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _gray(data: bytes) -> np.ndarray:
  mode = _opened(data, lambda image: image.mode)
  if mode in ('1', 'L', 'P'):
    return decode_label(data)
  if mode.startswith('I'):
    values = _opened(data, np.asarray)
    if values.max(initial=0) > IGNORE:
      raise ValueError(f'a label map of 16 bits whose values reach {values.max()}, over 255')
    return values.astype(np.uint8)
  channels = _opened(data, lambda image: np.asarray(_opaque(image).convert('RGB')))
  if (channels != channels[..., :1]).any():
    raise ValueError('a label map in colors, but others are gray')
  return np.ascontiguousarray(channels[..., 0])


def _opaque(image: Image.Image) -> Image.Image:
  """The image itself, if no pixel is transparent and no channel has 16 bits."""
  if image.mode in ('RGBA', 'LA') and np.asarray(image)[..., -1].min(initial=255) < 255:
    raise ValueError('a label map with transparent pixels')
  if image.mode not in ('1', 'L', 'P', 'LA', 'RGB', 'RGBA'):
    raise ValueError(f'not a label map of 8 bits in each channel but {image.mode}')
  return image


def _decoded(path: Path, decode: Callable[[bytes], T]) -> T:
  return decoded(path, read_file(path), decode)


def _opened(data: bytes, read: Callable[[Image.Image], T]) -> T:
  """What a function reads from the contents of a PNG file.

  Raises:
    ValueError: If it is none or broken, or the function raises one.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      kind = image.format
      image.load()
  except Image.DecompressionBombError as error:
    raise ValueError('larger than the 178,956,970 pixels that Pillow reads') from error
  except (OSError, SyntaxError, ValueError) as error:
    raise ValueError('not an image, or broken') from error
  if kind != 'PNG':
    raise ValueError(f'not a PNG file but {kind}, whatever its name')
  if image.mode in ('RGB', 'RGBA', 'LA') and data[_PNG_BITS] == 16:  # of which Pillow keeps 8
    raise ValueError('not a label map of 8 bits in each channel but of 16')
  return read(image)
