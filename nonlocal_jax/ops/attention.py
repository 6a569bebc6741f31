"""Attention in blocks of queries and keys or through cuDNN, and where the latter can be had."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nonlocal_jax.errors import UserError
from nonlocal_jax.ops.blocks import map_blocks

Attention = Literal['blocks', 'cudnn', 'flash']

# Since this compute capability cuDNN takes more channels.
_HOPPER = (9, 0)


def softmax_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  present: jax.Array | None = None,
  query_block: int,
  key_block: int,
) -> jax.Array:
  """`softmax(scale * queries . keys) . values`, a few queries and keys at a time.

  >>> x = jax.random.normal(jax.random.key(0), (1, 6, 4))
  >>> y = softmax_attention(x, x, x, scale=0.5, query_block=2, key_block=4)
  >>> bool(jnp.allclose(y, jax.nn.softmax(0.5 * x @ x.mT) @ x, atol=1e-5))
  True

  The largest score so far takes the place of the largest of all, and what was summed is made
  smaller when it grows (https://arxiv.org/abs/2112.05682, section 2). Scores are computed
  again in the backward pass, in blocks as well.

  Args:
    queries: (n, q, d) floats.
    keys: (n, k, d) floats.
    values: (n, k, e) floats.
    scale: Factor of the scores.
    present: (n, k) bool, keys that count, the first one in any case; None for all.
    query_block: Most queries at a time, see `blocks.map_blocks`.
    key_block: Most keys at a time; blocks are made equal, the last one padded.

  Returns:
    (n, q, e) of the dtype of `values`.
  """
  n, num_keys, _ = keys.shape
  num_blocks = -(-num_keys // key_block)
  size = -(-num_keys // num_blocks)
  padding = num_blocks * size - num_keys
  if padding:
    if present is None:
      present = jnp.ones((n, num_keys), bool)
    present = jnp.pad(present, ((0, 0), (0, padding)))
    keys, values = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (keys, values))

  def in_blocks(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(n, num_blocks, size, *x.shape[2:]), 1, 0)

  transposed_keys = jnp.swapaxes(in_blocks(keys), 2, 3)
  blocks = transposed_keys, in_blocks(values), None if present is None else in_blocks(present)
  wide = jnp.promote_types(keys.dtype, jnp.float32)

  def scores_of(
    queries: jax.Array, transposed_keys: jax.Array, present: jax.Array | None
  ) -> jax.Array:
    scores = jnp.matmul(queries * scale, transposed_keys, preferred_element_type=wide)
    return scores if present is None else jnp.where(present[:, None], scores, -jnp.inf)

  def with_all_keys(queries: jax.Array) -> jax.Array:
    transposed_keys, values, present = jax.tree.map(lambda x: x[0], blocks)
    weights = jax.nn.softmax(scores_of(queries, transposed_keys, present), axis=-1)
    return weights.astype(values.dtype) @ values

  def with_blocks_of_keys(queries: jax.Array) -> jax.Array:
    def add_block(sums: _Sums, block: tuple[jax.Array, jax.Array, jax.Array | None]) -> _Sums:
      transposed_keys, values, present = block
      scores = scores_of(queries, transposed_keys, present)
      # What is subtracted from all scores makes no difference, and so has no gradient.
      largest = jnp.maximum(sums.largest, scores.max(axis=-1, keepdims=True))
      largest = jax.lax.stop_gradient(largest)
      weights = jnp.exp(scores - largest)
      smaller = jnp.exp(sums.largest - largest)
      weighted = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=wide)
      return _Sums(
        largest,
        sums.weights * smaller + weights.sum(axis=-1, keepdims=True),
        sums.weighted * smaller + weighted,
      )

    column = (n, queries.shape[1], 1)
    sums = _Sums(
      jnp.full(column, -jnp.inf, wide),
      jnp.zeros(column, wide),
      jnp.zeros((*column[:2], values.shape[2]), wide),
    )
    again = jax.checkpoint(add_block)
    sums, _ = jax.lax.scan(lambda sums, block: (again(sums, block), None), sums, blocks)
    return (sums.weighted / sums.weights).astype(values.dtype)

  function = with_all_keys if num_blocks == 1 else with_blocks_of_keys
  return map_blocks(function, queries, query_block, recompute=True)


class _Sums(NamedTuple):
  """Sums over keys, of what is `exp(largest)` times as large."""

  largest: jax.Array  # (n, q, 1), the largest score
  weights: jax.Array  # (n, q, 1)
  weighted: jax.Array  # (n, q, e), values times weights


def cudnn_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  present: jax.Array | None = None,
) -> jax.Array:
  """`softmax(scale * queries . keys) . values` through cuDNN, forwards and backwards.

  cuDNN takes 16-bit floats. float32 operands are scaled by powers of two and rounded to float16,
  which has the 11 bits of TF32, whatever `jax_default_matmul_precision` says; the softmax within is
  float32. Reverse mode only, as cuDNN's.

  Args:
    queries: (n, q, d) floats.
    keys: (n, k, d) floats.
    values: (n, k, d) floats.
    scale: Factor of the scores.
    present: (n, k) bool, keys that count, at least one; None for all.

  Returns:
    (n, q, d) of the dtype of `values`.

  Raises:
    RuntimeError: If there is no cuDNN.
    NotImplementedError: If cuDNN does not take as many channels on this GPU, see
      `check_attention`.
  """
  num_queries, num_keys = queries.shape[1], keys.shape[1]
  lengths = None
  if present is not None:
    # cuDNN can leave out the last keys, and the order of keys does not matter: those that count go
    # first.
    order = jnp.argsort(~present, axis=1)[..., None]
    keys, values = (jnp.take_along_axis(x, order, axis=1) for x in (keys, values))
    lengths = present.sum(axis=1, dtype=jnp.int32)
  elif num_keys % 2:
    lengths = jnp.full(len(keys), num_keys, jnp.int32)
  queries, keys, values = (_even(x) for x in (queries, keys, values))
  attend = _cudnn if queries.dtype.itemsize == 2 else _cudnn_in_float16
  return attend(queries, keys, values, lengths, scale)[:, :num_queries]


def _cudnn(
  queries: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array | None, scale: float
) -> jax.Array:
  one_head = (x[:, :, None] for x in (queries, keys, values))
  result = jax.nn.dot_product_attention(
    *one_head, scale=scale, key_value_seq_lengths=lengths, implementation='cudnn'
  )
  return result[:, :, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn_in_float16(queries, keys, values, lengths, scale) -> jax.Array:
  return _cudnn_in_float16_forwards(queries, keys, values, lengths, scale)[0]


def _cudnn_in_float16_forwards(queries, keys, values, lengths, scale):
  # Queries and keys get the same size, which leaves their products as they are.
  q_exponent, k_exponent = _exponent(queries), _exponent(keys)
  shift = (k_exponent - q_exponent) // 2
  v_exponent = _exponent(values)
  operands = (
    jnp.ldexp(x, e).astype(jnp.float16)
    for x, e in ((queries, shift), (keys, -shift), (values, -v_exponent))
  )
  result, pull = jax.vjp(lambda q, k, v: _cudnn(q, k, v, lengths, scale), *operands)
  result = jnp.ldexp(result.astype(values.dtype), v_exponent)
  return result, (pull, shift, v_exponent)


def _cudnn_in_float16_backwards(scale, residuals, gradient):
  del scale
  pull, shift, v_exponent = residuals
  # As large as a sum over all queries allows.
  headroom = 14 - math.ceil(math.log2(gradient.shape[1]))
  g_shift = headroom - _exponent(gradient)
  of_operands = pull(jnp.ldexp(gradient, g_shift).astype(jnp.float16))
  exponents = (shift + v_exponent, v_exponent - shift, 0)
  return *(
    jnp.ldexp(x.astype(gradient.dtype), e - g_shift)
    for x, e in zip(of_operands, exponents, strict=True)
  ), None


_cudnn_in_float16.defvjp(_cudnn_in_float16_forwards, _cudnn_in_float16_backwards)


def _exponent(x: jax.Array) -> jax.Array:
  """(n, 1, 1) integers: all values of a sample are below 2^exponent."""
  _, exponent = jnp.frexp(jnp.abs(x).max(axis=(1, 2), keepdims=True))
  return exponent


def _even(x: jax.Array) -> jax.Array:
  """Adds zeros to an odd number of positions, for which JAX refuses the gradient."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0)))


def fastest_attention(
  channels: int, devices: Sequence[jax.Device], *, precision: str | None, train: bool
) -> Attention:
  """Chooses how to compute attention without losing accuracy.

  Args:
    channels: Inner channels of the non-local block.
    devices: The devices that share a batch.
    precision: Of matrix products, see `jax_default_matmul_precision`. What is above the default
      rules out the 11 bits of `cudnn_attention`.
    train: Whether it is differentiated.

  Returns:
    'cudnn' where the devices have it, 'flash' for prediction on one NVIDIA GPU of compute
    capability 9.0, where it has been measured, and otherwise 'blocks'.
  """
  device = devices[0]
  most = _most_cudnn_channels(device)
  if channels % 8 or channels > most:
    return 'blocks'
  if precision in (None, 'default', 'tensorfloat32'):
    return 'cudnn'
  is_measured = device.compute_capability == '9.0' and channels & (channels - 1) == 0
  return 'flash' if is_measured and channels >= 16 and len(devices) == 1 and not train else 'blocks'


def _most_cudnn_channels(device: jax.Device) -> int:
  """Most channels that cuDNN takes on a device; 0 where it is no NVIDIA GPU at hand."""
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return 0
  return 256 if tuple(map(int, device.compute_capability.split('.'))) >= _HOPPER else 128


def check_attention(attention: Attention, channels: int, device: jax.Device) -> None:
  """Checks that a device can compute attention so.

  Args:
    attention: See `NonLocalBlock`.
    channels: Inner channels of the non-local block.
    device: One of those that compute.

  Raises:
    UserError: If it cannot.
  """
  if attention == 'blocks':
    return
  most = _most_cudnn_channels(device)
  if not most:
    raise UserError(
      f'attention is {attention}, which needs an NVIDIA GPU, and this program runs on '
      f'{device.device_kind}; leave it at blocks.'
    )
  if attention == 'flash':
    if channels & (channels - 1) or channels < 16:
      raise UserError(
        'attention is flash, which takes a power of two of at least 16 inner channels, and the '
        f'non-local block has {channels}; leave it at blocks, or change the width.'
      )
    return
  capability = device.compute_capability
  if channels > most or channels % 8:
    raise UserError(
      f'attention is cudnn, which on {device.device_kind} (compute capability '
      f'{capability}) takes a multiple of 8 inner channels up to {most}, and the non-local block '
      f'has {channels}; leave it at blocks, or change the width.'
    )
