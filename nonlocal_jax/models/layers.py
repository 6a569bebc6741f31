"""The layers that the network is made of, with the conventions of the released checkpoints."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nonlocal_jax.models.config import BatchNormMode, Execution, NonLocalNetConfig
from nonlocal_jax.ops.convolution import Convolution, convolution_function

# Names of what `jax.checkpoint` has to keep so that only what is cheap is computed twice.
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
  """A square 2-D convolution padded as in the released checkpoints.

  The padding is `dilation * (kernel - 1) / 2` zeros on each side: at stride 2 this differs from
  'SAME'.

  It computes in the dtype of its input, into which it casts its float32 weights.

  Args:
    in_channels: Channels of the input.
    out_channels: Channels of the output.
    kernel: Edge of the kernel, odd.
    stride: Step between outputs, in input pixels.
    dilation: Step between kernel taps, in input pixels.
    use_bias: Whether to add a bias, initialised with zeros.
    kernel_init: Initialiser of the (kernel, kernel, in_channels, out_channels) float32 array.
    convolution: How it is computed, see `ops.convolution.convolution_function`.
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
  """Casts all to the dtype of the first; None stays."""
  dtype = arrays[0].dtype
  return tuple(array if array is None else array.astype(dtype) for array in arrays)


class BatchNorm(nnx.Module):
  """Batch normalisation over (n, h, w) with PyTorch's running statistics.

  In training the batch is normalised with its biased variance, and the running variance takes the
  unbiased one (`n / (n - 1)` larger), as `torch.nn.BatchNorm2d` does and `flax.nnx.BatchNorm` does
  not. Over a batch that is sharded under `jax.jit` the mean is that of the global batch: SyncBN.
  Statistics are computed in float32 at least, whatever the dtype of the input.

  Attributes:
    scale: (channels,) float32.
    bias: (channels,) float32.
    mean: (channels,) float32, running mean.
    var: (channels,) float32, running unbiased variance.
    mode: See `Execution.batch_norm`.
    groups: Equal parts of the batch that are normalized separately in training; the running
      statistics take their mean. With one for each device nothing is exchanged.
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
    """Starts as the identity on normalized data.

    Args:
      channels: Size of the last axis of the input.
      epsilon: Added to the variance.
      momentum: Weight of the old value in the running statistics, in [0, 1].
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
    """(n, h, w, channels) -> the same; in training by the batch's statistics, which are kept."""
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
    return ((wide - mean) * factor + self.bias[...]).reshape(x.shape).astype(x.dtype)

  def fold(self) -> jax.Array:
    """Keeps the offsets as its bias and leaves the factors to the convolution before it.

    Returns:
      (channels,) float32, what the convolution's kernel is to be multiplied with.
    """
    factor = jax.lax.rsqrt(self.var[...] + self.epsilon) * self.scale[...]
    self.bias[...] = self.bias[...] - self.mean[...] * factor
    return factor


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def batch_statistics(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance of each channel, in one pass over `x`.

  Each sample is summed about one of its own values, and what comes of the samples is put together
  as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983: as exact as a
  second pass, and with one exchange between devices.

  Args:
    x: (n, h, w, channels) floats.
    groups: Equal parts of the batch with statistics of their own.

  Returns:
    Mean and variance, (groups, channels) each.
  """
  shift = jax.lax.stop_gradient(x[:, :1, :1])  # (n, 1, 1, channels)
  shifted = x - shift
  mean = jnp.mean(shifted, axis=(1, 2))
  var = jnp.mean(jnp.square(shifted), axis=(1, 2)) - jnp.square(mean)
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
  """Makes the layers of a network, which share these options.

  Attributes:
    convolution: See `Execution.convolution`.
    epsilon: Of batch normalization, see `BatchNorm`.
    momentum: Of batch normalization.
    batch_norm: See `Execution.batch_norm`.
    groups: Of batch normalization.
  """

  convolution: Convolution
  epsilon: float
  momentum: float
  batch_norm: BatchNormMode
  groups: int

  @classmethod
  def from_config(cls, config: NonLocalNetConfig, execution: Execution) -> Self:
    """The factory of a network."""
    return cls(
      convolution=execution.convolution,
      epsilon=config.batch_norm_epsilon,
      momentum=config.batch_norm_momentum,
      batch_norm=execution.batch_norm,
      groups=execution.batch_norm_groups,
    )

  def conv(self, in_channels: int, out_channels: int, kernel: int, **options) -> nnx.Conv:
    """See `conv`."""
    return conv(in_channels, out_channels, kernel, convolution=self.convolution, **options)

  def norm(self, channels: int) -> BatchNorm:
    """See `BatchNorm`."""
    return BatchNorm(
      channels,
      epsilon=self.epsilon,
      momentum=self.momentum,
      mode=self.batch_norm,
      groups=self.groups,
    )

  def conv_norm(self, in_channels: int, out_channels: int, kernel: int, **options) -> 'ConvNorm':
    """See `ConvNorm`."""
    return ConvNorm(in_channels, out_channels, kernel, layers=self, **options)


class ConvNorm(nnx.Module):
  """Convolution without bias, batch normalization, ReLU if asked for (mmcv `ConvModule`)."""

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
    """See `conv` for the arguments; `relu` switches the activation."""
    self.conv = layers.conv(in_channels, out_channels, kernel, stride=stride, rngs=rngs)
    self.bn = layers.norm(out_channels)
    self.relu = relu

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """(n, h, w, in_channels) -> (n, ceil(h / stride), ceil(w / stride), out_channels)."""
    x = self.bn(self.conv(x), train=train)
    return jax.nn.relu(x) if self.relu else x
