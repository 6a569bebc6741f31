"""Predicts many images: reads the next ones in threads while the devices compute."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Self

import jax
import numpy as np
from flax import nnx

from nonlocal_jax.data.pixel_formats import PixelFormat
from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.batches import batches_of, images_at_once
from nonlocal_jax.inference.buckets import PaddedShape, shapes_with_room
from nonlocal_jax.inference.images import MAX_PIXELS, ImageLike, as_array, sizes_of
from nonlocal_jax.inference.predictor import BatchLogits, Predictor
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
    image: (h, w, channels) uint8 or uint16, as it was read.
    labels: (h, w) uint8, class of each pixel.
  """

  index: int
  image: np.ndarray
  labels: np.ndarray


class ConfidentPrediction(NamedTuple):
  """An image, its label map and how likely the labels are.

  Attributes:
    index: See `Prediction`.
    image: See `Prediction`.
    labels: See `Prediction`.
    confidence: (h, w) float32, the probability of each pixel's label.
  """

  index: int
  image: np.ndarray
  labels: np.ndarray
  confidence: np.ndarray


class ProbablePrediction(NamedTuple):
  """An image, its label map and the probabilities of all classes.

  Attributes:
    index: See `Prediction`.
    image: See `Prediction`.
    labels: See `Prediction`.
    probabilities: (h, w, classes) float32.
  """

  index: int
  image: np.ndarray
  labels: np.ndarray
  probabilities: np.ndarray


Result = Literal['labels', 'confidence', 'probabilities']
AnyPrediction = Prediction | ConfidentPrediction | ProbablePrediction


class _Read(NamedTuple):
  """An image that was read, and resized to each size of the protocol."""

  index: int
  image: np.ndarray
  views: list[np.ndarray]

  @property
  def size(self) -> Size:
    """(height, width) of the image."""
    return self.image.shape[:2]


class _Computed(NamedTuple):
  """Results of a batch, which devices may still be computing."""

  labels: jax.Array
  confidence: jax.Array | None
  logits: BatchLogits | None  # where all probabilities are wanted

  @classmethod
  def from_logits(cls, predictor: Predictor, logits: BatchLogits, result: Result) -> Self:
    """Dispatches what follows the network, and copies to the host."""
    confidence = None
    if result == 'confidence':
      labels, confidence = predictor.confident_labels(logits)
      confidence.copy_to_host_async()
    else:
      labels = predictor.labels(logits)
    labels.copy_to_host_async()
    return cls(labels, confidence, logits if result == 'probabilities' else None)

  def of_images(self, read: Sequence[_Read], predictor: Predictor) -> Iterator[AnyPrediction]:
    """Waits for the results; yields those of each image, without the padding."""
    labels = np.asarray(self.labels)
    confidence = None if self.confidence is None else np.asarray(self.confidence)
    probabilities = None if self.logits is None else _collected(predictor, self.logits, read)
    for place, (index, image, _) in enumerate(read):
      inside = (place, slice(image.shape[0]), slice(image.shape[1]))
      if probabilities is not None:
        yield ProbablePrediction(index, image, labels[inside], probabilities.pop(0))
      elif confidence is not None:
        yield ConfidentPrediction(index, image, labels[inside], confidence[inside])
      else:
        yield Prediction(index, image, labels[inside])


def _collected(
  predictor: Predictor, logits: BatchLogits, read: Sequence[_Read]
) -> list[np.ndarray]:
  """Collects the probabilities of each image, (h, w, classes) float32, from those of rows."""
  num_classes = logits.views[0].logits[0].shape[-1]
  found = [np.empty((*one.size, num_classes), np.float32) for one in read]
  for first, rows in predictor.probabilities(logits):
    for place, array in enumerate(found):
      part = array[first : first + rows.shape[1]]
      part[:] = rows[place, : part.shape[0], : part.shape[1]]
  return found


def prediction_of(
  image: np.ndarray, predictor: Predictor, state: nnx.State, *, result: Result = 'labels'
) -> AnyPrediction:
  """Predicts one image, (h, w, channels) uint8 or uint16."""
  size, protocol = image.shape[:2], predictor.protocol
  shape = PaddedShape.from_image(size, protocol).with_room(networks=protocol.window_crop is None)
  views = _views(image, protocol)
  logits = predictor.logits(state, shape, [views], [size], batch_size=predictor.mesh.size)
  computed = _Computed.from_logits(predictor, logits, result)
  (prediction,) = computed.of_images([_Read(0, image, [])], predictor)
  return prediction


