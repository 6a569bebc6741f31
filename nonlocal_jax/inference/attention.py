"""Where a pixel looks: the weights of one query of the non-local block, over the image."""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import cv2
import jax
import numpy as np
from flax import nnx

from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.inference.buckets import PaddedShape
from nonlocal_jax.inference.predictor import normalized_windows
from nonlocal_jax.inference.views import View, axis_matrix, feature_size, views_of
from nonlocal_jax.models import NonLocalNet, NonLocalNetConfig
from nonlocal_jax.protocol import EvalProtocol, Size

Point = tuple[float, float]  # (x, y) in pixels of the image
Position = tuple[int, int]  # (row, column) in the feature map

_WINDOWS_KEPT = 4  # features of an image: 32 MB for 1024x2048 pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
  """The part of an image that goes through the network with a pixel: all that the pixel sees.

  Attributes:
    image: (height, width) of the image.
    view: The resized image and its windows.
    top: First row of the window in the resized image.
    left: First column.
    align_corners: The corner convention.
    output_stride: Of the network.
  """

  image: Size
  view: View
  top: int
  left: int
  align_corners: bool
  output_stride: int

  @classmethod
  def around(cls, point: Point, image: Size, protocol: EvalProtocol, *, output_stride: int) -> Self:
    """Returns the window whose center is nearest to a point, without multi-scale and flips."""
    (view,) = views_of(protocol.with_multi_scale_flip(False), image)

    def nearest_start(axis: int, coordinate: float, starts: tuple[int, ...]) -> int:
      first = (coordinate + 0.5) * view.size[axis] / image[axis] - view.crop[axis] / 2
      return min(starts, key=lambda start: abs(start - first))

    return cls(
      image=image,
      view=view,
      top=nearest_start(0, point[1], view.tops),
      left=nearest_start(1, point[0], view.lefts),
      align_corners=protocol.align_corners,
      output_stride=output_stride,
    )

  @property
  def features(self) -> Size:
    """(rows, columns) of the non-local block's positions."""
    rows, columns = (feature_size(side, self.output_stride) for side in self.view.network)
    return rows, columns

  def position_of(self, point: Point) -> Position:
    """Returns the position whose features lie nearest to a pixel."""
    row, column = (
      min(max(round(self._to_features(axis, value)), 0), self.features[axis] - 1)
      for axis, value in enumerate(point[::-1])
    )
    return row, column

  def point_of(self, position: Position) -> Point:
    """Returns the pixel at the center of a position, inside the image."""
    y, x = (
      min(max(self._from_features(axis, value), 0), self.image[axis] - 1)
      for axis, value in enumerate(position)
    )
    return x, y

  def over_image(self, weights: np.ndarray) -> np.ndarray:
    """Interpolates weights to the pixels of the image.

    Args:
      weights: (rows, columns) float32.

    Returns:
      (h, w) float32; 0 outside the window.
    """
    rows, columns = (
      axis_matrix(
        (0,),
        crop=self.view.crop[axis],
        network=self.view.network[axis],
        size=self.view.crop[axis],
        out_size=self.view.crop[axis],
        align_corners=self.align_corners,
        output_stride=self.output_stride,
      )
      for axis in (0, 1)
    )
    resized = np.zeros(self.view.size, np.float32)
    height, width = self.view.crop
    resized[self.top : self.top + height, self.left : self.left + width] = (
      rows @ weights @ columns.T
    )
    return cv2.resize(resized, self.image[::-1], interpolation=cv2.INTER_LINEAR)

  def _to_features(self, axis: int, value: float) -> float:
    start, network = (self.top, self.left)[axis], self.view.network[axis]
    pixel = (value + 0.5) * self.view.size[axis] / self.image[axis] - 0.5 - start
    if self.align_corners:
      return pixel * (self.features[axis] - 1) / max(network - 1, 1)
    return (pixel + 0.5) * self.features[axis] / network - 0.5

  def _from_features(self, axis: int, value: float) -> float:
    start, network = (self.top, self.left)[axis], self.view.network[axis]
    if self.align_corners:
      pixel = value * (network - 1) / max(self.features[axis] - 1, 1)
    else:
      pixel = (value + 0.5) * network / self.features[axis] - 0.5
    return (pixel + start + 0.5) * self.image[axis] / self.view.size[axis] - 0.5


