"""The map between the names in a PyTorch state dict and the arrays of `NonLocalNet`, strict."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalBlock, NonLocalNet
from nonlocal_jax.models.attention import Attention
from nonlocal_jax.models.convolution import Method, convolution_function
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
_COUNTER = 'num_batches_tracked'
# What may be left in a state dict, and why.
_SKIPPED = (
  (rf'(.*\.)?{_COUNTER}', "PyTorch's counters of training batches"),
  (r'(backbone\.)?fc\..*', 'the classifier of ImageNet'),
)
_MAX_BLOCKS = 100  # of a stage; more is no ResNet
# A file of another origin may have any number of names; a message has room for so many.
_MAX_PROBLEMS = 1000
_MAX_GUESSES = 50  # each compares a name with all unknown ones


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

  @property
  def inner_channels(self) -> int:
    """Channels in which the non-local block, if there is one, compares positions."""
    block = self.abstract().decode_head.nl_block
    return 0 if block is None else block.g.out_features

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

  @functools.cache  # noqa: B019 architectures are small, and few
  def state_shapes(self) -> nnx.State:
    """Parameters and running statistics with shapes in place of arrays; not to be changed."""
    return nnx.state(self.abstract())

  def abstract(
    self,
    *,
    align_corners: bool = False,
    dropout: float = 0.1,
    convolution: Method = 'fast',
    attention: Attention = 'blocks',
    loops: bool = True,
  ) -> NonLocalNet:
    """The network with shapes in place of arrays; costs no memory.

    Args:
      align_corners: See `NonLocalNet`, as for `dropout`.
      dropout: Share of channels dropped.
      convolution: How convolutions are computed, see `models.convolution`.
      attention: How the non-local block computes its softmax, see `NonLocalBlock`.
      loops: Whether equal residual blocks are one loop, see `ResNet`.
    """
    parts = self._abstract_parts(align_corners=align_corners, dropout=dropout)
    model = nnx.merge(*parts, copy=True)
    model.set_attributes(nnx.Conv, conv_general_dilated=convolution_function(convolution))
    if self.non_local:
      model.set_attributes(NonLocalBlock, attention=attention)
    model.backbone.loops = loops
    return model

  @functools.cache  # noqa: B019 see `state_shapes`
  def _abstract_parts(
    self, *, align_corners: bool, dropout: float
  ) -> tuple[nnx.GraphDef[NonLocalNet], nnx.State]:
    return nnx.split(
      nnx.eval_shape(
        lambda: self.build(align_corners=align_corners, dropout=dropout, rngs=nnx.Rngs(0))
      )
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


def skipped(names: Iterable[str]) -> dict[str, str]:
  """Those of the names in a state dict that no network needs, each with the reason."""
  return {
    name: reason for name in names for pattern, reason in _SKIPPED if re.fullmatch(pattern, name)
  }


def tracked_batches(state_dict: Mapping[str, np.ndarray]) -> dict[str, int]:
  """PyTorch's counters of training batches, the largest of each part of the network.

  Args:
    state_dict: Arrays by name.

  Returns:
    E.g. {'backbone': 80000, 'decode_head': 80000}.
  """
  counters: dict[str, int] = {}
  for name, array in state_dict.items():
    part = name.partition('.')[0]
    if name.endswith(f'.{_COUNTER}') and array.ndim == 0 and array.dtype.kind in 'iu':
      counters[part] = max(int(array), counters.get(part, 0))
  return counters


def infer_architecture(state_dict: Mapping[str, np.ndarray], *, source: str) -> Architecture:
  """Reads the architecture off the names and shapes of a PyTorch state dict.

  Args:
    state_dict: Arrays by name.
    source: What to call it in errors, usually the path of its file.

  Raises:
    UserError: If it is not the state dict of a NonLocalNet.
  """
  needed = ('backbone.layer1.0.conv1.weight', 'decode_head.conv_seg.weight')
  missing = [name for name in needed if name not in state_dict or state_dict[name].ndim != 4]
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
  width, num_classes = (state_dict[name].shape[0] for name in needed)
  if not (all(1 <= count <= _MAX_BLOCKS for count in blocks) and width >= 2 and num_classes >= 1):
    raise UserError(
      f'{source} holds no NonLocalNet: its stages have {blocks} blocks, and it has {width} base '
      f'channels and {num_classes} classes; give a checkpoint of a whole segmentation model.'
    )
  return Architecture(
    stage_blocks=tuple(blocks),
    width=width,
    num_classes=num_classes,
    non_local=any(name.startswith('decode_head.nl_block.') for name in state_dict),
  )


def from_state_dict(
  state_dict: Mapping[str, np.ndarray],
  architecture: Architecture,
  *,
  source: str,
  part: str | None = None,
  dtype: type = np.float32,
) -> nnx.State:
  """Arranges the arrays of a PyTorch state dict as the state of a `NonLocalNet`.

  Every array of the network is filled from exactly one of the state dict, and every one of those is
  used or on the short list of what may be left (`skipped`).

  Args:
    state_dict: Arrays by name, kernels as (out, in, h, w).
    architecture: The network to fill.
    source: What to call the state dict in errors.
    part: 'backbone', 'decode_head' or 'auxiliary_head' to fill that alone; None for all.
    dtype: Of the result.

  Returns:
    The state, kernels as (h, w, in, out): views of the state dict's arrays where these have `dtype`
    already.

  Raises:
    UserError: If an array is missing, unknown, of another shape or kind, or not finite; the message
      names all of them, with the nearest of the unknown names for each that is missing.
  """
  variables = {
    torch_name(path): (path, variable)
    for path, variable in nnx.to_flat_state(architecture.state_shapes())
    if part in (None, path[0])
  }
  unknown = state_dict.keys() - variables.keys() - skipped(state_dict).keys()
  missing = [name for name in variables if name not in state_dict]
  problems = [f'{name} is missing{_nearest(name, unknown)}' for name in missing[:_MAX_GUESSES]]
  problems += [f'{name} is missing' for name in missing[_MAX_GUESSES:]]
  filled = {}
  for name, (path, variable) in variables.items():
    if name not in state_dict:
      continue
    array = np.asarray(state_dict[name])
    if array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    if array.shape != variable.shape:
      problems.append(f'{name} gives {array.shape}, expected {variable.shape}')
    elif not jnp.issubdtype(array.dtype, np.floating):
      problems.append(f'{name} gives {array.dtype}, expected floating-point numbers')
    elif not np.isfinite(array).all():
      problems.append(f'{name} has values that are not finite')
    else:
      filled[path] = variable.replace(np.asarray(array, dtype=dtype))
  problems += [f'{_shown(name)} is unknown' for name in sorted(unknown)[:_MAX_PROBLEMS]]
  if problems:
    more = f'; and {len(unknown) - _MAX_PROBLEMS} more' if len(unknown) > _MAX_PROBLEMS else ''
    raise UserError(
      f'{source} does not fit NonLocalNet ({architecture}): {"; ".join(problems)}{more}.'
    )
  return nnx.from_flat_state(filled)


def to_state_dict(
  state: nnx.State, num_batches_tracked: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
  """The inverse of `from_state_dict`: arrays by name.

  Args:
    state: Parameters and running statistics.
    num_batches_tracked: Adds PyTorch's counters of training batches with these values, by part of
      the network, 0 where a part is not named; None leaves them out.
  """
  state_dict = {}
  for path, variable in nnx.to_flat_state(state):
    name, array = torch_name(path), np.asarray(variable.get_value())
    state_dict[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    if num_batches_tracked is not None and name.endswith('.running_var'):
      counter = num_batches_tracked.get(str(path[0]), 0)
      state_dict[f'{name.removesuffix("running_var")}{_COUNTER}'] = np.array(counter, np.int64)
  return state_dict


def _nearest(name: str, candidates: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, sorted(candidates)[:_MAX_PROBLEMS], n=1)
  return f' (nearest: {_shown(near[0])})' if near else ''


def _shown(name: str) -> str:
  return name if name.isprintable() and len(name) <= 200 else ascii(name)[:200]
