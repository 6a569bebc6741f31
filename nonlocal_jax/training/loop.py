"""Training from a config: one linear function from the data to the last evaluation."""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.errors import RunStopped, UserError
from nonlocal_jax.evaluation.evaluate import (
  evaluator_for,
  picture_of,
  show_evaluation,
  write_evaluation,
)
from nonlocal_jax.evaluation.evaluator import Evaluation
from nonlocal_jax.experiment import dataset_of, network_of, open_splits, train_batches_of
from nonlocal_jax.models import NonLocalNet
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.parallel import (
  data_mesh,
  is_first_process,
  replicated,
  shard_batch,
)
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.runtime.signals import StopRequest
from nonlocal_jax.training.checkpointing import restore, save, with_weights
from nonlocal_jax.training.initial_weights import read_initial_weights
from nonlocal_jax.training.log import CURVES, LOG, TrainingLog, summary_table, write_curves
from nonlocal_jax.training.parameter_tables import PARAMETERS, all_parameters, parameters_by_module
from nonlocal_jax.training.recipe import (
  check_recipe,
  compile_step,
  optimizer_of,
  say_start,
)
from nonlocal_jax.training.run_files import BEST, check_same_run, write_run_files
from nonlocal_jax.training.train_step import Metrics, TrainState
from nonlocal_jax.weights.run_checkpoints import RunCheckpoints, has_checkpoint

_BATCH = ('image', 'label', 'size')


