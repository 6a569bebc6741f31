"""Prints and writes the results of an evaluation, and looks up the published score."""

import sys
from pathlib import Path

import numpy as np

from nonlocal_jax.data.datasets import PUBLISHED, Dataset
from nonlocal_jax.evaluation.evaluator import Evaluation
from nonlocal_jax.evaluation.metrics import undefined_reasons, without_hits
from nonlocal_jax.evaluation.pictures import comparison, write_png
from nonlocal_jax.evaluation.report import ReportFacts, write_report
from nonlocal_jax.evaluation.report_page import PAGE, NotReplacedError, report_page, write_page
from nonlocal_jax.evaluation.saved import details_files, read_evaluation
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.weights.released import ReleasedModel

PICTURE = 'predictions.png'


def show_evaluation(evaluation: Evaluation, dataset: Dataset, *, more: bool = False) -> None:
  """Prints the scores of each class and their means, and explains undefined ones.

  Only the first process prints.

  Args:
    evaluation: The results.
    dataset: The dataset, which names the classes.
    more: Whether to add Dice, Fscore, Precision and Recall.
  """
  _print_once(evaluation.scores.table(dataset.classes, more=more))
  reasons = undefined_reasons(evaluation.confusion, dataset.classes, more=more)
  for name, reason in reasons.items():
    _print_once(f'{name}: {reason}')
  if sentence := without_hits(evaluation.confusion, dataset.classes):
    _print_once(sentence)


def write_evaluation(
  workdir: Path, evaluation: Evaluation, dataset: Dataset, facts: ReportFacts
) -> None:
  """Writes `metrics.json` (see `report.write_report`) and `predictions.png`.

  With details also the results of each image, pictures of some, and the report as a page. Only the
  first process writes.

  Args:
    workdir: The output directory, created if it does not exist.
    evaluation: The results.
    dataset: The dataset, which names the classes and gives their colors.
    facts: What the scores depend on.
  """
  if not is_first_process():
    return
  details = evaluation.details
  files, more = ({}, {}) if details is None else details_files(details, dataset)
  write_report(workdir, evaluation.confusion, dataset, facts, seconds=evaluation.seconds, more=more)
  for name, data in files.items():
    write_whole(workdir / name, data)
  write_png(workdir / PICTURE, picture_of(evaluation, dataset))
  if details is not None:
    try:
      write_page(workdir / PAGE, report_page(read_evaluation(workdir)))
    except NotReplacedError as error:
      print(f'No report was written: {error}', file=sys.stderr)


def picture_of(evaluation: Evaluation, dataset: Dataset) -> np.ndarray:
  """Draws the examples of an evaluation, (h, w, 3) uint8 RGB; see `pictures.comparison`."""
  return comparison(evaluation.examples, classes=dataset.classes, palette=dataset.palette)


def comparable_miou(
  released: ReleasedModel,
  dataset: Dataset,
  protocol: EvalProtocol,
  *,
  images: int,
  attention: Attention,
) -> float | None:
  """Returns the published mIoU of a released model if it is comparable, else prints why it is not.

  Only the first process prints.

  Args:
    released: The released model.
    dataset: The dataset of this evaluation.
    protocol: The protocol of this evaluation.
    images: The number of images in this evaluation.
    attention: The implementation of attention in this evaluation, see `Execution.attention`.

  Returns:
    The mIoU in percent, or None if it is not comparable.
  """
  published = released.miou_ms_flip if protocol.averages else released.miou
  if published is None:
    _print_once(f'The mIoU of {released.name} with multi-scale and flip was not published.')
    return None
  differences = differences_from_published(
    released, dataset, protocol, images=images, attention=attention
  )
  if differences:
    _print_once(
      f'{released.name} was published with mIoU {published:.2f}, which cannot be compared: '
      f'{"; ".join(differences)}.'
    )
    return None
  return published


def differences_from_published(
  released: ReleasedModel,
  dataset: Dataset,
  protocol: EvalProtocol,
  *,
  images: int,
  attention: Attention,
) -> list[str]:
  """Lists what the published test did otherwise, as parts of a sentence; see `comparable_miou`."""
  original, theirs, differences = PUBLISHED[released.dataset], released.protocol, []
  labels = (dataset.name, dataset.label_map, dataset.ignore_labels)
  if labels != (original.name, original.label_map, original.ignore_labels):
    return [f'it was tested on the classes of {released.dataset}']
  if images != original.published_sizes['val']:
    differences.append(f'{images} images were tested, not {original.published_sizes["val"]}')
  if protocol.scale != theirs.scale:
    differences.append(f'the scale was {theirs.scale}')
  if protocol.keep_ratio != theirs.keep_ratio:
    differences.append('the aspect ratio was kept')
  windows = protocol.window_crop, protocol.window_stride
  if windows != (theirs.window_crop, theirs.window_stride):
    differences.append(f'the window crop was {theirs.window_crop}')
  if protocol.align_corners != theirs.align_corners:
    differences.append(f'align_corners was {theirs.align_corners}')
  if protocol.version != theirs.version and protocol.averages:
    differences.append(f'the protocol was {theirs.version}')
  if attention == 'cudnn':
    differences.append('attention was not rounded to float16, as cudnn does')
  return differences


def _print_once(text: str) -> None:
  """Prints in the first process."""
  if is_first_process():
    print(text)
