"""Layers with the padding, initialization and statistics of the released checkpoints."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nonlocal_jax.models.config import BatchNormMode, Execution, NonLocalNetConfig
from nonlocal_jax.ops.convolution import Convolution, convolution_function

# Names of the residuals that `jax.checkpoint` saves; everything else is cheap to recompute.
KEPT = ('convolved', 'batch_statistics')

KAIMING_FAN_OUT = nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def conv(
  in_channels: int,
  out_channels: int,
  kernel: int,
  *,
  stride: int = 1,
  dilation: int = 1,
  use_bias: bool = False,
  kernel_init: nnx.initializers.Initializer = KAIMING_FAN_OUT,
  convolution: Convolution = 'direct',
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """Returns a square 2-D convolution with the padding of the released checkpoints.

  The padding is `dilation * (kernel - 1) / 2` zeros on each side, which differs from 'SAME' at
  stride 2. The float32 weights are cast to the dtype of the input.

  Args:
    in_channels: Number of input channels.
    out_channels: Number of output channels.
    kernel: Edge length of the kernel, odd.
    stride: Step between outputs, in input pixels.
    dilation: Step between kernel taps, in input pixels.
    use_bias: Whether to add a bias, initialized to zero.
    kernel_init: Initializer of the (kernel, kernel, in_channels, out_channels) float32 kernel.
    convolution: Implementation, see `ops.convolution.convolution_function`.
    rngs: Source of the initial values.

  Returns:
    A convolution from (n, h, w, in_channels) to (n, ceil(h / stride), ceil(w / stride),
    out_channels).
  """
  pad = dilation * (kernel // 2)
  return nnx.Conv(
    in_channels,
    out_channels,
    (kernel, kernel),
    strides=stride,
    kernel_dilation=dilation,
    padding=((pad, pad), (pad, pad)),
    use_bias=use_bias,
    kernel_init=kernel_init,
    conv_general_dilated=convolution_function(convolution),
    promote_dtype=_as_the_input,
    rngs=rngs,
  )


def _as_the_input(arrays: Any, **_) -> Any:
  """Casts all arrays to the dtype of the first; leaves None as it is."""
  dtype = arrays[0].dtype
  return tuple(array if array is None else array.astype(dtype) for array in arrays)


class BatchNorm(nnx.Module):
  """Batch normalization over (n, h, w) with the running statistics of PyTorch.

  Training normalizes with the biased variance of the batch and updates the running variance with
  the unbiased one, which is `n / (n - 1)` times as large. `torch.nn.BatchNorm2d` does the same,
  `flax.nnx.BatchNorm` does not. If the batch is sharded under `jax.jit`, statistics are those of
  the global batch (SyncBN). They are computed in float32 or wider.

  Attributes:
    scale: (channels,) float32.
    bias: (channels,) float32.
    mean: (channels,) float32, running mean.
    var: (channels,) float32, running unbiased variance.
    mode: See `Execution.batch_norm`.
    groups: Number of equal parts of the batch that are normalized separately in training; running
      statistics are updated with the mean over the parts. One per device avoids communication.
  """

  def __init__(
    self,
    channels: int,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    mode: BatchNormMode = 'global',
    groups: int = 1,
  ):
    """Initializes scale and variance to one, bias and mean to zero.

    Args:
      channels: Size of the last axis of the input.
      epsilon: Constant added to the variance.
      momentum: Decay rate of the running statistics in [0, 1], as in `nnx.BatchNorm`.
      mode: See the class.
      groups: See the class.
    """
    self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
    self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
    self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))
    self.epsilon = epsilon
    self.momentum = momentum
    self.mode = mode
    self.groups = groups

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Normalizes x, (n, h, w, channels); in training also updates the running statistics."""
    if self.mode == 'folded':
      assert not train
      return x + self.bias[...].astype(x.dtype)
    x = checkpoint_name(x, 'convolved')
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if train and self.mode != 'frozen':
      mean, var = batch_statistics(wide, self.groups)  # (groups, channels)
      count = wide.size // (self.groups * x.shape[-1])
      unbiased = var * (count / max(count - 1, 1))
      for running, batch in ((self.mean, mean), (self.var, unbiased)):
        batch = jnp.mean(batch, axis=0)
        running[...] = self.momentum * running[...] + (1 - self.momentum) * batch
      wide = wide.reshape(self.groups, -1, *x.shape[1:])
      mean, var = mean[:, None, None, None], var[:, None, None, None]
    else:
      mean, var = self.mean[...], self.var[...]
    factor = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
    factor = checkpoint_name(factor, 'batch_statistics')
    return ((wide - mean) * factor + self.bias[...]).reshape(x.shape).astype(x.dtype)

  def fold(self) -> jax.Array:
    """Sets the bias to the offsets of the normalization and returns its factors.

    Returns:
      (channels,) float32, by which the kernel of the preceding convolution must be multiplied.
    """
    factor = jax.lax.rsqrt(self.var[...] + self.epsilon) * self.scale[...]
    self.bias[...] = self.bias[...] - self.mean[...] * factor
    return factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def batch_statistics(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Computes mean and biased variance of each channel in one pass over `x`.

  Each sample is shifted by one of its values, and the statistics of the samples are combined as in
  Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983. This is as accurate
  as a second pass and needs only one collective.

  Args:
    x: (n, h, w, channels) floats.
    groups: Number of equal parts of the batch, each with its own statistics.

  Returns:
    Mean and variance, (groups, channels) each.
  """
  shift = jax.lax.stop_gradient(x[:, :1, :1])  # (n, 1, 1, channels)
  shifted = x - shift
  # Row by row, which keeps a GPU busy: over all pixels of a sample at once, XLA finds too little to
  # do in parallel, and stores what is summed to compute it with more threads.
  mean, square = (jnp.mean(jnp.mean(x, axis=2), axis=1) for x in (shifted, jnp.square(shifted)))
  var = square - jnp.square(mean)
  of_samples = jnp.stack([mean + shift[:, 0, 0], var]).reshape(2, groups, -1, x.shape[-1])
  mesh = jax.sharding.get_abstract_mesh()
  is_auto = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
  if groups == 1 and not mesh.empty and mesh.size > 1 and is_auto:
    of_samples = jax.lax.with_sharding_constraint(of_samples, jax.sharding.PartitionSpec())
  means, variances = of_samples
  mean = jnp.mean(means, axis=1)
  between = jnp.mean(jnp.square(means - mean[:, None]), axis=1)
  return mean, jnp.mean(variances, axis=1) + between


@batch_statistics.defjvp
def _batch_statistics_jvp(groups, primals, tangents):
  (x,), (dx,) = primals, tangents
  mean, var = (checkpoint_name(y, 'batch_statistics') for y in batch_statistics(x, groups))
  in_groups = (groups, -1, *x.shape[1:])
  x, dx = x.reshape(in_groups), dx.reshape(in_groups)
  deviation = x - mean[:, None, None, None]
  over = (1, 2, 3)
  return (mean, var), (jnp.mean(dx, over), 2 * jnp.mean(deviation * dx, over))


@dataclasses.dataclass(frozen=True)
class LayerFactory:
  """Creates the layers of a network with shared options.

  Attributes:
    convolution: See `Execution.convolution`.
    epsilon: See `BatchNorm`.
    momentum: See `BatchNorm`.
    batch_norm: See `Execution.batch_norm`.
    groups: See `BatchNorm`.
  """

  convolution: Convolution
  epsilon: float
  momentum: float
  batch_norm: BatchNormMode
  groups: int

  @classmethod
  def from_config(cls, config: NonLocalNetConfig, execution: Execution) -> Self:
    """Creates the factory of a network's layers."""
    return cls(
      convolution=execution.convolution,
      epsilon=config.batch_norm_epsilon,
      momentum=config.batch_norm_momentum,
      batch_norm=execution.batch_norm,
      groups=execution.batch_norm_groups,
    )

  def conv(self, in_channels: int, out_channels: int, kernel: int, **options) -> nnx.Conv:
    """Returns a convolution, see the function `conv`."""
    return conv(in_channels, out_channels, kernel, convolution=self.convolution, **options)

  def norm(self, channels: int) -> BatchNorm:
    """Returns a batch normalization, see `BatchNorm`."""
    return BatchNorm(
      channels,
      epsilon=self.epsilon,
      momentum=self.momentum,
      mode=self.batch_norm,
      groups=self.groups,
    )

  def conv_norm(self, in_channels: int, out_channels: int, kernel: int, **options) -> 'ConvNorm':
    """Returns a convolution with batch normalization, see `ConvNorm`."""
    return ConvNorm(in_channels, out_channels, kernel, layers=self, **options)


class ConvNorm(nnx.Module):
  """Convolution without bias, batch normalization and optional ReLU (mmcv `ConvModule`)."""

  NORMALIZED = (('conv', 'bn'),)

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    relu: bool = True,
    layers: LayerFactory,
    rngs: nnx.Rngs,
  ):
    """Initializes the layers; see `conv` for the arguments. `relu` adds the activation."""
    self.conv = layers.conv(in_channels, out_channels, kernel, stride=stride, rngs=rngs)
    self.bn = layers.norm(out_channels)
    self.relu = relu

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """(n, h, w, in_channels) -> (n, ceil(h / stride), ceil(w / stride), out_channels)."""
    x = self.bn(self.conv(x), train=train)
    return jax.nn.relu(x) if self.relu else x
