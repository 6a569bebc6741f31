"""Attention through cuDNN, as far as it goes without a GPU.

What goes into cuDNN and what comes out of it is held against PyTorch in float64, with JAX's own
attention in cuDNN's place; that cuDNN is called is read off the programs for CUDA.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from nonlocal_jax import NonLocalBlock, UserError
from nonlocal_jax.models import Execution, NonLocalNetConfig
from nonlocal_jax.models.config import chosen_attention
from nonlocal_jax.ops.attention import check_attention, cudnn_attention, fastest_attention
from nonlocal_jax.ops.flash_attention import flash_attention

FORWARDS, BACKWARDS = '@__cudnn$fmhaSoftmax(', '@__cudnn$fmhaSoftmaxBackward('


@pytest.fixture
def hopper(monkeypatch):
  """What JAX asks when it traces attention through cuDNN, answered as on an H100."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(
    fused_attention_stablehlo,
    'check_compute_capability',
    lambda capability: tuple(map(int, capability.split('.'))) <= (9, 0),
  )


def program_for_cuda(function, *arguments) -> str:
  return jax.jit(function).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'masked'])
@pytest.mark.parametrize('counts', [(24, 12), (35, 35)], ids=['even', 'odd'])
@pytest.mark.parametrize(
  ('dtype', 'taken', 'size', 'largest', 'rms'),
  [
    ('bfloat16', 'bfloat16', 1, 0.06, 0.006),
    ('float32', 'float16', 1, 0.008, 0.0008),
    # Sizes of operands and gradients that float16 does not have.
    ('float32', 'float16', 1e6, 0.008, 0.0008),
    ('float32', 'float16', 1e-9, 0.008, 0.0008),
  ],
)
def test_attention_and_gradients_equal_pytorch(
  rng, monkeypatch, masked, counts, dtype, taken, size, largest, rms
):
  own = jax.nn.dot_product_attention

  def instead_of_cudnn(*arrays, implementation, **options):
    assert implementation == 'cudnn'
    assert {str(array.dtype) for array in arrays} == {taken}
    assert not any(array.shape[1] % 2 for array in arrays)
    # JAX on CPUs has no products of float16.
    wide = (array.astype(jnp.float32) for array in arrays)
    return own(*wide, implementation='xla', **options).astype(taken)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', instead_of_cudnn)
  num_queries, num_keys = counts
  shapes = [(2, num_queries, 8), (2, num_keys, 8), (2, num_keys, 8), (2, num_queries, 8)]
  arrays = [
    np.asarray(jnp.asarray(rng.normal(size=shape) * factor, dtype), np.float64)
    for shape, factor in zip(shapes, (size, 1 / size, size, size), strict=True)
  ]
  key_mask = np.ones((2, num_keys), bool)
  if masked:
    key_mask = rng.random((2, num_keys)) < 0.6

  def ours(*inputs):
    mask = jnp.asarray(key_mask) if masked else None
    return cudnn_attention(*inputs, scale=0.4, key_mask=mask)

  y, pull = jax.vjp(ours, *(jnp.asarray(array, dtype) for array in arrays[:3]))
  assert y.dtype == dtype
  found = [y, *pull(jnp.asarray(arrays[3], dtype))]

  inputs = [torch.as_tensor(array).requires_grad_() for array in arrays[:3]]
  expected = torch.nn.functional.scaled_dot_product_attention(
    *inputs, attn_mask=torch.as_tensor(key_mask)[:, None], scale=0.4
  )
  expected.backward(torch.as_tensor(arrays[3]))
  for our, their in zip(found, [expected.detach(), *(x.grad for x in inputs)], strict=True):
    error, scale = np.asarray(our, np.float64) - their.numpy(), their.numpy().std()
    assert np.abs(error).max() <= largest * scale
    assert np.sqrt(np.mean(error**2)) <= rms * scale


@pytest.mark.parametrize(
  ('sides', 'padded', 'mask'),
  [((64, 128), False, 'NO_MASK'), ((97, 97), False, 'PADDING'), ((64, 96), True, 'PADDING')],
  ids=['512x1024', '769x769', 'with padding'],
)
def test_the_block_calls_cudnn_both_ways(hopper, sides, padded, mask):
  make = functools.partial(NonLocalBlock, 512, execution=Execution(attention='cudnn'))
  graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
  sizes = jax.ShapeDtypeStruct((2, 2), jnp.int32) if padded else None

  def loss(state, x, sizes):
    return jnp.sum(nnx.merge(graphdef, state)(x, sizes=sizes))

  x = jax.ShapeDtypeStruct((2, *sides, 512), jnp.float32)
  program = program_for_cuda(jax.grad(loss), state, x, sizes)
  assert program.count(FORWARDS) == program.count(BACKWARDS) == 1
  assert set(re.findall(r'mask_type\\22: \\22(\w+)\\22', program)) == {mask}
  assert set(re.findall(r'fmha_scale\\22: ([\d.]+)', program)) == {'0.0625'}
  positions = sides[0] * sides[1]
  assert f'{positions}x{positions}' not in program


