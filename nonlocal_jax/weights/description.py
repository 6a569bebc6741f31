"""The description saved beside weights: everything needed to use them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.files import parse_object, sealed, unsealed


@dataclasses.dataclass(frozen=True)
class ModelDescription:
  """A trained network without its weights.

  Attributes:
    config: What the network is.
    protocol: How its images are tested.
    dataset: 'cityscapes', 'ade20k', 'voc12aug', 'demo' or 'custom'.
    classes: Name of each class.
    palette: RGB color of each class, in [0, 255].
    source: Where the weights come from: a file, or the training run.
    sha256: The file's sha256 in hex digits, None if there was none.
    num_batches_tracked: PyTorch's counters of training batches, for each part of the network;
      kept to write them back.
    assumed: Names of the fields of `protocol` that are not known from the weights' source, and have
      their defaults.
  """

  config: NonLocalNetConfig
  protocol: EvalProtocol
  dataset: str
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  source: str
  sha256: str | None
  num_batches_tracked: Mapping[str, int]
  assumed: tuple[str, ...] = ()

  def with_align_corners(self, align_corners: bool) -> Self:
    """The same with another corner convention, in `config` and in `protocol`."""
    return dataclasses.replace(
      self,
      config=dataclasses.replace(self.config, align_corners=align_corners),
      protocol=dataclasses.replace(self.protocol, align_corners=align_corners),
      assumed=tuple(name for name in self.assumed if name != 'align_corners'),
    )

  def to_json(self) -> str:
    """The description as indented JSON with a checksum."""
    return json.dumps(sealed(dataclasses.asdict(self)), indent=2) + '\n'

  @classmethod
  def from_json(cls, text: str | bytes, *, source: str) -> Self:
    """Creates a description from the result of `to_json`, of this or an earlier version.

    Args:
      text: The JSON.
      source: What to call it in errors.

    Raises:
      UserError: If it is not a description, or its checksum differs.
    """
    try:
      fields: dict[str, Any] = {
        key: _tuples(value) for key, value in unsealed(parse_object(text)).items()
      }
      if 'architecture' in fields:
        fields = _from_before_december_2026(fields)
      parts: dict[str, Any] = {
        'config': NonLocalNetConfig.from_dict(fields['config']),
        'protocol': EvalProtocol.from_dict(fields['protocol']),
      }
      if 'assumed' not in fields:
        fields['assumed'] = _assumed_before(parts['protocol'])
      return cls(**{**fields, **parts})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(
        f'{source} is no description of a model ({error}); write the weights again.'
      ) from error


def _from_before_december_2026(fields: dict[str, Any]) -> dict[str, Any]:
  """Converts the fields of older descriptions, where parts of config and protocol were flat."""
  corners = {'align_corners': fields.pop('align_corners')}
  config = {**fields.pop('architecture'), **corners}
  protocol = {'scale': fields.pop('test_scale'), **corners}
  protocol |= {name: fields.pop(name) for name in ('window_crop', 'window_stride')}
  return {**fields, 'config': config, 'protocol': protocol}


def _assumed_before(protocol: EvalProtocol) -> tuple[str, ...]:
  """Older descriptions of weights whose test was not known have the defaults, but for corners."""
  names = tuple(field.name for field in dataclasses.fields(EvalProtocol))
  if protocol == EvalProtocol():
    return names
  if protocol == EvalProtocol(align_corners=True):
    return tuple(name for name in names if name != 'align_corners')
  return ()


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
