"""The state of a training run and the pure function that takes it one step further."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import IMAGENET_MEAN, IMAGENET_STD
from nonlocal_jax.training.loss import (
  Ohem,
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
  """Everything that a step reads and writes.

  Attributes:
    step: () int32, steps taken.
    params: Trainable arrays of the network.
    batch_stats: Running statistics of its batch normalisations.
    opt_state: State of the optimizer.
    rng: Key from which each step folds its own.
    ema: Exponential moving average of `params`, None if none is kept.
  """

  step: jax.Array
  params: nnx.State
  batch_stats: nnx.State
  opt_state: Any
  rng: jax.Array
  ema: nnx.State | None = None

  @property
  def variables(self) -> nnx.State:
    """Parameters, averaged if an average is kept, and running statistics: what is evaluated."""
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
    """The state before the first step, from parameters and running statistics."""
    params, batch_stats = nnx.split_state(variables, nnx.Param, nnx.BatchStat)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=tx.init(params),
      rng=jax.random.key(seed),
      ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
    )


def make_train_step(
  config: NonLocalNetConfig,
  execution: Execution,
  tx: optax.GradientTransformation,
  *,
  auxiliary_weight: float,
  ignore_index: int = 255,
  avg_non_ignore: bool = False,
  class_weights: Sequence[float] | None = None,
  ohem: Ohem | None = None,
  compute_dtype: jax.typing.DTypeLike = jnp.float32,
  accumulate: int = 1,
  ema_decay: float | None = None,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The pure function of one training step, to be compiled with `jax.jit`.

  Args:
    config: The network.
    execution: How it is computed.
    tx: The optimizer.
    auxiliary_weight: Factor of the auxiliary head's loss.
    ignore_index: Label of the pixels without a class.
    avg_non_ignore: See `loss.loss_divisor`, as for `class_weights`.
    class_weights: Weight of each class in the loss; None for 1 each.
    ohem: See `loss.sum_of_losses`.
    compute_dtype: Of activations; parameters, statistics, softmax and loss are float32.
    accumulate: Equal parts of the batch that go through the network one after the other, their
      gradients added. The divisor of the loss is that of the whole batch; batch normalisation sees
      one part at a time.
    ema_decay: Weight of the old average in `TrainState.ema`; None if none is kept.
    mean: See `normalize`.
    std: See `normalize`.

  Returns:
    A function of the state and a batch `image` (n, h, w, 3) uint8 RGB, `label` (n, h, w) uint8,
    `size` (n, 2) int32 (see `normalize`), which returns the next state and the metrics `loss`,
    `loss_decode`, `loss_auxiliary`, `accuracy` (share of the labelled pixels) and `update_norm` (of
    the change to the parameters), scalars.
  """
  graphdef = nnx.graphdef(NonLocalNet.abstract(config, execution))
  total = functools.partial(
    sum_of_losses, ignore_index=ignore_index, class_weights=class_weights, ohem=ohem
  )

  def gradients(
    params: nnx.State, batch_stats: nnx.State, part: Batch, whole: Batch, dropout_key: jax.Array
  ) -> tuple[nnx.State, tuple[nnx.State, Metrics]]:
    """Of a part of a batch, its share of the loss of the whole."""
    labels = part['label'].astype(jnp.int32)
    images = normalize(part['image'], mean=mean, std=std, sizes=part['size'])
    images = images.astype(compute_dtype)
    divisor = loss_divisor(
      whole['label'],
      ignore_index=ignore_index,
      avg_non_ignore=avg_non_ignore,
      class_weights=class_weights,
    )
    labelled, all_labelled = (jnp.sum(x != ignore_index) for x in (labels, whole['label']))

    def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
      model = nnx.merge(graphdef, params, batch_stats, copy=True)
      pixels, auxiliary_pixels = (
        pixel_losses(
          logits,
          labels,
          method=execution.pixel_loss,
          align_corners=config.align_corners,
          ignore_index=ignore_index,
        )
        for logits in model.training_logits(images, rngs=nnx.Rngs(dropout=dropout_key))
      )
      loss_decode = total(pixels.losses, labels) / divisor
      loss_auxiliary = total(auxiliary_pixels.losses, labels) / divisor
      loss = loss_decode + auxiliary_weight * loss_auxiliary
      accuracy = pixel_accuracy(pixels.hits, labels, ignore_index=ignore_index)
      metrics = {
        'loss': loss,
        'loss_decode': loss_decode,
        'loss_auxiliary': loss_auxiliary,
        'accuracy': accuracy * labelled / jnp.maximum(all_labelled, 1),
      }
      return loss, (nnx.state(model, nnx.BatchStat), metrics)

    return jax.grad(loss_of, has_aux=True)(params)

  def accumulated_gradients(
    state: TrainState, batch: Batch, dropout_key: jax.Array
  ) -> tuple[nnx.State, tuple[nnx.State, Metrics]]:
    # Part i has the samples i, i + accumulate, ...: each device's share stays where it is.
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
    dtype = jnp.promote_types(compute_dtype, jnp.float32)
    zero_metrics = {name: jnp.zeros((), dtype) for name in names}
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
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
      ema = optax.incremental_update(params, ema, step_size=1 - ema_decay)
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


def _norm(tree: nnx.State) -> jax.Array:
  """L2 norm; the many small arrays are one, since each takes a GPU two kernels."""
  leaves = jax.tree.leaves(tree)
  small = [leaf.ravel() for leaf in leaves if leaf.ndim < 2]
  large = [leaf for leaf in leaves if leaf.ndim >= 2]
  return optax.tree.norm([jnp.concatenate(small), *large] if small else large)