def test_blocks_are_the_default_and_call_no_cudnn():
  graphdef, state = nnx.split(nnx.eval_shape(lambda: NonLocalBlock(512, rngs=nnx.Rngs(0))))
  x = jax.ShapeDtypeStruct((2, 16, 16, 512), jnp.float32)
  program = program_for_cuda(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
  assert 'cudnn' not in program
  assert '256x256' in program


@pytest.mark.parametrize(
  'options',
  [
    {'attention': 'quick'},
    {'attention': 'flash', 'mode': 'dot_product'},
    {'attention': 'cudnn', 'mode': 'gaussian'},
    {'attention': 'cudnn', 'query_block': 64},
    {'attention': 'cudnn', 'key_block': 64},
  ],
)
def test_what_the_block_cannot_do_is_an_error(options):
  with pytest.raises(ValueError, match=f"attention is '{options['attention']}', "):
    NonLocalBlock(16, **options, rngs=nnx.Rngs(0))


def gpu(kind: str, capability: str, platform: str = 'cuda 12090') -> types.SimpleNamespace:
  client = types.SimpleNamespace(platform_version=f'PJRT C API\n{platform}')
  return types.SimpleNamespace(
    platform='gpu', device_kind=kind, compute_capability=capability, client=client
  )


def test_gpus_that_can_and_cannot():
  check_attention('cudnn', 256, gpu('H100', '9.0'))
  check_attention('cudnn', 256, gpu('B200', '10.0'))
  check_attention('cudnn', 128, gpu('A100', '8.0'))
  check_attention('blocks', 256, gpu('A100', '8.0'))
  for channels, device, message in (
    (256, gpu('A100', '8.0'), r'A100 \(compute capability 8.0\) takes a multiple of 8 .* to 128'),
    (264, gpu('H100', '9.0'), 'up to 256, and the non-local block has 264; leave it at blocks'),
    (12, gpu('H100', '9.0'), 'takes a multiple of 8 inner channels up to 256'),
    (256, gpu('MI300', 'gfx942', 'rocm 60000'), 'needs an NVIDIA GPU, and .* on MI300; leave'),
    (256, jax.devices()[0], 'needs an NVIDIA GPU, and this program runs on cpu; leave it'),
  ):
    with pytest.raises(UserError, match=message):
      check_attention('cudnn', channels, device)


def test_the_fastest_attention_that_loses_no_accuracy():
  h100, a100 = gpu('H100', '9.0'), gpu('A100', '8.0')
  for channels, devices, precision, train, expected in (
    (256, [h100], 'default', True, 'cudnn'),
    (256, [h100] * 4, 'default', False, 'cudnn'),
    (256, [h100], 'highest', False, 'flash'),
    (256, [h100], 'high', False, 'flash'),
    (256, [h100], 'highest', True, 'blocks'),
    (256, [h100] * 4, 'highest', False, 'blocks'),
    (192, [h100], 'highest', False, 'blocks'),
    (256, [a100], 'default', True, 'blocks'),
    (128, [a100], 'default', True, 'cudnn'),
    (128, [a100], 'highest', False, 'blocks'),
    (256, [gpu('MI300', 'gfx942', 'rocm 60000')], 'default', True, 'blocks'),
    (256, jax.devices(), 'default', True, 'blocks'),
  ):
    assert fastest_attention(channels, devices, precision=precision, train=train) == expected


def test_attention_suits_the_network_and_the_devices():
  h100 = [gpu('H100', '9.0')]
  network = NonLocalNetConfig.from_depth(50, num_classes=19)
  without = dataclasses.replace(network, non_local=False)
  gaussian = dataclasses.replace(network, mode='gaussian')
  for attention, config, devices, precision, expected in (
    ('auto', network, h100, 'highest', 'flash'),
    ('auto', network, h100, 'default', 'cudnn'),
    ('cudnn', network, h100, 'highest', 'cudnn'),
    ('auto', without, h100, 'default', 'blocks'),
    ('auto', gaussian, h100, 'highest', 'blocks'),
    ('blocks', without, jax.devices(), 'highest', 'blocks'),
    ('auto', network, jax.devices(), 'default', 'blocks'),
  ):
    found = chosen_attention(attention, config, devices, precision=precision, train=False)
    assert found == expected
  for config, devices, message in (
    (network, jax.devices(), 'attention is cudnn, which needs an NVIDIA GPU'),
    (without, h100, 'attention is cudnn, which computes the embedded Gaussian'),
    (gaussian, h100, 'this network does not have it; leave it at blocks'),
  ):
    with pytest.raises(UserError, match=message):
      chosen_attention('cudnn', config, devices, precision='highest', train=False)


def test_channels_that_the_kernel_takes():
  check_attention('flash', 256, gpu('H100', '9.0'))
  for channels in (8, 96, 512):
    with pytest.raises(UserError, match=f'flash, which takes 16, .*, and .* has {channels}; leave'):
      check_attention('flash', channels, gpu('H100', '9.0'))
  x = jnp.zeros((1, 4, 512))
  with pytest.raises(ValueError, match='queries have 512 channels, expected one of 16, 32'):
    flash_attention(x, x, x, scale=1.0)
