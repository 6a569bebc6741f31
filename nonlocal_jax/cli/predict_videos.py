"""Predicts videos and cameras for `nonlocal-jax predict`: a video of labels and an overlay."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from nonlocal_jax.cli.predict_images import confidence_in
from nonlocal_jax.cli.prediction_files import (
  check_not_replaced,
  concerns_one_file,
  remove_predictions,
)
from nonlocal_jax.cli.prediction_videos import video_file
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import frame_overlay
from nonlocal_jax.inference.images import ImageTooLargeError
from nonlocal_jax.inference.pretrained import PretrainedModel
from nonlocal_jax.inference.probabilities import UNKNOWN, with_unknown
from nonlocal_jax.inference.stream import PIXELS_AHEAD, AnyPrediction
from nonlocal_jax.inference.videos import ASSUMED_RATE, Video, open_camera, open_video
from nonlocal_jax.runtime.files import check_absent
from nonlocal_jax.runtime.pipeline import in_threads
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.runtime.signals import StopRequest
from nonlocal_jax.runtime.wording import counted

_LABELS = '_labels.mkv'
_OVERLAY = '_overlay.mp4'


def check_video_results(videos: Mapping[str, Path], options: argparse.Namespace) -> None:
  """Checks that the results of videos, or of the camera, replace nothing they must not.

  Args:
    videos: The videos by the names of their results, without suffix.
    options: See `predict_options`.

  Raises:
    UserError: If they do.
  """
  endings = [_LABELS, _OVERLAY] if options.overlays else [_LABELS]
  check_not_replaced([options.out / f'{name}{ending}' for ending in endings for name in videos])
  if options.camera is not None:  # what it saw cannot be predicted again
    for ending in (_LABELS, _OVERLAY):
      check_absent(options.out / f'{_camera_name(options)}{ending}')


def predict_videos(
  videos: Mapping[str, Path], model: PretrainedModel, options: argparse.Namespace
) -> list[str]:
  """Predicts videos and writes the results, after `check_video_results`.

  Args:
    videos: The videos by the names of their results, without suffix.
    model: The network.
    options: See `predict_options`.

  Returns:
    A sentence about each video that failed.

  Raises:
    UserError: If further results cannot be written.
  """
  _check_channels(model)
  failures, is_any_predicted = [], False
  for name, path in videos.items():
    try:
      with contextlib.closing(open_video(path, max_pixels=options.max_pixels)) as video:
        _predict(video, options.out / name, model, options)
      is_any_predicted = True
      if video.problem:
        failures.append(video.problem)
    except ImageTooLargeError as error:
      failures.append(error.message('--max-pixels'))
    except UserError as error:
      if not concerns_one_file(error):
        raise
      failures.append(str(error))
  if is_any_predicted:
    print('The results have no sound.', file=sys.stderr)
  return failures


def predict_camera(model: PretrainedModel, options: argparse.Namespace) -> None:
  """Predicts what a camera sees until a signal, or for `options.frames` frames.

  Raises:
    UserError: If the camera cannot be read, or results cannot be written.
  """
  _check_channels(model)
  try:
    video = open_camera(options.camera, max_pixels=options.max_pixels)
  except ImageTooLargeError as error:
    raise UserError(error.message('--max-pixels')) from error
  with contextlib.closing(video), StopRequest(then='finishing the videos') as stop:
    print('The recording has no sound. Ctrl-C ends the recording.', file=sys.stderr)
    _predict(
      video, options.out / _camera_name(options), model, options, lambda: bool(stop.received)
    )
  if video.problem:
    raise UserError(video.problem)


def _camera_name(options: argparse.Namespace) -> str:
  return f'camera{options.camera}'


def _check_channels(model: PretrainedModel) -> None:
  pixels = PixelFormat(model.description.config.in_channels, model.protocol.bits)
  if pixels != RGB:
    raise UserError(f'Videos have {RGB}, and the network takes {pixels}: predict images.')


def _predict(
  video: Video,
  target: Path,
  model: PretrainedModel,
  options: argparse.Namespace,
  stopped: Callable[[], bool] = lambda: False,
) -> None:
  """Predicts a video and writes the results; nothing of them stays after an error."""
  rate = options.frame_rate or video.rate or ASSUMED_RATE
  if not (options.frame_rate or video.rate):
    print(
      f'{video.subject} tells no frame rate: {rate:g} frames per second are taken; see '
      '--frame-rate.',
      file=sys.stderr,
    )
  if any(side % 2 for side in video.size):
    height, width = video.size
    print(
      f'{video.subject} has {width}x{height} pixels, and OpenCV writes even sides only: the '
      'results have a further column or row.',
      file=sys.stderr,
    )
  below = options.unknown_below

  def drawn(prediction: AnyPrediction) -> tuple[np.ndarray, np.ndarray | None]:
    label = prediction.labels
    if below is not None:
      confidence = confidence_in(prediction)
      assert confidence is not None
      label = with_unknown(label, confidence, below=below)
    picture = None
    if options.overlays:
      picture = frame_overlay(prediction.image, label, classes=model.classes, palette=model.palette)
    return label, picture

  paths = [Path(f'{target}{_LABELS}')]
  if options.overlays:
    paths.append(Path(f'{target}{_OVERLAY}'))
  total = min(filter(None, (video.num_frames, options.frames)), default=None)
  started, num_unknown = time.perf_counter(), 0
  with contextlib.ExitStack() as stack:
    write_label = stack.enter_context(video_file(paths[0], video.size, rate, filling=UNKNOWN))
    write_picture = None
    if options.overlays:
      write_picture = stack.enter_context(video_file(paths[1], video.size, rate))
    bar = stack.enter_context(progress_bar(total, f'Predicting {target.name}', unit='frame'))
    predictions = model.predict_frames(
      video.frames(options.frames, stopped),
      multi_scale_flip=options.multi_scale_flip,
      return_confidence=below is not None,
    )
    for label, picture in in_threads(
      drawn,
      predictions,
      size=lambda prediction: sum(array.nbytes for array in prediction[1:]),
      most=4 * PIXELS_AHEAD,
    ):
      write_label(label)
      if write_picture is not None and picture is not None:
        write_picture(picture)
      num_unknown += int((label == UNKNOWN).sum()) if below is not None else 0
      bar.update()
  seconds = time.perf_counter() - started
  if not options.overlays:
    remove_predictions([Path(f'{target}{_OVERLAY}')])
  print(
    f'Predicted {counted(video.num_read, "frame")} of {video.name} in {seconds:.1f} s '
    f'({video.num_read / seconds:.3g} per second), to {" and ".join(map(str, paths))}.'
  )
  if below is not None:
    share = num_unknown / (video.num_read * video.size[0] * video.size[1])
    print(
      f'{share:.2%} of their pixels are unknown (label {UNKNOWN}): their class is less likely than '
      f'{below}.'
    )
  if video.duration and not options.frame_rate:
    _say_uneven(video, rate)


def _say_uneven(video: Video, rate: float) -> None:
  """Says that a file's frames are unevenly spaced in time, and how to keep the duration."""
  assert video.duration is not None
  even = (video.num_read - 1) / rate
  same = (video.num_read - 1) / video.duration
  print(
    f'The frames of {video.name} are unevenly spaced in time. All of them are in the results, '
    f'evenly at {rate:g} per second: {even:.2f} s in place of {video.duration:.2f} s; '
    f'--frame-rate={same:.3f} gives them the same duration.',
    file=sys.stderr,
  )
