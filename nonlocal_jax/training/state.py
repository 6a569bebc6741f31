"""The state of a training run and the pure function that takes it one step further."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nonlocal_jax.models import normalize
from nonlocal_jax.training.loss import cross_entropy, pixel_accuracy

Metrics = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['step', 'params', 'batch_stats', 'opt_state', 'rng'],
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
  """

  step: jax.Array
  params: nnx.State
  batch_stats: nnx.State
  opt_state: Any
  rng: jax.Array

  @property
  def variables(self) -> nnx.State:
    """Parameters and running statistics in one, as evaluation takes them."""
    return nnx.merge_state(self.params, self.batch_stats)

  @classmethod
  def create(
    cls, variables: nnx.State, tx: optax.GradientTransformation, *, seed: int
  ) -> 'TrainState':
    """The state before the first step, from parameters and running statistics."""
    params, batch_stats = nnx.split_state(variables, nnx.Param, nnx.BatchStat)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=tx.init(params),
      rng=jax.random.key(seed),
    )


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  *,
  auxiliary_weight: float,
  ignore_index: int = 255,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The pure function of one training step, to be compiled with `jax.jit`.

  Args:
    graphdef: Static part of the network.
    tx: The optimizer.
    auxiliary_weight: Factor of the auxiliary head's loss.
    ignore_index: Label of the pixels without a class.

  Returns:
    A function of the state and a batch `image` (n, h, w, 3) uint8 RGB, `label` (n, h, w) uint8,
    `size` (n, 2) int32 (see `normalize`), which returns the next state and the metrics `loss`,
    `loss_decode`, `loss_auxiliary`, `accuracy` (share of the labelled pixels) and `update_norm` (of
    the change to the parameters), scalars.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    labels = batch['label'].astype(jnp.int32)
    images = normalize(batch['image'], batch['size'])
    dropout_key = jax.random.fold_in(state.rng, state.step)

    def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
      model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
      logits, auxiliary_logits = model.training_logits(images, rngs=nnx.Rngs(dropout=dropout_key))
      logits = model.upsample(logits, labels.shape[1:])
      auxiliary_logits = model.upsample(auxiliary_logits, labels.shape[1:])
      loss_decode = cross_entropy(logits, labels, ignore_index=ignore_index)
      loss_auxiliary = cross_entropy(auxiliary_logits, labels, ignore_index=ignore_index)
      loss = loss_decode + auxiliary_weight * loss_auxiliary
      metrics = {
        'loss': loss,
        'loss_decode': loss_decode,
        'loss_auxiliary': loss_auxiliary,
        'accuracy': pixel_accuracy(logits, labels, ignore_index=ignore_index),
      }
      return loss, (nnx.state(model, nnx.BatchStat), metrics)

    grads, (batch_stats, metrics) = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics['update_norm'] = optax.tree.norm(updates)
    next_state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      rng=state.rng,
    )
    return next_state, metrics

  return train_step
