"""The random bits of ops/threefry.py against Random123's known answers and JAX's generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nonlocal_jax.models import NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.threefry import fast_compiling_key, threefry2x32
from nonlocal_jax.runtime.parallel import data_mesh
from nonlocal_jax.training.optimizer import OptimizerConfig
from nonlocal_jax.training.train_step import TrainState, initial_state


@pytest.mark.parametrize(
  ('counter', 'key', 'expected'),
  [  # kat_vectors of Random123, "threefry2x32 20"
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
  ],
)
def test_known_answers(counter, key, expected):
  high, low = (jnp.full((3,), word, jnp.uint32) for word in counter)
  found = threefry2x32(jnp.array(key, jnp.uint32), high, low)
  for words, word in zip(found, expected, strict=True):
    np.testing.assert_array_equal(words, np.full(3, word, np.uint32))


@pytest.mark.parametrize('seed', [7, -1])
@pytest.mark.parametrize('shape', [(), (3, 3, 5, 7), (70_001,)])
def test_draws_are_those_of_jax(seed, shape):
  ours, theirs = fast_compiling_key(seed), jax.random.key(seed)
  for _ in range(2):
    np.testing.assert_array_equal(jax.random.bits(ours, shape), jax.random.bits(theirs, shape))
    np.testing.assert_array_equal(
      jax.random.bits(ours, shape, jnp.uint8), jax.random.bits(theirs, shape, jnp.uint8)
    )
    np.testing.assert_array_equal(jax.random.normal(ours, shape), jax.random.normal(theirs, shape))
    ours, theirs = (jax.random.fold_in(key, 2**32 - 3) for key in (ours, theirs))


@pytest.mark.slow
def test_initial_weights_are_those_of_jax_s_generator():
  config = NonLocalNetConfig.from_depth(14, width=4, num_classes=5)
  _, tx = OptimizerConfig().make(10)

  @jax.jit
  def create():
    return TrainState.create(nnx.state(NonLocalNet(config, rngs=nnx.Rngs(3))), tx, seed=3)

  found = initial_state(config, tx, seed=3, keep_ema=False, mesh=data_mesh())
  for expected, array in zip(*map(jax.tree.leaves, (create(), found)), strict=True):
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
      expected, array = jax.random.key_data(expected), jax.random.key_data(array)
    np.testing.assert_array_equal(array, expected)
