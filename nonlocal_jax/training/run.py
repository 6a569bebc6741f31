"""A training run: its parts, its length, and its training step as a program."""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.loader import TrainIterator
from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.data.transforms import AugmentConfig
from nonlocal_jax.evaluation.evaluator import Evaluation, Evaluator
from nonlocal_jax.models import Execution, NonLocalNetConfig
from nonlocal_jax.runtime.devices import describe_mesh
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.training.memory import (
  StepMemory,
  StepOptions,
  StepTooLargeError,
  check_memory,
  explained_out_of_memory,
  memory_limit,
)
from nonlocal_jax.training.optimizer import OptimizerConfig
from nonlocal_jax.training.trackers import Service
from nonlocal_jax.training.train_step import BatchShape, StepConfig, lower_train_step


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
    services: Services that get the log.
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
  services: Sequence[Service] = ()

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
      f'{counted(schedule.steps, "step")} of SGD: learning rate {optimizer.learning_rate} to '
      f'{optimizer.min_learning_rate}, {poly}, heads x {optimizer.head_multiplier}, momentum '
      f'{optimizer.momentum}, weight decay {optimizer.weight_decay}'
      f'{"" if optimizer.decay_norm_and_bias else " (kernels only)"}\n'
      f'crop {augment.crop} of images scaled into {augment.scale} times {augment.ratio_range}; '
      f'auxiliary loss x {step.loss.auxiliary_weight}; {self.execution.batch_norm} batch '
      f'normalization; {step.dtype}; {self._extras()}'
    )

  def compile_step(self, execution: Execution | None = None) -> jax.stages.Compiled:
    """Compiles the training step, see `train_step.lower_train_step`.

    Args:
      execution: How the network is computed; None for the run's own way.

    Raises:
      StepTooLargeError: If the compiler runs out of memory.
    """
    _, tx = self.optimizer.make(self.schedule.steps)
    batch = BatchShape(self.schedule.batch_size, self.augment.crop)
    with explained_out_of_memory(self.step_options):
      return lower_train_step(
        self.network, execution or self.execution, tx, self.step, batch=batch, mesh=self.mesh
      ).compile()

  def check_memory(self, train_step: jax.stages.Compiled) -> StepMemory:
    """Compares what a compiled step needs with the memory of the devices; returns the need.

    Raises:
      StepTooLargeError: If it does not fit; it names what does, for which the step may be compiled
        once more.
    """

    def rematerialized() -> StepMemory | None:
      if is_first_process():
        print('It does not fit; compiling it with rematerialization', file=sys.stderr)
      try:
        execution = dataclasses.replace(self.execution, rematerialize=True)
        return StepMemory.of(self.compile_step(execution))
      except (StepTooLargeError, jax.errors.JaxRuntimeError):
        return None

    memory = StepMemory.of(train_step)
    check_memory(memory, memory_limit(self.mesh), self.step_options, rematerialized)
    return memory

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
