"""The non-local block against mmcv's, its blocks against the whole matrix, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import Execution, NonLocalBlock
from nonlocal_jax.ops.attention import softmax_attention
from tests import peer
from tests.mmseg_import import mmseg_module

MODES = ['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation']


def peer_block(channels: int, *, norm: bool, **options) -> torch.nn.Module:
  norm_cfg = {'type': 'BN'} if norm else None
  block = mmseg_module('mmcv.cnn').NonLocal2d(channels, norm_cfg=norm_cfg, **options)
  return peer.randomise(block).eval()


def copy_weights(theirs: torch.nn.Module, ours: NonLocalBlock) -> None:
  """Copies by name; with sub-sampling mmcv keeps g and phi inside a Sequential."""
  arrays = {name.replace('.0.conv', '.conv'): x.numpy() for name, x in theirs.state_dict().items()}
  for name in ('g', 'theta', 'phi', 'conv_out', 'concat_project'):
    layer = getattr(ours, name)
    if layer is None:
      continue
    layer.kernel[...] = jnp.asarray(arrays.pop(f'{name}.conv.weight').transpose(2, 3, 1, 0))
    if layer.bias is not None:
      layer.bias[...] = jnp.asarray(arrays.pop(f'{name}.conv.bias'))
  if ours.bn is not None:
    for leaf, name in (
      (ours.bn.scale, 'weight'),
      (ours.bn.bias, 'bias'),
      (ours.bn.mean, 'running_mean'),
      (ours.bn.var, 'running_var'),
    ):
      leaf[...] = jnp.asarray(arrays.pop(f'conv_out.bn.{name}'))
    arrays.pop('conv_out.bn.num_batches_tracked')
  assert not arrays


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(
  'options',
  [
    {'norm': True, 'sub_sample': False, 'use_scale': True},
    {'norm': False, 'sub_sample': True, 'use_scale': False},
  ],
  ids=['norm', 'sub_sample'],
)
def test_equals_mmcv(rng, mode, options):
  theirs = peer_block(6, mode=mode, **options)
  blocks = {'query_block': 10, **({'key_block': 5} if 'gaussian' in mode else {})}
  ours = NonLocalBlock(6, mode=mode, **options, **blocks, rngs=nnx.Rngs(0))
  copy_weights(theirs, ours)
  x = rng.normal(size=(2, 5, 7, 6)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.as_tensor(x.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1)
  assert_allclose(ours(jnp.asarray(x)), expected, atol=2e-5)


def test_reduction_keeps_at_least_one_channel():
  block = NonLocalBlock(2, reduction=8, rngs=nnx.Rngs(0))
  assert block.g.kernel.shape == (1, 1, 2, 1)


@pytest.mark.parametrize('mode', MODES)
def test_starts_as_the_identity(rng, mode):
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32)
  for norm in (True, False):
    block = NonLocalBlock(4, mode=mode, norm=norm, rngs=nnx.Rngs(0))
    assert_allclose(block(x), x)


@pytest.mark.parametrize('norm', [True, False])
def test_starts_open_if_asked(rng, norm):
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32)
  block = NonLocalBlock(4, norm=norm, zero_init=False, rngs=nnx.Rngs(0))
  assert np.abs(block(x) - x).max() > 0


@pytest.mark.parametrize('masked', [False, True], ids=['whole', 'masked'])
@pytest.mark.parametrize(('query_block', 'key_block'), [(100, 100), (100, 8), (7, 100), (5, 9)])
def test_attention_and_gradients_in_blocks_equal_pytorch(rng, query_block, key_block, masked):
  """In float64, with scores whose exponentials overflow if nothing is subtracted."""
  shapes = [(2, 24, 4), (2, 20, 4), (2, 20, 3), (2, 24, 3)]
  arrays = [rng.normal(size=shape) for shape in shapes]
  arrays[0] *= np.where(rng.random((2, 24, 1)) < 0.5, 1, 1000)
  key_mask = np.ones((2, 20), bool)
  if masked:
    key_mask = rng.random((2, 20)) < 0.6
    key_mask[:, 0], key_mask[0, 5:] = True, False  # whole blocks are masked
  with jax.enable_x64():

    def ours(*inputs):
      mask = jnp.asarray(key_mask) if masked else None
      blocks = {'query_block': query_block, 'key_block': key_block}
      return softmax_attention(*inputs, scale=0.4, key_mask=mask, **blocks)

    y, pull = jax.vjp(ours, *map(jnp.asarray, arrays[:3]))
    found = [y, *pull(jnp.asarray(arrays[3]))]
  inputs = [torch.as_tensor(array).requires_grad_() for array in arrays[:3]]
  expected = torch.nn.functional.scaled_dot_product_attention(
    *inputs, attn_mask=torch.as_tensor(key_mask)[:, None], scale=0.4
  )
  expected.backward(torch.as_tensor(arrays[3]))
  for our, their in zip(found, [expected.detach(), *(x.grad for x in inputs)], strict=True):
    assert_allclose(our, their.numpy(), rtol=1e-9, atol=1e-9 * their.abs().max())


def test_on_cpus_keys_are_in_blocks():
  """Without a choice; the result is that of all keys at once."""
  assert Execution.for_platform('cpu').key_block is not None
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 7, 4)), jnp.float32)
  results = []
  for key_block in (16, 42):
    execution = Execution.for_platform('cpu', key_block=key_block)
    block = NonLocalBlock(4, execution=execution, zero_init=False, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(block)
    program = jax.jit(lambda s, g=graphdef: nnx.merge(g, s)(x)).lower(state)
    results.append(program.compile()(state))
    assert ('1x42x42' in program.as_text()) == (key_block == 42)
  assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_blocks_of_a_concatenation_change_neither_result_nor_gradient(rng):
  x = jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
  weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

  def value_and_gradient(query_block: int):
    options = {'mode': 'concatenation', 'norm': False}
    block = NonLocalBlock(4, **options, query_block=query_block, rngs=nnx.Rngs(1))
    block.conv_out.kernel[...] = jnp.ones_like(block.conv_out.kernel[...])
    graphdef, state = nnx.split(block)
    return jax.value_and_grad(lambda s: jnp.sum(weights * nnx.merge(graphdef, s)(x)))(state)

  whole, whole_gradient = value_and_gradient(25)
  for query_block in (1, 7, 24):
    value, gradient = value_and_gradient(query_block)
    assert_allclose(value, whole, rtol=1e-5)
    for actual, expected in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(whole_gradient), strict=True
    ):
      assert_allclose(actual, expected, atol=1e-4)


def test_embedded_gaussian_equals_the_paper_in_float64(rng):
  block = NonLocalBlock(4, norm=False, rngs=nnx.Rngs(2))
  block.conv_out.kernel[...] = jnp.asarray(rng.normal(size=(1, 1, 2, 4)), jnp.float32)
  x = rng.normal(0, 5, size=(1, 3, 4, 4))

  def embed(layer: nnx.Conv) -> np.ndarray:
    kernel, bias = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.bias))
    return x.reshape(12, 4) @ kernel[0, 0] + bias

  scores = embed(block.theta) @ embed(block.phi).T / np.sqrt(2)
  weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
  y = weights @ embed(block.g) @ np.asarray(block.conv_out.kernel[...], np.float64)[0, 0]
  expected = x + y.reshape(x.shape)
  assert_allclose(block(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('backward', [False, True])
def test_memory_grows_with_positions_not_with_their_square(backward):
  """Four times the positions take four times the memory; the whole matrix would take sixteen."""
  graphdef, state = nnx.split(NonLocalBlock(16, query_block=64, rngs=nnx.Rngs(0)))

  def loss(state: nnx.State, x: jax.Array) -> jax.Array:
    return jnp.sum(nnx.merge(graphdef, state)(x))

  def temporary_bytes(side: int) -> int:
    x = jax.ShapeDtypeStruct((1, side, side, 16), jnp.float32)
    compiled = jax.jit(jax.grad(loss) if backward else loss).lower(state, x).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes

  small, large = temporary_bytes(64), temporary_bytes(128)
  assert large < 5 * small
  assert large < 4 * 16384**2 / 8  # an eighth of the float32 matrix


@pytest.mark.parametrize('mode', MODES)
def test_both_modes_of_differentiation_agree(rng, mode):
  """In training, with batch normalization, by default, and under `jax.vmap`: u . Jv = v . J'u."""
  with jax.enable_x64():
    graphdef, state = nnx.split(NonLocalBlock(4, mode=mode, zero_init=False, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), state)
    params, batch_stats = nnx.split_state(state, nnx.Param, nnx.BatchStat)

    def block(params: nnx.State, x: jax.Array) -> jax.Array:
      return nnx.merge(graphdef, params, batch_stats, copy=True)(x, train=True)

    arguments = params, jnp.asarray(rng.normal(size=(2, 5, 6, 4)))
    y, pull = jax.vjp(block, *arguments)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=(3, *a.shape))), arguments)
    cotangent = jnp.asarray(rng.normal(size=y.shape))
    pushed = jax.vmap(lambda v: jax.jvp(block, arguments, v)[1])(tangents)
    pulled = jax.tree.leaves(pull(cotangent))
    for place in range(3):
      tangent = [leaf[place] for leaf in jax.tree.leaves(tangents)]
      expected = sum(jnp.vdot(a, b) for a, b in zip(pulled, tangent, strict=True))
      assert_allclose(jnp.vdot(cotangent, pushed[place]), expected, rtol=1e-9)