def predictions(
  images: Sequence[ImageLike],
  predictor: Predictor,
  state: nnx.State,
  *,
  result: Result = 'labels',
  max_pixels: int = MAX_PIXELS,
  on_error: Callable[[int, UserError], object] | None = None,
) -> Iterator[AnyPrediction]:
  """Predicts images, those of one padded shape after another.

  Args:
    images: Paths, PIL images or arrays.
    predictor: Predicts on the devices of its mesh.
    state: The network's weights, on the mesh.
    result: What to predict: 'labels', also their 'confidence', or also the 'probabilities' of all
      classes.
    max_pixels: See `PretrainedModel.predict`.
    on_error: See `PretrainedModel.predict_many`.

  Yields:
    A prediction of each image that could be read.
  """
  for read, computed in one_behind(
    _computing(images, predictor, state, result, max_pixels, on_error)
  ):
    yield from computed.of_images(read, predictor)


def predictions_of_frames(
  frames: Iterable[np.ndarray],
  predictor: Predictor,
  state: nnx.State,
  *,
  result: Result = 'labels',
) -> Iterator[AnyPrediction]:
  """Predicts frames of one size in their order, of which it holds a few batches at a time.

  Args:
    frames: Each (h, w, channels) uint8 or uint16, read as they are needed.
    predictor: Predicts on the devices of its mesh.
    state: The network's weights, on the mesh.
    result: See `predictions`.

  Yields:
    A prediction of each frame.

  Raises:
    ValueError: If a frame has another shape or dtype than it needs.
  """
  for read, computed in one_behind(_computing_frames(frames, predictor, state, result)):
    yield from computed.of_images(read, predictor)


def _computing_frames(
  frames: Iterable[np.ndarray], predictor: Predictor, state: nnx.State, result: Result
) -> Iterator[tuple[list[_Read], _Computed]]:
  """Yields batches and their results."""
  protocol, mesh = predictor.protocol, predictor.mesh
  pixels = PixelFormat.of_protocol(protocol)
  first_size: Size | None = None
  batch_size, shape = 0, None

  def read(numbered: tuple[int, np.ndarray]) -> _Read:
    index, frame = numbered
    image = as_array(frame, pixels=pixels)
    return _Read(index, image, _views(image, protocol))

  loaded = in_threads(
    read,
    enumerate(frames),
    size=lambda numbered: math.prod(numbered[1].shape[:2]),
    most=PIXELS_AHEAD,
  )
  together: list[_Read] = []
  for found in loaded:
    if shape is None:
      first_size = found.size
      shape = shapes_with_room([found.size], protocol, platform=platform_of_mesh(mesh))[found.size]
      at_once = 1 if result == 'probabilities' else images_at_once(shape, protocol, mesh)
      batch_size = at_once * mesh.size
    if found.size != first_size:
      raise ValueError(f'frame {found.index} has the size {found.size}, expected {first_size}')
    together.append(found)
    if len(together) == batch_size:
      yield _dispatched(predictor, state, shape, together, batch_size, result)
      together = []
  if together and shape is not None:
    yield _dispatched(predictor, state, shape, together, batch_size, result)


def _dispatched(
  predictor: Predictor,
  state: nnx.State,
  shape: PaddedShape,
  together: list[_Read],
  batch_size: int,
  result: Result,
) -> tuple[list[_Read], _Computed]:
  """Starts to predict a batch; its resized images are no longer needed."""
  views = [found.views for found in together]
  sizes = [found.size for found in together]
  logits = predictor.logits(state, shape, views, sizes, batch_size=batch_size)
  computed = _Computed.from_logits(predictor, logits, result)
  return [found._replace(views=[]) for found in together], computed


def _computing(
  images: Sequence[ImageLike],
  predictor: Predictor,
  state: nnx.State,
  result: Result,
  max_pixels: int,
  on_error: Callable[[int, UserError], object] | None,
) -> Iterator[tuple[list[_Read], _Computed]]:
  """Yields batches and their results."""
  protocol, mesh = predictor.protocol, predictor.mesh
  pixels = PixelFormat.of_protocol(protocol)
  shapes_for_sizes = functools.partial(
    shapes_with_room, protocol=protocol, platform=platform_of_mesh(mesh)
  )

  def read(index: int) -> _Read | UserError:
    try:
      image = as_array(images[index], pixels=pixels, max_pixels=max_pixels)
    except UserError as error:
      return error
    return _Read(index, image, _views(image, protocol))

  sizes = [size or _UNKNOWN for size in sizes_of(images, max_pixels=max_pixels)]
  shape_of = shapes_for_sizes(sizes)
  batches = batches_of(
    [shape_of[size] for size in sizes],
    # Probabilities of several images would fill the host's memory.
    most=lambda shape: 1 if result == 'probabilities' else images_at_once(shape, protocol, mesh),
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
        yield _dispatched(predictor, state, shape, [found], mesh.size, result)
    if together:
      yield _dispatched(predictor, state, batch.shape, together, batch.size, result)


def _views(image: np.ndarray, protocol: EvalProtocol) -> list[np.ndarray]:
  """Resizes an image to each size of a protocol."""
  return [resize_to(image, view.size) for view in views_of(protocol, image.shape[:2])]
