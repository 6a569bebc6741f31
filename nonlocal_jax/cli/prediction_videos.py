"""Writes the videos of predictions: overlays as MP4, label maps as lossless Matroska."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from nonlocal_jax.cli.prediction_files import VIDEO_MARKS
from nonlocal_jax.data.paths import is_utf8
from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import Size
from nonlocal_jax.runtime.files import whole_file

# MPEG-4 Part 2 and FFV1: OpenCV's packages have no encoder of H.264, whose licence forbids it.
_CODECS = {'.mp4': 'mp4v', '.mkv': 'FFV1'}
_UNSURE_COUNT = 1e-3  # share by which the number of frames that a file's duration tells may differ


@contextlib.contextmanager
def video_file(
  path: Path, size: Size, rate: float, *, filling: int | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
  """Yields a function that adds a frame to a marked video; the file is there at the end.

  OpenCV writes even sides only. A frame with odd ones gets a further column or row.

  Args:
    path: The file: .mp4 for color, compressed with losses, or .mkv for gray without losses.
    size: (height, width) of the frames.
    rate: Frames per second.
    filling: Value of a further column or row; None to repeat the last one.

  Yields:
    A function of a frame, (h, w, 3) uint8 RGB or (h, w) uint8.

  Raises:
    UserError: If the file cannot be written.
  """
  if not is_utf8(path):
    raise UserError(f'The name {str(path)!a} is not UTF-8, as OpenCV needs: give another --out.')
  height, width = (side + side % 2 for side in size)
  padding = [(0, height - size[0]), (0, width - size[1])]
  codec = _CODECS[path.suffix]
  count = 0
  with whole_file(path, ending=path.suffix) as partial:
    place = os.path.abspath(partial)
    writer = cv2.VideoWriter(
      place,
      cv2.CAP_FFMPEG,
      cv2.VideoWriter.fourcc(*codec),
      rate,
      (width, height),
      isColor=path.suffix == '.mp4',
    )

    def write(frame: np.ndarray) -> None:
      nonlocal count
      if (height, width) != size:
        sides = padding[: frame.ndim] + [(0, 0)] * (frame.ndim - 2)
        if filling is None:
          frame = np.pad(frame, sides, mode='edge')
        else:
          frame = np.pad(frame, sides, constant_values=filling)
      writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) if frame.ndim == 3 else frame)
      count += 1

    try:
      if not writer.isOpened():
        partial.touch()  # raises where no file can be written
        raise UserError(
          f'{path} cannot be written: OpenCV has no encoder {codec} for {width}x{height} pixels at '
          f'{rate:g} frames per second here; install opencv-python-headless from PyPI, or give '
          '--frame-rate=25.'
        )
      yield write
    except cv2.error as error:
      raise UserError(f'{path} cannot be written: {error.err}.') from error
    finally:
      writer.release()
    # OpenCV does not say that the disk was full: the file tells how much it has.
    if abs(_num_frames(place) - count) > max(1, _UNSURE_COUNT * count):
      raise UserError(f'{path} cannot be written as a whole: see that the disk has room.')
    with partial.open('ab') as file:
      file.write(VIDEO_MARKS[path.suffix])


def _num_frames(path: str) -> float:
  capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
  try:
    return capture.get(cv2.CAP_PROP_FRAME_COUNT) if capture.grab() else 0
  finally:
    capture.release()
