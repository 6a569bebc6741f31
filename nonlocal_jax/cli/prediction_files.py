"""Files of predictions: pictures and probabilities, marked so that they are known again.

They are never taken for images, and replace no file but their like.
"""

import errno
import io
import struct
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from nonlocal_jax.data.paths import not_a_file
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import whole_file, write_whole

JPEG_MAX_SIDE = 65_500  # of libjpeg, in pixels

_MARK = 'nonlocal-jax predict'  # in PNG files as Software, in JPEG files as the comment
# What videos end in, which players skip: a free box of MP4, a void element of Matroska.
VIDEO_MARKS = {
  '.mp4': struct.pack('>I', 8 + len(_MARK)) + b'free' + _MARK.encode(),
  '.mkv': bytes([0xEC, 0x80 | len(_MARK)]) + _MARK.encode(),
}
# Errors of one name. After others, such as a full disk, no further file can be written.
_ERRORS_OF_A_NAME = (
  *(errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL),
  *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
)


def with_palette(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
  """Converts a label map to a palette image in the colors of the classes; unknown is black."""
  image = Image.fromarray(label)
  colors = np.zeros((int(label.max(initial=0)) + 1, 3), np.uint8)
  colors = np.concatenate([np.array(palette, np.uint8), colors[len(palette) :]])
  image.putpalette(colors.ravel().tolist())
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


def save_probabilities(probabilities: np.ndarray, classes: Sequence[str], path: Path) -> None:
  """Writes a marked file for `numpy.load`, atomically.

  Args:
    probabilities: (h, w, classes) floats, the array `probabilities` of the file, as float16.
    classes: Their names, the array `classes`.
    path: The file, which ends in .npz.

  Raises:
    UserError: If it cannot be written.
  """
  with (
    whole_file(path) as partial,
    partial.open('wb') as file,
    zipfile.ZipFile(file, 'w') as archive,
  ):
    archive.comment = _MARK.encode()
    arrays = {'probabilities': probabilities.astype(np.float16), 'classes': np.array(classes)}
    for name, array in arrays.items():
      with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def concerns_one_file(error: UserError) -> bool:
  """Whether other files can be written after an error of `save`."""
  cause = error.__cause__
  return not isinstance(cause, OSError) or cause.errno in (None, *_ERRORS_OF_A_NAME)


def is_prediction(path: Path) -> bool:
  """Whether a file was written by `save`, `save_probabilities` or `video_file`."""
  try:
    if not_a_file(path):
      return False
    if path.suffix in VIDEO_MARKS:
      return _ends_with(path, VIDEO_MARKS[path.suffix])
    if path.suffix == '.npz':
      with zipfile.ZipFile(path) as archive:
        return archive.comment == _MARK.encode()
    with Image.open(path) as image:
      return _MARK in (image.info.get('Software'), _text(image.info.get('comment')))
  except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError):
    return False


def remove_predictions(paths: Iterable[Path]) -> list[Path]:
  """Removes those of some files that are predictions, see `is_prediction`.

  Returns:
    What was removed.

  Raises:
    UserError: If one cannot be removed.
  """
  removed = []
  for path in paths:
    try:
      if not path.is_file() or not is_prediction(path):
        continue
    except OSError:  # e.g. a name that is too long, which no file has
      continue
    try:
      path.unlink(missing_ok=True)
    except OSError as error:
      raise UserError(f'{path} cannot be removed: {error.strerror}.') from error
    removed.append(path)
  return removed


def _ends_with(path: Path, mark: bytes) -> bool:
  with path.open('rb') as file:
    file.seek(max(path.stat().st_size - len(mark), 0))
    return file.read() == mark


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
