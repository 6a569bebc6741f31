"""The map between the names in a PyTorch state dict and the arrays of `NonLocalNet`, strict."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNet
from nonlocal_jax.models.resnet import STAGE_BLOCKS

Path = tuple[str | int, ...]

# Paths of modules that are called otherwise in the checkpoints; the first that matches counts.
_MODULE_NAMES = (
  (r'backbone\.stem\.(\d)\.conv', lambda m: f'backbone.stem.{3 * int(m[1])}'),
  (r'backbone\.stem\.(\d)\.bn', lambda m: f'backbone.stem.{3 * int(m[1]) + 1}'),
  (r'(.*)\.downsample\.conv', r'\1.downsample.0'),
  (r'(.*)\.downsample\.bn', r'\1.downsample.1'),
  (r'(.*)\.nl_block\.bn', r'\1.nl_block.conv_out.bn'),
  (r'(.*)\.nl_block\.(\w+)', r'\1.nl_block.\2.conv'),
)
_LEAF_NAMES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
# PyTorch counts training batches in each BatchNorm; nothing reads the counter.
_IGNORED = re.compile(r'.*\.num_batches_tracked')


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the shapes of a network's weights tell about it.

  Attributes:
    stage_blocks: Bottlenecks in each stage of the backbone.
    width: Base channels.
    num_classes: Classes of the heads.
    non_local: Whether the decode head has the non-local block.
  """

  stage_blocks: tuple[int, ...]
  width: int
  num_classes: int
  non_local: bool = True

  @classmethod
  def of_depth(
    cls, depth: int, *, width: int, num_classes: int, non_local: bool = True
  ) -> 'Architecture':
    """The architecture with the blocks per stage of a backbone of `depth` layers.

    Raises:
      UserError: If `depth` is unknown.
    """
    if depth not in STAGE_BLOCKS:
      raise UserError(
        f'config.model.depth is {depth}; it must be one of {", ".join(map(str, STAGE_BLOCKS))}.'
      )
    return cls(STAGE_BLOCKS[depth], width, num_classes, non_local)

  @property
  def depth(self) -> int:
    """Layers of the backbone, as in its name: three a bottleneck, stem and classifier."""
    return 3 * sum(self.stage_blocks) + 2

  def __str__(self) -> str:
    """E.g. 'R-50, width 64, 19 classes'."""
    without = '' if self.non_local else ', without the non-local block'
    return f'R-{self.depth}, width {self.width}, {self.num_classes} classes{without}'

  def build(
    self,
    *,
    align_corners: bool = False,
    dropout: float = 0.1,
    zero_init: bool = True,
    rngs: nnx.Rngs,
  ) -> NonLocalNet:
    """Makes the network with initial weights; see `NonLocalNet` for the arguments."""
    return NonLocalNet(
      self.num_classes,
      stage_blocks=self.stage_blocks,
      width=self.width,
      non_local=self.non_local,
      align_corners=align_corners,
      dropout=dropout,
      zero_init=zero_init,
      rngs=rngs,
    )

  def abstract(self, *, align_corners: bool = False, dropout: float = 0.1) -> NonLocalNet:
    """The network with shapes in place of arrays; costs no memory."""
    return nnx.eval_shape(
      lambda: self.build(align_corners=align_corners, dropout=dropout, rngs=nnx.Rngs(0))
    )


def torch_name(path: Path) -> str:
  """Name in a PyTorch state dict of the array at `path` in a `NonLocalNet` state."""
  *modules, leaf = path
  module = '.'.join(map(str, modules))
  for pattern, replacement in _MODULE_NAMES:
    renamed, count = re.subn(f'^{pattern}$', replacement, module)
    if count:
      module = renamed
      break
  return f'{module}.{_LEAF_NAMES[str(leaf)]}'


def infer_architecture(state_dict: Mapping[str, np.ndarray], *, source: str) -> Architecture:
  """Reads the architecture off the names and shapes of a PyTorch state dict.

  Args:
    state_dict: Arrays by name.
    source: What to call it in errors, usually the path of its file.

  Raises:
    UserError: If it is not the state dict of a NonLocalNet.
  """
  needed = ('backbone.layer1.0.conv1.weight', 'decode_head.conv_seg.weight')
  missing = [name for name in needed if name not in state_dict]
  if missing:
    raise UserError(
      f'{source} holds no NonLocalNet: {" and ".join(missing)} not among its '
      f'{len(state_dict)} arrays; '
      'give a checkpoint of a whole segmentation model.'
    )
  blocks = []
  for stage in range(1, 5):
    pattern = re.compile(rf'backbone\.layer{stage}\.(\d+)\.')
    blocks.append(len({m[1] for name in state_dict if (m := pattern.match(name))}))
  return Architecture(
    stage_blocks=tuple(blocks),
    width=state_dict['backbone.layer1.0.conv1.weight'].shape[0],
    num_classes=state_dict['decode_head.conv_seg.weight'].shape[0],
    non_local=any(name.startswith('decode_head.nl_block.') for name in state_dict),
  )


def from_state_dict(
  state_dict: Mapping[str, np.ndarray],
  architecture: Architecture,
  *,
  source: str,
  dtype: type = np.float32,
) -> nnx.State:
  """Arranges the arrays of a PyTorch state dict as the state of a `NonLocalNet`.

  Args:
    state_dict: Arrays by name, kernels as (out, in, h, w).
    architecture: The network to fill.
    source: What to call the state dict in errors.
    dtype: Of the result.

  Returns:
    The state, kernels as (h, w, in, out).

  Raises:
    UserError: If an array is missing, unknown or of another shape; the message names all of them.
  """
  abstract = nnx.state(architecture.abstract())
  unused = {name for name in state_dict if not _IGNORED.fullmatch(name)}
  problems, filled = [], {}
  for path, variable in nnx.to_flat_state(abstract):
    name = torch_name(path)
    if name not in state_dict:
      problems.append(f'{name} is missing')
      continue
    unused.discard(name)
    array = np.asarray(state_dict[name])
    if array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    if array.shape != variable.shape:
      problems.append(f'{name} gives {array.shape}, expected {variable.shape}')
      continue
    filled[path] = variable.replace(np.ascontiguousarray(array, dtype=dtype))
  problems += [f'{name} is unknown' for name in sorted(unused)]
  if problems:
    raise UserError(f'{source} does not fit NonLocalNet ({architecture}): {"; ".join(problems)}.')
  return nnx.from_flat_state(filled)


def to_state_dict(state: nnx.State) -> dict[str, np.ndarray]:
  """The inverse of `from_state_dict`, but for the batch counters: arrays by name."""
  state_dict = {}
  for path, variable in nnx.to_flat_state(state):
    array = np.asarray(variable.get_value())
    state_dict[torch_name(path)] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
  return state_dict
