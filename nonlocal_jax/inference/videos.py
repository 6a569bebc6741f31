"""Videos as they come: files and cameras, whose frames are read in order with OpenCV."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from nonlocal_jax.data.paths import is_utf8, not_a_file
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.images import MAX_PIXELS, ImageTooLargeError
from nonlocal_jax.protocol import Size
from nonlocal_jax.runtime.pipeline import in_threads

# How names of video files end.
VIDEO_SUFFIXES = (
  *('.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv', '.flv', '.ogv'),
  *('.ts', '.mts', '.m2ts', '.3gp', '.mjpeg', '.mjpg'),
)
# Frame rates in frames per second: others are those of files without one, e.g. 90,000.
MIN_RATE, MAX_RATE = 0.1, 1000.0
ASSUMED_RATE = 25.0

_TOLERATED_SHARE = 1e-3  # of a video's duration, by which rounded frame rates may be off
_TOLERATED_FRAMES = 1.5  # in time from an even spacing
_UNSURE_COUNT = 0.02  # share of the frames by which an estimated number may be too large


def is_video_name(name: str) -> bool:
  """Whether a file's name ends as those of videos do."""
  return name.lower().endswith(VIDEO_SUFFIXES)


class Video:
  """A video that is read once.

  Attributes:
    name: What to call it within a sentence.
    subject: What to call it at the start of one.
    size: (height, width) of its frames, turned as the file says.
    rate: Frames per second that the source tells; None if it tells none.
    num_frames: How many frames the file promises; None if it does not tell.
    num_read: How many frames `frames` has yielded.
    problem: Why there are fewer frames than promised, as a sentence; None if all is well.
    duration: Seconds from the first to the last frame that was read, by their time stamps; None if
      their spacing agrees with `rate`, or there are no time stamps.
  """

  def __init__(self, capture: cv2.VideoCapture, name: str, *, is_file: bool, max_pixels: int):
    """Reads the first frame; see `open_video` and `open_camera`."""
    self._capture, self.name, self._is_file = capture, name, is_file
    self.subject = f'File {name}' if is_file else name.capitalize()
    rate = capture.get(cv2.CAP_PROP_FPS)
    self.rate = rate if math.isfinite(rate) and MIN_RATE <= rate <= MAX_RATE else None
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT) if is_file else 0.0
    self.num_frames = round(count) if 1 <= count < 2**31 else None
    width, height = (capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > max_pixels:
      raise ImageTooLargeError(self.subject, int(width * height), max_pixels)
    first = self._next()
    if first is None:
      what = 'is no video that OpenCV reads, or broken' if is_file else 'gives no picture'
      raise UserError(f'{self.subject} {what}.')
    self._first: tuple[np.ndarray, float] | None = first
    self.size: Size = first[0].shape[:2]
    self.num_read = 0
    self.problem: str | None = None
    self.duration: float | None = None

  def close(self) -> None:
    """Releases the file or the camera."""
    self._capture.release()

  def frames(
    self, most: int | None = None, stopped: Callable[[], bool] = lambda: False
  ) -> Iterator[np.ndarray]:
    """Yields the frames; the next ones are read in a thread meanwhile.

    Args:
      most: The maximum number of frames; None for all.
      stopped: Asked before each frame but the first; when it returns True, there are no more.

    Yields:
      (h, w, 3) uint8 RGB.
    """
    assert self._first is not None, 'a video is read once'
    (frame, start), self._first = self._first, None
    read = in_threads(
      lambda _: self._next(), itertools.repeat(None), size=lambda _: 1, most=2, num_threads=1
    )
    following = itertools.chain([(frame, start)], read)
    del frame
    try:
      last, farthest = start, 0.0
      for found in itertools.islice(following, most):
        if self.num_read and stopped():
          return
        if found is None:
          self._note_end()
          break
        frame, last = found
        if frame.shape[:2] != self.size:
          self.problem = (
            f'{self.subject} changes its size after frame {self.num_read}, from '
            f'{_as_text(self.size)} to {_as_text(frame.shape[:2])}: the results end there.'
          )
          break
        if self.rate:
          even = self.num_read / self.rate
          farthest = max(farthest, abs(last - start - even) - _TOLERATED_SHARE * even)
        self.num_read += 1
        yield frame
      if self._is_file and self.rate and last > start:
        is_uneven = farthest > _TOLERATED_FRAMES / self.rate
        self.duration = last - start if is_uneven else None
    finally:
      read.close()

  def _next(self) -> tuple[np.ndarray, float] | None:
    """The next frame, RGB, and its time in seconds; None if there is none."""
    try:
      is_read, frame = self._capture.read()
      if not is_read or frame is None or frame.ndim != 3:
        return None
      seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
      return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), seconds
    except cv2.error:  # of a broken file
      return None

  def _note_end(self) -> None:
    if not self._is_file:
      self.problem = f'{self.subject} gave no picture after frame {self.num_read}: the results end.'
    elif self.num_frames and self.num_read < self.num_frames - max(
      1, int(_UNSURE_COUNT * self.num_frames)
    ):
      self.problem = (
        f'{self.subject} ends after frame {self.num_read} of {self.num_frames}, and so do the '
        'results: it is cut off or broken, or an edit list leaves frames out.'
      )


def open_video(path: Path, *, max_pixels: int = MAX_PIXELS) -> Video:
  """Opens a video file.

  Args:
    path: The file, in any format that OpenCV's FFmpeg reads.
    max_pixels: Limit of the pixels of a frame.

  Raises:
    UserError: If it cannot be read.
    ImageTooLargeError: If its frames have more pixels than `max_pixels`.
  """
  _quieten()
  if what := not_a_file(path):
    raise UserError(f'File {path} is {what}.')
  if not is_utf8(path):
    raise UserError(f'The name of file {str(path)!a} is not UTF-8, as OpenCV needs: rename it.')
  try:
    with path.open('rb') as file:
      file.read(1)
  except OSError as error:
    raise UserError(f'File {path} cannot be read: {error.strerror}.') from error
  # FFmpeg takes other than absolute paths for addresses if they have a colon.
  capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
  return _opened(capture, str(path), is_file=True, max_pixels=max_pixels)


def open_camera(index: int, *, max_pixels: int = MAX_PIXELS) -> Video:
  """Opens a camera.

  Args:
    index: Its number, from 0.
    max_pixels: See `open_video`.

  Raises:
    UserError: If there is none, or it gives no picture.
    ImageTooLargeError: See `open_video`.
  """
  _quieten()
  capture = cv2.VideoCapture(index)
  if not capture.isOpened():
    raise UserError(
      f'Camera {index} cannot be opened: see that it is connected, not in use, and that you may '
      'read it (on Linux /dev/video*).'
    )
  return _opened(capture, f'camera {index}', is_file=False, max_pixels=max_pixels)


def _opened(capture: cv2.VideoCapture, name: str, *, is_file: bool, max_pixels: int) -> Video:
  try:
    return Video(capture, name, is_file=is_file, max_pixels=max_pixels)
  except BaseException:
    capture.release()
    raise


def _quieten() -> None:
  """Turns off messages of OpenCV and FFmpeg, which come for each damaged part of a file."""
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _as_text(size: Size) -> str:
  return f'{size[1]}x{size[0]}'
