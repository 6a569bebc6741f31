"""From the pixels of label files in colors, in gray and in black and white to class indices."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from nonlocal_jax.data.datasets import Color
from nonlocal_jax.data.pixel_formats import PNG_START
from nonlocal_jax.data.transforms import IGNORE, decode_label
from nonlocal_jax.data.validation import decoded, read_file
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.wording import counted

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
  index = _index_of_color(tuple(palette))[codes]
  unknown = index == MOST_COLORS
  if unknown.any():
    listed = describe_colors(_counted(codes[unknown]))
    raise UserError(
      f'Label map {path} has colors of no class, {listed}: add them to {where}, or export the file '
      'anew, without smoothing and without compression that changes colors.'
    )
  return index


@functools.lru_cache(maxsize=2)
def _index_of_color(palette: tuple[Color, ...]) -> np.ndarray:
  """The index of each possible color, 255 for those of no class; (2**24,) uint8."""
  index = np.full(1 << 24, MOST_COLORS, np.uint8)
  index[[r << 16 | g << 8 | b for r, g, b in palette]] = np.arange(len(palette))
  return index


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
  other = [value for value in _values(gray) if value not in (0, 255)]
  if other:
    raise UserError(f'Label map {path} has the value {other[0]}, but others have 0 and 255 alone.')
  return (gray == 255).astype(np.uint8)


def _values(gray: np.ndarray) -> list[int]:
  return np.flatnonzero(np.bincount(gray.ravel(), minlength=256)).tolist()


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


def palette_chunk(path: Path) -> bytes | None:
  """Reads the palette of a PNG file, which stands before its pixels.

  Returns:
    Its RGB colors, 3 bytes each; None if it has none.

  Raises:
    OSError: If the file cannot be read.
  """
  with path.open('rb') as file:
    if file.read(len(PNG_START)) != PNG_START:
      return None
    while len(head := file.read(8)) == 8:
      length, kind = int.from_bytes(head[:4], 'big'), head[4:]
      if kind == b'PLTE':
        return file.read(min(length, 3 * 256))
      if kind == b'IDAT':
        break
      file.seek(length + 4, 1)
  return None


def _contents(data: bytes) -> Contents:
  if _is_one_channel(data):
    values = _values(decode_label(data))
    flat = _opened(data, lambda image: image.getpalette('RGB')) or []
    of_value = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    return Contents(values, palette={v: of_value[v] for v in values if v < len(of_value)})
  mode, samples = _opened(data, lambda image: (image.mode, np.asarray(image)))
  if mode.startswith('I'):
    return Contents(np.unique(samples[samples <= IGNORE]).tolist(), is_deep=True)
  samples = samples[..., :3] if mode.startswith('RGB') else samples[..., :1]
  if (samples != samples[..., :1]).any():
    return Contents((), is_color=True, is_colored=True)
  return Contents(_values(samples[..., 0]), is_colored=True)


def _is_one_channel(data: bytes) -> bool:
  """Whether a PNG file has a palette, or gray samples of up to 8 bits."""
  bits, kind = data[_PNG_BITS : _PNG_BITS + 1], data[_PNG_BITS + 1 : _PNG_BITS + 2]
  return kind == b'\x03' or (kind == b'\x00' and bits != b'\x10')


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
  listed = ', '.join(
    f'{list(color)} ({counted(count, "pixel")})' for color, count in [*counts.items()][:5]
  )
  return f'{listed} and {len(counts) - 5:,} more' if len(counts) > 5 else listed


def _color_codes(data: bytes) -> np.ndarray:
  """Colors as 65536 r + 256 g + b, (h, w) int32."""
  rgb = _opened(data, lambda image: np.asarray(_opaque(image).convert('RGB')))
  r, g, b = (rgb[..., channel].astype(np.int32) for channel in range(3))
  return r << 16 | g << 8 | b


def _gray(data: bytes) -> np.ndarray:
  if _is_one_channel(data):
    return decode_label(data)
  mode, values = _opened(data, lambda image: (image.mode, np.asarray(image)))
  if mode.startswith('I'):
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
