"""Training from a config: one linear function from the data to the last evaluation."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Self

import jax
from clu import parameter_overview
from flax import nnx
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.loader import TrainIterator
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.evaluator import Evaluation
from nonlocal_jax.evaluation.program import evaluator_for, show_evaluation, write_evaluation
from nonlocal_jax.experiment import architecture_of, dataset_of, open_splits, train_batches_of
from nonlocal_jax.parallel import data_mesh, over_batch, replicated, shard_batch
from nonlocal_jax.progress import progress_bar
from nonlocal_jax.training.optimizer import poly_schedule, sgd
from nonlocal_jax.training.state import Metrics, TrainState, make_train_step
from nonlocal_jax.weights.checkpoints import (
  DESCRIPTION,
  RunCheckpoints,
  config_differences,
  to_arrays,
)
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import read_backbone

CONFIG = 'config.json'
LOG = 'log.jsonl'
# What may change between a run and its continuation: nothing that the next step depends on.
_FREE = (
  'eval.',
  'checkpoint.',
  'data.source_dir',
  'data.data_dir',
  'data.workers',
  'data.classes',
  'data.palette',
  'train.log_every',
)


def train_and_evaluate(config: ConfigDict, workdir: Path) -> Evaluation:
  """Trains as a config says, from where `workdir` stands; evaluates at intervals and at the end.

  Args:
    config: See `configs/common.py`.
    workdir: Gets checkpoints, `config.json`, `model.json`, `log.jsonl`, TensorBoard events,
      `metrics.json` and `predictions.png`.

  Returns:
    The last evaluation.

  Raises:
    UserError: If config or data are not as they should be, `workdir` holds another run, or the loss
      is not finite.
  """
  mesh = data_mesh()
  if config.train.batch_size % mesh.size:
    raise UserError(
      f'config.train.batch_size is {config.train.batch_size}, which {mesh.size} devices cannot '
      'share; '
      'make it a multiple.'
    )
  architecture = architecture_of(config)
  dataset = dataset_of(config)
  _check_same_run(config, workdir, dataset)
  backbone = None
  if config.init_backbone and not _has_checkpoint(workdir):
    backbone = read_backbone(Path(config.init_backbone), architecture)
  splits = open_splits(config, dataset, workdir, ['train', 'val'])
  batches = train_batches_of(config, splits['train'], dataset)
  _write_run_files(config, workdir, dataset)

  schedule = poly_schedule(
    learning_rate=config.optimizer.learning_rate,
    min_learning_rate=config.optimizer.min_learning_rate,
    power=config.optimizer.power,
    steps=config.train.steps,
  )
  tx = sgd(schedule, momentum=config.optimizer.momentum, weight_decay=config.optimizer.weight_decay)
  network = {'align_corners': config.model.align_corners, 'dropout': config.model.dropout}

  def initial_state() -> TrainState:
    model = architecture.build(
      **network, zero_init=config.model.zero_init, rngs=nnx.Rngs(config.seed)
    )
    return TrainState.create(nnx.state(model), tx, seed=config.seed)

  everywhere = replicated(mesh)
  graphdef = nnx.graphdef(architecture.abstract(**network))
  state = jax.jit(initial_state, out_shardings=everywhere)()
  train_step = jax.jit(
    make_train_step(graphdef, tx, auxiliary_weight=config.train.auxiliary_weight),
    in_shardings=(everywhere, over_batch(mesh)),
    out_shardings=(everywhere, everywhere),
    donate_argnums=0,
  )
  evaluate = evaluator_for(config, graphdef, splits['val'], dataset, mesh)

  with (
    RunCheckpoints(workdir, keep=config.checkpoint.keep) as checkpoints,
    SummaryWriter(str(workdir)) as writer,
  ):
    if checkpoints.latest_step() is None:
      start_from = 'scratch'
      if backbone is not None:
        state = jax.device_put(_with_backbone(state, backbone), everywhere)
        start_from = f'the backbone in {config.init_backbone}'
      size = parameter_overview.count_parameters(to_arrays(state.params))
      print(f'{config.name}: {size:,} parameters, from {start_from}, on {mesh.size} device(s)')
    else:
      state = _restore(checkpoints, state, batches)
      print(f'{config.name}: goes on at step {int(state.step)} of {workdir}')
    start, steps = int(state.step), config.train.steps
    log = _TrainingLog(workdir, writer, batch_size=config.train.batch_size, start=start)
    with log, progress_bar(steps, 'Training', unit='step', initial=start) as bar:
      for step in range(start + 1, steps + 1):
        batch = next(batches)
        batch = shard_batch({name: batch[name] for name in ('image', 'label', 'size')}, mesh)
        with jax.default_matmul_precision(config.train.precision):
          state, metrics = train_step(state, batch)
        bar.update()
        last = step == steps
        saves = step % config.checkpoint.every == 0 or last
        if step % config.train.log_every == 0 or saves:
          bar.set_postfix(log.write(step, metrics, lr=float(schedule(step - 1))), refresh=False)
        if saves:
          _save(checkpoints, state, batches)
        if step % config.eval.every == 0 and not last:
          evaluation = evaluate(state.variables)
          bar.write(f'step {step}: {log.write_scores(step, evaluation)}', file=sys.stderr)
      evaluation = evaluate(state.variables)
      log.write_scores(steps, evaluation)
  show_evaluation(evaluation, config, dataset)
  write_evaluation(workdir, evaluation, config, dataset, images=len(splits['val']), step=steps)
  return evaluation


class _TrainingLog:
  """Metrics of a run: lines of `log.jsonl` and points of TensorBoard curves."""

  def __init__(self, workdir: Path, writer: SummaryWriter, *, batch_size: int, start: int):
    self._writer = writer
    self._batch_size = batch_size
    self._step, self._time = start, time.perf_counter()
    path = workdir / LOG
    if path.exists():  # what was logged after the checkpoint will be logged again
      lines = path.read_text().splitlines(keepends=True)
      kept = (line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= start)
      path.write_text(''.join(kept))
    self._file = path.open('a')

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused) -> None:
    self._file.close()

  def write(self, step: int, metrics: Metrics, *, lr: float) -> dict[str, str]:
    """Logs the metrics of a step; returns what the progress bar shows.

    Raises:
      UserError: If the loss or the update is not finite.
    """
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values['loss'] + values['update_norm']):
      raise UserError(
        f'the loss is {values["loss"]} and its update {values["update_norm"]} at step {step}; '
        'lower config.optimizer.learning_rate, or look at the labels, and start again in a new '
        '--workdir.'
      )
    now = time.perf_counter()
    rate = (step - self._step) * self._batch_size / (now - self._time)
    self._step, self._time = step, now
    self._write(step, {**values, 'lr': lr, 'images_per_second': rate}, 'train')
    return {
      'loss': f'{values["loss"]:.4f}',
      'lr': f'{lr:.5f}',
      'images/s': f'{rate:.1f}',
    }

  def write_scores(self, step: int, evaluation: Evaluation) -> str:
    """Logs the scores of an evaluation; returns them as text."""
    summary = evaluation.scores.summary()
    self._write(step, summary, 'val')
    self._time = time.perf_counter()
    return '  '.join(f'{name} {value:.2f}' for name, value in summary.items())

  def _write(self, step: int, values: dict[str, float], group: str) -> None:
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._writer.add_scalar(f'{group}/{name}', value, step)


def _has_checkpoint(workdir: Path) -> bool:
  with RunCheckpoints(workdir, keep=None) as checkpoints:
    return checkpoints.latest_step() is not None


def _with_backbone(state: TrainState, backbone: nnx.State) -> TrainState:
  """`state` with the parameters and running statistics of another backbone."""
  params, batch_stats = nnx.split_state(backbone, nnx.Param, nnx.BatchStat)
  return dataclasses.replace(
    state,
    params=nnx.merge_state(state.params, params),
    batch_stats=nnx.merge_state(state.batch_stats, batch_stats),
  )


def _save(checkpoints: RunCheckpoints, state: TrainState, batches: TrainIterator) -> None:
  checkpoints.save(
    int(state.step), model=state.variables, training=_beside_model(state), iterator=batches
  )


def _restore(checkpoints: RunCheckpoints, state: TrainState, batches: TrainIterator) -> TrainState:
  """The newest checkpoint in the structure of `state`; sets `batches` to its place."""
  variables, training = checkpoints.restore(
    model=state.variables, training=_beside_model(state), iterator=batches
  )
  params, batch_stats = nnx.split_state(variables, nnx.Param, nnx.BatchStat)
  rng = jax.random.wrap_key_data(training.pop('rng'))
  return TrainState(params=params, batch_stats=batch_stats, rng=rng, **training)


def _beside_model(state: TrainState) -> dict[str, Any]:
  """All of the state but the network."""
  rng = jax.random.key_data(state.rng)
  return {'step': state.step, 'opt_state': state.opt_state, 'rng': rng}


def _check_same_run(config: ConfigDict, workdir: Path, dataset: Dataset) -> None:
  path = workdir / CONFIG
  if not path.exists():
    return
  differences = [
    difference
    for difference in config_differences(path.read_text(), _as_json(config, dataset))
    if not difference.startswith(_FREE)
  ]
  if differences:
    raise UserError(
      f'{workdir} holds a run of another config ({"; ".join(differences)}); '
      'choose another --workdir.'
    )


def _write_run_files(config: ConfigDict, workdir: Path, dataset: Dataset) -> None:
  description = ModelDescription(
    architecture=architecture_of(config),
    align_corners=config.model.align_corners,
    dataset=dataset.name,
    classes=dataset.classes,
    palette=dataset.palette,
    test_scale=tuple(config.eval.scale),
    window_crop=tuple(config.eval.window_crop) or None,
    window_stride=tuple(config.eval.window_stride) or None,
    source=f'trained with config {config.name}',
    sha256=None,
    num_batches_tracked=dict.fromkeys(('backbone', 'decode_head', 'auxiliary_head'), 0),
  )
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / DESCRIPTION).write_text(description.to_json())
  (workdir / CONFIG).write_text(_as_json(config, dataset))


def _as_json(config: ConfigDict, dataset: Dataset) -> str:
  """The config as JSON, with what the description beside a custom dataset adds."""
  values = config.to_dict()
  if dataset.layout == 'custom':
    values['data'].update(
      num_classes=dataset.num_classes,
      classes=dataset.classes,
      palette=dataset.palette,
      reduce_zero_label=dataset.reduce_zero_label,
      ignore_labels=dataset.ignore_labels,
      label_map=dataset.label_map,
    )
  return json.dumps(values, indent=2) + '\n'
