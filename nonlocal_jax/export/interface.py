"""What an exported program takes and returns, and which steps of a protocol are inside it."""

import dataclasses
from typing import Self

import numpy as np

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.ops.resize import bilinear_matrix
from nonlocal_jax.protocol import EvalProtocol, Size
from nonlocal_jax.weights.description import ModelDescription

MAX_PIXELS = 2**24  # of an image, 4096x4096
MAX_SCORES = 2**30  # class scores of an image, 4 GiB
SCORES_AT_ONCE = 2**23  # of an image, in rows
PAIRWISE_WEIGHTS_AT_ONCE = 2**23  # of an image, in blocks of queries
BLUE_FIRST = (2, 1, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interface:
  """Shapes of an exported program: images (n, *size, channels) to classes (n, *size), all uint8.

  Attributes:
    size: (height, width) of the images.
    batch: Number of images; None for any number.
    confidence: Whether the probability of each pixel's class is a second output, float32.
    config: The network.
    protocol: How its images are tested.
  """

  size: Size
  batch: int | None
  confidence: bool
  config: NonLocalNetConfig
  protocol: EvalProtocol

  @classmethod
  def of(
    cls, description: ModelDescription, *, size: Size, batch: int | None, confidence: bool
  ) -> Self:
    """Creates the interface of a network.

    Raises:
      UserError: If there is no such program, see `_check`.
    """
    interface = cls(
      size=size,
      batch=batch,
      confidence=confidence,
      config=description.config,
      protocol=description.protocol,
    )
    interface._check()
    return interface

  def _check(self) -> None:
    if self.protocol.bits != 8:
      raise UserError(
        f'The network takes images of {self.protocol.bits} bits, and programs take such of 8: '
        'export its weights with format="safetensors".'
      )
    height, width = self.size
    if min(height, width) < 1:
      raise UserError(f'size is {height},{width}; give height and width in pixels, at least 1.')
    if height * width > MAX_PIXELS or height * width * self.config.num_classes > MAX_SCORES:
      most = min(MAX_PIXELS, MAX_SCORES // self.config.num_classes)
      raise UserError(
        f'size is {height},{width}, which are {height * width:,} pixels of '
        f'{self.config.num_classes} classes; give one of at most {most:,} pixels.'
      )
    if self.batch is not None and self.batch < 1:
      raise UserError(f'batch is {self.batch}; give a number of images, or none for any number.')
    if self.confidence and self.config.threshold not in (None, 0.5):
      raise UserError(
        f'The network has one output channel and the threshold {self.config.threshold}, and its '
        'probabilities are not those of its classes: export it without confidence.'
      )

  @property
  def network(self) -> Size:
    """(height, width) that the network sees: `size`, padded as the protocol says."""
    height, width = self.size
    if self.protocol.pad_size is not None:
      height = max(height, self.protocol.pad_size[0])
      width = max(width, self.protocol.pad_size[1])
    multiple = self.protocol.pad_multiple or 1
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple

  @property
  def features(self) -> Size:
    """(rows, columns) of the network's logits."""
    stride = self.config.output_stride
    return -(-self.network[0] // stride), -(-self.network[1] // stride)

  @property
  def upsampling(self) -> tuple[np.ndarray, np.ndarray]:
    """Matrices from logits to pixels: (height, rows) and (width, columns) float32.

    They interpolate to `network`, and leave out what was padded.
    """
    rows, columns = (
      bilinear_matrix(features, network, align_corners=self.config.align_corners)[:side]
      for features, network, side in zip(self.features, self.network, self.size, strict=True)
    )
    return rows, columns

  @property
  def rows_at_once(self) -> int:
    """Number of rows whose class scores are computed together."""
    return max(SCORES_AT_ONCE // (self.size[1] * self.config.num_classes), 1)

  @property
  def queries_at_once(self) -> int:
    """Number of queries of the non-local block that are computed together."""
    rows, columns = self.features
    return max(PAIRWISE_WEIGHTS_AT_ONCE // (rows * columns), 1)

  def takes(self) -> str:
    """Says what goes in and comes out, in one line."""
    count = 'n' if self.batch is None else self.batch
    height, width = self.size
    channels = self.config.in_channels
    order = ' RGB' if channels == 3 else ''
    confidence = f' and confidence ({count}, {height}, {width}) float32' if self.confidence else ''
    return (
      f'images ({count}, {height}, {width}, {channels}) uint8{order} -> classes ({count}, '
      f'{height}, {width}) uint8{confidence}'
    )

  def inside(self) -> str:
    """Says which steps the program contains."""
    steps = ['normalization']
    if self.protocol.channel_order == 'bgr':
      steps.insert(0, 'the order of the channels (BGR)')
    if self.network != self.size:
      steps.append(f'padding to {self.network[0]},{self.network[1]}')
    steps += ['the network', 'upsampling to the size of the image', 'the largest score']
    return ', '.join(steps)

  def not_inside(self) -> str:
    """Says which steps of the protocol are left to whoever calls the program."""
    protocol = self.protocol
    height, width = self.size
    steps = [
      f'resizing images to {height},{width} (bilinear, without antialiasing, as OpenCV does) and '
      'label maps back'
    ]
    if protocol.scale is not None and protocol.keep_ratio:
      box = 'x'.join(map(str, protocol.scale))
      steps.append(
        f'keeping the aspect ratio (in tests images are fitted into {box}, width x height)'
      )
    if protocol.window_crop is not None:
      crop = ','.join(map(str, protocol.window_crop))
      steps.append(f'sliding windows (in tests of {crop}, and their scores are averaged)')
    if protocol.averages:
      steps.append('averages over several sizes and flips')
    return '; '.join(steps)
