"""ResNetV1c with dilated last stages (D8), whose output stride is 8 (mmseg `ResNetV1c`)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models.config import Execution, NonLocalNetConfig
from nonlocal_jax.models.layers import KEPT, LayerFactory
from nonlocal_jax.ops.masking import mask_padding, strided_sizes
from nonlocal_jax.ops.pooling import MaxPool, max_pool

EXPANSION = 4


class Bottleneck(nnx.Module):
  """Residual block of 1x1, 3x3 (with stride and dilation) and 1x1 convolutions."""

  NORMALIZED = (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3'))

  def __init__(
    self,
    in_channels: int,
    planes: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    layers: LayerFactory,
    rngs: nnx.Rngs,
  ):
    """Initializes a block with `4 * planes` output channels; projects the shortcut if needed."""
    out_channels = EXPANSION * planes
    self.stride = stride
    self.conv1 = layers.conv(in_channels, planes, 1, rngs=rngs)
    self.bn1 = layers.norm(planes)
    self.conv2 = layers.conv(planes, planes, 3, stride=stride, dilation=dilation, rngs=rngs)
    self.bn2 = layers.norm(planes)
    self.conv3 = layers.conv(planes, out_channels, 1, rngs=rngs)
    self.bn3 = layers.norm(out_channels)
    self.bn3.scale[...] = self.bn3.scale[...] * 0  # zero_init_residual: starts as the shortcut
    projects = stride != 1 or in_channels != out_channels
    self.downsample = (
      layers.conv_norm(in_channels, out_channels, 1, stride=stride, relu=False, rngs=rngs)
      if projects
      else None
    )

  def __call__(
    self, x: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
  ) -> jax.Array:
    """(n, h, w, in_channels) -> (n, ceil(h / stride), ceil(w / stride), 4 * planes).

    Values in the padding given by `sizes` (see `masking.valid_mask`) do not affect the images.
    """
    shortcut = x if self.downsample is None else self.downsample(x, train=train)
    x = jax.nn.relu(self.bn1(self.conv1(x), train=train))
    x = jax.nn.relu(self.bn2(self.conv2(mask_padding(x, sizes)), train=train))
    return jax.nn.relu(self.bn3(self.conv3(x), train=train) + shortcut)


class ResNet(nnx.Module):
  """Deep-stem ResNet whose last two stages are dilated instead of strided.

  The backward pass saves the outputs of convolutions and the batch statistics, and recomputes
  normalization and ReLU, which are cheap.
  """

  def __init__(
    self,
    config: NonLocalNetConfig,
    execution: Execution | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    """Initializes the backbone.

    Args:
      config: Architecture of the network.
      execution: How the backbone is computed; None for the fastest on JAX's default backend.
      rngs: Source of the initial values.
    """
    execution = execution or Execution.for_platform()
    layers, width = LayerFactory.from_config(config, execution), config.width
    self.stem = nnx.List(
      [
        layers.conv_norm(config.in_channels, width // 2, 3, stride=2, rngs=rngs),
        layers.conv_norm(width // 2, width // 2, 3, rngs=rngs),
        layers.conv_norm(width // 2, width, 3, rngs=rngs),
      ]
    )
    stages, channels = [], width
    for stage, count in enumerate(config.stage_blocks):
      planes, blocks = width * 2**stage, []
      dilation = config.stage_dilations[stage]
      contracted = max(dilation // 2, 1) if config.contract_dilation else dilation
      for block in range(count):
        blocks.append(
          Bottleneck(
            channels,
            planes,
            stride=config.stage_strides[stage] if block == 0 else 1,
            dilation=contracted if block == 0 else dilation,
            layers=layers,
            rngs=rngs,
          )
        )
        channels = EXPANSION * planes
      stages.append(nnx.List(blocks))
    self.layer1, self.layer2, self.layer3, self.layer4 = stages
    self.rematerialize = execution.rematerialize
    self.scan_blocks = execution.scan_blocks
    self.max_pool: MaxPool = execution.max_pool

  def __call__(
    self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Extracts features.

    Args:
      images: (n, h, w, in_channels) float32, normalized.
      train: Whether batch normalization uses the statistics of the batch.
      sizes: (n, 2) integers, sizes of the images without padding, see `masking.valid_mask`. The
        padding does not affect the features of the images; features in the padding are
        meaningless. None for no padding.

    Returns:
      Features of stages 3 and 4: (n, ceil(h / 8), ceil(w / 8), 16 * width) and the same with
      32 * width channels.
    """
    x = self.stem[0](mask_padding(images, sizes), train=train)
    sizes = strided_sizes(sizes, 2)
    for layer in (self.stem[1], self.stem[2]):
      x = layer(mask_padding(x, sizes), train=train)
    # After a ReLU, zero padding equals the -inf padding of max pooling.
    x = max_pool(mask_padding(x, sizes), self.max_pool)
    sizes = strided_sizes(sizes, 2)
    features = []
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
      x = self._run([stage[0]], x, train=train, sizes=sizes)
      sizes = strided_sizes(sizes, stage[0].stride)
      for blocks in [stage[1:]] if self.scan_blocks else [[block] for block in stage[1:]]:
        x = self._run(blocks, x, train=train, sizes=sizes)
      features.append(x)
    return features[2], features[3]

  def _run(
    self, blocks: Sequence[Bottleneck], x: jax.Array, *, train: bool, sizes: jax.Array | None
  ) -> jax.Array:
    """Applies identical bottlenecks in sequence; updates their running statistics in training."""
    if not blocks:
      return x
    graphdef = nnx.graphdef(blocks[0])
    states = [nnx.state(block) for block in blocks]

    def run(x: jax.Array, state: nnx.State) -> tuple[jax.Array, nnx.State | None]:
      block = nnx.merge(graphdef, state, copy=True)
      x = block(x, train=train, sizes=sizes)
      return x, nnx.state(block, nnx.BatchStat) if train else None

    if train:
      kept = None if self.rematerialize else jax.checkpoint_policies.save_only_these_names(*KEPT)
      run = jax.checkpoint(run, policy=kept, prevent_cse=len(blocks) == 1)
    if len(blocks) == 1:
      x, batch_stats = run(x, states[0])
      batch_stats = [batch_stats]
    else:
      x, stacked = jax.lax.scan(run, x, jax.tree.map(lambda *a: jnp.stack(a), *states))
      batch_stats = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(len(blocks))]
    if train:
      for block, state in zip(blocks, batch_stats, strict=True):
        nnx.update(block, state)
    return x
