"""Max pooling against PyTorch, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nonlocal_jax.ops.pooling import max_pool


def pooled(x, gradient, method):
  """The maxima and the gradient of the input."""
  y, pull = jax.vjp(jax.jit(lambda x: max_pool(x, method)), jnp.asarray(x))
  return np.asarray(y), np.asarray(pull(jnp.asarray(gradient))[0])


@pytest.mark.parametrize('method', ['scatter', 'selections'])
@pytest.mark.parametrize('size', [(6, 8), (7, 9), (8, 5), (2, 3), (1, 1)])
def test_max_pool_is_that_of_torch_with_equal_values(rng, size, method):
  """Most windows have several maxima; sums are in the order of PyTorch."""
  x = np.maximum(rng.integers(-2, 3, size=(2, *size, 3)), 0).astype(np.float64)
  gradient = rng.normal(size=(2, -(-size[0] // 2), -(-size[1] // 2), 3))
  theirs = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
  expected = torch.nn.functional.max_pool2d(theirs, 3, stride=2, padding=1)
  expected.backward(torch.tensor(gradient.transpose(0, 3, 1, 2).copy()))
  with jax.enable_x64(True):
    y, of_input = pooled(x, gradient, method)
  assert theirs.grad is not None
  np.testing.assert_array_equal(y, expected.detach().numpy().transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(of_input, theirs.grad.numpy().transpose(0, 2, 3, 1))


def test_selections_are_the_scattered_gradient_in_bfloat16_and_with_nan(rng):
  x = rng.normal(size=(2, 9, 8, 4)).astype(jnp.bfloat16)
  gradient = rng.integers(-9, 10, size=(2, 5, 4, 4)).astype(jnp.bfloat16)
  for ours, expected in zip(
    *(pooled(x, gradient, m) for m in ('selections', 'scatter')), strict=True
  ):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.astype(np.float32), expected.astype(np.float32))
  x[0, 4, 4, 0] = np.nan
  y = pooled(x, gradient, 'selections')[0].astype(np.float32)
  assert np.isnan(y).sum() == 1
  assert np.isnan(y[0, 2, 2, 0])
