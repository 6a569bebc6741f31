"""The map between the names in a PyTorch state dict and the arrays of `NonLocalNet`, strict."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes

Path = tuple[Any, ...]  # names and indices

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


def infer_config(state_dict: Mapping[str, np.ndarray], *, source: str) -> NonLocalNetConfig:
  """Reads what a network is off the names and shapes of a PyTorch state dict.

  What they do not tell has its default, `align_corners` above all.

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
  stem = state_dict.get('backbone.stem.0.weight', np.empty((0, 3, 3, 3)))
  block = 'decode_head.nl_block'
  inner = state_dict.get(f'{block}.g.conv.weight', np.empty(0)).shape[:1]
  mode = 'embedded_gaussian'
  if f'{block}.g.conv.weight' in state_dict and f'{block}.theta.conv.weight' not in state_dict:
    mode = 'gaussian'
  elif f'{block}.concat_project.conv.weight' in state_dict:
    mode = 'concatenation'
  return NonLocalNetConfig(
    stage_blocks=tuple(blocks),
    width=width,
    num_classes=num_classes,
    in_channels=stem.shape[1] if stem.ndim == 4 and stem.shape[1] else 3,
    non_local=any(name.startswith(f'{block}.') for name in state_dict),
    mode=mode,
    reduction=max(8 * width // inner[0], 1) if inner and inner[0] else 2,
  )


def from_state_dict(
  state_dict: Mapping[str, np.ndarray],
  config: NonLocalNetConfig,
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
    config: The network to fill.
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
    for path, variable in nnx.to_flat_state(state_shapes(config))
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
    raise UserError(f'{source} does not fit NonLocalNet ({config}): {"; ".join(problems)}{more}.')
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
