"""Segments images and videos and writes label maps and overlays.

    nonlocal-jax predict --checkpoint=WEIGHTS INPUT... --out=DIR

WEIGHTS is a .pth file of MMSegmentation, a converted directory, the workdir of a training run
(runs/NAME for its newest checkpoint, runs/NAME/best for the one with the best mIoU), or the name of
a released model, which is downloaded: see `nonlocal-jax models`.
An INPUT is an image, a video, a folder of them, or a pattern such as 'photos/*.jpg'. For an image
a.jpg, writes DIR/a.png, the class indices with the classes' colors as palette, and
DIR/a_overlay.jpg, the image blended with these colors. For a video b.mp4, writes DIR/b_labels.mkv,
the class indices as lossless gray video, and DIR/b_overlay.mp4. The files of a folder keep their
subfolders. Results of earlier predictions among the inputs are left out, and no file but these is
ever replaced; those of an input that is predicted again go, also where the new prediction has none
of their kind.

--confidence adds DIR/a_confidence.png, --probabilities DIR/a_probabilities.npz, of images only.
With --unknown-below=T, pixels whose class is less likely than T are unknown, label 255.

    nonlocal-jax predict --checkpoint=WEIGHTS --camera=0 --out=DIR

predicts what a camera sees until Ctrl-C, or --frames=COUNT, to DIR/camera0_labels.mkv and
DIR/camera0_overlay.mp4.
"""

import dataclasses
from collections.abc import Sequence

import jax

import nonlocal_jax
from nonlocal_jax.cli.predict_images import check_image_results, predict_images, submission_values
from nonlocal_jax.cli.predict_inputs import Inputs, find_inputs
from nonlocal_jax.cli.predict_options import check_for_images, check_for_videos, parse_options
from nonlocal_jax.cli.predict_videos import check_video_results, predict_camera, predict_videos
from nonlocal_jax.cli.program import say_weights
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import Execution
from nonlocal_jax.runtime.devices import say_devices
from nonlocal_jax.runtime.files import make_folder
from nonlocal_jax.runtime.parallel import data_mesh
from nonlocal_jax.runtime.wording import counted


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax predict`."""
  options = parse_options(arguments, __doc__)
  images, videos = Inputs({}, {}) if options.camera is not None else find_inputs(options.inputs)
  has_videos = options.camera is not None or bool(videos)
  if videos:
    check_for_videos(options, str(next(iter(videos.values()))))
  if not has_videos:
    check_for_images(options)
  check_image_results(images, options)
  check_video_results(videos, options)
  devices = jax.local_devices()
  if not has_videos:
    devices = devices[: len(images)]
  say_devices(data_mesh(devices))
  say_weights(options.checkpoint)
  execution = Execution.for_platform()
  if options.convolution == 'direct':
    execution = dataclasses.replace(execution, convolution='direct')
  model = nonlocal_jax.load(
    options.checkpoint,
    align_corners=options.align_corners,
    ema=options.ema,
    execution=execution,
    precision=options.precision,
    attention=options.attention,
    devices=devices,
  )
  if options.scale:
    protocol = dataclasses.replace(model.protocol, scale=tuple(options.scale), scale_factor=None)
    model = model.with_protocol(protocol)
  if options.submission:
    submission_values(model)  # raises before the folder is made
  make_folder(options.out)
  if options.camera is not None:
    predict_camera(model, options)
    return
  failures = {
    'image': predict_images(images, model, options) if images else [],
    'video': predict_videos(videos, model, options) if videos else [],
  }
  said = [
    '\n  '.join([f'{counted(len(listed), kind)} failed:', *listed])
    for kind, listed in failures.items()
    if listed
  ]
  if said:
    raise UserError('\n'.join(said))
