"""What training code puts around the arrays of a network: prefixes, averages, heads of one channel.

Each function returns a state dict as `state_dict.from_state_dict` expects it, and notes for the
user.
"""

import math
from collections.abc import Mapping

import numpy as np

from nonlocal_jax.errors import UserError
from nonlocal_jax.weights.state_dict import shown

Arrays = dict[str, np.ndarray]

# Of `DataParallel` and its kin, `torch.compile`, and Lightning modules; no part of the network is
# called so.
_WRAPPERS = ('module', '_orig_mod', 'model')
_AVERAGE = 'ema_'  # what mmcv's EMAHook puts before a name, with underscores for its dots


def without_wrappers(arrays: Mapping[str, np.ndarray], *, source: str) -> tuple[Arrays, list[str]]:
  """Leaves out the names of wrappers, in any order and at any place.

  Args:
    arrays: Arrays by name.
    source: What to call the file in errors.

  Raises:
    UserError: If two arrays then have the same name.
  """
  renamed: Arrays = {}
  found: dict[str, None] = {}
  for name, array in arrays.items():
    parts = name.split('.')
    kept = '.'.join(part for part in parts if part not in _WRAPPERS)
    found |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
    if kept in renamed:
      raise UserError(
        f'{source} holds {shown(kept)} twice, with and without a prefix such as '
        f'{next(iter(found))}.: save one of the networks alone.'
      )
    renamed[kept] = array
  if not found:
    return renamed, []
  return renamed, [f'Of its names the prefix {" and ".join(f"{x}." for x in found)} was left out.']


def choose_average(
  arrays: Mapping[str, np.ndarray], *, ema: bool, is_average: bool, source: str
) -> tuple[Arrays, list[str]]:
  """Takes the weights or their exponential moving average.

  mmcv's EMAHook keeps the average of backbone.conv1.weight as ema_backbone_conv1_weight. There is
  one of each parameter, and none of the running statistics.

  Args:
    arrays: Arrays by name.
    ema: Whether to take the average.
    is_average: Whether the weights are the average already, and what is beside them is not.
    source: What to call the file in errors.

  Raises:
    UserError: If there is no average to take.
  """
  beside = {name: f'{_AVERAGE}{name.replace(".", "_")}' for name in arrays}
  beside = {name: other for name, other in beside.items() if other in arrays}
  others = set(beside.values())
  chosen = {name: array for name, array in arrays.items() if name not in others}
  if is_average:
    return chosen, ['Its weights are an exponential moving average, as the hook saves them.']
  if not beside:
    if ema:
      raise UserError(f'{source} holds no exponential moving average: load it without ema (--ema).')
    return chosen, []
  if ema:
    taken = {name: arrays[other] for name, other in beside.items()}
    return {**chosen, **taken}, [
      f'The exponential moving averages of {len(taken)} arrays were taken.'
    ]
  return chosen, [
    f'It also holds exponential moving averages of {len(beside)} arrays, which ema=True (--ema) '
    'takes.'
  ]


def as_two_classes(arrays: Mapping[str, np.ndarray], threshold: float) -> tuple[Arrays, list[str]]:
  """Turns classifiers of one channel x into those of two classes.

  MMSegmentation predicts class 1 where sigmoid(x) > threshold, which is where x is larger than the
  constant log(threshold / (1 - threshold)), the score of class 0 here.

  Args:
    arrays: Arrays by name.
    threshold: In (0, 1).
  """
  changed = dict(arrays)
  for head in ('decode_head', 'auxiliary_head'):
    kernel, bias = (changed.get(f'{head}.conv_seg.{part}') for part in ('weight', 'bias'))
    if kernel is None or bias is None or kernel.shape[:1] != (1,) or bias.shape != (1,):
      continue
    score = np.full(1, math.log(threshold / (1 - threshold)), bias.dtype)
    changed[f'{head}.conv_seg.weight'] = np.concatenate([np.zeros_like(kernel), kernel])
    changed[f'{head}.conv_seg.bias'] = np.concatenate([score, bias])
  return changed, [
    f'Its one output channel became two classes that predict the same at the threshold {threshold}.'
  ]