class AttentionMap(NamedTuple):
  """Where a pixel looks.

  Attributes:
    weights: (rows, columns) float32 over the positions of the non-local block.
    position: The pixel's own position.
    window: The part of the image that the positions cover.
  """

  weights: np.ndarray
  position: Position
  window: Window


class AttentionPrograms:
  """Compiled programs that compute single rows of a network's pairwise weights."""

  def __init__(
    self,
    graphdef: nnx.GraphDef[NonLocalNet],
    protocol: EvalProtocol,
    *,
    precision: str,
    options: dict[str, Any],
  ):
    """Prepares the programs; they are compiled when first called.

    Args:
      graphdef: The network.
      protocol: How images are tested.
      precision: See `Predictor`.
      options: Of the compiler.
    """

    @jax.default_matmul_precision(precision)
    def block_input(
      state: nnx.State, images: jax.Array, sizes: jax.Array, extents: jax.Array, *, padded: bool
    ) -> jax.Array:
      normalized = normalized_windows(images, sizes, protocol)
      network = nnx.merge(graphdef, state)
      return network.block_input(normalized, sizes=extents if padded else None)

    @jax.default_matmul_precision(precision)
    def weights(
      state: nnx.State, x: jax.Array, positions: jax.Array, sizes: jax.Array
    ) -> jax.Array:
      block = nnx.merge(graphdef, state).decode_head.nl_block
      assert block is not None
      return block.pairwise_weights(x, positions, sizes=sizes)

    self.block_input = jax.jit(block_input, static_argnames=['padded'], compiler_options=options)
    self.weights = jax.jit(weights, compiler_options=options)


class ImageAttention:
  """The attention of an image: calling it with a pixel computes where that pixel looks.

  The network runs once for each window, and features are kept, so that further pixels are fast.
  """

  def __init__(
    self,
    image: np.ndarray,
    protocol: EvalProtocol,
    config: NonLocalNetConfig,
    programs: AttentionPrograms,
    state: nnx.State,
  ):
    """Computes nothing yet.

    Args:
      image: (h, w, channels) uint8 or uint16.
      protocol: How images are tested.
      config: The network.
      programs: Its programs.
      state: Its weights, on the devices.
    """
    self._image = image
    self._protocol = protocol.with_multi_scale_flip(False)
    self._output_stride = config.output_stride
    self._programs = programs
    self._state = state
    self._features = functools.lru_cache(maxsize=_WINDOWS_KEPT)(self._compute_features)

  def __call__(self, point: Point) -> AttentionMap:
    """Computes where a pixel looks.

    Args:
      point: (x, y) in pixels of the image, from the center of the upper left one.

    Raises:
      ValueError: If the point lies outside the image.
    """
    x, y = point
    height, width = self._image.shape[:2]
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
      raise ValueError(f'point is {point}, outside the image of {width}x{height} pixels')
    window = Window.around(
      point, (height, width), self._protocol, output_stride=self._output_stride
    )
    position = window.position_of(point)
    rows, columns = window.features
    weights = self._programs.weights(
      self._state,
      self._features(window),
      np.array([[position]], np.int32),
      np.array([[rows, columns]], np.int32),
    )
    return AttentionMap(np.asarray(weights)[0, 0, :rows, :columns], position, window)

  def _compute_features(self, window: Window) -> jax.Array:
    """Returns the input of the block, (1, rows, columns, channels), perhaps padded."""
    shape = PaddedShape.from_image(window.image, self._protocol)
    shape = shape.with_room(networks=self._protocol.window_crop is None)
    (padded_view,) = shape.views
    height, width = window.view.crop
    resized = resize_to(self._image, window.view.size)
    images = np.zeros((1, *padded_view.network, self._image.shape[2]), self._image.dtype)
    images[0, :height, :width] = resized[window.top :, window.left :][:height, :width]
    return self._programs.block_input(
      self._state,
      images,
      np.array([window.view.crop], np.int32),
      np.array([window.view.network], np.int32),
      padded=shape.padded,
    )
