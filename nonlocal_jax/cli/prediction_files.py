"""Files of predictions: label maps and overlays, marked so that they are never taken for images."""

import errno
import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from nonlocal_jax.data.paths import not_a_file
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import write_whole

JPEG_MAX_SIDE = 65_500  # of libjpeg, in pixels

_MARK = 'nonlocal-jax predict'  # in PNG files as Software, in JPEG files as the comment
# Errors of one name. After others, such as a full disk, no further file can be written.
_ERRORS_OF_A_NAME = (
  *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL),
  *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
)


def with_palette(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
  """Converts a label map to a palette image in the colors of the classes."""
  image = Image.fromarray(label)
  image.putpalette(np.array(palette, np.uint8).ravel().tolist())
  return image


def save(image: Image.Image, path: Path) -> None:
  """Writes a marked PNG or JPEG file atomically.

  Raises:
    UserError: If it cannot be written.
  """
  encoded = io.BytesIO()
  try:
    if path.suffix == '.png':
      text = PngImagePlugin.PngInfo()
      text.add_text('Software', _MARK)
      image.save(encoded, 'PNG', pnginfo=text)
    else:
      image.save(encoded, 'JPEG', comment=_MARK)
  except (OSError, ValueError) as error:  # e.g. a side that JPEG does not allow
    width, height = image.size
    raise UserError(f'{path} cannot be written with {width}x{height} pixels: {error}.') from error
  write_whole(path, encoded.getvalue())


def concerns_one_file(error: UserError) -> bool:
  """Whether other files can be written after an error of `save`."""
  cause = error.__cause__
  return not isinstance(cause, OSError) or cause.errno in (None, *_ERRORS_OF_A_NAME)


def is_prediction(path: Path) -> bool:
  """Whether a file was written by `save`."""
  try:
    if not_a_file(path):
      return False
    with Image.open(path) as image:
      return _MARK in (image.info.get('Software'), _text(image.info.get('comment')))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return False


def _text(comment: object) -> object:
  return comment.decode(errors='replace') if isinstance(comment, bytes) else comment


def check_not_replaced(targets: Sequence[Path], *, but: Collection[Path] = ()) -> None:
  """Checks that no file will be replaced but earlier predictions.

  Args:
    targets: Where files will be written.
    but: Predictions that must not be replaced either.

  Raises:
    UserError: If there is another file in the place of one of `targets`.
  """
  for target in targets:
    try:
      is_taken = target in but or (target.is_file() and not is_prediction(target))
    except OSError:  # e.g. a name that is too long, which is reported when it is written
      continue
    if is_taken:
      raise UserError(
        f'{target} exists and is no earlier prediction: give another --out, or remove it.'
      )
