"""What a network is, saved with its weights, and how it is computed, never saved."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from nonlocal_jax.errors import UserError
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.ops.convolution import Convolution
from nonlocal_jax.runtime.parallel import Platform, platform_of

STAGE_BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

Mode = Literal['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation']
BatchNormMode = Literal['global', 'per_device', 'frozen', 'folded']
PixelLoss = Literal['row_blocks', 'reductions']

# Fields that make no difference to a network's predictions.
_OF_TRAINING = ('dropout', 'zero_init', 'batch_norm_momentum')


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonLocalNetConfig:
  """What makes a network what it is.

  Attributes:
    stage_blocks: Bottlenecks in each stage of the backbone.
    num_classes: Classes of both heads.
    width: Base channels: stage s has `width * 2**s` planes. 64 in the released models.
    in_channels: Channels of the input.
    stage_strides: Stride of the first bottleneck of each stage.
    stage_dilations: Dilation of the 3x3 convolutions of each stage.
    contract_dilation: Whether the first bottleneck of a stage has half the dilation of the others.
    non_local: Whether the decode head has the non-local block.
    mode: The block's pairwise function, see `NonLocalBlock`.
    use_scale: Whether the embedded Gaussian divides by the square root of the inner channels.
    reduction: Channels of the block's input per inner channel.
    align_corners: Whether logits are upsampled corner on corner, as in the released 769x769 models,
      or with half-pixel centers.
    dropout: Rate at which channels are dropped before the classifiers, in [0, 1).
    zero_init: Whether the non-local block starts as the identity.
    batch_norm_epsilon: Added to variances.
    batch_norm_momentum: Weight of the old value in the running statistics, as in `nnx.BatchNorm`.
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

  def __post_init__(self):
    """Checks the shape of the backbone.

    Raises:
      ValueError: If there are not four stages, or a field has a value for more or fewer.
    """
    for name in ('stage_blocks', 'stage_strides', 'stage_dilations'):
      value = getattr(self, name)
      if len(value) != 4 or min(value) < 1:
        raise ValueError(f'{name} is {value}, expected four positive numbers, one for each stage')

  @classmethod
  def from_depth(cls, depth: int, **fields: Any) -> Self:
    """A config with the blocks per stage of a ResNet of `depth` layers.

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
    """Layers of the backbone, as in its name: three per bottleneck, stem and classifier."""
    return 3 * sum(self.stage_blocks) + 2

  @property
  def output_stride(self) -> int:
    """Pixels of the input per feature, along each axis."""
    stride = 4  # of the stem and the pooling
    for of_stage in self.stage_strides:
      stride *= of_stage
    return stride

  @property
  def block_channels(self) -> int:
    """Channels of the non-local block's input."""
    return 8 * self.width

  @property
  def inner_channels(self) -> int:
    """Channels in which the non-local block, if there is one, compares positions; else 0."""
    return max(self.block_channels // self.reduction, 1) if self.non_local else 0

  def predicts_like(self, other: 'NonLocalNetConfig') -> bool:
    """Whether the same weights give the same predictions: only what matters in training differs."""
    fields = {name: getattr(other, name) for name in _OF_TRAINING}
    return dataclasses.replace(self, **fields) == other

  def to_dict(self) -> dict[str, Any]:
    """The fields as values that JSON can hold."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Reads what `to_dict` wrote; a field that is missing takes its default.

    Raises:
      TypeError: If there is no such field, or `stage_blocks` or `num_classes` is missing.
    """
    values: dict[str, Any] = {
      name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
    }
    return cls(**values)

  def __str__(self) -> str:
    """E.g. 'R-50, width 64, 19 classes'."""
    without = '' if self.non_local else ', without the non-local block'
    channels = '' if self.in_channels == 3 else f', {self.in_channels} input channels'
    return f'R-{self.depth}, width {self.width}, {self.num_classes} classes{channels}{without}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a network is computed: on which kind of device, and with how much memory.

  Weights know nothing of it; those of a run on GPUs load on a CPU.

  Attributes:
    convolution: How convolutions are computed, see `ops.convolution.convolution_function`.
    attention: How the embedded Gaussian is computed: in 'blocks' of queries and keys, or in one
      kernel by 'cudnn' or 'flash', see `ops.attention.cudnn_attention` and
      `ops.flash_attention.flash_attention`.
    pairwise_weights: Pairwise weights of the non-local block held at a time, over the whole batch.
    query_block: Queries processed at a time; None for as many as `pairwise_weights` allow.
    key_block: Most keys processed at a time by a softmax in blocks; None for all.
    rematerialize: Whether the backward pass recomputes the whole inside of each bottleneck: less
      memory, a third more time.
    scan_blocks: Whether the equal bottlenecks of a stage are one `jax.lax.scan`, compiled once.
    batch_norm: What batch normalization normalizes with in training: statistics of the 'global'
      batch (SyncBN), of each device's part of it ('per_device'), or the running statistics, which
      then stay as they are ('frozen'). 'folded' is for prediction only: scales are in the
      convolutions before, see `folding.fold_batch_norms`.
    batch_norm_groups: Equal parts of the batch that 'per_device' normalizes separately: the number
      of devices.
    pixel_loss: How the loss of upsampled logits is computed, see `training.loss.pixel_losses`.
    scores_at_once: Class scores at image size that a device holds in prediction.
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
  scores_at_once: int = 2**22

  def __post_init__(self):
    """Checks choices that no type checker has seen.

    Raises:
      ValueError: If `attention`, `batch_norm`, `convolution` or `pixel_loss` is unknown.
    """
    choices = {
      'attention': Attention,
      'batch_norm': BatchNormMode,
      'convolution': Convolution,
      'pixel_loss': PixelLoss,
    }
    for name, literal in choices.items():
      if getattr(self, name) not in get_args(literal):
        expected = ', '.join(get_args(literal))
        raise ValueError(f'{name} is {getattr(self, name)!r}, expected one of {expected}')

  @classmethod
  def for_platform(cls, platform: Platform | None = None, **overrides: Any) -> Self:
    """What is fastest on a platform.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'; None for that of JAX's default backend.
      **overrides: Fields with other values.
    """
    platform = platform_of() if platform is None else platform
    return cls(**{**_DEFAULTS.get(platform, {}), **overrides})


_DEFAULTS: Mapping[Platform, Mapping[str, Any]] = {
  'cpu': {
    'convolution': 'matmul',
    # So few that pairwise weights, a block's keys and scores stay in the cache.
    'pairwise_weights': 2**21,
    'key_block': 4096,
    'scores_at_once': 2**21,
    # It also keeps the compiler from merging what is recomputed with what was computed first.
    'scan_blocks': True,
  },
  'gpu': {'convolution': 'sub_images', 'pixel_loss': 'reductions', 'scores_at_once': 2**26},
  'tpu': {'pixel_loss': 'reductions'},
}
