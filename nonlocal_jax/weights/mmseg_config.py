"""Reads the settings in the config that MMSegmentation saves with its weights, 0.x and 1.x.

A setting that can change a prediction is honored, or refused by name if the network or the test
here has nothing for it. So is a key that is not known.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.weights.config_literals import MAX_CHARACTERS, read_assignments
from nonlocal_jax.weights.config_section import Section
from nonlocal_jax.weights.mmseg_network import NetworkReader
from nonlocal_jax.weights.mmseg_protocol import ProtocolReader

# Key of `meta` in files that this package wrote: JSON of the protocol and what of it was assumed.
PROTOCOL_KEY = 'nonlocal_jax'
# Fields of the protocol that a config's text says as well.
_IN_TEXTS = ('scale', 'scale_factor', 'window_crop', 'window_stride', 'pad_size')
_IN_TEXTS += ('align_corners', 'channel_order', 'mean', 'std')


@dataclasses.dataclass(frozen=True)
class RecordedSettings:
  """What a recorded config says about a network and its test.

  Attributes:
    network: Fields of `NonLocalNetConfig` by name.
    protocol: How the network was tested.
    assumed: Names of the protocol's fields that the config does not record.
    notes: Remarks for the user, one sentence each.
  """

  network: Mapping[str, Any]
  protocol: EvalProtocol
  assumed: tuple[str, ...]
  notes: tuple[str, ...] = ()


def recorded_settings(
  meta: Mapping[str, Any], *, source: str, in_channels: int = 3
) -> RecordedSettings:
  """Reads the settings in the `meta` of a checkpoint.

  A key that a section leaves out has MMSegmentation's own default. A section that is left out
  altogether has the settings of the published models.

  Args:
    meta: Not trusted. MMSegmentation 0.x stores the config's text as 'config', 1.x as 'cfg'.
    source: What to call the file in errors.
    in_channels: Number of channels of the network's input.

  Raises:
    UserError: If a setting can change predictions and is not supported, or is not known, or differs
      from what this package recorded beside the config; the message names it.
  """
  texts = {key: meta.get(key) for key in ('cfg', 'config')}
  key = next((key for key, text in texts.items() if type(text) is str and text.strip()), None)
  if key is None:
    return _nothing_recorded()
  try:
    config = read_assignments(str(texts[key]))
  except ValueError as error:
    raise UserError(
      f"{source} records a config that cannot be read (meta['{key}']): {error}; load the weights "
      'from a file without it.'
    ) from error
  if 'model' not in config:
    return _nothing_recorded()
  model = Section(config['model'], 'model', source)
  test = ProtocolReader(config, meta, model, source=source, in_channels=in_channels, key=key)
  network = NetworkReader(model).read()
  protocol = read = test.read(network.get('align_corners'))
  model.close()
  ours = meta.get(PROTOCOL_KEY)
  if type(ours) is not str:
    return RecordedSettings(network, protocol, tuple(test.assumed), tuple(test.notes))
  try:
    if len(ours) > MAX_CHARACTERS:
      raise ValueError('too long')
    fields = json.loads(ours)
    protocol = EvalProtocol.from_dict(fields['protocol'])
    assumed = tuple(name for name in fields['assumed'] if hasattr(protocol, name))
  except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
    raise UserError(
      f"{source} has a damaged test protocol (meta['{PROTOCOL_KEY}']); write it again."
    ) from error
  differing = [
    name
    for name in _IN_TEXTS
    if name not in (*test.assumed, *assumed) and getattr(read, name) != getattr(protocol, name)
  ]
  if differing:
    name = differing[0]
    raise UserError(
      f'{source} records {name}={getattr(read, name)} in its config and {getattr(protocol, name)} '
      f"in meta['{PROTOCOL_KEY}']: if the config was edited, take out that entry."
    )
  return RecordedSettings(network, protocol, assumed, tuple(test.notes))


def protocol_entry(protocol: EvalProtocol, assumed: Sequence[str]) -> str:
  """The entry `PROTOCOL_KEY` of a file's `meta`, which holds what a config cannot."""
  return json.dumps({'protocol': protocol.to_dict(), 'assumed': list(assumed)})


def _nothing_recorded() -> RecordedSettings:
  return RecordedSettings(
    {}, EvalProtocol(), tuple(f.name for f in dataclasses.fields(EvalProtocol))
  )
