"""The options of training that the format of a dataset's images asks for."""

import shlex
from typing import TYPE_CHECKING

from nonlocal_jax.data.pixel_formats import RGB, PixelFormat

if TYPE_CHECKING:
  from nonlocal_jax.data.prepared import PreparedSplit


def format_to_read(split: 'PreparedSplit') -> PixelFormat:
  """Returns the format in which the images of a split lose nothing that RGB of 8 bits would."""
  (first, *others) = split.pixel_formats or {RGB: len(split)}
  return RGB if others or first in (PixelFormat(1, 8), PixelFormat(4, 8)) else first


def pixel_options(split: 'PreparedSplit') -> list[str]:
  """Returns the options to train on a split, and says why.

  Images that RGB of 8 bits holds all of need none; of the others all must have one format.

  Args:
    split: The training images.
  """
  statistics = split.channel_statistics()
  if statistics is None:
    return []
  (pixels,) = split.pixel_formats
  # A channel that never varies is 0 once normalized, whatever its std.
  mean, std = map(_as_option, (statistics[0], tuple(value or 1.0 for value in statistics[1])))
  options = [
    *([] if pixels.channels == RGB.channels else [f'--config.data.channels={pixels.channels}']),
    *([] if pixels.bits == RGB.bits else [f'--config.data.bits={pixels.bits}']),
    f'--config.data.mean={mean}',
    f'--config.data.std={std}',
    '--config.train.photometric_distortion=False',
  ]
  print(f'\nThe images have {pixels}, with mean {mean} and standard deviation {std}.')
  if format_to_read(split) == RGB:
    what = 'repeated' if pixels.channels == 1 else 'without the fourth channel'
    print(
      f'They are read as RGB, {what}, as pretrained backbones take it. To read them as they are, '
      f'train with\n  {shlex.join(options)}'
    )
    return []
  return options


def _as_option(values: tuple[float, ...]) -> str:
  """Returns values as an option has them, to six digits."""
  listed = ','.join(f'{value:.6g}' for value in values)
  return f'({listed},)' if len(values) == 1 else f'({listed})'
