"""What an evaluation prints and writes, and the published score beside it."""

from pathlib import Path

import numpy as np
from PIL import Image

from nonlocal_jax.data.datasets import PUBLISHED, Dataset
from nonlocal_jax.evaluation.evaluator import Evaluation
from nonlocal_jax.evaluation.metrics import undefined_reasons
from nonlocal_jax.evaluation.pictures import comparison
from nonlocal_jax.evaluation.report import ReportFacts, write_report
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.files import whole_file
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.weights.released import ReleasedModel

PICTURE = 'predictions.png'


def show_evaluation(evaluation: Evaluation, dataset: Dataset, *, more: bool = False) -> None:
  """Prints the scores of each class and their means, and why some have none (first process).

  Args:
    evaluation: What was found.
    dataset: Names of the classes.
    more: Whether to add Dice, Fscore, Precision and Recall.
  """
  if not is_first_process():
    return
  print(evaluation.scores.table(dataset.classes, more=more))
  reasons = undefined_reasons(evaluation.confusion, dataset.classes, more=more)
  for name, reason in reasons.items():
    print(f'{name}: {reason}')


def write_evaluation(
  workdir: Path, evaluation: Evaluation, dataset: Dataset, facts: ReportFacts
) -> None:
  """Writes `metrics.json` (see `report.write_report`) and `predictions.png`, on the first process.

  Args:
    workdir: Where to; made if it is not there.
    evaluation: What was found.
    dataset: Names and colours of the classes.
    facts: What the scores depend on.
  """
  if not is_first_process():
    return
  write_report(workdir, evaluation.confusion, dataset, facts, seconds=evaluation.seconds)
  with whole_file(workdir / PICTURE) as partial:
    Image.fromarray(picture_of(evaluation, dataset)).save(partial, format='PNG')


def picture_of(evaluation: Evaluation, dataset: Dataset) -> np.ndarray:
  """The examples of an evaluation as (h, w, 3) uint8 RGB, see `pictures.comparison`."""
  return comparison(evaluation.examples, classes=dataset.classes, palette=dataset.palette)


def comparable_miou(
  released: ReleasedModel, dataset: Dataset, protocol: EvalProtocol, *, images: int
) -> float | None:
  """The published mIoU of a released model, if it was measured in the same way; else says why not.

  Args:
    released: The model.
    dataset: What is tested on.
    protocol: How images are tested.
    images: How many images are tested.

  Returns:
    In percent, None if it is not comparable.
  """
  published = released.miou_ms_flip if protocol.averages else released.miou
  if published is None:
    print(f'The mIoU of {released.name} with multi-scale and flip was not published.')
    return None
  differences = _differences(released, dataset, protocol, images)
  if differences:
    print(
      f'{released.name} was published with mIoU {published:.2f}, which cannot be compared: '
      f'{"; ".join(differences)}.'
    )
    return None
  return published


def _differences(
  released: ReleasedModel, dataset: Dataset, protocol: EvalProtocol, images: int
) -> list[str]:
  original, theirs, differences = PUBLISHED[released.dataset], released.protocol, []
  labels = (dataset.name, dataset.label_map, dataset.ignore_labels)
  if labels != (original.name, original.label_map, original.ignore_labels):
    return [f'it was tested on the classes of {released.dataset}']
  if images != original.published_sizes['val']:
    differences.append(f'{images} images were tested, not {original.published_sizes["val"]}')
  if protocol.scale != theirs.scale:
    differences.append(f'the scale was {theirs.scale}')
  windows = protocol.window_crop, protocol.window_stride
  if windows != (theirs.window_crop, theirs.window_stride):
    differences.append(f'the window crop was {theirs.window_crop}')
  if protocol.align_corners != theirs.align_corners:
    differences.append(f'align_corners was {theirs.align_corners}')
  if protocol.version != theirs.version and protocol.averages:
    differences.append(f'the protocol was {theirs.version}')
  return differences
