"""The decode head with the non-local block, the auxiliary head (mmseg `NLHead`, `FCNHead`)."""

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models.layers import ConvNorm, conv
from nonlocal_jax.models.non_local import NonLocalBlock
from nonlocal_jax.ops.masking import mask_padding


class NonLocalHead(nnx.Module):
  """Convolution, non-local block, convolution, one over [features, result], classifier."""

  def __init__(
    self,
    in_channels: int,
    channels: int,
    num_classes: int,
    *,
    non_local: bool = True,
    zero_init: bool = True,
    dropout: float = 0.1,
    rngs: nnx.Rngs,
  ):
    """Makes the head.

    Args:
      in_channels: Channels of the features.
      channels: Channels inside the head.
      num_classes: Number of classes.
      non_local: Whether it has the block; without it this is mmseg's `FCNHead` with two
        convolutions.
      zero_init: Whether the block starts as the identity.
      dropout: Share of channels dropped before the classifier.
      rngs: Source of the initial values.
    """
    self.convs = nnx.List(
      [
        ConvNorm(in_channels, channels, 3, rngs=rngs),
        ConvNorm(channels, channels, 3, rngs=rngs),
      ]
    )
    self.nl_block = NonLocalBlock(channels, zero_init=zero_init, rngs=rngs) if non_local else None
    self.conv_cat = ConvNorm(in_channels + channels, channels, 3, rngs=rngs)
    self.dropout = dropout_channels(dropout)
    self.conv_seg = classifier(channels, num_classes, rngs=rngs)

  def __call__(
    self,
    features: jax.Array,
    *,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
    sizes: jax.Array | None = None,
  ) -> jax.Array:
    """(n, h, w, in_channels) -> (n, h, w, num_classes); in training `rngs` drops channels.

    What lies in the padding that `sizes` tells of (see `masking.valid_mask`) does not matter.
    """
    features = mask_padding(features, sizes)
    x = self.convs[0](features, train=train)
    if self.nl_block is not None:
      x = self.nl_block(x, train=train, sizes=sizes)
    x = mask_padding(self.convs[1](mask_padding(x, sizes), train=train), sizes)
    x = self.conv_cat(jnp.concatenate([features, x], axis=-1), train=train)
    return self.conv_seg(self.dropout(x, deterministic=not train, rngs=rngs))


class AuxiliaryHead(nnx.Module):
  """One convolution and the classifier, on the features of stage 3; for training only."""

  def __init__(
    self,
    in_channels: int,
    channels: int,
    num_classes: int,
    *,
    dropout: float = 0.1,
    rngs: nnx.Rngs,
  ):
    """Makes the head."""
    self.convs = nnx.List([ConvNorm(in_channels, channels, 3, rngs=rngs)])
    self.dropout = dropout_channels(dropout)
    self.conv_seg = classifier(channels, num_classes, rngs=rngs)

  def __call__(
    self, features: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """(n, h, w, in_channels) -> (n, h, w, num_classes); in training `rngs` drops channels."""
    x = self.convs[0](features, train=train)
    return self.conv_seg(self.dropout(x, deterministic=not train, rngs=rngs))


def dropout_channels(rate: float) -> nnx.Dropout:
  """Drops whole channels of a sample with probability `rate` (torch `Dropout2d`)."""
  return nnx.Dropout(rate, broadcast_dims=(1, 2))


def classifier(channels: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Conv:
  """The 1x1 convolution from features to logits."""
  init = nnx.initializers.normal(0.01)
  return conv(channels, num_classes, 1, use_bias=True, kernel_init=init, rngs=rngs)
