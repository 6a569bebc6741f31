"""Images of other formats than RGB of 8 bits: one to many channels, 8 or 16 bits."""

import io
import logging
from typing import Literal, NamedTuple, cast

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image

from nonlocal_jax.data.transforms import decode_image
from nonlocal_jax.protocol import EvalProtocol

MAX_CHANNELS = 128  # of an image

# What it says of broken files is said by errors; without a handler Python prints it.
logging.getLogger('tifffile').addHandler(logging.NullHandler())

PNG_START = b'\x89PNG\r\n\x1a\n'  # of a file
_TIFF_STARTS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 3, 6: 4}  # by color type; gray with alpha is read as RGB
_MODES = {'1': (1, 8), 'L': (1, 8), 'I;16': (1, 16), 'RGBA': (4, 8)}  # of Pillow
_PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError)


class PixelFormat(NamedTuple):
  """What a pixel consists of.

  Attributes:
    channels: Number of channels, 1 to 128. Three are red, green and blue.
    bits: Of a sample, 8 or 16, unsigned.
  """

  channels: int = 3
  bits: Literal[8, 16] = 8

  @property
  def dtype(self) -> np.dtype:
    """Of an array of samples."""
    return np.dtype(np.uint8 if self.bits == 8 else np.uint16)

  @classmethod
  def of_protocol(cls, protocol: EvalProtocol) -> 'PixelFormat':
    """The format of the images that a protocol tests."""
    return cls(len(protocol.mean), protocol.bits)

  def __str__(self) -> str:
    """Returns it in words, as in '1 channel of 16 bits'."""
    return f'{self.channels} channel{"" if self.channels == 1 else "s"} of {self.bits} bits'


RGB = PixelFormat()


def format_name(pixels: PixelFormat) -> str:
  """Returns a short name.

  >>> format_name(PixelFormat(5, 16))
  '5x16'
  """
  return f'{pixels.channels}x{pixels.bits}'


def format_of_name(name: str) -> PixelFormat:
  """Returns the format of that name."""
  channels, bits = map(int, name.split('x'))
  return PixelFormat(channels, cast(Literal[8, 16], bits))


def format_of(data: bytes) -> PixelFormat:
  """Reads the pixel format of an image file from its header.

  Args:
    data: Contents of the file.

  Returns:
    The format. Files with a palette, or gray with transparency, are RGB, and so is what cannot be
    told.

  Raises:
    ValueError: If it is a TIFF file of other samples than unsigned integers of 8 or 16 bits, or of
      too many channels.
  """
  if data.startswith(_TIFF_STARTS):
    return _format_of_tiff(data)
  if data.startswith(PNG_START) and len(data) > 25:
    return PixelFormat(_PNG_CHANNELS.get(data[25], 3), 16 if data[24] == 16 else 8)
  try:
    with Image.open(io.BytesIO(data)) as file:
      channels, bits = _MODES.get(file.mode, (3, 8))
  except _PIL_ERRORS:
    return RGB
  return PixelFormat(channels, cast(Literal[8, 16], bits))


def decode(data: bytes, pixels: PixelFormat = RGB) -> np.ndarray:
  """Decodes an image file, EXIF orientation applied.

  RGB of 8 bits is what `transforms.decode_image` makes of any file: a gray channel is repeated, 16
  bits become 8, and a fourth channel is left out. For another format the file must have it.

  Args:
    data: Contents of the file.
    pixels: The format that the array has.

  Returns:
    (h, w, channels) uint8 or uint16.

  Raises:
    ValueError: If it is no image, broken, or of another format.
  """
  if pixels == RGB and not _has_pages(data):
    return decode_image(data)
  found = format_of(data)
  if pixels == RGB and found.channels in (3, 4):  # pages, of which `decode_image` sees the first
    image = _decode_as_it_is(data, found)[..., :3]
    return np.ascontiguousarray(image if found.bits == 8 else (image >> 8).astype(np.uint8))
  if found != pixels:
    raise ValueError(f'an image with {found}, and not with {pixels}')
  return _decode_as_it_is(data, found)


def decode_any(data: bytes) -> tuple[np.ndarray, PixelFormat]:
  """Decodes an image file in its own format.

  Returns:
    (h, w, channels) uint8 or uint16, and the format.

  Raises:
    ValueError: If it is no image, broken, or of a format that is not supported.
  """
  found = format_of(data)
  if found == RGB and not _has_pages(data):
    return decode_image(data), RGB
  try:
    return _decode_as_it_is(data, found), found
  except ValueError:
    if _has_pages(data) or found not in (PixelFormat(1, 8), PixelFormat(4, 8)):
      raise
    return decode_image(data), RGB  # of a compression or orientation that only RGB is read of


def displayable(image: np.ndarray) -> np.ndarray:
  """Makes an RGB image of 8 bits, to be looked at, of one of any format.

  Args:
    image: (h, w, channels) uint8 or uint16.

  Returns:
    (h, w, 3) uint8: RGB as it is, else the first three channels, or the only one or two of them as
    gray; samples of 16 bits are stretched to the values that occur.
  """
  channels = image.shape[-1]
  shown = image[..., :3] if channels >= 3 else np.repeat(image[..., :1], 3, axis=-1)
  if shown.dtype == np.uint8:
    return np.ascontiguousarray(shown)
  low, high = (float(np.percentile(shown, share)) for share in (1, 99))
  scaled = (shown.astype(np.float32) - low) * (255 / max(high - low, 1))
  return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def pixels_in_tiff(data: bytes) -> int:
  """Number of pixels that the header of a TIFF file promises; 0 for other files.

  Raises:
    ValueError: If it is broken.
  """
  if not data.startswith(_TIFF_STARTS):
    return 0
  page = _pages(data)[0]
  return page.imagewidth * page.imagelength


