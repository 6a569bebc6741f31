"""Reads the two files of a sample and checks that they are intact and match."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import scipy.io
from PIL import Image

from nonlocal_jax.data import transforms
from nonlocal_jax.data.pixel_formats import PNG_START, RGB, PixelFormat, decode_any, format_of
from nonlocal_jax.data.samples import Sample
from nonlocal_jax.errors import UserError

# Cityscapes' label ids of the 19 evaluated classes, in order; all others are ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
T = TypeVar('T')


class AuditedSample(NamedTuple):
  """A checked sample.

  Attributes:
    image: The image file as it is.
    label: A PNG file of label values: as it is, or made of another kind of label file.
    size: (height, width) of both.
    pixels: How often each label value occurs, (256,) int64.
    pixel_format: The image's own format.
    moments: Sums of the samples of each channel and of their squares, unless it is RGB of 8 bits.
  """

  image: bytes
  label: bytes
  size: tuple[int, int]
  pixels: np.ndarray
  pixel_format: PixelFormat
  moments: tuple[list[int], list[int]] | None


def read_sample(sample: Sample) -> AuditedSample:
  """Reads and decodes both files of a sample.

  Cityscapes label ids (`*_labelIds.png`) are mapped to its 19 classes; SBD labels (`.mat`), and
  what `Sample.read_label` makes of other files, become PNG files.

  Args:
    sample: What to read.

  Returns:
    The contents of the files.

  Raises:
    UserError: If a file is missing, broken, cut off or of a wrong kind, or their sizes differ.
  """
  image_bytes = read_file(sample.image)
  image = decoded(sample.image, image_bytes, _decode_whole)
  pixel_format = format_of(image_bytes)
  h, w = image.shape[:2]
  label, label_bytes = read_label(sample, h, w)
  if image.shape[:2] != label.shape:
    (image_h, image_w), (label_h, label_w) = image.shape[:2], label.shape
    turned = _is_turned(image_bytes) and (image_w, image_h) == label.shape
    raise UserError(
      f'Label map {sample.label} is {label_w}x{label_h} pixels but its image {sample.image} is '
      f'{image_w}x{image_h}{" once turned as its EXIF orientation says" if turned else ""}: '
      'replace one of them.'
    )
  pixels = np.bincount(label.ravel(), minlength=256)
  moments = None if pixel_format == RGB else _moments(image)
  return AuditedSample(image_bytes, label_bytes, label.shape, pixels, pixel_format, moments)


def read_label(sample: Sample, h: int, w: int) -> tuple[np.ndarray, bytes]:
  """Reads the label map of a sample.

  Args:
    sample: What to read.
    h: Height of its image.
    w: Width of its image.

  Returns:
    The values, (h, w) uint8, perhaps of another size; and a PNG file of them.

  Raises:
    UserError: If its file is missing, broken, or not what it should be.
  """
  if sample.read_label is not None:
    label = sample.read_label(h, w)
    return label, _as_png(label)
  label_bytes = read_file(sample.label)
  if sample.label.suffix.lower() == '.mat':
    label = decoded(sample.label, label_bytes, _decode_sbd)
    return label, _as_png(label)
  label = decoded(sample.label, label_bytes, transforms.decode_label)
  if sample.label.name.lower().endswith('_labelids.png'):
    label = cv2.LUT(label, _from_cityscapes_ids())
    return label, _as_png(label)
  return label, label_bytes


def read_file(path: Path) -> bytes:
  """Reads a file.

  Raises:
    UserError: If it cannot be read.
  """
  try:
    return path.read_bytes()
  except OSError as error:
    reason = error.strerror or str(error)
    raise UserError(f'File {path} cannot be read ({reason}): replace it.') from error


def decoded(path: Path, data: bytes, decode: Callable[[bytes], T]) -> T:
  """Decodes the contents of a file; of PNG files the checksums are compared first.

  Args:
    path: The file, for messages.
    data: Its contents.
    decode: What reads them; raises a `ValueError` whose message says what the file is.

  Returns:
    What it reads.

  Raises:
    UserError: If it cannot be decoded.
  """
  try:
    if data.startswith(PNG_START):
      _check_png(data)
    return decode(data)
  except ValueError as error:
    raise UserError(f'File {path} is {error}: replace it.') from error


def _decode_whole(data: bytes) -> np.ndarray:
  """Decodes an image strictly: OpenCV accepts truncated files."""
  image, _ = decode_any(data)
  if data.startswith(_JPEG_START) and not data.rstrip(b'\0').endswith(_JPEG_END):
    try:
      with Image.open(io.BytesIO(data)) as file:
        file.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
      raise ValueError(f'cut off or broken ({error})') from error
  return image


def _moments(image: np.ndarray) -> tuple[list[int], list[int]]:
  """Sums the samples of each channel, and their squares."""
  values = np.arange(np.iinfo(image.dtype).max + 1, dtype=np.int64)
  sums, squares = [], []
  for channel in np.moveaxis(image, -1, 0):
    counts = np.bincount(channel.ravel(), minlength=len(values))
    sums.append(int(counts @ values))
    squares.append(int(counts @ values**2))
  return sums, squares


def _check_png(data: bytes) -> None:
  """Compares the chunks of a PNG file with their checksums, which decoders do not always.

  Raises:
    ValueError: If one differs, or the file ends before its last chunk does.
  """
  start, kind = len(PNG_START), b''
  while kind != b'IEND':
    if start + 12 > len(data):
      raise ValueError('cut off or broken')
    (length,) = struct.unpack_from('>I', data, start)
    end = start + 8 + length
    if end + 4 > len(data):
      raise ValueError('cut off or broken')
    kind, body = data[start + 4 : start + 8], memoryview(data)[start + 4 : end]
    if zlib.crc32(body) != struct.unpack_from('>I', data, end)[0]:
      raise ValueError(
        f'broken (the checksum of its chunk {kind.decode("ascii", "replace")} differs)'
      )
    start = end + 4


def _decode_sbd(data: bytes) -> np.ndarray:
  """Decodes a label map of SBD: field Segmentation of the struct GTcls in a MATLAB 5 file."""
  try:
    label = scipy.io.loadmat(io.BytesIO(data))['GTcls'][0]['Segmentation'][0]
  except Exception as error:  # SciPy raises many types on broken files
    raise ValueError('not a MATLAB file with GTcls.Segmentation, or broken') from error
  if label.dtype != np.uint8 or label.ndim != 2:
    raise ValueError(f'not a label map of 8 bits but {label.ndim} axes of {label.dtype}')
  return label


def _from_cityscapes_ids() -> np.ndarray:
  lookup = np.full(256, transforms.IGNORE, np.uint8)
  lookup[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
  return lookup


def _as_png(label: np.ndarray) -> bytes:
  written, data = cv2.imencode('.png', label)
  assert written
  return data.tobytes()


def _is_turned(data: bytes) -> bool:
  try:
    with Image.open(io.BytesIO(data)) as file:
      return file.getexif().get(0x0112, 1) > 4
  except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
    return False  # of a format or size that Pillow does not read
