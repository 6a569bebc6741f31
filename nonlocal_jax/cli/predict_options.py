"""The options of `nonlocal-jax predict`, and which of them go together."""

import argparse
import math
from collections.abc import Sequence
from typing import get_args

from nonlocal_jax.cli.program import (
  Parser,
  add_align_corners,
  add_ema,
  add_scale,
  path_option,
)
from nonlocal_jax.errors import UsageError, UserError
from nonlocal_jax.inference.images import DECODER_MAX_PIXELS, MAX_PIXELS
from nonlocal_jax.inference.pretrained import Precision
from nonlocal_jax.inference.videos import MAX_RATE, MIN_RATE
from nonlocal_jax.ops.attention import Attention


def parse_options(arguments: Sequence[str], description: str | None) -> argparse.Namespace:
  """Parses the command line.

  Raises:
    UserError: If a value is out of range, or options exclude each other.
  """
  parser = Parser('nonlocal-jax predict', description)
  parser.add_argument(
    'inputs',
    nargs='*',
    metavar='INPUT',
    help="an image, a video, a folder, or a pattern such as 'photos/*'",
  )
  parser.add_argument(
    '--checkpoint',
    required=True,
    type=path_option,
    metavar='WEIGHTS',
    help='a .pth file, a converted directory or a workdir',
  )
  parser.add_argument('--out', required=True, type=path_option, metavar='DIR', help='output folder')
  parser.add_argument(
    '--submission',
    action='store_true',
    help='write the label values that the servers of Cityscapes and ADE20K expect, and no overlays',
  )
  parser.add_argument(
    '--overlays',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='whether to write the blended images and videos beside the label maps (default: yes)',
  )
  parser.add_argument(
    '--multi-scale-flip',
    action='store_true',
    default=None,
    help='average over six scales, each with and without a horizontal flip',
  )
  add_scale(parser)
  add_align_corners(parser)
  parser.add_argument(
    '--confidence',
    action='store_true',
    help='write the probability of each predicted class as well: 8-bit gray PNG files in which 255 '
    'is certain',
  )
  parser.add_argument(
    '--probabilities',
    action='store_true',
    help='write the probabilities of all classes as well: .npz files of float16 (height, width, '
    'classes), 2 bytes for each pixel and class',
  )
  parser.add_argument(
    '--unknown-below',
    type=float,
    metavar='T',
    help="pixels whose predicted class is less likely than T, between 0 and 1, become 'unknown', "
    'label 255',
  )
  add_ema(parser)
  parser.add_argument(
    '--convolution',
    choices=['fast', 'direct'],
    default='fast',
    help="'direct' uses XLA's own convolutions on every platform (default: fast)",
  )
  parser.add_argument(
    '--precision',
    choices=get_args(Precision),
    default='highest',
    help="precision of matrix products: 'highest' is float32; on recent GPUs 'default' is TF32, "
    "several times as fast, and 'high' three TF32 convolutions in place of one (default: highest)",
  )
  parser.add_argument(
    '--attention',
    choices=[*get_args(Attention), 'auto'],
    default='blocks',
    help="how attention is computed: 'flash' and 'cudnn' (which rounds to float16) are for NVIDIA "
    "GPUs, 'auto' is the fastest that suits the precision (default: blocks)",
  )
  parser.add_argument(
    '--max-pixels',
    type=int,
    default=MAX_PIXELS,
    metavar='COUNT',
    help='leave out images and videos with more pixels, which bounds the memory; default: '
    '134,217,728 (2^27), at most 2^30',
  )
  parser.add_argument(
    '--camera',
    type=int,
    metavar='INDEX',
    help='predict what a camera sees in place of INPUTs; the first one has the index 0',
  )
  parser.add_argument(
    '--frames',
    type=int,
    metavar='COUNT',
    help='predict at most so many frames of each video, or of the camera (default: all of a video, '
    'those of a camera until Ctrl-C)',
  )
  parser.add_argument(
    '--frame-rate',
    type=float,
    metavar='RATE',
    help="frames per second of the videos that are written (default: the source's)",
  )
  options = parser.parse(arguments)
  if not 1 <= options.max_pixels <= DECODER_MAX_PIXELS:
    raise UserError(
      f'--max-pixels is {options.max_pixels:,}; it must be from 1 to {DECODER_MAX_PIXELS:,}.'
    )
  below = options.unknown_below
  if below is not None and not 0 < below < 1:
    raise UserError(f'--unknown-below is {below}; it must be a probability between 0 and 1.')
  if below is not None and options.submission:
    raise UserError('--submission needs a class for each pixel: leave out --unknown-below.')
  _check_video_options(options)
  return options


def _check_video_options(options: argparse.Namespace) -> None:
  if options.camera is None and not options.inputs:
    raise UsageError(
      'there is no INPUT: give images, videos, folders or patterns, or --camera=0; see '
      'nonlocal-jax predict --help.'
    )
  if options.camera is not None:
    if options.inputs:
      raise UserError(
        f'--camera takes the place of INPUTs, and there is {options.inputs[0]}: leave out one of '
        'the two.'
      )
    if options.camera < 0:
      raise UserError(f'--camera is {options.camera}; the first camera has the index 0.')
    check_for_videos(options, f'the camera {options.camera}')
  if options.frames is not None and options.frames < 1:
    raise UserError(f'--frames is {options.frames}; it must be at least 1.')
  rate = options.frame_rate
  if rate is not None and not (math.isfinite(rate) and MIN_RATE <= rate <= MAX_RATE):
    raise UserError(f'--frame-rate is {rate:g}; it must be from {MIN_RATE:g} to {MAX_RATE:g}.')


def check_for_videos(options: argparse.Namespace, video: str) -> None:
  """Checks that all options apply to videos.

  Args:
    options: The options.
    video: What to call one of the videos that are inputs.

  Raises:
    UserError: If one does not.
  """
  for name in ('submission', 'probabilities', 'confidence'):
    if getattr(options, name):
      raise UserError(f'--{name} is for images, and {video} is a video: leave out one of the two.')


def check_for_images(options: argparse.Namespace) -> None:
  """Checks that no option is for videos, where there are none.

  Raises:
    UserError: If one is.
  """
  for name in ('frames', 'frame_rate'):
    if getattr(options, name) is not None:
      option = f'--{name.replace("_", "-")}'
      raise UserError(f'{option} is for videos, and all INPUTs are images: leave it out.')
