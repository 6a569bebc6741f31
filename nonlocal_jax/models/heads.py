"""Decode head with the non-local block, and auxiliary head (mmseg `NLHead` and `FCNHead`)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models.config import Execution, NonLocalNetConfig
from nonlocal_jax.models.layers import LayerFactory
from nonlocal_jax.models.non_local import NonLocalBlock
from nonlocal_jax.ops.masking import mask_padding


class NonLocalHead(nnx.Module):
  """Decode head: conv, non-local block, conv, conv over [input, result], classifier."""

  def __init__(
    self,
    config: NonLocalNetConfig,
    execution: Execution | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    """Initializes the head.

    Args:
      config: Architecture of the network. Without the non-local block the head is mmseg's
        `FCNHead` with two convolutions.
      execution: How the head is computed; None for the fastest on JAX's default backend.
      rngs: Source of the initial values.
    """
    execution = execution or Execution.for_platform()
    layers = LayerFactory.from_config(config, execution)
    in_channels, channels = 32 * config.width, config.block_channels
    self.convs = nnx.List(
      [
        layers.conv_norm(in_channels, channels, 3, rngs=rngs),
        layers.conv_norm(channels, channels, 3, rngs=rngs),
      ]
    )
    block = functools.partial(
      NonLocalBlock,
      channels,
      reduction=config.reduction,
      mode=config.mode,
      use_scale=config.use_scale,
      zero_init=config.zero_init,
      epsilon=config.batch_norm_epsilon,
      momentum=config.batch_norm_momentum,
      execution=execution,
    )
    self.nl_block = block(rngs=rngs) if config.non_local else None
    self.conv_cat = layers.conv_norm(in_channels + channels, channels, 3, rngs=rngs)
    self.dropout = dropout_channels(config.dropout)
    self.conv_seg = classifier(channels, config.num_classes, layers=layers, rngs=rngs)

  def __call__(
    self,
    features: jax.Array,
    *,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
    sizes: jax.Array | None = None,
  ) -> jax.Array:
    """Computes logits: (n, h, w, in_channels) -> (n, h, w, num_classes).

    `rngs` is for dropout in training. Values in the padding given by `sizes` (see
    `masking.valid_mask`) do not affect the logits of the images.
    """
    features = mask_padding(features, sizes)
    x = self.block_input(features, train=train)
    if self.nl_block is not None:
      x = self.nl_block(x, train=train, sizes=sizes)
    x = mask_padding(self.convs[1](mask_padding(x, sizes), train=train), sizes)
    x = self.conv_cat(jnp.concatenate([features, x], axis=-1), train=train)
    return self.conv_seg(self.dropout(x, deterministic=not train, rngs=rngs))

  def block_input(self, features: jax.Array, *, train: bool = False) -> jax.Array:
    """Computes what the non-local block takes: (n, h, w, in_channels) -> (n, h, w, channels).

    Values in the padding of `features` must be 0, see `masking.mask_padding`.
    """
    return self.convs[0](features, train=train)


class AuxiliaryHead(nnx.Module):
  """Auxiliary head for training: one convolution and a classifier on the features of stage 3."""

  def __init__(
    self,
    config: NonLocalNetConfig,
    execution: Execution | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    """Initializes the head; arguments are those of `NonLocalHead`."""
    layers = LayerFactory.from_config(config, execution or Execution.for_platform())
    in_channels, channels = 16 * config.width, 4 * config.width
    self.convs = nnx.List([layers.conv_norm(in_channels, channels, 3, rngs=rngs)])
    self.dropout = dropout_channels(config.dropout)
    self.conv_seg = classifier(channels, config.num_classes, layers=layers, rngs=rngs)

  def __call__(
    self, features: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Computes logits: (n, h, w, in_channels) -> (n, h, w, num_classes)."""
    x = self.convs[0](features, train=train)
    return self.conv_seg(self.dropout(x, deterministic=not train, rngs=rngs))


def dropout_channels(rate: float) -> nnx.Dropout:
  """Returns a dropout layer that drops whole channels of a sample (torch `Dropout2d`)."""
  return nnx.Dropout(rate, broadcast_dims=(1, 2))


def classifier(
  channels: int, num_classes: int, *, layers: LayerFactory, rngs: nnx.Rngs
) -> nnx.Conv:
  """Returns the 1x1 convolution from features to logits."""
  init = nnx.initializers.normal(0.01)
  return layers.conv(channels, num_classes, 1, use_bias=True, kernel_init=init, rngs=rngs)
