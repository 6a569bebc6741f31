"""Segments images and writes a label map and an overlay for each.

    nonlocal-jax predict --checkpoint=WEIGHTS INPUT... --out=DIR

WEIGHTS is a .pth file of MMSegmentation, a converted directory, the workdir of a training run
(runs/NAME for its newest checkpoint, runs/NAME/best for the one with the best mIoU), or the name of
a released model, which is downloaded: see `nonlocal-jax models`.
An INPUT is an image, a folder, or a pattern such as 'photos/*.jpg'. For an image a.jpg, writes
DIR/a.png, the class indices with the classes' colors as palette, and DIR/a_overlay.jpg, the image
blended with these colors. The images of a folder keep their subfolders. Results of earlier
predictions among the inputs are left out, and no file but these is ever replaced; those of an image
that is predicted again go, also where the new prediction has none of their kind.

--confidence adds DIR/a_confidence.png, --probabilities DIR/a_probabilities.npz. With
--unknown-below=T, pixels whose class is less likely than T are unknown, label 255.
"""

import argparse
import collections
import dataclasses
import glob
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from PIL import Image

import nonlocal_jax
from nonlocal_jax.cli.prediction_files import (
  JPEG_MAX_SIDE,
  check_not_replaced,
  concerns_one_file,
  is_prediction,
  remove_predictions,
  save,
  save_probabilities,
  with_palette,
)
from nonlocal_jax.cli.program import (
  Parser,
  add_align_corners,
  add_ema,
  add_scale,
  path_option,
  say_weights,
)
from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, without_suffix
from nonlocal_jax.data.validation import CITYSCAPES_IDS
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import overlay
from nonlocal_jax.inference.images import DECODER_MAX_PIXELS, MAX_PIXELS, ImageTooLargeError
from nonlocal_jax.inference.pretrained import Precision, PretrainedModel
from nonlocal_jax.inference.probabilities import UNKNOWN, confidence_of, with_unknown
from nonlocal_jax.inference.stream import (
  PIXELS_AHEAD,
  AnyPrediction,
  ConfidentPrediction,
  ProbablePrediction,
)
from nonlocal_jax.models import Execution
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.runtime.devices import say_devices
from nonlocal_jax.runtime.files import given_path, make_folder
from nonlocal_jax.runtime.parallel import data_mesh
from nonlocal_jax.runtime.pipeline import in_threads, num_cores
from nonlocal_jax.runtime.progress import progress_bar

