"""The attention kernel, run as plain JAX, against PyTorch in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nonlocal_jax.ops.flash_attention import Tiles, flash_attention

TILES = Tiles(queries=16, keys=16, warps=4, stages=1)


def arrays(rng, *, size: float = 1.0) -> list[np.ndarray]:
  """Queries, keys and values, of very different sizes if wanted; and the result's gradient."""
  shapes = [(2, 45, 16), (2, 40, 16), (2, 40, 16), (2, 45, 16)]
  q, k, v, gradient = (rng.normal(size=shape) for shape in shapes)
  return [q * size, k / size, v * size, gradient]


def of_torch(inputs, key_mask: np.ndarray | None) -> list[np.ndarray]:
  """Result and gradients of queries, keys and values."""
  *operands, gradient = (torch.as_tensor(x, dtype=torch.float64) for x in inputs)
  operands = [x.requires_grad_() for x in operands]
  mask = None if key_mask is None else torch.as_tensor(key_mask)[:, None]
  y = torch.nn.functional.scaled_dot_product_attention(*operands, attn_mask=mask, scale=0.4)
  y.backward(gradient)
  return [y.detach().numpy(), *(x.grad.numpy() for x in operands)]


def kernel(key_mask: np.ndarray | None, parts: int):
  mask = None if key_mask is None else jnp.asarray(key_mask)
  return functools.partial(
    flash_attention, scale=0.4, key_mask=mask, parts=parts, tiles=TILES, interpret=True
  )


@pytest.fixture(params=[False, True], ids=['whole', 'masked'])
def key_mask(request, rng) -> np.ndarray | None:
  if not request.param:
    return None
  mask = rng.random((2, 40)) < 0.6
  mask[:, 0] = True
  return mask


@pytest.mark.parametrize('size', [1.0, 1e4, 1e-6])
@pytest.mark.parametrize(('parts', 'bound'), [(1, 4e-3), (2, 3e-6)])
def test_float32_in_parts(rng, key_mask, size, parts, bound):
  """Two parts are as exact as float32, and one as TF32, whatever the size of the operands."""
  inputs = arrays(rng, size=size)
  y, pull = jax.vjp(kernel(key_mask, parts), *(jnp.asarray(x, jnp.float32) for x in inputs[:3]))
  found = [y, *pull(jnp.asarray(inputs[3], jnp.float32))]
  expected = of_torch(inputs, key_mask)
  for ours, theirs, limit in zip(found, expected, [bound] + [5e-6] * 3, strict=True):
    assert ours.dtype == jnp.float32
    assert np.abs(ours - theirs).max() <= limit * theirs.std()


def test_bfloat16_stays_bfloat16(rng, key_mask):
  inputs = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays(rng)]
  y = kernel(key_mask, 2)(*(jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]))
  assert y.dtype == jnp.bfloat16
  theirs = of_torch(inputs, key_mask)[0]
  assert np.abs(np.asarray(y, np.float64) - theirs).max() <= 0.06 * theirs.std()


def test_forward_mode_agrees_with_reverse_mode(rng, key_mask):
  *inputs, gradient = (jnp.asarray(x, jnp.float32) for x in arrays(rng))
  directions = [jnp.asarray(x[:, ::-1]) for x in inputs]
  function = kernel(key_mask, 2)
  _, tangent = jax.jvp(function, inputs, directions)
  gradients = jax.vjp(function, *inputs)[1](gradient)
  forwards = jnp.vdot(tangent, gradient)
  backwards = sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))
  assert abs(forwards - backwards) <= 1e-5 * jnp.linalg.norm(tangent) * jnp.linalg.norm(gradient)


def test_a_sample_by_itself_is_the_same(rng):
  inputs = [jnp.asarray(x, jnp.float32) for x in arrays(rng)[:3]]
  function = kernel(None, 2)
  one_by_one = jax.vmap(function)(*(x[:, None] for x in inputs))[:, 0]
  assert (one_by_one == function(*inputs)).all()


def test_for_cuda_it_is_one_kernel_and_no_scores_are_held():
  shape = jax.ShapeDtypeStruct((1, 4096, 256), jnp.float32)
  function = functools.partial(flash_attention, scale=0.0625)
  # Since JAX 0.12 it has to know the GPU.
  gpu = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('data',), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(function).trace(shape, shape, shape)
    program = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert len(re.findall(r'custom_call @__gpu\$xla\.gpu\.triton', program)) == 1
  assert '4096x4096' not in program
  assert 'stablehlo.reduce_precision' in program  # XLA would drop a conversion and back
