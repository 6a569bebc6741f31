"""What stands beside saved weights: all that is needed to use them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import Architecture
from nonlocal_jax.protocol import EvalProtocol


@dataclasses.dataclass(frozen=True)
class ModelDescription:
  """A trained network without its weights.

  Attributes:
    architecture: Shape of the network.
    protocol: How its images are tested.
    dataset: 'cityscapes', 'ade20k', 'voc12aug', 'demo' or 'custom'.
    classes: Name of each class.
    palette: RGB colour of each class, in [0, 255].
    source: Where the weights come from: a file, or the training run.
    sha256: The file's sha256 in hex digits, None if there was none.
    num_batches_tracked: Training batches that the batch normalisations of each part of the network
      have seen, by PyTorch's counters; nothing computes with them.
  """

  architecture: Architecture
  protocol: EvalProtocol
  dataset: str
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  source: str
  sha256: str | None
  num_batches_tracked: Mapping[str, int]

  def to_json(self) -> str:
    """The description as indented JSON."""
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'

  @classmethod
  def from_json(cls, text: str, *, source: str) -> Self:
    """Reads what `to_json` of this or an earlier version wrote.

    Args:
      text: The JSON.
      source: What to call it in errors.

    Raises:
      UserError: If it is not a description.
    """
    try:
      fields: Mapping[str, Any] = {key: _tuples(value) for key, value in json.loads(text).items()}
      fields = fields if 'protocol' in fields else _with_protocol(fields)
      architecture = {key: _tuples(value) for key, value in fields['architecture'].items()}
      parts = {
        'architecture': Architecture(**architecture),
        'protocol': EvalProtocol.from_dict(fields['protocol']),
      }
      return cls(**{**fields, **parts})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(
        f'{source} is no description of a model ({error}); write the weights again.'
      ) from error


def _with_protocol(fields: Mapping[str, Any]) -> Mapping[str, Any]:
  """Fields of before December 2026, when a description held parts of the protocol one by one."""
  fields = dict(fields)
  names = {'test_scale': 'scale'}
  names |= {name: name for name in ('align_corners', 'window_crop', 'window_stride')}
  return {'protocol': {new: fields.pop(old) for old, new in names.items()}, **fields}


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
