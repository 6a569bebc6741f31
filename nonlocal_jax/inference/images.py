"""Images as they come: files, PIL images and arrays, all as uint8 RGB arrays."""

import io
import os
import re
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from nonlocal_jax.data.paths import not_a_file
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat, decode, pixels_in_tiff
from nonlocal_jax.data.transforms import decode_image
from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import Size
from nonlocal_jax.runtime.pipeline import num_cores

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray

MAX_PIXELS = 2**27  # of an image file, by default: 0.4 GB as RGB
DECODER_MAX_PIXELS = 2**30  # OpenCV's own limit

_SIXTEEN_BITS = ('I;16', 'I;16L', 'I;16B', 'I;16N')
_UNBOUNDED = ('I', 'F')  # modes of PIL without a largest value
_PIL_ERRORS = (
  *(OSError, SyntaxError, ValueError, TypeError, struct.error),
  Image.DecompressionBombError,
)
_QUARTER_TURNS = (5, 6, 7, 8)  # values of the EXIF orientation


class ImageTooLargeError(UserError):
  """Raised for an image with more pixels than `max_pixels`, before it takes up memory."""

  def __init__(self, name: str, num_pixels: int, max_pixels: int):
    """Composes the message for callers from Python.

    Args:
      name: What to call the image.
      num_pixels: Its number of pixels.
      max_pixels: The limit.
    """
    self._facts = name, num_pixels, max_pixels
    super().__init__(self.message('max_pixels'))

  def message(self, option: str | None) -> str:
    """Returns the message with the name of the option that sets the limit, if there is one."""
    name, num_pixels, max_pixels = self._facts
    remedy = 'shrink it'
    if option and num_pixels <= DECODER_MAX_PIXELS:
      remedy += f', or set {option} if the memory suffices'
    return f'{name} has {num_pixels:,} pixels, more than {max_pixels:,}: {remedy}.'


