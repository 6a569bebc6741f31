"""Saves and restores the state of a training run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.data.loader import TrainIterator
from nonlocal_jax.training.initial_weights import InitialWeights
from nonlocal_jax.training.train_step import TrainState
from nonlocal_jax.weights.arrays import from_arrays, to_arrays
from nonlocal_jax.weights.run_checkpoints import RunCheckpoints


def with_weights(state: TrainState, weights: nnx.State) -> TrainState:
  """Returns `state` with the parameters and running statistics in `weights` replaced."""
  params, batch_stats = nnx.split_state(weights, nnx.Param, nnx.BatchStat)
  params = nnx.merge_state(state.params, params)
  return dataclasses.replace(
    state,
    params=params,
    batch_stats=nnx.merge_state(state.batch_stats, batch_stats),
    # A copy: a training step is given its arrays to overwrite, each of them once.
    ema=None if state.ema is None else jax.tree.map(jnp.copy, params),
  )


def started_from(state: TrainState, initial: InitialWeights) -> TrainState:
  """Returns a random state with the initial weights of a run, which may be on the host."""
  weights = initial.fitted_to(state.params)
  return state if weights is None else with_weights(state, weights)


def save(checkpoints: RunCheckpoints, state: TrainState, batches: TrainIterator) -> None:
  """Saves a state and the position in the data, in the background."""
  checkpoints.save(
    int(state.step),
    model=state.variables,
    training=_beside_model(state),
    data=batches.get_state(),
  )


def restore(checkpoints: RunCheckpoints, state: TrainState, batches: TrainIterator) -> TrainState:
  """Restores the newest checkpoint.

  Args:
    checkpoints: Checkpoints of the run.
    state: A state with the structure and shardings of the result.
    batches: Iterator, which is set to the restored position in the data.

  Returns:
    The restored state.
  """
  restored = checkpoints.restore(model=state.variables, training=_beside_model(state))
  batches.set_state(restored.data)
  params, batch_stats = nnx.split_state(restored.model, nnx.Param, nnx.BatchStat)
  training = restored.training
  ema = None
  if state.ema is not None:
    params, ema = from_arrays(training['params'], state.params), params
  return TrainState(
    step=training['step'],
    params=params,
    batch_stats=batch_stats,
    opt_state=training['opt_state'],
    rng=jax.random.wrap_key_data(training['rng']),
    ema=ema,
  )


def _beside_model(state: TrainState) -> dict[str, Any]:
  """Returns the parts of a state that are saved separately from the evaluated weights."""
  beside = {
    'step': state.step,
    'opt_state': state.opt_state,
    'rng': jax.random.key_data(state.rng),
  }
  if state.ema is not None:
    beside['params'] = to_arrays(state.params)
  return beside
