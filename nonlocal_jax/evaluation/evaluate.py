"""Evaluation as a config says: of a checkpoint, and what it prints and writes."""

from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.evaluator import Evaluation, Evaluator
from nonlocal_jax.evaluation.metrics import undefined_reasons
from nonlocal_jax.evaluation.pictures import comparison
from nonlocal_jax.evaluation.report import published_line, write_report
from nonlocal_jax.experiment import (
  check_device,
  dataset_of,
  execution_of,
  network_of,
  open_splits,
  protocol_of,
)
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.runtime.files import whole_file
from nonlocal_jax.runtime.parallel import data_mesh, is_first_process
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import read_weights
from nonlocal_jax.weights.released import ReleasedModel, released_model_of_sha256

PICTURE = 'predictions.png'


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, workdir: Path) -> Evaluation:
  """Evaluates saved weights as a config says; prints the scores and writes them to `workdir`.

  Args:
    config: Network, data and test sizes.
    checkpoint: A .pth file, a converted directory or the workdir of a training run.
    workdir: Gets `metrics.json` and `predictions.png`.

  Raises:
    UserError: If the weights are of another network than the config's, or the data is not as it
      should be, or the config asks for what the devices do not have.
  """
  network, mesh = network_of(config), data_mesh()
  check_device(config, mesh)
  description, state = read_weights(checkpoint, align_corners=config.model.align_corners)
  if not description.config.predicts_like(network):
    raise UserError(
      f'{checkpoint} holds {description.config}, but the config describes {network}; '
      'give its own config, or set config.model and config.data.num_classes to match.'
    )
  dataset = dataset_of(config)
  split = open_splits(config, dataset, workdir, ['val'])['val']
  evaluate = evaluator_for(config, split, dataset, mesh)
  weights = evaluate.prepared(state)
  del state  # a file in memory
  evaluation = evaluate(weights)
  published = _published_miou(config, description, images=len(split))
  show_evaluation(evaluation, config, dataset)
  if published is not None and is_first_process():
    print(published_line(100 * evaluation.scores.mean_iou, published, dataset.name))
  write_evaluation(
    workdir,
    evaluation,
    config,
    dataset,
    images=len(split),
    description=description,
    checkpoint=checkpoint,
    published=published,
  )
  return evaluation


def evaluator_for(
  config: ConfigDict, split: PreparedSplit, dataset: Dataset, mesh: Mesh
) -> Evaluator:
  """The evaluator that a config describes, on the devices of a mesh."""
  predictor = Predictor(
    network_of(config),
    protocol_of(config),
    execution=execution_of(config, mesh, train=False),
    precision=config.eval.precision,
    mesh=mesh,
  )
  return Evaluator(
    predictor,
    split,
    num_classes=dataset.num_classes,
    label_lookup=dataset.label_lookup,
    batch_size=config.eval.batch_size * mesh.size,
    most_shapes=config.eval.shapes,
  )


def show_evaluation(evaluation: Evaluation, config: ConfigDict, dataset: Dataset) -> None:
  """Prints the scores of each class and their means, and why some have none (first process)."""
  if not is_first_process():
    return
  more = config.eval.more_scores
  print(evaluation.scores.table(dataset.classes, more=more))
  reasons = undefined_reasons(evaluation.confusion, dataset.classes, more=more)
  for name, reason in reasons.items():
    print(f'{name}: {reason}')


def write_evaluation(
  workdir: Path,
  evaluation: Evaluation,
  config: ConfigDict,
  dataset: Dataset,
  *,
  images: int,
  description: ModelDescription | None = None,
  checkpoint: Path | None = None,
  step: int | None = None,
  published: float | None = None,
) -> None:
  """Writes `metrics.json` (see `report.write_report`) and `predictions.png`, on the first process.

  Args:
    workdir: Where to; made if it is not there.
    evaluation: What was found.
    config: As what was evaluated.
    dataset: Names and colours of the classes.
    images: How many images.
    description: What the checkpoint's weights are, None after training.
    checkpoint: Where the weights are from, None after training.
    step: Training steps that the weights have seen, None if they are not of a training run.
    published: mIoU in percent that was published of these weights, tested so.
  """
  if not is_first_process():
    return
  write_report(
    workdir,
    evaluation.confusion,
    dataset,
    images=images,
    seconds=evaluation.seconds,
    protocol=protocol_of(config),
    config=config.to_dict(),
    checkpoint=str(checkpoint) if checkpoint else None,
    sha256=description.sha256 if description else None,
    step=step,
    published=published,
    more=config.eval.more_scores,
  )
  with whole_file(workdir / PICTURE) as partial:
    Image.fromarray(picture_of(evaluation, dataset)).save(partial, format='PNG')


def picture_of(evaluation: Evaluation, dataset: Dataset) -> np.ndarray:
  """The examples of an evaluation as (h, w, 3) uint8 RGB, see `pictures.comparison`."""
  return comparison(evaluation.examples, classes=dataset.classes, palette=dataset.palette)


def _published_miou(
  config: ConfigDict, description: ModelDescription, *, images: int
) -> float | None:
  """The published mIoU of released weights, if it was measured as the config measures.

  Says what differs, if it was not.
  """
  released = released_model_of_sha256(description.sha256) if description.sha256 else None
  if released is None:
    return None
  several = config.eval.multi_scale_flip
  published = released.miou_ms_flip if several else released.miou
  if published is None:
    print(f'The mIoU of {released.name} with multi-scale and flip was not published.')
    return None
  differences = _differences(config, released, images)
  if differences:
    print(
      f'{released.name} was published with mIoU {published:.2f}, which cannot be compared: '
      f'{"; ".join(differences)}.'
    )
    return None
  return published


def _differences(config: ConfigDict, released: ReleasedModel, images: int) -> list[str]:
  dataset = dataset_of(config)
  ours, theirs, differences = protocol_of(config), released.protocol, []
  if config.data.dataset != released.dataset or config.data.label_map or config.data.ignore_labels:
    return [f'it was tested on the classes of {released.dataset}']
  if images != dataset.published_sizes['val']:
    differences.append(f'{images} images were tested, not {dataset.published_sizes["val"]}')
  if ours.scale != theirs.scale:
    differences.append(f'config.eval.scale was {theirs.scale}')
  if (ours.window_crop, ours.window_stride) != (theirs.window_crop, theirs.window_stride):
    differences.append(f'config.eval.window_crop was {theirs.window_crop or ()}')
  if ours.align_corners != theirs.align_corners:
    differences.append(f'config.model.align_corners was {theirs.align_corners}')
  if ours.version != theirs.version and ours.averages:
    differences.append(f'config.eval.protocol was {theirs.version}')
  return differences