def as_array(
  image: ImageLike, *, pixels: PixelFormat = RGB, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Reads or converts an image.

  Args:
    image: The path of an image file, a PIL image, or an array (h, w, channels) of NumPy or JAX.
    pixels: The format that the array has, see `pixel_formats.decode`; PIL images are RGB.
    max_pixels: Limit for files and PIL images.

  Returns:
    (h, w, channels) uint8 or uint16, of files and PIL images with EXIF orientation applied.

  Raises:
    UserError: If a file cannot be read.
    ImageTooLargeError: If it has more pixels than `max_pixels`.
    ValueError: If the image has another number of channels, dtype or mode.
    TypeError: If it is none of these.
  """
  if isinstance(image, str | os.PathLike):
    array = read_image(Path(image), pixels=pixels, max_pixels=max_pixels)
  elif isinstance(image, Image.Image):
    if image.width * image.height > max_pixels:
      raise ImageTooLargeError('image', image.width * image.height, max_pixels)
    array = _from_pil(image)
  elif hasattr(image, '__array__'):
    array = np.asarray(image)
  else:
    raise TypeError(
      f'image has the type {type(image).__name__}, expected a path, a PIL image or an array; put '
      'several into a list'
    )
  channels, dtype = pixels.channels, pixels.dtype
  if array.ndim != 3 or array.shape[-1] != channels or array.dtype != dtype or not array.size:
    kind = f'{dtype} RGB' if channels == 3 else str(dtype)
    raise ValueError(
      f'image is {array.shape} {array.dtype}, expected (h, w, {channels}) {kind}; convert it first'
    )
  return array


def read_image(
  path: Path, *, pixels: PixelFormat = RGB, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Reads an image file, EXIF orientation applied.

  Args:
    path: The file.
    pixels: The format that the array has, see `pixel_formats.decode`.
    max_pixels: Limit of its number of pixels; OpenCV's own is `DECODER_MAX_PIXELS`.

  Returns:
    (h, w, channels) uint8 or uint16.

  Raises:
    UserError: If it cannot be read.
    ImageTooLargeError: If it has more pixels than `max_pixels`.
  """
  try:
    if what := not_a_file(path):
      raise UserError(f'File {path} is {what}.')
    num_pixels, limit = _pixels_in_header(path), min(max_pixels, DECODER_MAX_PIXELS)
    if num_pixels > limit:
      raise ImageTooLargeError(f'File {path}', num_pixels, limit)
    data = path.read_bytes()
    if not num_pixels and pixels_in_tiff(data) > limit:
      raise ImageTooLargeError(f'File {path}', pixels_in_tiff(data), limit)
    return decode(data, pixels)
  except OSError as error:
    raise UserError(f'File {path} cannot be read: {error.strerror}.') from error
  except ValueError as error:
    raise UserError(f'File {path} is {error}.') from error


def image_from_bytes(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes the contents of an image file, EXIF orientation applied.

  Args:
    data: The contents.
    name: What to call it in errors.
    max_pixels: See `read_image`.

  Returns:
    (h, w, 3) uint8 RGB.

  Raises:
    UserError: If it is no image, or broken.
    ImageTooLargeError: If it has more pixels than `max_pixels`.
  """
  num_pixels, limit = _pixels_in_header(io.BytesIO(data)), min(max_pixels, DECODER_MAX_PIXELS)
  if num_pixels > limit:
    raise ImageTooLargeError(name, num_pixels, limit)
  try:
    image = decode_image(data)
  except ValueError as error:
    raise UserError(f'{name} is {error}.') from error
  if image.shape[0] * image.shape[1] > limit:  # of a kind whose header Pillow does not read
    raise ImageTooLargeError(name, image.shape[0] * image.shape[1], limit)
  return image


def _pixels_in_header(source: Path | BinaryIO) -> int:
  """Number of pixels that a file promises; 0 if Pillow does not read its header."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of large images
      with Image.open(source) as file:
        return file.width * file.height
  except Image.DecompressionBombError as error:
    promised = re.search(r'(\d+) pixels', str(error))
    return int(promised[1]) if promised else DECODER_MAX_PIXELS + 1
  except _PIL_ERRORS:
    return 0


def sizes_of(images: Sequence[ImageLike], *, max_pixels: int = MAX_PIXELS) -> list[Size | None]:
  """Finds the sizes of images without decoding them.

  Args:
    images: See `as_array`.
    max_pixels: See `as_array`.

  Returns:
    (height, width) of each as `as_array` returns it; None where it is not known before, and for
    images that have too many pixels. A file whose header promises another size than its pixels have
    is possible.
  """
  with warnings.catch_warnings(), ThreadPoolExecutor(num_cores()) as pool:
    warnings.simplefilter('ignore')  # of large images and odd metadata
    sizes = pool.map(_size_of, images)
    return [size if size and 0 < size[0] * size[1] <= max_pixels else None for size in sizes]


def _size_of(image: ImageLike) -> Size | None:
  if isinstance(image, np.ndarray):
    return image.shape[:2] if image.ndim == 3 else None
  try:
    if isinstance(image, Image.Image):
      return _oriented(image)
    if isinstance(image, str | os.PathLike) and not not_a_file(Path(image)):
      with Image.open(image) as file:
        return _oriented(file)
  except _PIL_ERRORS:
    pass  # `as_array` reads the file in another way, or says what is wrong
  return None


def _oriented(image: Image.Image) -> Size:
  width, height = image.size
  is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _QUARTER_TURNS
  return (width, height) if is_turned else (height, width)


def _from_pil(image: Image.Image) -> np.ndarray:
  """Converts a PIL image as `read_image` does a file: no alpha, 16 bits shifted to 8."""
  if image.mode in _UNBOUNDED:
    raise ValueError(f"image has mode {image.mode!r}; convert it to 'RGB' first")
  image = ImageOps.exif_transpose(image)
  if image.mode in _SIXTEEN_BITS:
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  return np.asarray(image.convert('RGB'))
