"""What the page shows of an image, and the results of the last images."""

import base64
import collections
import dataclasses
import gzip
import math
import secrets
from typing import Any

import cv2
import numpy as np

from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.attention_picture import links, shades, span
from nonlocal_jax.inference.attention import AttentionMap, Point
from nonlocal_jax.inference.images import ImageTooLargeError, image_from_bytes
from nonlocal_jax.inference.pretrained import PretrainedModel
from nonlocal_jax.protocol import Size

MOST_PIXELS = 2**25  # of an image

_SHOWN_PIXELS = 2**22  # of pictures and label maps that browsers get
_SHADED_PIXELS = 2**18  # of weights over an image, which are smooth
_CONFIDENCE_STEPS = 2**16 - 1
_JPEG_QUALITY = 92
_IMAGES_KEPT = 16
_PIXELS_KEPT = 2 * MOST_PIXELS  # of all images together: 200 MB as RGB


class NotKeptError(UserError):
  """Raised for the results of an image that are not kept any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
  """An image and its classes, ready to be sent.

  Attributes:
    image: (h, w, 3) uint8 RGB.
    shown: (height, width) of what browsers get, at most 4 million pixels.
    picture: The image as JPEG.
    labels: (height, width) uint8, compressed by gzip.
    confidence: (height, width) uint16, little endian, where 65535 is certain; compressed by gzip.
  """

  image: np.ndarray
  shown: Size
  picture: bytes
  labels: bytes
  confidence: bytes


def segment(model: PretrainedModel, data: bytes) -> Segmentation:
  """Segments an image.

  Args:
    model: The network, of images with three channels.
    data: Contents of an image file.

  Raises:
    UserError: If it is no image, or has more than `MOST_PIXELS` pixels.
  """
  try:
    image = image_from_bytes(data, name='The file', max_pixels=MOST_PIXELS)
  except ImageTooLargeError as error:
    raise UserError(error.message(None)) from error
  labels, confidence = model.predict(image, return_confidence=True)
  size = labels.shape
  shown = shown_size(size, _SHOWN_PIXELS)
  rows, columns = (
    (np.arange(shown[axis]) * size[axis] + size[axis] // 2) // shown[axis] for axis in (0, 1)
  )
  nearest = np.ix_(rows, columns)
  steps = np.rint(_CONFIDENCE_STEPS * confidence[nearest]).astype('<u2')
  resized = cv2.resize(image, shown[::-1], interpolation=cv2.INTER_AREA)
  _, picture = cv2.imencode('.jpg', resized[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
  return Segmentation(
    image=image,
    shown=shown,
    picture=picture.tobytes(),
    labels=gzip.compress(labels[nearest].astype(np.uint8).tobytes(), 1),
    confidence=gzip.compress(steps.tobytes(), 1),
  )


def shown_size(size: Size, most_pixels: int) -> Size:
  """Returns a size of the same aspect ratio with at most so many pixels.

  >>> shown_size((3000, 4000), 750_000)
  (750, 1000)
  >>> shown_size((1, 4000), 1000)
  (1, 1000)
  """
  height, width = size
  scale = min(1, math.sqrt(most_pixels / (height * width)))
  rows, columns = (min(max(int(side * scale), 1), most_pixels) for side in size)
  return rows, columns


def describe_attention(attention: AttentionMap, image: Size) -> dict[str, Any]:
  """Describes where a pixel looks, as JSON.

  Args:
    attention: Where it looks.
    image: (height, width) of the image.

  Returns:
    `query`, the pixel at the center of its position, as [x, y]; `links`, [x, y, strength] of the
    largest weights; `span`, a phrase; `width`, `height` and `shades`, see
    `evaluation.attention_picture`; the shades are in base64, row by row.
  """
  height, width = shown_size(image, _SHADED_PIXELS)
  return {
    'query': attention.window.point_of(attention.position),
    'links': [[*point, round(strength, 4)] for point, strength in links(attention)],
    'span': span(attention),
    'width': width,
    'height': height,
    'shades': base64.b64encode(shades(attention, (height, width)).tobytes()).decode(),
  }


class Results:
  """Segmentations of the last images, under names that cannot be guessed."""

  def __init__(self):
    """Creates an empty store."""
    self._kept: collections.OrderedDict[str, Segmentation] = collections.OrderedDict()

  def add(self, result: Segmentation) -> str:
    """Keeps a result; returns its name. The oldest ones go where there are too many."""
    name = secrets.token_urlsafe(16)
    self._kept[name] = result
    while len(self._kept) > 1 and (
      len(self._kept) > _IMAGES_KEPT or self._num_pixels() > _PIXELS_KEPT
    ):
      self._kept.popitem(last=False)
    return name

  def get(self, name: str) -> Segmentation:
    """Returns the result of a name.

    Raises:
      NotKeptError: If there is none.
    """
    if name not in self._kept:
      raise NotKeptError('This image is not kept any more: give it again.')
    self._kept.move_to_end(name)
    return self._kept[name]

  def _num_pixels(self) -> int:
    return sum(math.prod(result.image.shape[:2]) for result in self._kept.values())


class Attention:
  """Computes where pixels of images look; keeps the features of the last images."""

  def __init__(self, model: PretrainedModel, most: int = 2):
    """Creates it.

    Args:
      model: A network with the non-local block.
      most: Images whose features are kept.
    """
    self._model, self._most = model, most
    self._looks: collections.OrderedDict[str, Any] = collections.OrderedDict()

  def __call__(self, name: str, result: Segmentation, point: Point) -> dict[str, Any]:
    """Computes where a pixel looks, see `describe_attention`.

    Args:
      name: The name of an image.
      result: The image.
      point: (x, y) of a pixel inside it.
    """
    if name not in self._looks:
      self._looks[name] = self._model.image_attention(result.image)
    self._looks.move_to_end(name)
    while len(self._looks) > self._most:
      self._looks.popitem(last=False)
    return describe_attention(self._looks[name](point), result.image.shape[:2])
