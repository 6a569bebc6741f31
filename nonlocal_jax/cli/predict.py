"""Segments images and writes a label map and an overlay for each.

    nonlocal-jax predict --checkpoint=WEIGHTS INPUT... --out=DIR

WEIGHTS is a .pth file of MMSegmentation, a converted directory or the workdir of a training run.
An INPUT is an image, a folder, or a pattern such as 'photos/*.jpg'. For an image a.jpg, writes
DIR/a.png, the class indices with the classes' colors as palette, and DIR/a_overlay.jpg, the image
blended with these colors. The images of a folder keep their subfolders.
"""

import argparse
import dataclasses
import glob
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from PIL import Image

import nonlocal_jax
from nonlocal_jax.cli.program import Parser
from nonlocal_jax.data.paths import files_below
from nonlocal_jax.data.validation import CITYSCAPES_IDS
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import overlay
from nonlocal_jax.inference.pretrained import Precision, PretrainedModel
from nonlocal_jax.inference.stream import PIXELS_AHEAD, Prediction
from nonlocal_jax.models import Execution
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.runtime.devices import say_devices
from nonlocal_jax.runtime.files import whole_file
from nonlocal_jax.runtime.parallel import data_mesh
from nonlocal_jax.runtime.pipeline import in_threads
from nonlocal_jax.runtime.progress import progress_bar

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax predict`."""
  parser = Parser('nonlocal-jax predict', __doc__)
  parser.add_argument('inputs', nargs='+', metavar='INPUT')
  parser.add_argument('--checkpoint', required=True, type=Path)
  parser.add_argument('--out', required=True, type=Path)
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
  parser.add_argument(
    '--scale',
    nargs=2,
    type=int,
    metavar=('WIDTH', 'HEIGHT'),
    help='box that images are resized into; default: that of the checkpoint',
  )
  parser.add_argument(
    '--align-corners',
    action=argparse.BooleanOptionalAction,
    help='corner convention, for files that do not record it',
  )
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
  options = parser.parse(arguments)
  images = find_images(options.inputs)
  devices = jax.local_devices()[: len(images)]
  say_devices(data_mesh(devices))
  execution = Execution.for_platform()
  if options.convolution == 'direct':
    execution = dataclasses.replace(execution, convolution='direct')
  model = nonlocal_jax.load(
    options.checkpoint,
    align_corners=options.align_corners,
    execution=execution,
    precision=options.precision,
    attention=options.attention,
    devices=devices,
  )
  if options.scale:
    protocol = dataclasses.replace(model.protocol, scale=tuple(options.scale))
    model = model.with_protocol(protocol)
  values = submission_values(model) if options.submission else None
  targets = [options.out / name for name in images]

  def write(prediction: Prediction) -> None:
    target, label = targets[prediction.index], prediction.labels
    if values is not None:
      save(Image.fromarray(values[label]), Path(f'{target}.png'))
      return
    save(with_palette(label, model.palette), Path(f'{target}.png'))
    if not options.overlays:
      return
    picture = overlay(prediction.image, label, classes=model.classes, palette=model.palette)
    save(Image.fromarray(picture), Path(f'{target}_overlay.jpg'))

  failures: dict[int, str] = {}
  started = time.perf_counter()
  with progress_bar(len(images), 'Predicting', unit='img') as bar:

    def note_failure(index: int, error: UserError) -> None:
      failures[index] = str(error)
      bar.update()

    predictions = model.predict_many(
      list(images.values()), multi_scale_flip=options.multi_scale_flip, on_error=note_failure
    )
    for _ in in_threads(
      write,
      predictions,
      size=lambda prediction: prediction.labels.size,
      most=PIXELS_AHEAD,
      eager=True,
    ):
      bar.update()
  seconds = time.perf_counter() - started
  predicted = len(images) - len(failures)
  print(f'{predicted} of {len(images)} images were predicted in {seconds:.1f} s, to {options.out}.')
  if failures:
    listed = [failures[index] for index in sorted(failures)]
    raise UserError('\n  '.join([f'{len(failures)} images failed:', *listed]))


def find_images(inputs: Sequence[str]) -> dict[str, Path]:
  """Finds the images that the command line names.

  Returns:
    The images by the names of their output files, without suffix.

  Raises:
    UserError: If an input names no image, or two images would have the same output file.
  """
  found: dict[str, Path] = {}
  for given in inputs:
    paths = list(_images_of(given))
    if not paths:
      raise UserError(f'{given} is no image, no folder of images and no pattern that fits any.')
    for name, path in paths:
      if found.setdefault(name, path) != path:
        raise UserError(f'{found[name]} and {path} would both go to {name}.png: rename one.')
  return found


def _images_of(given: str) -> Iterable[tuple[str, Path]]:
  folder = Path(given)
  if folder.is_dir():
    for path in files_below(folder):
      if path.suffix.lower() in _SUFFIXES:
        yield path.relative_to(folder).with_suffix('').as_posix(), path
    return
  for name in [given] if folder.is_file() else sorted(glob.glob(given, recursive=True)):
    if Path(name).is_file():
      yield Path(name).stem, Path(name)


def submission_values(model: PretrainedModel) -> np.ndarray:
  """Returns the label value of each class that the benchmark's server expects, uint8.

  Raises:
    UserError: If the model was trained on another dataset.
  """
  dataset = model.description.dataset
  if dataset == 'cityscapes':
    return np.array(CITYSCAPES_IDS, np.uint8)
  if dataset == 'ade20k':
    return np.arange(1, len(model.classes) + 1, dtype=np.uint8)
  raise UserError(
    f'--submission is for models of Cityscapes and ADE20K, and this one is of {dataset}.'
  )


def with_palette(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
  """Converts a label map to a palette image in the colors of the classes."""
  image = Image.fromarray(label)
  image.putpalette(np.array(palette, np.uint8).ravel().tolist())
  return image


def save(image: Image.Image, path: Path) -> None:
  """Writes an image file atomically."""
  with whole_file(path) as partial:
    image.save(partial, 'PNG' if path.suffix == '.png' else 'JPEG')
