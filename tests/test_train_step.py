"""Options of a training step, in float64 where two ways must lead to the same numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.layers import BatchNorm
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.runtime.parallel import data_mesh, over_batch, replicated, shard_batch
from nonlocal_jax.training.checkpointing import with_weights
from nonlocal_jax.training.loss import LossConfig
from nonlocal_jax.training.optimizer import OptimizerConfig, sgd
from nonlocal_jax.training.train_step import (
  BatchShape,
  StepConfig,
  TrainState,
  initial_state,
  lower_train_step,
  make_train_step,
)
from nonlocal_jax.weights.arrays import to_arrays

CONFIG = NonLocalNetConfig.from_depth(14, width=4, num_classes=3, zero_init=False)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, size=(8, 40, 48, 3), dtype=np.uint8),
    'label': rng.choice([0, 1, 2, 255], size=(8, 40, 48)).astype(np.uint8),
    'size': np.full((8, 2), 40, np.int32),
  }


@pytest.fixture(scope='module')
def variables():
  """With the block and the residual branches open."""
  state = jax.jit(lambda: nnx.state(NonLocalNet(CONFIG, rngs=nnx.Rngs(0))))()
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: np.abs(rng.normal(1, 0.1, x.shape)) if x.ndim == 1 else np.asarray(x, np.float64),
    state,
  )


def take_step(variables, batch, *, devices=1, dtype='float64', dropout=0.0, steps=1, **options):
  """Metrics, gradients and running statistics after SGD with rate 1, whose update is the gradient.

  Options are those of `Execution`, `StepConfig` and `LossConfig`.
  """
  chosen = {key: options.pop(key) for key in ('batch_norm', 'rematerialize') if key in options}
  if chosen.get('batch_norm') == 'per_device':
    chosen['batch_norm_groups'] = devices
  config = dataclasses.replace(CONFIG, dropout=dropout)
  execution = Execution.for_platform(**chosen)
  tx = optax.sgd(1.0)
  names = {field.name for field in dataclasses.fields(LossConfig)}
  loss = LossConfig(**{name: options.pop(name) for name in names & options.keys()})
  step = make_train_step(config, execution, tx, StepConfig(loss=loss, dtype=dtype, **options))
  mesh = data_mesh(jax.devices()[:devices])
  jitted = jax.jit(
    step, in_shardings=(replicated(mesh), over_batch(mesh)), out_shardings=replicated(mesh)
  )
  with jax.enable_x64(dtype == 'float64'):
    if dtype != 'float64':
      variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    keep_ema = 'ema_decay' in options
    state = TrainState.create(variables, tx, seed=0, keep_ema=keep_ema)
    state = jax.device_put(state, replicated(mesh))
    states = [state]
    for _ in range(steps):
      state, metrics = jitted(state, shard_batch(batch, mesh))
      states.append(state)
    before, after = to_arrays(states[-2].params), to_arrays(states[-1].params)
    gradients = {name: np.asarray(before[name] - after[name]) for name in before}
  return metrics, gradients, states


def host_arrays(state):
  return {name: np.asarray(array) for name, array in to_arrays(state).items()}


def assert_same(actual, expected, rtol=1e-9):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    scale = np.abs(array).max()
    assert_allclose(actual[name], array, rtol=rtol, atol=1e-3 * rtol * scale + 1e-14, err_msg=name)


@pytest.fixture(scope='module')
def frozen(variables, batch):
  """The step with frozen batch normalisation, everything at once."""
  return take_step(variables, batch, batch_norm='frozen', avg_non_ignore=True)


def test_frozen_batch_norm_uses_and_keeps_the_running_statistics(variables, batch, frozen):
  metrics, gradients, states = frozen
  for name, array in to_arrays(states[1].batch_stats).items():
    np.testing.assert_array_equal(array, to_arrays(variables)[name])
  assert np.abs(gradients['backbone.layer1.0.bn1.scale']).max() > 0  # they are still trained
  trained = take_step(variables, batch, avg_non_ignore=True)
  assert abs(float(trained[0]['loss'] - metrics['loss'])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(('accumulate', 'devices'), [(4, 1), (2, 4)])
def test_accumulated_gradients_are_those_of_the_whole_batch(
  variables, batch, frozen, accumulate, devices
):
  """Also where the parts have different numbers of labeled pixels."""
  found = take_step(
    variables,
    batch,
    batch_norm='frozen',
    avg_non_ignore=True,
    accumulate=accumulate,
    devices=devices,
  )
  assert_same(found[1], frozen[1])
  for name in ('loss', 'loss_decode', 'loss_auxiliary', 'accuracy', 'update_norm'):
    assert_allclose(found[0][name], frozen[0][name], rtol=1e-9, err_msg=name)


@pytest.fixture(scope='module')
def plain(variables, batch):
  """The step without options, on one device."""
  return take_step(variables, batch, dropout=0.5)


@pytest.mark.slow
def test_rematerialised_blocks_give_the_same(variables, batch, plain):
  found = take_step(variables, batch, dropout=0.5, rematerialize=True)
  assert_same(found[1], plain[1])
  assert_same(*(to_arrays(result[2][1].batch_stats) for result in (found, plain)))


@pytest.mark.slow
def test_four_devices_take_the_step_of_one(variables, batch, plain):
  """Batch statistics included: the mean over the sharded batch is the global one."""
  assert jax.device_count() == 4
  found = take_step(variables, batch, dropout=0.5, devices=4)
  assert len(found[0]['loss'].sharding.device_set) == 4
  assert_allclose(found[0]['loss'], plain[0]['loss'], rtol=1e-12)
  assert_same(found[1], plain[1])
  assert_same(*(to_arrays(result[2][1].batch_stats) for result in (found, plain)))


@pytest.mark.slow
def test_batch_norm_per_device_sees_each_part_by_itself(variables, batch):
  """As the mean of the gradients of four runs, each on its quarter."""
  found = take_step(variables, batch, devices=4, batch_norm='per_device')
  parts = [
    take_step(variables, {name: array[start : start + 2] for name, array in batch.items()})
    for start in range(0, 8, 2)
  ]
  assert_same(
    found[1], {name: np.mean([part[1][name] for part in parts], axis=0) for name in found[1]}
  )
  statistics = [to_arrays(part[2][1].batch_stats) for part in parts]
  assert_same(
    to_arrays(found[2][1].batch_stats),
    {name: np.mean([s[name] for s in statistics], axis=0) for name in statistics[0]},
  )


@pytest.mark.parametrize(('groups', 'exchanges'), [(1, True), (4, False)])
def test_batch_norm_per_device_exchanges_nothing(groups, exchanges):
  norm = BatchNorm(3, groups=groups)
  over = over_batch(data_mesh())

  def normalised(x):
    return nnx.merge(*nnx.split(norm), copy=True)(x, train=True)

  lowered = jax.jit(normalised, in_shardings=over, out_shardings=over).lower(jnp.ones((8, 5, 5, 3)))
  assert ('all-reduce' in lowered.compile().as_text()) == exchanges


@pytest.mark.slow
def test_a_batch_norm_needs_one_collective_each_way():
  _, tx = OptimizerConfig().make(steps=10)
  batch, mesh = BatchShape(8, (40, 48)), data_mesh()
  lowered = lower_train_step(
    CONFIG, Execution.for_platform(), tx, StepConfig(), batch=batch, mesh=mesh
  )
  program = lowered.compile().as_text()
  norms = sum(name.endswith('.mean') for name in to_arrays(state_shapes(CONFIG)))
  assert norms == 24
  collectives = re.findall(r' (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(', program)
  assert collectives.count('all-gather') <= norms
  assert collectives.count('all-reduce') <= norms
  assert set(collectives) <= {'all-gather', 'all-reduce'}


def test_moving_average_of_the_weights(variables, batch):
  """0.9 e + 0.1 p after each of three steps, from the initial weights; it is what is evaluated."""
  _, _, states = take_step(variables, batch, batch_norm='frozen', ema_decay=0.9, steps=3)
  expected = host_arrays(states[0].params)
  for state in states[1:]:
    params = host_arrays(state.params)
    expected = {name: 0.9 * expected[name] + 0.1 * params[name] for name in params}
    assert_same(to_arrays(state.ema), expected)
  evaluated = to_arrays(states[-1].variables)
  assert_same({name: evaluated[name] for name in expected}, expected)
  assert evaluated.keys() == to_arrays(variables).keys()


@pytest.mark.slow
def test_bfloat16_computes_near_float64_and_keeps_float32_weights(variables, batch):
  expected = take_step(variables, batch)
  found = take_step(variables, batch, dtype='bfloat16')
  assert_allclose(found[0]['loss'], expected[0]['loss'], rtol=2e-2)
  assert {array.dtype for array in jax.tree.leaves(found[2][1].variables)} == {np.dtype('float32')}
  assert found[0]['loss'].dtype == np.float32
  for name in ('decode_head.conv_seg.kernel', 'backbone.layer4.0.conv2.kernel'):
    a, b = found[1][name].ravel(), expected[1][name].ravel()
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.98, name
  statistics = [to_arrays(result[2][1].batch_stats) for result in (found, expected)]
  for name, array in statistics[1].items():
    assert_allclose(statistics[0][name], array, rtol=0.05, atol=0.05, err_msg=name)


def test_bfloat16_reaches_convolutions_but_neither_statistics_nor_softmax(batch):
  """Read off the program before it is compiled."""
  tx = sgd(lambda step: jnp.asarray(0.1), momentum=0.9, weight_decay=5e-4)
  state = jax.eval_shape(functools.partial(TrainState.create, tx=tx, seed=0), state_shapes(CONFIG))
  step = make_train_step(CONFIG, Execution.for_platform(), tx, StepConfig(dtype='bfloat16'))
  operations = list(_equations(jax.make_jaxpr(step)(state, batch).jaxpr))

  def dtypes(name):
    return {
      (str(v.aval.dtype), len(v.aval.shape))
      for e in operations
      if e.primitive.name == name
      for v in e.invars
    }

  assert {dtype for dtype, _ in dtypes('conv_general_dilated')} == {'bfloat16'}
  assert {dtype for dtype, _ in dtypes('exp')} == {'float32'}
  assert {dtype for dtype, _ in dtypes('rsqrt')} == {'float32'}
  assert {dtype for dtype, _ in dtypes('log')} == {'float32'}


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _equations(inner)


def test_averaged_weights_share_no_memory_with_those_they_start_from():
  """A step is given both to overwrite: XLA refuses to take one array twice."""
  config = NonLocalNetConfig.from_depth(14, num_classes=4, width=8)
  tx = optax.sgd(0.1)
  state = initial_state(config, tx, seed=0, keep_ema=True, mesh=data_mesh(jax.devices()[:1]))
  backbone = nnx.from_flat_state(
    (path, variable.replace(np.full(variable.shape, 2, np.float32)))
    for path, variable in nnx.to_flat_state(state.variables)
    if path[0] == 'backbone'
  )
  started = jax.device_put(with_weights(state, backbone), jax.devices()[0])
  arrays = jax.tree.leaves((started.params, started.ema))
  assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)
  for ours, theirs in zip(*map(jax.tree.leaves, (started.params, started.ema)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
