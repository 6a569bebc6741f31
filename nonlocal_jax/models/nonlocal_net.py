"""`NonLocalNet`: backbone and heads in one module (mmseg `EncoderDecoder` with `NLHead`)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models.config import Execution, NonLocalNetConfig
from nonlocal_jax.models.heads import AuxiliaryHead, NonLocalHead
from nonlocal_jax.models.resnet import ResNet
from nonlocal_jax.ops.masking import mask_padding, strided_sizes
from nonlocal_jax.ops.resize import resize_bilinear


class NonLocalNet(nnx.Module):
  """Dilated ResNet with a non-local decode head and an auxiliary FCN head.

  Parameter paths are those of the released checkpoints (`backbone.layer3.5.conv2`), except for the
  stem and the shortcuts; `nonlocal_jax.weights.state_dict` maps the names.

  Attributes:
    config: Architecture of the network.
    execution: How the network is computed.
  """

  def __init__(
    self,
    config: NonLocalNetConfig,
    *,
    execution: Execution | None = None,
    rngs: nnx.Rngs,
  ):
    """Initializes the network with the initializers of MMSegmentation.

    Args:
      config: Architecture of the network.
      execution: How the network is computed; None for the fastest on JAX's default backend.
      rngs: Source of the initial values.
    """
    execution = execution or Execution.for_platform()
    self.config = config
    self.execution = execution
    self.backbone = ResNet(config, execution, rngs=rngs)
    self.decode_head = NonLocalHead(config, execution, rngs=rngs)
    has_auxiliary = config.auxiliary_head
    self.auxiliary_head = AuxiliaryHead(config, execution, rngs=rngs) if has_auxiliary else None

  @classmethod
  def abstract(cls, config: NonLocalNetConfig, execution: Execution | None = None) -> 'NonLocalNet':
    """Returns the network with `jax.ShapeDtypeStruct` in place of arrays, without allocation."""
    return nnx.merge(*_abstract_parts(config, execution or Execution.for_platform()), copy=True)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Computes logits at the size of the input.

    Args:
      images: (n, h, w, in_channels) float32, normalized (see `normalize`).

    Returns:
      (n, h, w, num_classes) float32.

    Raises:
      ValueError: If `images` have another shape, or are integers.
    """
    _check_images(images, self.config.in_channels)
    _, height, width, _ = images.shape
    return self.upsample(self.encode_decode(images), (height, width))

  def encode_decode(self, images: jax.Array, *, sizes: jax.Array | None = None) -> jax.Array:
    """Computes logits at the output stride, 8 in the released models, without upsampling.

    Args:
      images: (n, h, w, in_channels) float32, normalized.
      sizes: (n, 2) integers, height and width of each image without the padding at its bottom and
        right. The padding does not affect the logits of the images. None for no padding.

    Returns:
      (n, ceil(h / stride), ceil(w / stride), num_classes) float32, with `config.output_stride`;
      values in the padding are meaningless.

    Raises:
      ValueError: If `images` have another shape, or are integers.
    """
    _check_images(images, self.config.in_channels)
    _, features = self.backbone(images, sizes=sizes)
    return self.decode_head(features, sizes=strided_sizes(sizes, self.config.output_stride))

  def block_input(self, images: jax.Array, *, sizes: jax.Array | None = None) -> jax.Array:
    """Computes what the non-local block takes, e.g. for `NonLocalBlock.pairwise_weights`.

    Args:
      images: (n, h, w, in_channels) float32, normalized.
      sizes: See `encode_decode`.

    Returns:
      (n, ceil(h / stride), ceil(w / stride), block_channels) float32, with
      `config.output_stride`; values in the padding are meaningless.

    Raises:
      ValueError: If `images` have another shape, or are integers.
    """
    _check_images(images, self.config.in_channels)
    _, features = self.backbone(images, sizes=sizes)
    strided = strided_sizes(sizes, self.config.output_stride)
    return self.decode_head.block_input(mask_padding(features, strided))

  def training_logits(self, images: jax.Array, *, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Computes logits of both heads, at their strides, in training mode; updates statistics.

    Args:
      images: (n, h, w, in_channels) float32, normalized.
      rngs: Random keys, with a 'dropout' stream.

    Returns:
      Logits of the decode head and of the auxiliary head, each (n, ceil(h / stride), ceil(w /
      stride), num_classes) float32, with the strides of the fourth and the third stage.

    Raises:
      ValueError: If `images` have another shape or are integers, batch norms are folded, or the
        network has no auxiliary head.
    """
    _check_images(images, self.config.in_channels)
    if self.auxiliary_head is None:
      raise ValueError(
        'the network has no auxiliary head, as the file that it was loaded from; train its '
        'backbone and decode_head by a loss of your own'
      )
    if self.execution.batch_norm == 'folded':
      raise ValueError("batch_norm is 'folded', which is for prediction only; use 'global'")
    auxiliary_features, features = self.backbone(images, train=True)
    logits = self.decode_head(features, train=True, rngs=rngs)
    return logits, self.auxiliary_head(auxiliary_features, train=True, rngs=rngs)

  def upsample(self, logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes logits (n, h, w, c) to `size` (height, width) with the config's `align_corners`."""
    return resize_bilinear(logits, size, align_corners=self.config.align_corners)


def _check_images(images: jax.Array, channels: int) -> None:
  if images.ndim != 4 or images.shape[-1] != channels:
    raise ValueError(f'images have shape {images.shape}, expected (n, h, w, {channels})')
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'images are {images.dtype}, expected floats; normalize them with nonlocal_jax.normalize'
    )


def state_shapes(config: NonLocalNetConfig) -> nnx.State:
  """Returns the shapes of parameters and running statistics; cached, do not modify."""
  return _abstract_parts(config, Execution())[1]


@functools.cache
def _abstract_parts(
  config: NonLocalNetConfig, execution: Execution
) -> tuple[nnx.GraphDef[NonLocalNet], nnx.State]:
  return nnx.split(
    nnx.eval_shape(lambda: NonLocalNet(config, execution=execution, rngs=nnx.Rngs(0)))
  )
