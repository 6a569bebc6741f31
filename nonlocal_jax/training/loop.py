"""The training loop: restore, train, log, save, evaluate."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.loader import TrainIterator
from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.data.transforms import AugmentConfig
from nonlocal_jax.errors import RunStopped, UserError
from nonlocal_jax.evaluation.evaluate import picture_of
from nonlocal_jax.evaluation.evaluator import Evaluation, Evaluator
from nonlocal_jax.models import Execution, NonLocalNetConfig
from nonlocal_jax.runtime.devices import counted, describe_mesh
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.parallel import is_first_process, replicated, shard_batch
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.runtime.signals import StopRequest
from nonlocal_jax.training.best_weights import BestWeights
from nonlocal_jax.training.checkpointing import restore, save, with_weights
from nonlocal_jax.training.initial_weights import InitialWeights
from nonlocal_jax.training.log import CURVES, LOG, TrainingLog, summary_table, write_curves
from nonlocal_jax.training.memory import (
  StepMemory,
  StepOptions,
  check_memory,
  explained_out_of_memory,
  memory_limit,
)
from nonlocal_jax.training.optimizer import OptimizerConfig
from nonlocal_jax.training.parameter_tables import PARAMETERS, all_parameters, parameters_by_module
from nonlocal_jax.training.train_step import (
  BatchShape,
  Metrics,
  StepConfig,
  initial_state,
  lower_train_step,
)
from nonlocal_jax.weights.run_checkpoints import BEST, RunCheckpoints

_BATCH = ('image', 'label', 'size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """Length of a run, and when it logs, evaluates and saves.

  Attributes:
    steps: Number of training steps.
    batch_size: Global batch size, over all devices.
    seed: Seed of the initial values, the order of the images, augmentation and dropout.
    log_every: Steps between log lines.
    eval_every: Steps between evaluations; the last step is always evaluated.
    checkpoint_every: Steps between checkpoints; evaluated steps are always saved.
    keep: Number of most recent checkpoints to keep.
    patience: Evaluations in a row without a better mIoU after which training stops; 0 for never.
  """

  steps: int
  batch_size: int
  seed: int = 0
  log_every: int = 50
  eval_every: int = 2000
  checkpoint_every: int = 2000
  keep: int = 3
  patience: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
  """Components of a training run.

  Attributes:
    name: Name of the run.
    network: Architecture of the network.
    execution: How the network is computed.
    augment: Augmentation of the samples.
    step: What a training step computes.
    optimizer: Optimizer and learning rate.
    schedule: Length of the run, and when it logs, evaluates and saves.
    dataset: Names and colors of the classes.
    split: Training split.
    batches: Iterator over this process's batches, at its start.
    evaluator: Evaluates the weights, on the same devices.
    report: Callback for the last evaluation and its step.
    mesh: Device mesh.
  """

  name: str
  network: NonLocalNetConfig
  execution: Execution
  augment: AugmentConfig
  step: StepConfig
  optimizer: OptimizerConfig
  schedule: ScheduleConfig
  dataset: Dataset
  split: PreparedSplit
  batches: TrainIterator
  evaluator: Evaluator
  report: Callable[[Evaluation, int], None]
  mesh: Mesh

  @property
  def step_options(self) -> StepOptions:
    """What the memory of a training step depends on."""
    return StepOptions(
      batch_size=self.schedule.batch_size,
      devices=self.mesh.size,
      device_kind=self.mesh.devices.flat[0].device_kind,
      accumulate=self.step.accumulate,
      rematerialize=self.execution.rematerialize,
      has_batch_statistics=self.execution.batch_norm != 'frozen',
    )

  def start_lines(self, source: str, parameters: int, step_gib: float) -> str:
    """Formats the summary that is printed at the start of a run.

    Args:
      source: Origin of the weights.
      parameters: Number of parameters.
      step_gib: Memory of a step on each device, in GiB.
    """
    schedule, optimizer, augment, step = self.schedule, self.optimizer, self.augment, self.step
    parts = f', accumulated over {step.accumulate} parts' if step.accumulate > 1 else ''
    poly = f'poly {optimizer.power} ({optimizer.schedule})'
    return (
      f'{self.name}: {source}\n'
      f'{describe_mesh(self.mesh)}, mesh {dict(self.mesh.shape)}; batch '
      f'{schedule.batch_size}, {schedule.batch_size // self.mesh.size} on each device{parts}\n'
      f'{parameters:,} parameters; a training step needs {step_gib:.2f} GiB on each device\n'
      f'{schedule.steps:,} steps of SGD: learning rate {optimizer.learning_rate} to '
      f'{optimizer.min_learning_rate}, {poly}, heads x {optimizer.head_multiplier}, momentum '
      f'{optimizer.momentum}, weight decay {optimizer.weight_decay}'
      f'{"" if optimizer.decay_norm_and_bias else " (kernels only)"}\n'
      f'crop {augment.crop} of images scaled into {augment.scale} times {augment.ratio_range}; '
      f'auxiliary loss x {step.loss.auxiliary_weight}; {self.execution.batch_norm} batch '
      f'normalization; {step.dtype}; {self._extras()}'
    )

  def _extras(self) -> str:
    """Returns the enabled options that are not part of the published recipe."""
    loss, execution, patience = self.step.loss, self.execution, self.schedule.patience
    extras = {
      'mean over labeled pixels': loss.avg_non_ignore,
      'class weights': loss.class_weights,
      f'OHEM below {loss.ohem and loss.ohem.thresh}': loss.ohem,
      f'focal loss with gamma {loss.focal_gamma}': loss.focal_gamma,
      f'Dice loss x {loss.dice_weight}': loss.dice_weight,
      f'averaged weights with decay {self.step.ema_decay}': self.step.ema_decay,
      'rematerialized blocks': execution.rematerialize,
      'deterministic': execution.deterministic,
      f'{execution.attention} attention': execution.attention != 'blocks',
      'no non-local block': not self.network.non_local,
      f'until {counted(patience, "evaluation")} bring no better mIoU': patience,
    }
    return ', '.join(name for name, on in extras.items() if on) or 'no further options'


def train_and_evaluate(
  run: TrainingRun,
  workdir: Path,
  *,
  initial: InitialWeights | None,
  ignored_checkpoint: Path | None = None,
) -> Evaluation:
  """Trains, and evaluates at intervals and at the end.

  Args:
    run: Components of the run.
    workdir: Output directory for checkpoints, the weights with the best mIoU (`best`), `log.jsonl`,
      TensorBoard events and `curves.png`. With several processes, it must be shared by all.
    initial: Initial weights of a new run; None to resume from the newest checkpoint in `workdir`.
    ignored_checkpoint: A checkpoint that was requested but is not read because the run resumes;
      printed at the start.

  Returns:
    The last evaluation.

  Raises:
    StepTooLargeError: If a training step does not fit in the memory of a device.
    UserError: If the loss is not finite, or checkpoints cannot be written or read.
    RunStopped: After SIGTERM or SIGINT, once the state is saved.
  """
  mesh, batches, split, plan = run.mesh, run.batches, run.split, run.schedule
  learning_rate, tx = run.optimizer.make(plan.steps)
  batch_shape = BatchShape(plan.batch_size, run.augment.crop)

  def compiled(execution: Execution) -> jax.stages.Compiled:
    return lower_train_step(
      run.network, execution, tx, run.step, batch=batch_shape, mesh=mesh
    ).compile()

  if is_first_process():
    print('Compiling the training step', file=sys.stderr)
  stop = StopRequest()
  with (
    contextlib.ExitStack() as from_first_step_on,
    ThreadPoolExecutor(1, thread_name_prefix='compile') as beside,
    RunCheckpoints(workdir, keep=plan.keep) as checkpoints,
    RunCheckpoints(workdir / BEST, keep=BestWeights.KEEP) as best_checkpoints,
  ):
    # Compiles while this thread makes or reads the weights, which takes seconds as well.
    compiling = beside.submit(compiled, run.execution)
    keep_ema = run.step.ema_decay > 0
    state = initial_state(run.network, tx, seed=plan.seed, keep_ema=keep_ema, mesh=mesh)
    if initial is not None:
      source = f'from {initial.source}'
      if initial.state is not None:
        state = jax.device_put(with_weights(state, initial.state), replicated(mesh))
    else:
      state = restore(checkpoints, state, batches)
      source = f'resumes at step {int(state.step):,} of {workdir}'
      if ignored_checkpoint is not None:
        source += f'; {ignored_checkpoint} is not read again'
    start, steps = int(state.step), plan.steps
    batches.start_prefetch()

    def rematerialized() -> StepMemory | None:
      if is_first_process():
        print('It does not fit; compiling it with rematerialization', file=sys.stderr)
      try:
        return StepMemory.of(compiled(dataclasses.replace(run.execution, rematerialize=True)))
      except jax.errors.JaxRuntimeError:
        return None

    with explained_out_of_memory(run.step_options):
      train_step = compiling.result()
    memory = StepMemory.of(train_step)
    check_memory(memory, memory_limit(mesh), run.step_options, rematerialized)
    if is_first_process():
      size = sum(array.size for array in jax.tree.leaves(state.params))
      print(run.start_lines(source, size, memory.total / 2**30), flush=True)
      write_whole(workdir / PARAMETERS, all_parameters(state.params) + '\n')
      print(parameters_by_module(state.params), flush=True)

    with (
      TrainingLog(workdir, batch_size=plan.batch_size, start=start) as log,
      progress_bar(steps, 'Training', unit='step', initial=start) as bar,
    ):
      best_weights = BestWeights(best_checkpoints, log.evaluations)

      def evaluate_and_log(step: int) -> Evaluation:
        def leave_if_asked() -> None:  # alone: other processes would wait for this one's images
          if stop.received and jax.process_count() == 1:
            leave(step)

        evaluation = run.evaluator(
          run.evaluator.prepared(state.variables), after_batch=leave_if_asked
        )
        summary = evaluation.scores.summary()
        # Saved before it is logged: if the program is killed between, it is saved again.
        if best_weights.are_worse_than(summary):
          best_weights.save(step, state.variables, summary)
        log.write_evaluation(step, summary, picture_of(evaluation, run.dataset))
        if is_first_process():
          scores = '  '.join(f'{name} {value:.2f}' for name, value in summary.items())
          bar.write(f'step {step}: {scores}', file=sys.stderr)
        return evaluation

      def leave(step: int) -> NoReturn:
        save(checkpoints, state, batches)
        checkpoints.wait()
        raise RunStopped(
          f'stopped by {stop.received or "a signal"} after step {step:,}, which is saved; run the '
          'same command again to resume.'
        )

      evaluation, last = None, start
      is_due = _is_due(start, plan.eval_every, steps) and not log.has(start)
      if start == steps or is_due or has_stalled(log.evaluations, plan.patience):
        evaluation = evaluate_and_log(start)  # the run is over, or stopped before this evaluation
      in_flight: list[_Step] = []
      for step in range(start + 1, steps + 1):
        if has_stalled(log.evaluations, plan.patience):
          break
        last = step
        try:
          with log.waiting():
            batch = next(batches)
        except Exception:
          # A worker process was killed, or a file is damaged: no step is to be lost.
          if step - 1 > start and jax.process_count() == 1:
            _finish(in_flight, split, but=0)
            save(checkpoints, state, batches)
            checkpoints.wait()
          raise
        arrays = shard_batch({name: batch[name] for name in _BATCH}, mesh)
        if step == start + 1:  # before, there is nothing to save that is not saved yet
          from_first_step_on.enter_context(stop)
        stop_flags = _on_each_device(bool(stop.received), mesh)
        with explained_out_of_memory(run.step_options):
          state, metrics = train_step(state, arrays, stop_flags)
          if step == start + 1:
            jax.block_until_ready(metrics)
        in_flight.append(_Step(step, metrics, batch['index']))
        bar.update()
        evaluates = _is_due(step, plan.eval_every, steps)
        saves = evaluates or _is_due(step, plan.checkpoint_every, steps)
        logs = saves or step % plan.log_every == 0
        # Checks the previous step while this one runs. Waits for this one only if it is logged.
        stops = _finish(in_flight, split, but=0 if logs else 1)
        if stops:
          _finish(in_flight, split, but=0)
        if logs:
          values = {name: float(value) for name, value in metrics.items() if name != 'stop'}
          rate = float(np.asarray(learning_rate(step - 1)))
          bar.set_postfix(log.write(step, values, lr=rate), refresh=False)
        if saves:  # before the evaluation, so that a kill during it loses no steps
          save(checkpoints, state, batches)
        if stops:
          leave(step)
        if evaluates:
          evaluation = evaluate_and_log(step)
    assert evaluation is not None
    checkpoints.wait()
    run.report(evaluation, last)
    if is_first_process():
      if last < steps:
        print(
          f'Stopped after step {last:,} of {steps:,}: no better mIoU in '
          f'{counted(plan.patience, "evaluation")}.'
        )
      write_curves(workdir / LOG, workdir / CURVES)
      print(summary_table(log.evaluations))
      print(f'The best weights, of step {best_weights.step:,}, are in {workdir / BEST}.')
  return evaluation


class _Step(NamedTuple):
  """A step that may still be running on the devices."""

  number: int
  metrics: Metrics
  indices: np.ndarray  # dataset indices of this process's images


def _finish(steps: list[_Step], split: PreparedSplit, *, but: int) -> bool:
  """Waits for all but the newest `but` steps, checks them and removes them from the list.

  Returns:
    Whether any process was asked to stop before one of these steps.

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
        'learning rate in a new workdir.'
      )
    stops = stops or bool(metrics['stop'])
  return stops


def has_stalled(evaluations: Sequence[Mapping[str, Any]], patience: int) -> bool:
  """Whether the last `patience` evaluations brought no better mIoU than those before them."""
  scores = [np.nan_to_num(line['mIoU'], nan=-np.inf) for line in evaluations]
  return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])


def _is_due(step: int, every: int, steps: int) -> bool:
  return step > 0 and (step % every == 0 or step == steps)


def _on_each_device(flag: bool, mesh: Mesh) -> jax.Array:
  """Returns (devices,) bool with this process's flag on each of its devices."""
  count = mesh.local_mesh.size
  return shard_batch({'flag': np.full(count, flag)}, mesh)['flag']
