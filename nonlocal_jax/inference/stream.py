"""Predicts many images: reads the next ones in threads while the devices compute."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.batches import batches_of, images_at_once
from nonlocal_jax.inference.buckets import PaddedShape, shapes_with_room
from nonlocal_jax.inference.images import MAX_PIXELS, ImageLike, as_array, sizes_of
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.views import views_of
from nonlocal_jax.protocol import EvalProtocol, Size
from nonlocal_jax.runtime.parallel import platform_of_mesh
from nonlocal_jax.runtime.pipeline import in_threads, one_behind

PIXELS_AHEAD = 2**25  # of images that wait for the next stage: 100 MB as RGB
_UNKNOWN = (1, 1)  # stands for a size that is known only when the image is read


class Prediction(NamedTuple):
  """An image and its label map.

  Attributes:
    index: The image's place among the images that were given.
    image: (h, w, channels) uint8, as it was read.
    labels: (h, w) uint8, class of each pixel.
  """

  index: int
  image: np.ndarray
  labels: np.ndarray


class _Read(NamedTuple):
  """An image that was read, and resized to each size of the protocol."""

  index: int
  image: np.ndarray
  views: list[np.ndarray]

  @property
  def size(self) -> Size:
    """(height, width) of the image."""
    return self.image.shape[:2]


def labels_of(image: np.ndarray, predictor: Predictor, state: nnx.State) -> np.ndarray:
  """Predicts one image, (h, w, channels) uint8; returns the class of each pixel, (h, w) uint8."""
  size, protocol = image.shape[:2], predictor.protocol
  shape = PaddedShape.from_image(size, protocol).with_room(networks=protocol.window_crop is None)
  views = _views(image, protocol)
  labels = predictor(state, shape, [views], [size], batch_size=predictor.mesh.size)
  return np.asarray(labels)[0, : size[0], : size[1]]


def predictions(
  images: Sequence[ImageLike],
  predictor: Predictor,
  state: nnx.State,
  *,
  channels: int,
  max_pixels: int = MAX_PIXELS,
  on_error: Callable[[int, UserError], object] | None = None,
) -> Iterator[Prediction]:
  """Predicts images, those of one padded shape after another.

  Args:
    images: Paths, PIL images or arrays.
    predictor: Predicts on the devices of its mesh.
    state: The network's weights, on the mesh.
    channels: Channels that each image must have.
    max_pixels: See `PretrainedModel.predict`.
    on_error: See `PretrainedModel.predict_many`.

  Yields:
    A prediction of each image that could be read.
  """
  for read, labels in one_behind(
    _computing(images, predictor, state, channels, max_pixels, on_error)
  ):
    on_host = np.asarray(labels)
    for place, (index, image, _) in enumerate(read):
      height, width = image.shape[:2]
      yield Prediction(index, image, on_host[place, :height, :width])


def _computing(
  images: Sequence[ImageLike],
  predictor: Predictor,
  state: nnx.State,
  channels: int,
  max_pixels: int,
  on_error: Callable[[int, UserError], object] | None,
) -> Iterator[tuple[list[_Read], jax.Array]]:
  """Yields batches and their label maps, which devices may still be computing."""
  protocol, mesh = predictor.protocol, predictor.mesh
  shapes_for_sizes = functools.partial(
    shapes_with_room, protocol=protocol, platform=platform_of_mesh(mesh)
  )

  def read(index: int) -> _Read | UserError:
    try:
      image = as_array(images[index], channels=channels, max_pixels=max_pixels)
    except UserError as error:
      return error
    return _Read(index, image, _views(image, protocol))

  def dispatch(
    shape: PaddedShape, together: list[_Read], batch_size: int
  ) -> tuple[list[_Read], jax.Array]:
    views = [found.views for found in together]
    sizes = [found.size for found in together]
    labels = predictor(state, shape, views, sizes, batch_size=batch_size)
    labels.copy_to_host_async()
    return [found._replace(views=[]) for found in together], labels

  sizes = [size or _UNKNOWN for size in sizes_of(images, max_pixels=max_pixels)]
  shape_of = shapes_for_sizes(sizes)
  batches = batches_of(
    [shape_of[size] for size in sizes],
    most=lambda shape: images_at_once(shape, protocol, mesh),
    num_devices=mesh.size,
  )
  loaded = in_threads(
    read,
    [index for batch in batches for index in batch.indices],
    size=lambda index: PIXELS_AHEAD if sizes[index] == _UNKNOWN else math.prod(sizes[index]),
    most=PIXELS_AHEAD,
  )
  for batch in batches:
    together: list[_Read] = []
    for index in batch.indices:
      found = next(loaded)
      if isinstance(found, UserError):
        if on_error is None:
          raise found
        on_error(index, found)
      elif found.size == sizes[index]:
        together.append(found)
      else:
        shape = shapes_for_sizes([found.size])[found.size]
        yield dispatch(shape, [found], mesh.size)
    if together:
      yield dispatch(batch.shape, together, batch.size)


def _views(image: np.ndarray, protocol: EvalProtocol) -> list[np.ndarray]:
  """Resizes an image to each size of a protocol."""
  return [resize_to(image, view.size) for view in views_of(protocol, image.shape[:2])]
