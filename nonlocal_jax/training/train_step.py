"""The training state and the training step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.ops.threefry import fast_compiling_key
from nonlocal_jax.protocol import IMAGENET_MEAN, IMAGENET_STD
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import Platform, over_batch, platform_of_mesh, replicated
from nonlocal_jax.training.loss import (
  LossConfig,
  PixelLosses,
  dice_losses,
  loss_divisor,
  pixel_accuracy,
  pixel_losses,
  sum_of_losses,
)

Metrics = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['step', 'params', 'batch_stats', 'opt_state', 'rng', 'ema'],
  meta_fields=[],
)
@dataclasses.dataclass
class TrainState:
  """State of a training run.

  Attributes:
    step: () int32, number of steps taken.
    params: Parameters of the network.
    batch_stats: Running statistics of batch normalization.
    opt_state: State of the optimizer.
    rng: Random key; each step folds in its number.
    ema: Exponential moving average of `params`, or None.
  """

  step: jax.Array
  params: nnx.State
  batch_stats: nnx.State
  opt_state: Any
  rng: jax.Array
  ema: nnx.State | None = None

  @property
  def variables(self) -> nnx.State:
    """The weights to evaluate: `ema`, or `params` without it, and running statistics."""
    return nnx.merge_state(self.params if self.ema is None else self.ema, self.batch_stats)

  @classmethod
  def create(
    cls,
    variables: nnx.State,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    keep_ema: bool = False,
  ) -> 'TrainState':
    """Creates the state before the first step from parameters and running statistics."""
    params, batch_stats = nnx.split_state(variables, nnx.Param, nnx.BatchStat)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=tx.init(params),
      rng=jax.random.key(seed),
      ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
    )


def initial_state(
  network: NonLocalNetConfig,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  keep_ema: bool,
  mesh: Mesh,
) -> TrainState:
  """Creates a randomly initialized state, replicated on a mesh."""

  def create() -> TrainState:
    model = NonLocalNet(network, rngs=nnx.Rngs(fast_compiling_key(seed)))
    return TrainState.create(nnx.state(model), tx, seed=seed, keep_ema=keep_ema)

  return jax.jit(create, out_shardings=replicated(mesh))()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """Options of a training step.

  Attributes:
    loss: Options of the loss.
    dtype: Dtype of activations, 'float32' or 'bfloat16'; parameters, statistics, softmax and loss
      are float32.
    precision: Matmul precision, see `jax_default_matmul_precision`.
    accumulate: Number of gradient accumulation steps: equal parts of the batch that are computed in
      sequence. The divisor of the loss is that of the whole batch; batch normalization uses the
      statistics of each part.
    ema_decay: Decay rate of `TrainState.ema`; 0 for no average.
    mean: Mean of each image channel, see `normalize`.
    std: Standard deviation of each image channel.
    bits: Of a sample of the images, 8 or 16.
  """

  loss: LossConfig = dataclasses.field(default_factory=LossConfig)
  dtype: str = 'float32'
  precision: str = 'default'
  accumulate: int = 1
  ema_decay: float = 0.0
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  bits: Literal[8, 16] = 8


class BatchShape(NamedTuple):
  """Shape of a global batch of images.

  Attributes:
    size: Number of images, over all devices.
    crop: (height, width) of the images, in pixels.
  """

  size: int
  crop: tuple[int, int]


def make_train_step(
  config: NonLocalNetConfig,
  execution: Execution,
  tx: optax.GradientTransformation,
  options: StepConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the pure function of a training step, to be compiled with `jax.jit`.

  Args:
    config: Architecture of the network.
    execution: How the network is computed.
    tx: Optimizer.
    options: Options of the step.

  Returns:
    A function from the state and a batch to the next state and scalar metrics. The batch has
    `image` (n, h, w, channels) uint8 or uint16, `label` (n, h, w) uint8 and `size` (n, 2) int32
    (see `normalize`). Metrics are `loss`, `loss_decode`, `loss_auxiliary`, `accuracy` (over labeled
    pixels) and `update_norm` (L2 norm of the parameter updates).
  """
  graphdef = nnx.graphdef(NonLocalNet.abstract(config, execution))
  loss_config, accumulate, dtype = options.loss, options.accumulate, jnp.dtype(options.dtype)
  ignore_index, class_weights = loss_config.ignore_index, loss_config.class_weights
  total = functools.partial(
    sum_of_losses,
    ignore_index=ignore_index,
    class_weights=class_weights,
    ohem=loss_config.ohem,
    focal_gamma=loss_config.focal_gamma,
  )

  def gradients(
    params: nnx.State, batch_stats: nnx.State, part: Batch, whole: Batch, dropout_key: jax.Array
  ) -> tuple[nnx.State, tuple[nnx.State, Metrics]]:
    """Computes gradients and metrics of a part of a batch, as its share of the whole batch."""
    labels = part['label'].astype(jnp.int32)
    images = normalize(part['image'], mean=options.mean, std=options.std, sizes=part['size'])
    images = images.astype(dtype)
    divisor = loss_divisor(
      whole['label'],
      ignore_index=ignore_index,
      avg_non_ignore=loss_config.avg_non_ignore,
      class_weights=class_weights,
    )
    labeled, all_labeled = (jnp.sum(x != ignore_index) for x in (labels, whole['label']))

    def loss_of_head(pixels: PixelLosses) -> jax.Array:
      loss = total(pixels.losses, labels) / divisor
      if loss_config.dice_weight:
        dice = jnp.sum(dice_losses(pixels, labels, ignore_index=ignore_index))
        loss += loss_config.dice_weight * dice / len(whole['label'])
      return loss

    def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
      model = nnx.merge(graphdef, params, batch_stats, copy=True)
      pixels, auxiliary_pixels = (
        pixel_losses(
          logits,
          labels,
          method=execution.pixel_loss,
          align_corners=config.align_corners,
          ignore_index=ignore_index,
          with_squares=loss_config.dice_weight > 0,
        )
        for logits in model.training_logits(images, rngs=nnx.Rngs(dropout=dropout_key))
      )
      loss_decode, loss_auxiliary = map(loss_of_head, (pixels, auxiliary_pixels))
      loss = loss_decode + loss_config.auxiliary_weight * loss_auxiliary
      accuracy = pixel_accuracy(pixels.hits, labels, ignore_index=ignore_index)
      metrics = {
        'loss': loss,
        'loss_decode': loss_decode,
        'loss_auxiliary': loss_auxiliary,
        'accuracy': accuracy * labeled / jnp.maximum(all_labeled, 1),
      }
      return loss, (nnx.state(model, nnx.BatchStat), metrics)

    return jax.grad(loss_of, has_aux=True)(params)

  def accumulated_gradients(
    state: TrainState, batch: Batch, dropout_key: jax.Array
  ) -> tuple[nnx.State, tuple[nnx.State, Metrics]]:
    # Part i has the samples i, i + accumulate, ..., so that no sample moves between devices.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), dict(batch)
    )

    def add(carry, part_and_number):
      part, number = part_and_number
      *sums, batch_stats = carry
      key = jax.random.fold_in(dropout_key, number)
      grads, (batch_stats, metrics) = gradients(state.params, batch_stats, part, batch, key)
      return (*jax.tree.map(jnp.add, sums, [grads, metrics]), batch_stats), None

    names = ('loss', 'loss_decode', 'loss_auxiliary', 'accuracy')
    acc_dtype = jnp.promote_types(dtype, jnp.float32)
    zero_metrics = {name: jnp.zeros((), acc_dtype) for name in names}
    start = (jax.tree.map(jnp.zeros_like, state.params), zero_metrics, state.batch_stats)
    (grads, metrics, batch_stats), _ = jax.lax.scan(add, start, (parts, jnp.arange(accumulate)))
    return grads, (batch_stats, metrics)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    dropout_key = jax.random.fold_in(state.rng, state.step)
    if accumulate == 1:
      grads, (batch_stats, metrics) = gradients(
        state.params, state.batch_stats, batch, batch, dropout_key
      )
    else:
      grads, (batch_stats, metrics) = accumulated_gradients(state, batch, dropout_key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema: Any = state.ema
    if options.ema_decay:
      ema = optax.incremental_update(params, ema, step_size=1 - options.ema_decay)
    next_state = TrainState(
      step=state.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      rng=state.rng,
      ema=ema,
    )
    return next_state, {**metrics, 'update_norm': _norm(updates)}

  return train_step


def lower_train_step(
  config: NonLocalNetConfig,
  execution: Execution,
  tx: optax.GradientTransformation,
  options: StepConfig,
  *,
  batch: BatchShape,
  mesh: Mesh,
  platform: Platform | None = None,
) -> jax.stages.Lowered:
  """Lowers the training step for the devices of a mesh, without data.

  Args:
    config: Architecture of the network.
    execution: How the network is computed.
    tx: Optimizer.
    options: Options of the step.
    batch: Shape of the global batch.
    mesh: Device mesh; its devices may come from `jax.experimental.topologies`.
    platform: Platform to lower for; None for that of `mesh`. A program for another platform can be
      inspected, but not compiled.

  Returns:
    A lowered function of the state (donated), the batch (see `make_train_step`) and `stop`,
    (devices,) bool; batch and `stop` are sharded over the mesh. It returns the next state and the
    metrics, including `stop`, which is True if any device's flag is.
  """
  step = make_train_step(config, execution, tx, options)

  def train_step(
    state: TrainState, batch: dict[str, jax.Array], stop: jax.Array
  ) -> tuple[TrainState, Metrics]:
    state, metrics = step(state, batch)
    return state, {**metrics, 'stop': jnp.any(stop)}

  everywhere, over = replicated(mesh), over_batch(mesh)
  create = functools.partial(TrainState.create, tx=tx, seed=0, keep_ema=options.ema_decay > 0)
  state = jax.eval_shape(create, state_shapes(config))
  jitted = jax.jit(
    train_step,
    in_shardings=(everywhere, over, over),
    out_shardings=(everywhere, everywhere),
    donate_argnums=0,
    compiler_options=compiler_options(
      platform or platform_of_mesh(mesh), deterministic=execution.deterministic
    ),
  )
  images = batch.size, *batch.crop
  arrays = {
    'image': jax.ShapeDtypeStruct(
      (*images, config.in_channels), jnp.uint8 if options.bits == 8 else jnp.uint16
    ),
    'label': jax.ShapeDtypeStruct(images, jnp.uint8),
    'size': jax.ShapeDtypeStruct((batch.size, 2), jnp.int32),
  }
  # Batch normalization reads the mesh to combine its statistics in one collective.
  with (
    jax.default_matmul_precision(options.precision),
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  ):
    traced = jitted.trace(state, arrays, jax.ShapeDtypeStruct((mesh.size,), jnp.bool))
    names = None if platform is None else ({'gpu': 'cuda'}.get(platform, platform),)
    return traced.lower(lowering_platforms=names)


def _norm(tree: optax.Updates) -> jax.Array:
  """Computes the L2 norm; concatenates small arrays, each of which would take two GPU kernels."""
  leaves = jax.tree.leaves(tree)
  small = [leaf.ravel() for leaf in leaves if leaf.ndim < 2]
  large = [leaf for leaf in leaves if leaf.ndim >= 2]
  return optax.tree.norm([jnp.concatenate(small), *large] if small else large)
