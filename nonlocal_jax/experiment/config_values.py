"""Checks the names and values of a config, each on its own."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import STAGE_BLOCKS
from nonlocal_jax.recipes import BALANCED, base_config, fields_of, no_such_field

_PRECISIONS = ('default', 'high', 'highest', 'bfloat16', 'tensorfloat32', 'float32')
_CHOICES = {
  'model.attention': ('blocks', 'cudnn', 'flash', 'auto'),
  'model.convolution': ('fast', 'direct'),
  'eval.protocol': ('v0', 'v1'),
  'optimizer.schedule': ('v0', 'v1'),
  'train.batch_norm': ('global', 'per_device', 'frozen'),
  'train.dtype': ('float32', 'bfloat16'),
}
_LEAST = {  # whole numbers
  **dict.fromkeys(('train.steps', 'train.batch_size', 'train.log_every', 'train.accumulate'), 1),
  **dict.fromkeys(('train.ohem_min_kept', 'eval.every', 'eval.shapes', 'eval.batch_size'), 1),
  **dict.fromkeys(('checkpoint.every', 'checkpoint.keep'), 1),
  'model.width': 2,
  'data.workers': 0,
  'eval.patience': 0,
  'seed': 0,
}
_MOST = 2**31 - 1


# What every other number must be, in words and as a test.
_NOT_NEGATIVE = ('a finite number that is not negative', lambda value: 0 <= value < math.inf)
_POSITIVE = ('a finite number that is positive', lambda value: 0 < value < math.inf)
_BELOW_ONE = ('a number in [0, 1)', lambda value: 0 <= value < 1)
_SHARE = ('a number in [0, 1]', lambda value: 0 <= value <= 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
  'model.dropout': _BELOW_ONE,
  'train.cat_max_ratio': _SHARE,
  'train.flip_probability': _SHARE,
  'train.auxiliary_weight': _NOT_NEGATIVE,
  'train.ohem_threshold': _SHARE,
  'train.focal_gamma': _NOT_NEGATIVE,
  'train.dice_weight': _NOT_NEGATIVE,
  'train.ema_decay': _BELOW_ONE,
  'optimizer.learning_rate': _NOT_NEGATIVE,
  'optimizer.min_learning_rate': _NOT_NEGATIVE,
  'optimizer.power': _NOT_NEGATIVE,
  'optimizer.momentum': _BELOW_ONE,
  'optimizer.weight_decay': _NOT_NEGATIVE,
  'optimizer.head_multiplier': _POSITIVE,
}


def check_names(config: ConfigDict) -> None:
  """Checks that a config has only known fields: a misspelt one would have no effect.

  Raises:
    UserError: If it has others.
  """
  known = fields_of(base_config())
  for key in fields_of(config):
    if key not in known and not key.startswith('published.'):  # facts of a published model
      raise no_such_field(key)


def check_values(config: ConfigDict) -> None:
  """Checks the range of each value.

  Raises:
    UserError: If a value is out of range; the message names its key.
  """
  pairs = ('train.scale', 'train.crop', 'train.ratio_range')
  windows = ('eval.window_crop', 'eval.window_stride')
  optional = (*windows, 'eval.scale', 'eval.scale_factor')
  for key, least in _LEAST.items():
    value = _value(config, key)
    if value is not None or key != 'eval.batch_size':
      _expect(value >= least, config, key, f'a number of at least {least}')
      _expect(value <= _MOST, config, key, 'below 2^31')
  for key, (expected, holds) in _RANGES.items():
    _expect(holds, config, key, expected)
  depths = ', '.join(map(str, STAGE_BLOCKS))
  _expect(config.model.depth in STAGE_BLOCKS, config, 'model.depth', f'one of {depths}')
  for key in ('train.precision', 'eval.precision'):
    _expect(_value(config, key) in _PRECISIONS, config, key, f'one of {", ".join(_PRECISIONS)}')
  for key in (*pairs, *(key for key in optional if _value(config, key))):
    _expect(_are_two_positive, config, key, 'two positive numbers')
  for key in ('train.scale', 'train.crop', 'eval.scale', *windows):
    _expect(_are_whole, config, key, 'whole numbers')
  both = all(_value(config, key) for key in windows) or not any(_value(config, k) for k in windows)
  _expect(both, config, 'eval.window_stride', 'given together with config.eval.window_crop')
  meets = all(map(operator.le, _value(config, 'eval.window_stride'), config.eval.window_crop))
  _expect(meets, config, 'eval.window_stride', 'at most config.eval.window_crop, without gaps')
  alone = not (config.eval.scale and config.eval.scale_factor)
  _expect(alone, config, 'eval.scale_factor', 'empty, or config.eval.scale')
  for key, values in _CHOICES.items():
    _expect(_value(config, key) in values, config, key, ' or '.join(values))
  has_block = config.model.non_local or config.model.attention in ('blocks', 'auto')
  _expect(has_block, config, 'model.attention', 'blocks without the non-local block')
  weights = 'numbers that are finite and not negative, or balanced'
  _expect(_are_weights, config, 'train.class_weights', weights)
  if config.data.num_classes is not None:
    _expect(2 <= config.data.num_classes <= 255, config, 'data.num_classes', 'from 2 to 255')
  _expect(_are_names, config, 'data.classes', 'names')
  _expect(_are_colors, config, 'data.palette', '(red, green, blue) of each class, from 0 to 255')
  for key in ('data.ignore_labels', 'data.label_map'):
    _expect(_are_label_values, config, key, 'whole numbers from 0 to 255')


def _are_two_positive(values: Sequence[float]) -> bool:
  return len(values) == 2 and min(values) > 0 and math.isfinite(sum(values))


def _are_whole(values: Sequence[float]) -> bool:
  return all(value == int(value) for value in values)


def _are_weights(values: Sequence[Any]) -> bool:
  return tuple(values) == BALANCED or all(0 <= value < math.inf for value in values)


def _are_label_values(values: Sequence[int]) -> bool:
  return _are_whole(values) and all(0 <= value <= 255 for value in values)


def _are_names(values: Sequence[str]) -> bool:
  return all(isinstance(value, str) for value in values)


def _are_colors(values: Sequence[Sequence[int]]) -> bool:
  return all(len(color) == 3 and _are_label_values(color) for color in values)


def _value(config: ConfigDict, key: str) -> Any:
  *section, name = key.split('.')
  return (config[section[0]] if section else config)[name]


def _expect(
  holds: bool | Callable[[Any], bool], config: ConfigDict, key: str, expected: str
) -> None:
  """Raises `UserError` if a value is not as expected, or not of a type that can be."""
  value = _value(config, key)
  try:
    is_expected = holds(value) if callable(holds) else holds
  except (TypeError, ValueError, OverflowError):  # e.g. strings in a tuple of numbers
    is_expected = False
  if not is_expected:
    raise UserError(f'config.{key} is {value}; it must be {expected}.')
