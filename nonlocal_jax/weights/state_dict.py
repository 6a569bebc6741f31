"""The map between the names in a PyTorch state dict and the arrays of `NonLocalNet`, strict."""

import dataclasses
import difflib
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_MAX_BLOCKS = 66  # of all stages together; ResNet-200 has as many
_MAX_CHANNELS = 1024  # of the input and of the first stage
_MAX_CLASSES = 2**16
# A file of another origin may have any number of names; a message has room for so many.
_MAX_PROBLEMS = 10
# Each missing name is compared with so many of the unknown ones, which takes 0.1 ms each.
_MAX_GUESSES = 100
_SHOWN = 100  # characters of a name


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
    if name.endswith(f'.{_COUNTER}') and array.ndim == 0 and array.dtype.kind == 'i':
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
  stem = state_dict.get('backbone.stem.0.weight', np.empty((0, 3, 3, 3)))
  in_channels = stem.shape[1] if stem.ndim == 4 and stem.shape[1] else 3
  fits = min(blocks) >= 1 and sum(blocks) <= _MAX_BLOCKS and in_channels <= _MAX_CHANNELS
  if not (fits and 2 <= width <= _MAX_CHANNELS and 1 <= num_classes <= _MAX_CLASSES):
    raise UserError(
      f'{source} holds no NonLocalNet: its stages have {blocks} blocks, and it has {in_channels} '
      f'input channels, {width} base channels and {num_classes} classes; give a checkpoint of a '
      'whole segmentation model.'
    )
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
    in_channels=in_channels,
    non_local=any(name.startswith(f'{block}.') for name in state_dict),
    mode=mode,
    reduction=max(8 * width // inner[0], 1) if inner and inner[0] else 2,
    auxiliary_head=any(name.startswith('auxiliary_head.') for name in state_dict),
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
      names ten of them, with the nearest of the unknown names for each that is missing.
  """
  variables = {
    torch_name(path): (path, variable)
    for path, variable in _variables(config)
    if part in (None, path[0])
  }
  unknown = state_dict.keys() - variables.keys() - skipped(state_dict).keys()
  missing = [name for name in variables if name not in state_dict]
  # Comparing takes time in the square of the length.
  candidates = {name: name.split('.') for name in unknown if len(name) <= _SHOWN}
  problems = [f'{name} is missing{_nearest(name, candidates)}' for name in missing[:_MAX_PROBLEMS]]
  problems += [f'{name} is missing' for name in missing[_MAX_PROBLEMS:]]
  filled = {}
  for name, (path, variable) in variables.items():
    if name not in state_dict:
      continue
    array = np.asarray(state_dict[name])
    if array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    if array.shape != variable.shape:
      problems.append(f'{name} gives {str(array.shape)[:_SHOWN]}, expected {variable.shape}')
    elif not jnp.issubdtype(array.dtype, np.floating):
      problems.append(f'{name} gives {array.dtype}, expected floating-point numbers')
    else:
      with np.errstate(over='ignore'):
        array = np.asarray(array, dtype=dtype)
      if np.isfinite(array).all():
        filled[path] = variable.replace(array)
      else:
        problems.append(f'{name} has values that are not finite')
  problems += [f'{shown(name)} is unknown' for name in sorted(unknown)]
  if problems:
    left = len(problems) - _MAX_PROBLEMS
    problems[_MAX_PROBLEMS:] = [f'and {left} more'] if left > 0 else []
    raise UserError(f'{source} does not fit NonLocalNet ({config}): {"; ".join(problems)}.')
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


def _variables(config: NonLocalNetConfig) -> Iterator[tuple[Path, nnx.Variable]]:
  """Paths and shapes of a network's arrays.

  All blocks of a stage but the first are alike, so two of each are built: a network of the names in
  a file costs time before it is known whether the file has its arrays.
  """
  two = tuple(min(count, 2) for count in config.stage_blocks)
  for path, variable in nnx.to_flat_state(
    state_shapes(dataclasses.replace(config, stage_blocks=two))
  ):
    yield path, variable
    match path:
      case ('backbone', str() as stage, 1, *rest) if stage.startswith('layer'):
        for index in range(2, config.stage_blocks[int(stage.removeprefix('layer')) - 1]):
          yield ('backbone', stage, index, *rest), variable


def _nearest(name: str, candidates: Mapping[str, Sequence[str]]) -> str:
  parts = set(name.split('.'))
  likely = heapq.nsmallest(
    _MAX_GUESSES,
    candidates,
    key=lambda other: (len(parts.symmetric_difference(candidates[other])), other),
  )
  near = difflib.get_close_matches(name, likely, n=1)
  return f' (nearest: {shown(near[0])})' if near else ''


def shown(name: str) -> str:
  """A name from a file as it may stand in a message: short and printable."""
  return name if len(name) <= _SHOWN and name.isprintable() else ascii(name[:_SHOWN])
