"""Fast convolutions and their gradients against PyTorch in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose

from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.convolution import (
  convolution_function,
  matmul_convolution,
  product_convolution,
  sub_image_convolution,
)

# Shape of the input, channels out, edge, stride, dilation; whether it is done by Winograd.
CASES = {
  'pointwise': ((2, 7, 9, 6), 5, 1, 1, 1, False),
  'pointwise strided': ((2, 7, 10, 6), 5, 1, 2, 1, False),
  'few channels': ((2, 9, 8, 3), 4, 3, 1, 1, False),
  'strided': ((2, 9, 8, 3), 4, 3, 2, 1, False),
  'strided, even': ((1, 8, 10, 3), 4, 3, 2, 1, False),
  'few positions': ((1, 8, 8, 64), 64, 3, 1, 1, False),
  'wasteful': ((2, 17, 17, 64), 64, 3, 1, 4, False),
  'whole tiles': ((2, 16, 20, 64), 64, 3, 1, 1, True),
  'cut tiles': ((1, 27, 22, 64), 72, 3, 1, 1, True),
  'dilated': ((1, 31, 24, 64), 64, 3, 1, 2, True),
  'dilated by 4': ((2, 30, 31, 64), 65, 3, 1, 4, True),
  'inputs in parts': ((2, 16, 16, 600), 64, 3, 1, 1, True),
  'outputs in parts': ((2, 16, 16, 64), 600, 3, 1, 2, True),
  'no parts': ((2, 16, 16, 257), 64, 3, 1, 1, True),
}


def arrays(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Input, kernel and gradient of the output."""
  rng = np.random.default_rng(0)
  shape, out_channels, edge, stride, _, _ = CASES[case]
  n, height, width, channels = shape
  out = (n, -(-height // stride), -(-width // stride), out_channels)
  x, gradient = rng.normal(size=shape), rng.normal(size=out)
  kernel = rng.normal(size=(edge, edge, channels, out_channels)) / np.sqrt(edge**2 * channels)
  return x, kernel, gradient


def of_torch(case: str) -> list[np.ndarray]:
  """Output and both gradients, in float64."""
  _, _, edge, stride, dilation, _ = CASES[case]
  x, kernel, gradient = (torch.as_tensor(array) for array in arrays(case))
  x, kernel = x.requires_grad_(), kernel.requires_grad_()
  y = torch.nn.functional.conv2d(
    x.permute(0, 3, 1, 2),
    kernel.permute(3, 2, 0, 1),
    None,
    stride,
    dilation * (edge // 2),
    dilation,
  ).permute(0, 2, 3, 1)
  y.backward(gradient)
  assert x.grad is not None
  assert kernel.grad is not None
  return [y.detach().numpy(), x.grad.numpy(), kernel.grad.numpy()]


def results_of(case: str, convolution=matmul_convolution):
  """The function from input, kernel and gradient of the output to output and both gradients."""
  _, _, edge, stride, dilation, _ = CASES[case]
  pad = dilation * (edge // 2)

  @jax.jit
  def results(x, kernel, gradient):
    y, pull = jax.vjp(
      functools.partial(
        convolution,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
      ),
      x,
      kernel,
    )
    return [y, *pull(gradient)]

  return results


def of_jax(case: str, dtype, convolution=matmul_convolution) -> list[np.ndarray]:
  results = results_of(case, convolution)
  return [np.asarray(a) for a in results(*(jnp.asarray(a, dtype) for a in arrays(case)))]


@pytest.mark.parametrize(
  'convolution', [matmul_convolution, product_convolution, sub_image_convolution]
)
@pytest.mark.parametrize('case', CASES)
def test_convolution_and_gradients_equal_pytorch_in_float64(case, convolution):
  with jax.enable_x64(True):
    ours_of_case = of_jax(case, jnp.float64, convolution)
    for ours, theirs in zip(ours_of_case, of_torch(case), strict=True):
      assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', ['whole tiles', 'dilated', 'inputs in parts', 'pointwise'])
def test_rounding_errors_in_float32_are_small(case):
  for ours, theirs in zip(of_jax(case, jnp.float32), of_torch(case), strict=True):
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 3e-4 * theirs.std()


@pytest.mark.parametrize('case', CASES)
def test_what_is_done_by_winograd(case):
  """Then the program, with both gradients, has products of 36 matrices and no convolution."""
  *_, edge, _, _, expected = CASES[case]
  program = results_of(case).lower(*(jnp.asarray(a, jnp.float32) for a in arrays(case))).as_text()
  products = re.findall(r'stablehlo\.dot_general.* batching_dims = \[0\] x \[0\]', program)
  assert bool(products) == expected
  assert ('stablehlo.convolution' in program) == (edge == 3 and not expected)


@pytest.mark.slow
def test_the_network_is_the_same_by_direct_convolutions_and_without_scans(rng):
  """Also that these options reach the network: the numbers of convolutions are known."""
  config = NonLocalNetConfig(stage_blocks=(2, 3, 1, 2), width=16, num_classes=5, zero_init=False)
  state = jax.jit(lambda: nnx.state(NonLocalNet(config, rngs=nnx.Rngs(0))))()
  images = jnp.asarray(rng.normal(size=(1, 184, 192, 3)), jnp.float32)
  logits, counts = [], []
  for options in ({}, {'convolution': 'direct'}, {'scan_blocks': False}):
    graphdef = nnx.graphdef(NonLocalNet.abstract(config, Execution.for_platform('cpu', **options)))
    run = jax.jit(lambda s, x, g=graphdef: nnx.merge(g, s).encode_decode(x))
    counts.append(run.lower(state, images).as_text().count('stablehlo.convolution'))
    logits.append(np.asarray(run(state, images)))
  for other in logits[1:]:
    assert np.abs(other - logits[0]).max() <= 1e-3 * logits[0].std()
  # The 3x3 convolutions of stem, first and second stage have few channels: not by Winograd.
  assert counts == [3 + 2 + 2, 3 + 4 * 4 + 3 * 3 + 8, 3 + 2 + 3]


def test_an_unknown_way_is_an_error():
  with pytest.raises(ValueError, match="convolution is 'quick', expected one of direct, matmul"):
    convolution_function('quick')