# What the names of results end in, beside '.png' for label maps.
_OVERLAY = '_overlay.jpg'
_CONFIDENCE = '_confidence.png'
_PROBABILITIES = '_probabilities.npz'


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax predict`."""
  parser = Parser('nonlocal-jax predict', __doc__)
  parser.add_argument(
    'inputs', nargs='+', metavar='INPUT', help="an image, a folder, or a pattern such as 'photos/*'"
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
    help='whether to write the blended images beside the label maps (default: yes)',
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
    help='leave out images with more pixels, which bounds the memory; default: 134,217,728 (2^27), '
    'at most 2^30',
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
  images = find_images(options.inputs)
  targets = [options.out / name for name in images]
  label_maps = {Path(f'{target}.png') for target in targets}
  overlays = options.overlays and not options.submission
  wanted = {
    '.png': True,
    _OVERLAY: overlays,
    _CONFIDENCE: options.confidence,
    _PROBABILITIES: options.probabilities,
  }
  files = [
    Path(f'{target}{ending}')
    for ending, is_wanted in wanted.items()
    if is_wanted
    for target in targets
  ]
  if len(set(files)) < len(files):
    (twice, _), *_ = collections.Counter(files).most_common()
    raise UserError(f'Results of two images would both be {twice}: rename one of the images.')
  check_not_replaced(files)
  devices = jax.local_devices()[: len(images)]
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
  values = submission_values(model) if options.submission else None
  make_folder(options.out)

  large_overlays: list[Path] = []
  outdated: list[Path] = []
  unwanted = [ending for ending, is_wanted in wanted.items() if not is_wanted]
  unwanted.append(str(Path(_OVERLAY).with_suffix('.png')))  # of an image that was larger
  counts: list[tuple[int, int]] = []  # of unknown pixels and of all, for each image

  def write(prediction: AnyPrediction) -> tuple[int, UserError | None]:
    target, image, label = targets[prediction.index], prediction.image, prediction.labels
    confidence = confidence_in(prediction)
    if below is not None:
      assert confidence is not None
      label = with_unknown(label, confidence, below=below)
    label_map = with_palette(label, model.palette)
    if values is not None:
      label_map = Image.fromarray(values[label])
    try:
      others = {Path(f'{target}{ending}') for ending in unwanted} - label_maps
      outdated.extend(remove_predictions(others))
      save(label_map, Path(f'{target}.png'))
      if options.confidence:
        assert confidence is not None
        shades = np.rint(255 * confidence).astype(np.uint8)
        save(Image.fromarray(shades), Path(f'{target}{_CONFIDENCE}'))
      if isinstance(prediction, ProbablePrediction):
        path = Path(f'{target}{_PROBABILITIES}')
        save_probabilities(prediction.probabilities, model.classes, path)
      if overlays:
        picture = overlay(image, label, classes=model.classes, palette=model.palette)
        path = Path(f'{target}{_OVERLAY}')
        if max(picture.shape) > JPEG_MAX_SIDE:
          path = path.with_suffix('.png')
          check_not_replaced([path], but=label_maps)
          large_overlays.append(path)
        save(Image.fromarray(picture), path)
    except UserError as error:
      if not concerns_one_file(error):
        raise
      return prediction.index, error
    if below is not None:
      counts.append((int((label == UNKNOWN).sum()), label.size))
    return prediction.index, None

  failures: dict[int, str] = {}
  started = time.perf_counter()
  with progress_bar(len(images), 'Predicting', unit='img') as bar:

    def note_failure(index: int, error: UserError) -> None:
      is_too_large = isinstance(error, ImageTooLargeError)
      failures[index] = error.message('--max-pixels') if is_too_large else str(error)
      bar.update()

    predictions = model.predict_many(
      list(images.values()),
      multi_scale_flip=options.multi_scale_flip,
      max_pixels=options.max_pixels,
      on_error=note_failure,
      return_probabilities=options.probabilities,
      return_confidence=((options.confidence or below is not None) and not options.probabilities),
    )
    for index, error in in_threads(
      write,
      predictions,
      size=lambda prediction: sum(array.nbytes for array in prediction[1:]),
      most=4 * PIXELS_AHEAD,  # of three bytes of an image and one of a label map
      eager=True,
    ):
      if error is None:
        bar.update()
      else:
        note_failure(index, error)
  seconds = time.perf_counter() - started
  predicted = len(images) - len(failures)
  print(f'{predicted} of {len(images)} images were predicted in {seconds:.1f} s, to {options.out}.')
  if below is not None:
    unknown, pixels = np.sum(counts or [(0, 1)], axis=0).tolist()
    print(
      f'{unknown / pixels:.2%} of their pixels are unknown (label {UNKNOWN}): their class is less '
      f'likely than {below}.'
    )
  if outdated:
    print(
      f'{len(outdated)} files of an earlier prediction, which do not belong to these label maps, '
      f'were removed, such as {outdated[0]}.',
      file=sys.stderr,
    )
  if large_overlays:
    print(
      f'{len(large_overlays)} overlays with more than {JPEG_MAX_SIDE:,} pixels on a side, which '
      f'JPEG does not allow, are PNG files, such as {large_overlays[0]}.',
      file=sys.stderr,
    )
  if failures:
    listed = [failures[index] for index in sorted(failures)]
    raise UserError('\n  '.join([f'{len(failures)} images failed:', *listed]))


def confidence_in(prediction: AnyPrediction) -> np.ndarray | None:
  """Returns the probability of each label, (h, w) float32, if it was predicted."""
  if isinstance(prediction, ConfidentPrediction):
    return prediction.confidence
  if isinstance(prediction, ProbablePrediction):
    return confidence_of(prediction.probabilities, prediction.labels)
  return None


def find_images(inputs: Sequence[str]) -> dict[str, Path]:
  """Finds the images that the command line names, without results of earlier predictions.

  Returns:
    The images by the names of their output files, without suffix.

  Raises:
    UserError: If an input names no image, or two images would have the same output file.
  """
  found: dict[str, Path] = {}
  num_left_out, others = 0, []
  for given in inputs:
    if not given:  # as of an unset variable
      raise UserError('an INPUT is empty: give an image, a folder, or a pattern.')
    files = list(_files_of(given))
    named = [(name, path) for name, path in files if name is not None]
    results = [path for name, path in files if name is None and is_prediction(path)]
    num_left_out += len(results)
    others += [path for name, path in files if name is None and path not in results]
    if not named:
      raise UserError(
        f'{given} is neither an image nor a folder of images nor a pattern that matches any.'
      )
    with warnings.catch_warnings(), ThreadPoolExecutor(num_cores()) as pool:
      warnings.simplefilter('ignore')  # of large images and odd metadata
      are_predictions = list(pool.map(is_prediction, [path for _, path in named]))
    if all(are_predictions):
      raise UserError(f'{given} holds only results of earlier predictions: give the images.')
    num_left_out += sum(are_predictions)
    for (name, path), is_left_out in zip(named, are_predictions, strict=True):
      if not is_left_out and found.setdefault(name, path) != path:
        raise UserError(f'{found[name]} and {path} would both go to {name}.png: rename one.')
  if num_left_out:
    print(f'{num_left_out} results of earlier predictions are left out.', file=sys.stderr)
  if others:
    print(
      f'{len(others)} files whose names do not end as those of images are left out, such as '
      f'{others[0]}.',
      file=sys.stderr,
    )
  return found


def _files_of(given: str) -> Iterable[tuple[str | None, Path]]:
  """The files that an input names, with the names of their results, None for other than images."""
  folder = given_path(given)
  if folder.is_dir():
    for path in files_below(folder):
      name = path.relative_to(folder).as_posix()
      yield without_suffix(name, IMAGE_SUFFIXES), path
    return
  paths = [folder] if folder.is_file() else sorted(glob.glob(str(folder), recursive=True))
  for path in map(Path, paths):
    if not path.is_dir():
      yield path.stem, path


def submission_values(model: PretrainedModel) -> np.ndarray:
  """Returns the label value of each class that the benchmark's server expects, uint8.

  The classes may be some of the benchmark's, in any order: they are known by name.

  Raises:
    UserError: If the model was trained on another dataset, or has a class that is not exactly one
      of the benchmark's.
  """
  dataset = model.description.dataset
  values = {'cityscapes': CITYSCAPES_IDS, 'ade20k': range(1, 151)}.get(dataset)
  if values is None:
    raise UserError(
      f'--submission is for models of Cityscapes and ADE20K, and this one is of {dataset}.'
    )
  value_of = dict(zip(PUBLISHED[dataset].classes, values, strict=True))
  others = [name for name in model.classes if name not in value_of]
  if others or len(set(model.classes)) < len(model.classes):
    raise UserError(
      f'--submission needs classes of {dataset}, each at most once, and this model has merged or '
      f'renamed ones{f", such as {others[0]!r}" if others else ""}: predict without it.'
    )
  return np.array([value_of[name] for name in model.classes], np.uint8)
