"""Configuration of a network: its architecture, and how it is computed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import jax

from nonlocal_jax.errors import UserError
from nonlocal_jax.ops.attention import Attention, check_attention, fastest_attention
from nonlocal_jax.ops.convolution import Convolution
from nonlocal_jax.ops.pooling import MaxPool
from nonlocal_jax.protocol import with_plain_numbers
from nonlocal_jax.runtime.parallel import Platform, platform_of

STAGE_BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

Mode = Literal['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation']
BatchNormMode = Literal['global', 'per_device', 'frozen', 'folded']
PixelLoss = Literal['row_blocks', 'reductions']

# Fields that do not affect logits.
_TRAINING_ONLY = ('dropout', 'zero_init', 'batch_norm_momentum', 'auxiliary_head', 'threshold')


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonLocalNetConfig:
  """Architecture of a network; saved with its weights.

  Attributes:
    stage_blocks: Number of bottlenecks in each stage of the backbone.
    num_classes: Number of classes of both heads.
    width: Base width: stage s has `width * 2**s` planes. 64 in the released models.
    in_channels: Number of channels of the input.
    stage_strides: Stride of the first bottleneck of each stage.
    stage_dilations: Dilation of the 3x3 convolutions of each stage.
    contract_dilation: Whether the first bottleneck of a stage has half the stage's dilation.
    non_local: Whether the decode head has the non-local block.
    mode: The block's pairwise function, see `NonLocalBlock`.
    use_scale: Whether the embedded Gaussian divides by the square root of the inner channels.
    reduction: Ratio of the block's input channels to its inner channels.
    align_corners: Whether logits are upsampled with aligned corners, as in the released 769x769
      models, or with half-pixel centers.
    dropout: Dropout rate of the channels before the classifiers, in [0, 1).
    zero_init: Whether the non-local block is the identity at initialization.
    batch_norm_epsilon: Constant added to variances.
    batch_norm_momentum: Decay rate of the running statistics, as in `nnx.BatchNorm`.
    auxiliary_head: Whether there is an auxiliary head, which only training uses.
    threshold: Of two classes that come from one output channel, the probability of the second
      from which on it was predicted; None for all other networks.
  """

  stage_blocks: tuple[int, ...]
  num_classes: int
  width: int = 64
  in_channels: int = 3
  stage_strides: tuple[int, ...] = (1, 2, 1, 1)
  stage_dilations: tuple[int, ...] = (1, 1, 2, 4)
  contract_dilation: bool = True
  non_local: bool = True
  mode: Mode = 'embedded_gaussian'
  use_scale: bool = True
  reduction: int = 2
  align_corners: bool = False
  dropout: float = 0.1
  zero_init: bool = True
  batch_norm_epsilon: float = 1e-5
  batch_norm_momentum: float = 0.9
  auxiliary_head: bool = True
  threshold: float | None = None

  def __post_init__(self):
    """Checks the ranges of the fields.

    Raises:
      ValueError: If there are not four stages, a field has a value for more or fewer, or a value is
        out of range.
    """
    with_plain_numbers(self)
    for name in ('stage_blocks', 'stage_strides', 'stage_dilations'):
      value = getattr(self, name)
      if len(value) != 4 or not all(type(number) is int and number >= 1 for number in value):
        raise ValueError(f'{name} is {value}, expected four positive numbers, one for each stage')
    least = {'num_classes': 1, 'width': 2, 'in_channels': 1, 'reduction': 1}
    for name, minimum in least.items():
      value = getattr(self, name)
      if type(value) is not int or value < minimum:
        raise ValueError(f'{name} is {value}, expected a number of at least {minimum}')
    if not 0 < self.batch_norm_epsilon < math.inf:
      raise ValueError(
        f'batch_norm_epsilon is {self.batch_norm_epsilon}, expected a positive number'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout is {self.dropout}, expected a number in [0, 1)')
    if self.mode not in get_args(Mode):
      raise ValueError(f'mode is {self.mode!r}, expected one of {", ".join(get_args(Mode))}')

  @classmethod
  def from_depth(cls, depth: int, **fields: Any) -> Self:
    """Creates the config of a network whose backbone is a ResNet of `depth` layers.

    Args:
      depth: 14, 26, 50 or 101.
      **fields: The other fields; `num_classes` is required.

    Raises:
      UserError: If `depth` is unknown.
    """
    if depth not in STAGE_BLOCKS:
      raise UserError(f'depth is {depth}; it must be one of {", ".join(map(str, STAGE_BLOCKS))}.')
    return cls(stage_blocks=STAGE_BLOCKS[depth], **fields)

  @property
  def depth(self) -> int:
    """Number of layers in the name of the backbone: three per bottleneck, stem, classifier."""
    return 3 * sum(self.stage_blocks) + 2

  @property
  def output_stride(self) -> int:
    """Stride of the backbone's last features, in input pixels."""
    stride = 4  # stem and max pooling
    for stage_stride in self.stage_strides:
      stride *= stage_stride
    return stride

  @property
  def block_channels(self) -> int:
    """Number of input channels of the non-local block."""
    return 8 * self.width

  @property
  def inner_channels(self) -> int:
    """Number of inner channels of the non-local block; 0 without the block."""
    return max(self.block_channels // self.reduction, 1) if self.non_local else 0

  def predicts_like(self, other: 'NonLocalNetConfig') -> bool:
    """Whether two configs differ only in fields that do not affect logits."""
    return not self.differences(other)

  def differences(self, other: 'NonLocalNetConfig') -> list[str]:
    """Lists the fields that affect logits and differ, as in 'width 64, not 32'."""
    return [
      f'{field.name} {getattr(self, field.name)}, not {getattr(other, field.name)}'
      for field in dataclasses.fields(self)
      if field.name not in _TRAINING_ONLY
      and getattr(self, field.name) != getattr(other, field.name)
    ]

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON-compatible values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Creates a config from the result of `to_dict`; missing fields take their defaults.

    Raises:
      TypeError: If a field is unknown, or `stage_blocks` or `num_classes` is missing.
    """
    values: dict[str, Any] = {
      name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
    }
    return cls(**values)

  def __str__(self) -> str:
    """Returns a summary such as 'R-50, width 64, 19 classes'."""
    without = '' if self.non_local else ', without the non-local block'
    channels = '' if self.in_channels == 3 else f', {self.in_channels} input channels'
    return f'R-{self.depth}, width {self.width}, {self.num_classes} classes{channels}{without}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a network is computed: the trade-offs between speed and memory on a kind of device.

  It is not saved with the weights: weights of a run on GPUs load on a CPU.

  Attributes:
    convolution: Implementation of convolutions, see `ops.convolution.convolution_function`.
    attention: Implementation of the embedded Gaussian: in 'blocks' of queries and keys, or as one
      kernel ('cudnn' or 'flash'), see `ops.attention.cudnn_attention` and
      `ops.flash_attention.flash_attention`.
    pairwise_weights: Maximum number of pairwise weights of the non-local block in memory, over the
      whole batch.
    query_block: Number of queries per block; None for as many as `pairwise_weights` allows.
    key_block: Maximum number of keys per block of the softmax; None for all keys.
    rematerialize: Whether the backward pass recomputes all activations inside each bottleneck,
      which saves memory and takes a third more time.
    scan_blocks: Whether the identical bottlenecks of a stage run in one `jax.lax.scan`, so that
      they are compiled once.
    batch_norm: Statistics that batch normalization uses in training: those of the 'global' batch
      (SyncBN), those of each device's share of it ('per_device'), or the running statistics, which
      are not updated ('frozen'). 'folded' is for prediction only: the scales are part of the
      preceding convolutions, see `folding.fold_batch_norms`.
    batch_norm_groups: Number of equal parts of the batch that 'per_device' normalizes separately,
      which is the number of devices.
    pixel_loss: Implementation of the loss of upsampled logits, see `training.loss.pixel_losses`.
    max_pool: Implementation of the gradient of max pooling, see `ops.pooling.max_pool`.
    scores_at_once: Maximum number of class scores at image size that a device holds in prediction.
    deterministic: Whether programs give the same bits in every process on GPUs of one kind; they
      are slower, because no algorithm is chosen by trials. On CPUs and TPUs all programs do.
  """

  convolution: Convolution = 'direct'
  attention: Attention = 'blocks'
  pairwise_weights: int = 2**24  # 64 MiB in float32
  query_block: int | None = None
  key_block: int | None = None
  rematerialize: bool = False
  scan_blocks: bool = False
  batch_norm: BatchNormMode = 'global'
  batch_norm_groups: int = 1
  pixel_loss: PixelLoss = 'row_blocks'
  max_pool: MaxPool = 'scatter'
  scores_at_once: int = 2**22
  deterministic: bool = False

  def __post_init__(self):
    """Checks the literals, which may come from a config at run time.

    Raises:
      ValueError: If `attention`, `batch_norm`, `convolution`, `max_pool` or `pixel_loss` is
        unknown.
    """
    choices = {
      'attention': Attention,
      'batch_norm': BatchNormMode,
      'convolution': Convolution,
      'max_pool': MaxPool,
      'pixel_loss': PixelLoss,
    }
    for name, literal in choices.items():
      if getattr(self, name) not in get_args(literal):
        expected = ', '.join(get_args(literal))
        raise ValueError(f'{name} is {getattr(self, name)!r}, expected one of {expected}')

  @classmethod
  def for_platform(cls, platform: Platform | None = None, **overrides: Any) -> Self:
    """Returns the fastest settings for a platform.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'; None for that of JAX's default backend.
      **overrides: Fields to set to other values.
    """
    platform = platform_of() if platform is None else platform
    return cls(**{**_DEFAULTS.get(platform, {}), **overrides})


def chosen_attention(
  attention: Attention | Literal['auto'],
  config: NonLocalNetConfig,
  devices: Sequence[jax.Device],
  *,
  precision: str | None,
  train: bool,
) -> Attention:
  """Returns the attention implementation to use.

  Args:
    attention: See `Execution.attention`; 'auto' for the fastest, see `fastest_attention`.
    config: The network.
    devices: The devices that share a batch.
    precision: Matmul precision, see `jax_default_matmul_precision`.
    train: Whether gradients are needed.

  Raises:
    UserError: If the network or the devices do not support it.
    ValueError: If it is unknown.
  """
  if attention not in (*get_args(Attention), 'auto'):
    expected = ', '.join((*get_args(Attention), 'auto'))
    raise ValueError(f'attention is {attention!r}, expected one of {expected}')
  fits = config.non_local and config.mode == 'embedded_gaussian'
  if attention == 'auto':
    if not fits:
      return 'blocks'
    return fastest_attention(config.inner_channels, devices, precision=precision, train=train)
  if attention != 'blocks' and not fits:
    raise UserError(
      f'attention is {attention}, which computes the embedded Gaussian, and this network does not '
      'have it; leave it at blocks.'
    )
  check_attention(attention, config.inner_channels, devices[0])
  return attention


_DEFAULTS: Mapping[Platform, Mapping[str, Any]] = {
  'cpu': {
    'convolution': 'matmul',
    # Small enough that pairwise weights, a block's keys and scores stay in the cache.
    'pairwise_weights': 2**21,
    'key_block': 4096,
    'scores_at_once': 2**21,
    # A scan also keeps XLA from merging recomputed values with the original ones (CSE).
    'scan_blocks': True,
  },
  'gpu': {
    'convolution': 'sub_images',
    'pixel_loss': 'reductions',
    'max_pool': 'selections',
    'scores_at_once': 2**26,
  },
  'tpu': {'pixel_loss': 'reductions'},
}
