"""The recipe of a config, in code and in words: optimizer, compiled step, first lines."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import (
  check_device,
  dataset_of,
  execution_of,
  network_of,
  protocol_of,
)
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import Platform, over_batch, platform_of, replicated
from nonlocal_jax.training.loss import Ohem
from nonlocal_jax.training.optimizer import poly_schedule, sgd
from nonlocal_jax.training.train_step import Metrics, TrainState, make_train_step


def check_recipe(config: ConfigDict, mesh: Mesh) -> None:
  """Checks that the devices can do what they are asked to, that they can share a batch evenly, and
  that each class has a weight if any has.

  Raises:
    UserError: If not.
  """
  check_device(config, mesh)
  num_classes = dataset_of(config).num_classes
  if config.train.class_weights and len(config.train.class_weights) != num_classes:
    raise UserError(
      f'config.train.class_weights has {len(config.train.class_weights)} weights, but there are '
      f'{num_classes} classes: give one for each.'
    )
  parts = mesh.size * config.train.accumulate
  if config.train.batch_size % parts:
    accumulated = config.train.accumulate > 1
    raise UserError(
      f'config.train.batch_size is {config.train.batch_size}, which {mesh.size} devices cannot '
      f'share{f" in {config.train.accumulate} parts each" if accumulated else ""}; make it a '
      'multiple.'
    )


def optimizer_of(config: ConfigDict) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """The learning rate of the backbone by 0-based step, and the optimizer."""
  options = config.optimizer

  def schedule(learning_rate: float) -> optax.Schedule:
    return poly_schedule(
      learning_rate=learning_rate,
      min_learning_rate=options.min_learning_rate,
      power=options.power,
      steps=config.train.steps,
      version=options.schedule,
    )

  head_schedule = None
  if options.head_multiplier != 1:
    head_schedule = schedule(options.head_multiplier * options.learning_rate)
  tx = sgd(
    schedule(options.learning_rate),
    momentum=options.momentum,
    weight_decay=options.weight_decay,
    decay_norm_and_bias=options.decay_norm_and_bias,
    head_schedule=head_schedule,
  )
  return schedule(options.learning_rate), tx


def compile_step(
  config: ConfigDict, state: TrainState, tx: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Compiled:
  """Compiles the training step for a mesh.

  Args:
    config: The recipe.
    state: A state on the mesh.
    tx: The optimizer.
    mesh: The devices.

  Returns:
    A function of the state, whose memory it takes over, the batch (see `make_train_step`) and
    `stop` (devices,) bool, both split over the mesh; it returns the next state and the metrics,
    with `stop` whether any of those is true.
  """
  return lower_step(config, state, tx, mesh).compile()


def lower_step(
  config: ConfigDict,
  state: TrainState,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  *,
  platform: Platform | None = None,
) -> jax.stages.Lowered:
  """The program of the training step, not yet compiled.

  Args:
    config: The recipe.
    state: A state on the mesh, or shapes in place of its arrays.
    tx: The optimizer.
    mesh: The devices.
    platform: For which the program is; None for that of the mesh. It can be looked at for any
      platform, and compiled for that of the mesh.

  Returns:
    See `compile_step`.
  """
  options = config.train
  ohem = Ohem(options.ohem_threshold, options.ohem_min_kept) if options.ohem else None
  protocol = protocol_of(config)
  take_step = make_train_step(
    network_of(config),
    execution_of(config, mesh, train=True, platform=platform),
    tx,
    auxiliary_weight=options.auxiliary_weight,
    avg_non_ignore=options.avg_non_ignore,
    class_weights=tuple(options.class_weights) or None,
    ohem=ohem,
    compute_dtype=jnp.dtype(options.dtype),
    accumulate=options.accumulate,
    ema_decay=options.ema_decay or None,
    mean=protocol.mean,
    std=protocol.std,
  )

  def train_step(
    state: TrainState, batch: dict[str, jax.Array], stop: jax.Array
  ) -> tuple[TrainState, Metrics]:
    state, metrics = take_step(state, batch)
    return state, {**metrics, 'stop': jnp.any(stop)}

  everywhere, over = replicated(mesh), over_batch(mesh)
  platform_of_mesh = platform_of(list(mesh.devices.flat))
  jitted = jax.jit(
    train_step,
    in_shardings=(everywhere, over, over),
    out_shardings=(everywhere, everywhere),
    donate_argnums=0,
    compiler_options=compiler_options(platform or platform_of_mesh),
  )
  n, crop = options.batch_size, tuple(options.crop)
  batch = {
    'image': jax.ShapeDtypeStruct((n, *crop, 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((n, *crop), jnp.uint8),
    'size': jax.ShapeDtypeStruct((n, 2), jnp.int32),
  }
  # Batch normalization asks for one exchange between the devices of the mesh it is traced under.
  with (
    jax.default_matmul_precision(options.precision),
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  ):
    traced = jitted.trace(state, batch, jax.ShapeDtypeStruct((mesh.size,), jnp.bool))
    names = None if platform is None else ({'gpu': 'cuda'}.get(platform, platform),)
    return traced.lower(lowering_platforms=names)


def say_start(
  config: ConfigDict, source: str, mesh: Mesh, size: int, train_step: jax.stages.Compiled
) -> None:
  """Prints what a run starts from, on what it runs, what it needs and what it does."""
  options, optimizer = config.train, config.optimizer
  device = mesh.devices.flat[0].device_kind
  processes = jax.process_count()
  share = options.batch_size // mesh.size
  parts = f', in {options.accumulate} parts one after the other' if options.accumulate > 1 else ''
  schedule = f'poly {optimizer.power} ({optimizer.schedule})'
  print(
    f'{config.name}: {source}\n'
    f'{mesh.size} device(s) ({device}) of {processes} process(es), mesh '
    f'{dict(mesh.shape)}; batch {options.batch_size}, {share} on each device{parts}\n'
    f'{size:,} parameters; a training step needs {_gibibytes(train_step):.2f} GiB on each device\n'
    f'{options.steps:,} steps of SGD: learning rate {optimizer.learning_rate} to '
    f'{optimizer.min_learning_rate}, {schedule}, heads x {optimizer.head_multiplier}, momentum '
    f'{optimizer.momentum}, weight decay {optimizer.weight_decay}'
    f'{"" if optimizer.decay_norm_and_bias else " (kernels only)"}\n'
    f'crop {tuple(options.crop)} of images scaled into {tuple(options.scale)} times '
    f'{tuple(options.ratio_range)}; auxiliary loss x {options.auxiliary_weight}; '
    f'{options.batch_norm} batch normalisation; {options.dtype}; {_extras(config)}',
    flush=True,
  )


def _extras(config: ConfigDict) -> str:
  """The options that are not the published recipe's, of those that are on."""
  options = config.train
  extras = {
    'mean over labelled pixels': options.avg_non_ignore,
    'class weights': options.class_weights,
    f'OHEM below {options.ohem_threshold}': options.ohem,
    f'average of weights with decay {options.ema_decay}': options.ema_decay,
    'rematerialised blocks': options.rematerialize,
    'attention through cuDNN': config.model.attention == 'cudnn',
    'no non-local block': not config.model.non_local,
  }
  return ', '.join(name for name, on in extras.items() if on) or 'no further options'


def _gibibytes(compiled: jax.stages.Compiled) -> float:
  """Memory of a compiled program: arguments, results and what lies between."""
  memory: Any = compiled.memory_analysis()
  total = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return (total + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / 2**30
