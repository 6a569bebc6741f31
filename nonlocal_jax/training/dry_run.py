"""What a training run needs and how long it takes, found out by a few steps that nothing keeps."""

import sys
import time

import jax

from nonlocal_jax.runtime.parallel import is_first_process, replicated, shard_batch
from nonlocal_jax.runtime.progress import as_duration
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.training.checkpointing import started_from
from nonlocal_jax.training.initial_weights import InitialWeights
from nonlocal_jax.training.loop import BATCH, on_each_device
from nonlocal_jax.training.memory import explained_out_of_memory
from nonlocal_jax.training.parameter_tables import parameters_by_module
from nonlocal_jax.training.run import TrainingRun
from nonlocal_jax.training.train_step import initial_state

_STEPS = 10  # that are timed, after one that is not


def dry_run(run: TrainingRun, *, initial: InitialWeights) -> None:
  """Does all that comes before the first step, takes a few steps and prints an estimate of time.

  Args:
    run: Components of the run.
    initial: Its initial weights.

  Raises:
    StepTooLargeError: If a training step does not fit in the memory of a device.
    UserError: If batches cannot be loaded.
  """
  if is_first_process():
    print('Compiling the training step', file=sys.stderr)
  _, tx = run.optimizer.make(run.schedule.steps)
  keep_ema = run.step.ema_decay > 0
  state = initial_state(run.network, tx, seed=run.schedule.seed, keep_ema=keep_ema, mesh=run.mesh)
  state = jax.device_put(started_from(state, initial), replicated(run.mesh))
  train_step = run.compile_step()
  memory = run.check_memory(train_step)
  run.batches.start_prefetch()
  if is_first_process():
    size = sum(array.size for array in jax.tree.leaves(state.params))
    print(run.start_lines(f'from {initial.source}', size, memory.total / 2**30), flush=True)
    print(parameters_by_module(state.params), flush=True)
  go_on, metrics, started, waited = on_each_device(False, run.mesh), None, 0.0, 0.0
  for step in range(1 + _STEPS):
    before = time.perf_counter()
    batch = next(run.batches)
    if step:
      waited += time.perf_counter() - before
    arrays = shard_batch({name: batch[name] for name in BATCH}, run.mesh)
    with explained_out_of_memory(run.step_options):
      state, metrics = train_step(state, arrays, go_on)
      if not step:
        jax.block_until_ready(metrics)
    if not step:
      started = time.perf_counter()
  jax.block_until_ready(metrics)
  seconds = (time.perf_counter() - started) / _STEPS
  if is_first_process():
    print(_summary(run, seconds, waited / _STEPS))


def _summary(run: TrainingRun, seconds: float, waited: float) -> str:
  schedule = run.schedule
  evaluations = -(-schedule.steps // schedule.eval_every)
  images = run.evaluator.num_images
  whole = as_duration(seconds * schedule.steps)
  return (
    f'A step took {seconds:.3g} s, of which {waited / seconds:.0%} were spent waiting for images '
    f'({_STEPS} steps); {counted(schedule.steps, "step")} take about {whole} without '
    f'{counted(evaluations, "evaluation")} of {counted(images, "image")}.\n'
    'Nothing was trained, and no checkpoint was written.'
  )
