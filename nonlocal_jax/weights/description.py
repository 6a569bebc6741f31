"""What stands beside saved weights: all that is needed to use them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig


@dataclasses.dataclass(frozen=True)
class ModelDescription:
  """A trained network without its weights.

  Attributes:
    config: What the network is.
    dataset: 'cityscapes', 'ade20k', 'voc12aug', 'demo' or 'custom'.
    classes: Name of each class.
    palette: RGB colour of each class, in [0, 255].
    test_scale: (width, height) of the box that test images are resized into; None leaves them at
      their own size.
    window_crop: (height, width) of the sliding windows at test time; None for the whole image.
    window_stride: (vertical, horizontal) step of the windows; None for the whole image.
    source: Where the weights come from: a file, or the training run.
    sha256: The file's sha256 in hex digits, None if there was none.
    num_batches_tracked: Training batches that the batch normalisations of each part of the network
      have seen, by PyTorch's counters; nothing computes with them.
  """

  config: NonLocalNetConfig
  dataset: str
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  test_scale: tuple[int, int] | None
  window_crop: tuple[int, int] | None
  window_stride: tuple[int, int] | None
  source: str
  sha256: str | None
  num_batches_tracked: Mapping[str, int]

  def to_json(self) -> str:
    """The description as indented JSON."""
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'

  @classmethod
  def from_json(cls, text: str, *, source: str) -> Self:
    """Reads what `to_json` wrote.

    Args:
      text: The JSON.
      source: What to call it in errors.

    Raises:
      UserError: If it is not a description.
    """
    try:
      fields: dict[str, Any] = {key: _tuples(value) for key, value in json.loads(text).items()}
      if 'architecture' in fields:  # until November 2026 with the shapes of the weights alone
        config = {**fields.pop('architecture'), 'align_corners': fields.pop('align_corners')}
      else:
        config = fields['config']
      return cls(**{**fields, 'config': NonLocalNetConfig.from_dict(config)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise UserError(
        f'{source} is no description of a model ({error}); write the weights again.'
      ) from error


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
