"""How images are tested: their size, sliding windows, flips, corners and normalization."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale testing
# ImageNet statistics of RGB in [0, 255], the `data_preprocessor` of the released models.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

Version = Literal['v0', 'v1']
Size = tuple[int, int]  # (height, width)


def with_plain_numbers(instance: Any) -> None:
  """Replaces numbers and arrays of NumPy in a new frozen dataclass, so that JSON can hold it."""

  def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | tuple | list):
      return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value

  for field in dataclasses.fields(instance):
    object.__setattr__(instance, field.name, plain(getattr(instance, field.name)))


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
  """How images become label maps at test time. Saved with weights, runs and reports.

  >>> protocol = EvalProtocol.from_version('v0', scale=(2048, 512))
  >>> protocol.with_multi_scale_flip().ratios
  (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
  >>> EvalProtocol.from_json(protocol.to_json()) == protocol
  True

  Attributes:
    scale: (width, height) that images are resized to; None for each image's own size.
    scale_factor: (width, height) factors of each image's own size, in place of `scale`.
    keep_ratio: Whether the aspect ratio is kept: `scale`, or the size that `scale_factor` gives, is
      then a box that the image is fitted into, see `transforms.rescaled_size`.
    window_crop: (height, width) of sliding windows, in pixels; None for the whole image at once.
    window_stride: (vertical, horizontal) step between windows; None for the whole image at once.
    pad_windows: Whether an image smaller than a window is padded with zeros to the window's size;
      otherwise the window shrinks to the image.
    pad_multiple: Multiple that the sides of a whole image are padded to with zeros, after
      normalization; None for no padding. The padding is cut off the logits.
    pad_size: (height, width) that smaller whole images are padded to in the same way.
    version: Of MMSegmentation: what `ratios` multiply in multi-scale testing, `scale` in 'v0' and
      each image's own size in 'v1'.
    ratios: Resize factors. Over several, and over flips, class probabilities are averaged.
    flip: Whether each size is tested mirrored as well.
    align_corners: Corner convention of every resize of logits, see `resize.bilinear_taps`.
    channel_order: Order of the channels that the network takes. Images are RGB; for 'bgr' they are
      reversed before normalization.
    mean: Subtracted from each channel, in the range of the samples and in the order of the network.
    std: Each channel is divided by it.
    bits: Of a sample of the images, 8 or 16. Images of three channels of 8 bits are RGB, whatever
      their files are; others are read as they are.

  Raises:
    ValueError: If a value is out of range or two do not fit together.
  """

  scale: tuple[int, int] | None = None
  scale_factor: tuple[float, float] | None = None
  keep_ratio: bool = True
  window_crop: Size | None = None
  window_stride: Size | None = None
  pad_windows: bool = True
  pad_multiple: int | None = None
  pad_size: Size | None = None
  version: Version = 'v0'
  ratios: tuple[float, ...] = (1.0,)
  flip: bool = False
  align_corners: bool = False
  channel_order: Literal['rgb', 'bgr'] = 'rgb'
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  bits: Literal[8, 16] = 8

  def __post_init__(self):
    """Checks the values."""
    with_plain_numbers(self)
    for name in ('scale', 'window_crop', 'window_stride', 'pad_size'):
      pair = getattr(self, name)
      if pair is not None and not (
        isinstance(pair, tuple) and len(pair) == 2 and all(type(x) is int and x > 0 for x in pair)
      ):
        raise ValueError(f'{name} is {pair!r}, expected two positive integers or None')
    factor, multiple = self.scale_factor, self.pad_multiple
    if factor is not None and not (len(factor) == 2 and all(0 < x < math.inf for x in factor)):
      raise ValueError(f'scale_factor is {factor!r}, expected two positive numbers or None')
    if factor is not None and self.scale is not None:
      raise ValueError('scale and scale_factor are both given; set one to None')
    if multiple is not None and not (type(multiple) is int and multiple > 0):
      raise ValueError(f'pad_multiple is {multiple!r}, expected a positive integer or None')
    if (self.window_crop is None) != (self.window_stride is None):
      raise ValueError('window_crop and window_stride must be given together')
    if (
      self.window_crop and self.window_stride and _leaves_gaps(self.window_crop, self.window_stride)
    ):
      raise ValueError(
        f'window_stride is {self.window_stride!r}, which leaves gaps between windows of '
        f'{self.window_crop!r}'
      )
    if self.window_crop is not None and (multiple or self.pad_size):
      raise ValueError('pad_multiple and pad_size are for whole images; set window_crop to None')
    if self.version not in ('v0', 'v1'):
      raise ValueError(f"version is {self.version!r}, expected 'v0' or 'v1'")
    if not self.ratios or not all(0 < ratio < math.inf for ratio in self.ratios):
      raise ValueError(f'ratios is {self.ratios!r}, expected one or more positive numbers')
    if self.channel_order not in ('rgb', 'bgr'):
      raise ValueError(f"channel_order is {self.channel_order!r}, expected 'rgb' or 'bgr'")
    if not self.mean or len(self.mean) != len(self.std):
      raise ValueError(
        f'mean has {len(self.mean)} values and std {len(self.std)}, expected one per channel'
      )
    if not all(map(math.isfinite, self.mean)):
      raise ValueError(f'mean is {self.mean!r}, expected finite numbers')
    if not all(0 < std < math.inf for std in self.std):
      raise ValueError(f'std is {self.std!r}, expected positive numbers')
    if self.bits not in (8, 16):
      raise ValueError(f'bits is {self.bits!r}, expected 8 or 16')

  @classmethod
  def from_version(
    cls,
    version: Version,
    *,
    multi_scale_flip: bool = False,
    pad_windows: bool | None = None,
    **fields: Any,
  ) -> Self:
    """The protocol of a version of MMSegmentation.

    Args:
      version: 'v0', which the published scores were measured with, multiplies the test scale by the
        ratios and pads small windows; 'v1' multiplies each image's own size and does not pad.
      multi_scale_flip: Whether to test at the six `RATIOS`, each mirrored as well.
      pad_windows: See the class; None for the version's own.
      **fields: The other fields of the class.

    Raises:
      ValueError: As the class.
    """
    pads = version == 'v0' if pad_windows is None else pad_windows
    protocol = cls(version=version, pad_windows=pads, **fields)
    return protocol.with_multi_scale_flip() if multi_scale_flip else protocol

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Reads what `to_dict` made, perhaps after JSON turned tuples into lists.

    Raises:
      ValueError: If a field is unknown or its value is out of range.
    """
    unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f'unknown fields of an EvalProtocol: {", ".join(sorted(unknown))}')
    values: dict[str, Any] = {
      key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()
    }
    return cls(**values)

  @classmethod
  def from_json(cls, text: str) -> Self:
    """Creates a protocol from the result of `to_json`.

    Raises:
      ValueError: If the text is not JSON, a field is unknown or its value is out of range.
    """
    return cls.from_dict(json.loads(text))

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a dictionary of JSON values."""
    return dataclasses.asdict(self)

  def to_json(self) -> str:
    """The protocol as indented JSON."""
    return json.dumps(self.to_dict(), indent=2) + '\n'

  def with_multi_scale_flip(self, on: bool = True) -> Self:
    """The same protocol with the six `RATIOS` and flips, or with neither."""
    return dataclasses.replace(self, ratios=RATIOS if on else (1.0,), flip=on)

  @property
  def flips(self) -> int:
    """How often each size is tested: 2 with flips, else 1."""
    return 2 if self.flip else 1

  @property
  def averages(self) -> bool:
    """Whether class probabilities of several passes are averaged."""
    return self.flip or len(self.ratios) > 1

  @property
  def ratios_of_image(self) -> bool:
    """Whether `ratios` multiply the image's own size rather than `scale`."""
    return self.version == 'v1' and (self.flip or self.ratios != (1.0,))


def _leaves_gaps(window_crop: Size, window_stride: Size) -> bool:
  return any(stride > crop for crop, stride in zip(window_crop, window_stride, strict=True))