def train_and_evaluate(
  config: ConfigDict,
  workdir: Path,
  *,
  checkpoint: Path | None = None,
  new_classifier: bool = False,
) -> Evaluation:
  """Trains as a config says, from where `workdir` stands; evaluates at intervals and at the end.

  A run goes on from the newest checkpoint in `workdir`; a new one starts from `checkpoint`, or from
  `config.init_backbone`, or from scratch.

  Args:
    config: See `nonlocal_jax/recipes.py`.
    workdir: Gets checkpoints, the weights with the best mIoU in `best`, `config.json`,
      `model.json`, `log.jsonl`, TensorBoard events, `curves.png`, `metrics.json` and
      `predictions.png`. Of several processes all must see it.
    checkpoint: Weights of a whole network: a .pth file, a converted directory or a workdir.
    new_classifier: Whether the classifiers of both heads are left out of `checkpoint`.

  Returns:
    The last evaluation.

  Raises:
    UserError: If config or data are not as they should be, `workdir` holds another run, the loss is
      not finite, or checkpoints cannot be written.
    RunStopped: If SIGTERM or SIGINT came, once the state is saved.
  """
  mesh = data_mesh()
  check_recipe(config, mesh)
  dataset = dataset_of(config)
  check_same_run(config, workdir, dataset)
  initial = None
  if not has_checkpoint(workdir):
    initial = read_initial_weights(
      config, dataset, checkpoint=checkpoint, new_classifier=new_classifier
    )
  splits = open_splits(config, dataset, workdir, ['train', 'val'])
  batches = train_batches_of(config, splits['train'], dataset)
  if is_first_process():
    write_run_files(config, workdir, dataset)

  schedule, tx = optimizer_of(config)
  network = network_of(config)

  def initial_state() -> TrainState:
    model = NonLocalNet(network, rngs=nnx.Rngs(config.seed))
    return TrainState.create(
      nnx.state(model), tx, seed=config.seed, keep_ema=config.train.ema_decay > 0
    )

  state = jax.jit(initial_state, out_shardings=replicated(mesh))()
  evaluate = evaluator_for(config, splits['val'], dataset, mesh)

  with (
    RunCheckpoints(workdir, keep=config.checkpoint.keep) as checkpoints,
    RunCheckpoints(workdir / BEST, keep=1) as best_weights,
  ):
    if initial is not None:
      source = f'from {initial.source}'
      if initial.state is not None:
        state = jax.device_put(with_weights(state, initial.state), replicated(mesh))
    else:
      state = restore(checkpoints, state, batches)
      source = f'goes on at step {int(state.step):,} of {workdir}'
      if checkpoint is not None:
        source += f'; {checkpoint} is not read again'
    start, steps = int(state.step), config.train.steps
    best_weights.delete_after(start)
    batches.start_prefetch()
    if is_first_process():
      print('Compiling the training step', file=sys.stderr)
    train_step = compile_step(config, state, tx, mesh)
    if is_first_process():
      size = sum(array.size for array in jax.tree.leaves(state.params))
      say_start(config, source, mesh, size, train_step)
      write_whole(workdir / PARAMETERS, all_parameters(state.params) + '\n')
      print(parameters_by_module(state.params), flush=True)

    with (
      TrainingLog(workdir, batch_size=config.train.batch_size, start=start) as log,
      progress_bar(steps, 'Training', unit='step', initial=start) as bar,
      StopRequest() as stop,
    ):

      def evaluate_and_log(step: int) -> Evaluation:
        evaluation = evaluate(evaluate.prepared(state.variables))
        summary = evaluation.scores.summary()
        if log.would_be_best(summary):  # saved before it is logged, and so never missed
          best_weights.save(step, model=state.variables)
          best_weights.wait()
        log.write_evaluation(step, summary, picture_of(evaluation, dataset))
        if is_first_process():
          scores = '  '.join(f'{name} {value:.2f}' for name, value in summary.items())
          bar.write(f'step {step}: {scores}', file=sys.stderr)
        return evaluation

      def leave(step: int) -> None:
        save(checkpoints, state, batches)
        checkpoints.wait()
        raise RunStopped(
          f'stopped by {stop.received or "a signal"} after step {step:,}, which is saved; the same '
          'command goes on from there.'
        )

      evaluation = None
      if start == steps or (_is_due(start, config.eval.every, steps) and not log.has(start)):
        evaluation = evaluate_and_log(start)  # stopped before it came to that
      in_flight: list[_Step] = []
      for step in range(start + 1, steps + 1):
        try:
          with log.waiting():
            batch = next(batches)
        except Exception:
          # The signal may have ended the processes that make batches.
          if not stop.received or jax.process_count() > 1:
            raise
          _finish(in_flight, splits['train'], but=0)
          leave(step - 1)
        state, metrics = train_step(
          state,
          shard_batch({name: batch[name] for name in _BATCH}, mesh),
          _on_each_device(bool(stop.received), mesh),
        )
        in_flight.append(_Step(step, metrics, batch['index']))
        bar.update()
        evaluates = _is_due(step, config.eval.every, steps)
        saves = evaluates or _is_due(step, config.checkpoint.every, steps)
        logs = saves or step % config.train.log_every == 0
        # The step before is looked at while this one runs; this one, too, where it is needed.
        stops = _finish(in_flight, splits['train'], but=0 if logs else 1)
        if stops:
          _finish(in_flight, splits['train'], but=0)
        if logs:
          values = {name: float(value) for name, value in metrics.items() if name != 'stop'}
          bar.set_postfix(log.write(step, values, lr=float(schedule(step - 1))), refresh=False)
        if saves:  # before the evaluation, during which the program may be killed
          save(checkpoints, state, batches)
        if stops:
          leave(step)
        if evaluates:
          evaluation = evaluate_and_log(step)
  assert evaluation is not None
  show_evaluation(evaluation, config, dataset)
  write_evaluation(workdir, evaluation, config, dataset, images=len(splits['val']), step=steps)
  if is_first_process():
    write_curves(workdir / LOG, workdir / CURVES)
    print(summary_table(log.evaluations))
  return evaluation


class _Step(NamedTuple):
  """A step that the devices may still be taking."""

  number: int
  metrics: Metrics
  indices: np.ndarray  # of the images of this process


def _finish(steps: list[_Step], split: PreparedSplit, *, but: int) -> bool:
  """Waits for all but the newest `but` steps and takes them off the list.

  Returns:
    Whether a process was asked to stop before one of them.

  Raises:
    UserError: If a loss or an update is not finite.
  """
  stops = False
  while len(steps) > but:
    number, metrics, indices = steps.pop(0)
    loss, update = float(metrics['loss']), float(metrics['update_norm'])
    if not math.isfinite(loss + update):
      images = ', '.join(str(split[index]['id']) for index in indices.tolist())
      raise UserError(
        f'the loss is {loss} and its update {update} at step {number}, on the images {images}; the '
        'last checkpoint is from before: look at the images and labels, or start with a lower '
        'config.optimizer.learning_rate in a new --workdir.'
      )
    stops = stops or bool(metrics['stop'])
  return stops


def _is_due(step: int, every: int, steps: int) -> bool:
  return step > 0 and (step % every == 0 or step == steps)


def _on_each_device(flag: bool, mesh: Mesh) -> jax.Array:
  """(devices,) bool, a process's flag on each of its devices."""
  count = mesh.local_mesh.size
  return shard_batch({'flag': np.full(count, flag)}, mesh)['flag']