def test_keys_in_blocks_without_a_softmax_are_an_error():
  with pytest.raises(ValueError, match="key_block is 8, but mode 'dot_product' has no softmax"):
    NonLocalBlock(4, mode='dot_product', key_block=8, rngs=nnx.Rngs(0))


def test_unknown_mode_is_an_error():
  with pytest.raises(ValueError, match="mode is 'sum', expected one of embedded_gaussian"):
    NonLocalBlock(4, mode='sum', rngs=nnx.Rngs(0))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('sub_sample', [False, True], ids=['whole', 'sub_sample'])
def test_rows_of_weights_are_those_of_mmcvs_matrix(rng, mode, sub_sample):
  """In batches, and with garbage in the padding."""
  theirs = peer_block(6, mode=mode, norm=True, sub_sample=sub_sample)
  ours = NonLocalBlock(6, mode=mode, sub_sample=sub_sample, rngs=nnx.Rngs(0))
  copy_weights(theirs, ours)
  sizes, positions = [(6, 8), (4, 6)], [[(0, 0), (5, 7)], [(3, 5), (2, 1)]]
  x = 2 * rng.normal(size=(2, 6, 8, 6)).astype(np.float32)
  weights = ours.pairwise_weights(
    jnp.asarray(x), jnp.asarray(positions), sizes=jnp.asarray(sizes, jnp.int32)
  )
  factor = 2 if sub_sample else 1
  for image, (height, width), places, found in zip(x, sizes, positions, weights, strict=True):
    tensor = torch.as_tensor(image[:height, :width].transpose(2, 0, 1))[None]
    theta, phi = (tensor.flatten(2), theirs.phi(tensor) if sub_sample else tensor)
    if mode == 'gaussian':
      theta, phi = theta.mT, phi.flatten(2)
    else:
      theta, phi = theirs.theta(tensor).flatten(2), theirs.phi(tensor).flatten(2)
      theta, phi = (
        (theta[..., None], phi[:, :, None]) if mode == 'concatenation' else (theta.mT, phi)
      )
    with torch.no_grad():
      matrix = getattr(theirs, mode)(theta, phi)[0].numpy()
    for (row, column), of_query in zip(places, np.asarray(found), strict=True):
      inside = of_query[: height // factor, : width // factor]
      bound = 1e-6 * max(1, np.abs(matrix).max())
      assert_allclose(inside.ravel(), matrix[row * width + column], atol=bound)
      assert of_query.sum() == pytest.approx(inside.sum())
  if 'gaussian' in mode:
    assert_allclose(weights.sum(axis=(2, 3)), 1, atol=1e-6)


def test_rows_of_weights_take_memory_for_rows_alone():
  """Of 16,384 positions the matrix has 1 GiB."""
  block = NonLocalBlock(8, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(block)

  def rows(state, x, positions):
    return nnx.merge(graphdef, state).pairwise_weights(x, positions)

  x = jax.ShapeDtypeStruct((1, 128, 128, 8), jnp.float32)
  positions = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
  memory = jax.jit(rows).lower(state, x, positions).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * 2**20


@pytest.mark.parametrize('attention', ['cudnn', 'flash'])
def test_attention_that_the_backend_lacks_is_refused_when_constructed(attention):
  with pytest.raises(UserError, match=f'attention is {attention}, which needs an NVIDIA GPU'):
    NonLocalBlock(512, attention=attention, rngs=nnx.Rngs(0))
