"""Predicts images for `nonlocal-jax predict`, and writes what the options ask for."""

import argparse
import collections
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from nonlocal_jax.cli.prediction_files import (
  JPEG_MAX_SIDE,
  check_not_replaced,
  concerns_one_file,
  remove_predictions,
  save,
  save_probabilities,
  with_palette,
)
from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.data.pixel_formats import displayable
from nonlocal_jax.data.validation import CITYSCAPES_IDS
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import overlay
from nonlocal_jax.inference.images import ImageTooLargeError
from nonlocal_jax.inference.pretrained import PretrainedModel
from nonlocal_jax.inference.probabilities import UNKNOWN, confidence_of, with_unknown
from nonlocal_jax.inference.stream import (
  PIXELS_AHEAD,
  AnyPrediction,
  ConfidentPrediction,
  ProbablePrediction,
)
from nonlocal_jax.runtime.pipeline import in_threads
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.runtime.wording import counted

# What the names of results end in, beside '.png' for label maps.
_OVERLAY = '_overlay.jpg'
_CONFIDENCE = '_confidence.png'
_PROBABILITIES = '_probabilities.npz'


def check_image_results(images: Mapping[str, Path], options: argparse.Namespace) -> None:
  """Checks that the results of images replace nothing but earlier predictions.

  Args:
    images: The images by the names of their results, without suffix.
    options: See `predict_options`.

  Raises:
    UserError: If they do, or two images have the same result.
  """
  files = [
    options.out / f'{name}{ending}'
    for ending, is_wanted in _endings(options).items()
    if is_wanted
    for name in images
  ]
  if len(set(files)) < len(files):
    (twice, _), *_ = collections.Counter(files).most_common()
    raise UserError(f'Results of two images would both be {twice}: rename one of the images.')
  check_not_replaced(files)


def predict_images(
  images: Mapping[str, Path], model: PretrainedModel, options: argparse.Namespace
) -> list[str]:
  """Predicts images and writes the results, after `check_image_results`.

  Args:
    images: The images by the names of their results, without suffix.
    model: The network.
    options: See `predict_options`.

  Returns:
    A sentence about each image that failed.

  Raises:
    UserError: If the model has no benchmark, or further results cannot be written.
  """
  values = submission_values(model) if options.submission else None
  below, wanted = options.unknown_below, _endings(options)
  targets = [options.out / name for name in images]
  label_maps = {Path(f'{target}.png') for target in targets}
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
      if wanted[_OVERLAY]:
        picture = overlay(displayable(image), label, classes=model.classes, palette=model.palette)
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
  print(
    f'Predicted {predicted} of {counted(len(images), "image")} in {seconds:.1f} s, to '
    f'{options.out}.'
  )
  if below is not None:
    unknown, pixels = np.sum(counts or [(0, 1)], axis=0).tolist()
    print(
      f'{unknown / pixels:.2%} of their pixels are unknown (label {UNKNOWN}): their class is less '
      f'likely than {below}.'
    )
  if outdated:
    print(
      f'Removed {counted(len(outdated), "file")} of an earlier prediction that would not fit these '
      f'label maps, such as {outdated[0]}.',
      file=sys.stderr,
    )
  if large_overlays:
    print(
      f'Written as PNG: {counted(len(large_overlays), "overlay")} with more than {JPEG_MAX_SIDE:,} '
      f'pixels on a side, which JPEG does not allow, such as {large_overlays[0]}.',
      file=sys.stderr,
    )
  return [failures[index] for index in sorted(failures)]


def _endings(options: argparse.Namespace) -> dict[str, bool]:
  """What the names of all kinds of results end in, and whether they are wanted."""
  return {
    '.png': True,
    _OVERLAY: options.overlays and not options.submission,
    _CONFIDENCE: options.confidence,
    _PROBABILITIES: options.probabilities,
  }


def confidence_in(prediction: AnyPrediction) -> np.ndarray | None:
  """Returns the probability of each label, (h, w) float32, if it was predicted."""
  if isinstance(prediction, ConfidentPrediction):
    return prediction.confidence
  if isinstance(prediction, ProbablePrediction):
    return confidence_of(prediction.probabilities, prediction.labels)
  return None


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