def _format_of_tiff(data: bytes) -> PixelFormat:
  page, *others = _pages(data)
  if others and (
    page.samplesperpixel != 1 or any((p.shape, p.dtype) != (page.shape, page.dtype) for p in others)
  ):
    raise ValueError(
      f'a TIFF file of {1 + len(others)} images: save the one that is meant, or equal pages of one '
      'channel'
    )
  if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not others:
    return RGB
  channels, dtype = int(page.samplesperpixel) + len(others), page.dtype
  if page.photometric == tifffile.PHOTOMETRIC.YCBCR and dtype == np.uint8:
    return RGB
  if page.bitspersample == 1:
    return PixelFormat(channels, 8)
  if dtype not in (np.uint8, np.uint16) or page.bitspersample not in (8, 16):
    kind = f'{page.bitspersample} bits' if dtype is None else str(dtype)
    raise ValueError(f'a TIFF file of {kind}, and not of unsigned integers of 8 or 16 bits')
  if not 1 <= channels <= MAX_CHANNELS:
    raise ValueError(f'a TIFF file of {channels} channels, more than {MAX_CHANNELS}')
  return PixelFormat(channels, 8 if dtype == np.uint8 else 16)


def _pages(data: bytes) -> list[tifffile.TiffPage]:
  """The images of a TIFF file, without smaller copies of them; at least one."""
  try:
    pages = [page.aspage() for page in tifffile.TiffFile(io.BytesIO(data)).pages]
    found = [page for page in pages if not page.is_reduced] or [pages[0]]
  except Exception as error:  # tifffile raises many types on broken files
    raise ValueError('not an image, or broken') from error
  return found


def _has_pages(data: bytes) -> bool:
  """Whether it is a TIFF file of several pages, of which other readers see the first."""
  return data.startswith(_TIFF_STARTS) and len(_pages(data)) > 1


def _decode_as_it_is(data: bytes, pixels: PixelFormat) -> np.ndarray:
  if data.startswith(_TIFF_STARTS):
    image = _decode_tiff(data)
  else:
    flags = {
      1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH,
      3: cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH,
    }
    image = _decode_by_opencv(data, flags.get(pixels.channels, cv2.IMREAD_UNCHANGED))
    if pixels.channels == 4:
      image = _turned(image, data)
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[-1] != pixels.channels or image.dtype != pixels.dtype:
    raise ValueError(f'broken: its header promises {pixels}')
  return image


def _decode_by_opencv(data: bytes, flags: int) -> np.ndarray:
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
  except cv2.error:  # e.g. more pixels than OpenCV allows
    image = None
  if image is None:
    raise ValueError('not an image, or broken')
  if image.ndim == 3 and image.shape[-1] in (3, 4):
    to_rgb = cv2.COLOR_BGR2RGB if image.shape[-1] == 3 else cv2.COLOR_BGRA2RGBA
    return cv2.cvtColor(image, to_rgb)
  return image


def _decode_tiff(data: bytes) -> np.ndarray:
  page, *others = pages = _pages(data)
  if others:
    return np.stack([_decode_page(page) for page in pages], axis=-1)
  plain = page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
  is_known_to_opencv = plain and page.samplesperpixel in (1, 3) and page.planarconfig == 1
  if page.compression not in _BUILT_IN and is_known_to_opencv:
    _check_orientation(page)
    return _decode_by_opencv(data, cv2.IMREAD_UNCHANGED)
  return _decode_page(page)


def _check_orientation(page: tifffile.TiffPage) -> None:
  orientation = page.tags.get('Orientation')
  if orientation is not None and orientation.value not in (0, 1):
    raise ValueError('a TIFF file that is to be turned (tag Orientation)')


def _decode_page(page: tifffile.TiffPage) -> np.ndarray:
  _check_orientation(page)
  try:
    image = page.asarray()
  except Exception as error:  # tifffile raises many types on broken files
    if page.compression not in _BUILT_IN:
      kind = tifffile.COMPRESSION(page.compression).name
      raise ValueError(
        f'a TIFF file of compression {kind}, which is not supported for {page.samplesperpixel} '
        'channels'
      ) from error
    raise ValueError('cut off or broken') from error
  if page.samplesperpixel > 1 and page.planarconfig == 2:
    image = np.moveaxis(image, 0, -1)
  if image.dtype == np.bool_:
    image = image.astype(np.uint8) * 255
  if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
    image = np.iinfo(image.dtype).max - image
  return np.ascontiguousarray(image)


# Compressions that tifffile decodes with Python's own library.
_BUILT_IN = frozenset(
  {
    tifffile.COMPRESSION.NONE,
    tifffile.COMPRESSION.ADOBE_DEFLATE,
    tifffile.COMPRESSION.DEFLATE,
    tifffile.COMPRESSION.LZMA,
  }
)


def _turned(image: np.ndarray, data: bytes) -> np.ndarray:
  """Applies the EXIF orientation, which OpenCV does not to images with transparency."""
  try:
    with Image.open(io.BytesIO(data)) as file:
      orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
  except _PIL_ERRORS:
    return image
  if orientation in (2, 4, 5, 7):
    image = image[:, ::-1]
  quarters = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
  return np.ascontiguousarray(np.rot90(image, quarters))
