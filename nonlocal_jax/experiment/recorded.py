"""Compares how a config tests images with what is recorded beside weights."""

import dataclasses
from collections.abc import Collection
from typing import Any

from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import RATIOS, EvalProtocol
from nonlocal_jax.weights.description import ModelDescription

# Fields of a config, and the protocol's fields that they set.
_FIELDS = {
  'eval.scale': ('scale',),
  'eval.scale_factor': ('scale_factor',),
  'eval.keep_ratio': ('keep_ratio',),
  'eval.window_crop': ('window_crop',),
  'eval.window_stride': ('window_stride',),
  'eval.pad_windows': ('pad_windows',),
  'eval.multi_scale_flip': ('ratios', 'flip'),
  'eval.protocol': ('version',),
  'model.align_corners': ('align_corners',),
}
# Fields of a config that weights decide: images are normalized as in training.
_OF_IMAGES = {'data.mean': 'mean', 'data.std': 'std', 'data.bits': 'bits'}
_OF_AVERAGING = ('eval.multi_scale_flip', 'eval.protocol')


def protocol_of_evaluation(
  configured: EvalProtocol,
  description: ModelDescription,
  *,
  overrides: Collection[str],
  source: str,
) -> EvalProtocol:
  """Returns the protocol to evaluate weights by.

  It is the recorded one, with the config's values where nothing is recorded and where the config is
  to count.

  Args:
    configured: The protocol that the config describes.
    description: What is recorded beside the weights.
    overrides: Fields of the config, such as 'eval.scale', that count whatever is recorded.
    source: What to call the weights in errors.

  Raises:
    UserError: If another field of the config differs from what is recorded, or one that says how
      images are normalized.
  """
  recorded, chosen, differences = description.protocol, {}, {}
  for key, name in _OF_IMAGES.items():
    here, there = getattr(configured, name), getattr(recorded, name)
    if key in overrides and here != there:
      raise UserError(
        f'{source} takes images of {name} {there}, but config.{key} is {here}: leave it out.'
      )
  averages = configured.averages if 'eval.multi_scale_flip' in overrides else recorded.averages
  for key, names in _FIELDS.items():
    here = {name: getattr(configured, name) for name in names}
    there = {name: getattr(recorded, name) for name in names}
    if key in overrides or set(names) <= set(description.assumed):
      chosen |= here
    elif not _was_used(key, recorded, averages=averages):
      chosen |= {} if key in _OF_AVERAGING else here
    elif here != there:
      differences[key] = (_shown(key, recorded), _shown(key, configured))
  if 'eval.scale' in overrides and configured.scale:
    chosen['scale_factor'] = None
    differences.pop('eval.scale_factor', None)
  if differences:
    listed = '; '.join(
      f'{key} is {there} there and {here} in the config'
      for key, (there, here) in differences.items()
    )
    flags = ' '.join(
      f'--config.{key}={str(there).replace(" ", "")!r}' for key, (there, _) in differences.items()
    )
    raise UserError(
      f'{source} was tested in another way than the config says: {listed}; for the same test '
      f'add {flags}, or set these fields to '
      'other values on the command line.'
    )
  try:
    return dataclasses.replace(recorded, **chosen)
  except ValueError as error:
    raise UserError(f'the config does not fit how {source} was tested: {error}.') from error


def _was_used(key: str, recorded: EvalProtocol, *, averages: bool) -> bool:
  """Whether the recorded test depended on the field, and a config can set it to what it was."""
  if key == 'eval.keep_ratio':
    return recorded.scale is not None or recorded.scale_factor is not None
  if key == 'eval.pad_windows':
    return recorded.window_crop is not None
  if key == 'eval.protocol':
    return averages
  if key == 'eval.multi_scale_flip':
    return (recorded.ratios, recorded.flip) in (((1.0,), False), (RATIOS, True))
  return True


def _shown(key: str, protocol: EvalProtocol) -> Any:
  """The value of a field as it is written in a config."""
  if key == 'eval.multi_scale_flip':
    return protocol.averages
  value = getattr(protocol, _FIELDS[key][0])
  return () if value is None else value
