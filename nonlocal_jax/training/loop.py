"""The training loop: restore, train, log, save, evaluate."""

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.errors import RunStopped, UserError
from nonlocal_jax.evaluation.evaluate import picture_of
from nonlocal_jax.evaluation.evaluator import Evaluation
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.parallel import is_first_process, replicated, shard_batch
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.runtime.signals import StopRequest
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.training.best_weights import BestWeights
from nonlocal_jax.training.checkpointing import restore, save, started_from
from nonlocal_jax.training.initial_weights import InitialWeights
from nonlocal_jax.training.log import CURVES, LOG, TrainingLog, summary_table, write_curves
from nonlocal_jax.training.memory import explained_out_of_memory
from nonlocal_jax.training.parameter_tables import PARAMETERS, all_parameters, parameters_by_module
from nonlocal_jax.training.run import TrainingRun
from nonlocal_jax.training.train_step import Metrics, initial_state
from nonlocal_jax.weights.run_checkpoints import BEST, RunCheckpoints

BATCH = ('image', 'label', 'size')  # what a training step takes of a loader's batch


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
    compiling = beside.submit(run.compile_step)
    keep_ema = run.step.ema_decay > 0
    state = initial_state(run.network, tx, seed=plan.seed, keep_ema=keep_ema, mesh=mesh)
    if initial is not None:
      source = f'from {initial.source}'
      state = jax.device_put(started_from(state, initial), replicated(mesh))
    else:
      state = restore(checkpoints, state, batches)
      source = f'resumes at step {int(state.step):,} of {workdir}'
      if ignored_checkpoint is not None:
        source += f'; {ignored_checkpoint} is not read again'
    start, steps = int(state.step), plan.steps
    batches.start_prefetch()

    train_step = compiling.result()
    memory = run.check_memory(train_step)
    if is_first_process():
      size = sum(array.size for array in jax.tree.leaves(state.params))
      print(run.start_lines(source, size, memory.total / 2**30), flush=True)
      write_whole(workdir / PARAMETERS, all_parameters(state.params) + '\n')
      print(parameters_by_module(state.params), flush=True)

    with (
      TrainingLog(workdir, batch_size=plan.batch_size, start=start, services=run.services) as log,
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
        arrays = shard_batch({name: batch[name] for name in BATCH}, mesh)
        if step == start + 1:  # before, there is nothing to save that is not saved yet
          from_first_step_on.enter_context(stop)
        stop_flags = on_each_device(bool(stop.received), mesh)
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


def on_each_device(flag: bool, mesh: Mesh) -> jax.Array:
  """Returns the argument `stop` of a training step, with this process's flag on its devices."""
  count = mesh.local_mesh.size
  return shard_batch({'flag': np.full(count, flag)}, mesh)['flag']
