"""Softmax attention, blockwise or by cuDNN, and the choice between implementations."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nonlocal_jax.errors import UserError
from nonlocal_jax.ops.blocks import map_blocks

Attention = Literal['blocks', 'cudnn', 'flash']

# Of the kernel in `flash_attention`; more do not fit into a GPU's shared memory.
FLASH_CHANNELS = (16, 32, 64, 128, 256)
# From this compute capability on, cuDNN supports 256 channels instead of 128.
_HOPPER = (9, 0)


def softmax_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  key_mask: jax.Array | None = None,
  query_block: int,
  key_block: int,
) -> jax.Array:
  """Computes `softmax(scale * queries @ keys.T) @ values` in blocks of queries and keys.

  >>> x = jax.random.normal(jax.random.key(0), (1, 6, 4))
  >>> y = softmax_attention(x, x, x, scale=0.5, query_block=2, key_block=4)
  >>> bool(jnp.allclose(y, jax.nn.softmax(0.5 * x @ x.mT) @ x, atol=1e-5))
  True

  The softmax is online: it keeps a running maximum of the scores and rescales its partial sums
  when the maximum grows (https://arxiv.org/abs/2112.05682, section 2). The backward pass recomputes
  the scores block by block.

  Args:
    queries: (n, q, d) floats.
    keys: (n, k, d) floats.
    values: (n, k, e) floats.
    scale: Factor of the scores.
    key_mask: (n, k) bool, False for keys to ignore; the first key must not be masked. None to
      attend to all keys.
    query_block: Maximum number of queries per block, see `blocks.map_blocks`.
    key_block: Maximum number of keys per block. Blocks have equal sizes; the last one is padded.

  Returns:
    (n, q, e), the dtype of `values`.
  """
  n, num_keys, _ = keys.shape
  num_blocks = -(-num_keys // key_block)
  size = -(-num_keys // num_blocks)
  padding = num_blocks * size - num_keys
  if padding:
    if key_mask is None:
      key_mask = jnp.ones((n, num_keys), bool)
    key_mask = jnp.pad(key_mask, ((0, 0), (0, padding)))
    keys, values = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (keys, values))

  def in_blocks(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(n, num_blocks, size, *x.shape[2:]), 1, 0)

  transposed_keys = jnp.swapaxes(in_blocks(keys), 2, 3)
  blocks = transposed_keys, in_blocks(values), None if key_mask is None else in_blocks(key_mask)
  acc_dtype = jnp.promote_types(keys.dtype, jnp.float32)

  def scores_of(
    queries: jax.Array, transposed_keys: jax.Array, key_mask: jax.Array | None
  ) -> jax.Array:
    scores = jnp.matmul(queries * scale, transposed_keys, preferred_element_type=acc_dtype)
    return scores if key_mask is None else jnp.where(key_mask[:, None], scores, -jnp.inf)

  def with_all_keys(queries: jax.Array) -> jax.Array:
    transposed_keys, values, key_mask = jax.tree.map(lambda x: x[0], blocks)
    weights = jax.nn.softmax(scores_of(queries, transposed_keys, key_mask), axis=-1)
    return weights.astype(values.dtype) @ values

  def with_blocks_of_keys(queries: jax.Array) -> jax.Array:
    def add_block(sums: _Sums, block: tuple[jax.Array, jax.Array, jax.Array | None]) -> _Sums:
      transposed_keys, values, key_mask = block
      scores = scores_of(queries, transposed_keys, key_mask)
      # The softmax does not depend on the value that is subtracted: it needs no gradient.
      new_max = jnp.maximum(sums.running_max, scores.max(axis=-1, keepdims=True))
      new_max = jax.lax.stop_gradient(new_max)
      weights = jnp.exp(scores - new_max)
      rescale = jnp.exp(sums.running_max - new_max)
      weighted = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=acc_dtype)
      return _Sums(
        new_max,
        sums.weights * rescale + weights.sum(axis=-1, keepdims=True),
        sums.weighted * rescale + weighted,
      )

    column = (n, queries.shape[1], 1)
    sums = _Sums(
      jnp.full(column, -jnp.inf, acc_dtype),
      jnp.zeros(column, acc_dtype),
      jnp.zeros((*column[:2], values.shape[2]), acc_dtype),
    )
    step = jax.checkpoint(add_block)
    sums, _ = jax.lax.scan(lambda sums, block: (step(sums, block), None), sums, blocks)
    return (sums.weighted / sums.weights).astype(values.dtype)

  function = with_all_keys if num_blocks == 1 else with_blocks_of_keys
  return map_blocks(function, queries, query_block, recompute=True)


class _Sums(NamedTuple):
  """State of the online softmax; both sums are relative to `exp(running_max)`."""

  running_max: jax.Array  # (n, q, 1), largest score so far
  weights: jax.Array  # (n, q, 1), sum of exp(score - running_max)
  weighted: jax.Array  # (n, q, e), the same sum with each term times its value


def cudnn_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  key_mask: jax.Array | None = None,
) -> jax.Array:
  """Computes `softmax(scale * queries @ keys.T) @ values` with cuDNN's fused attention.

  cuDNN supports 16-bit floats only. float32 operands are scaled by powers of two and rounded to
  float16, which has the 11-bit significand of TF32, whatever `jax_default_matmul_precision` is. The
  softmax is float32. Supports reverse-mode differentiation only.

  Args:
    queries: (n, q, d) floats.
    keys: (n, k, d) floats.
    values: (n, k, d) floats.
    scale: Factor of the scores.
    key_mask: (n, k) bool, False for keys to ignore; at least one per sample must be True. None to
      attend to all keys.

  Returns:
    (n, q, d), the dtype of `values`.

  Raises:
    RuntimeError: If cuDNN is not available.
    NotImplementedError: If cuDNN does not support d channels on this GPU, see `check_attention`.
  """
  num_queries, num_keys = queries.shape[1], keys.shape[1]
  lengths = None
  if key_mask is not None:
    # cuDNN masks by sequence length only. Attention does not depend on the order of the keys, so
    # the unmasked ones are moved to the front.
    order = jnp.argsort(~key_mask, axis=1)[..., None]
    keys, values = (jnp.take_along_axis(x, order, axis=1) for x in (keys, values))
    lengths = key_mask.sum(axis=1, dtype=jnp.int32)
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
  # Opposite shifts bring queries and keys to the same magnitude and leave their products unchanged.
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
  # Scaled up as far as a sum over all queries cannot overflow float16.
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
  """Returns (n, 1, 1) integers e such that all values of a sample are below 2^e."""
  _, exponent = jnp.frexp(jnp.abs(x).max(axis=(1, 2), keepdims=True))
  return exponent


def _even(x: jax.Array) -> jax.Array:
  """Pads the positions with zeros to an even number: JAX has no gradient for odd ones."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0)))


def fastest_attention(
  channels: int, devices: Sequence[jax.Device], *, precision: str | None, train: bool
) -> Attention:
  """Chooses the fastest implementation that is as accurate as `precision` asks for.

  Args:
    channels: Inner channels of the non-local block.
    devices: The devices that share a batch.
    precision: Matmul precision, see `jax_default_matmul_precision`. Anything above the default
      rules out `cudnn_attention`, which rounds to 11 bits.
    train: Whether gradients are needed.

  Returns:
    'cudnn' where the devices support it; 'flash' for prediction on one NVIDIA GPU of compute
    capability 9.0, the only one it was measured on; otherwise 'blocks'.
  """
  device = devices[0]
  most = _most_cudnn_channels(device)
  if channels % 8 or channels > most:
    return 'blocks'
  if precision in (None, 'default', 'tensorfloat32'):
    return 'cudnn'
  is_measured = device.compute_capability == '9.0' and channels in FLASH_CHANNELS
  return 'flash' if is_measured and len(devices) == 1 and not train else 'blocks'


def _most_cudnn_channels(device: jax.Device) -> int:
  """Returns the maximum number of channels for cuDNN; 0 if the device is not an NVIDIA GPU."""
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return 0
  return 256 if tuple(map(int, device.compute_capability.split('.'))) >= _HOPPER else 128


def check_attention(attention: Attention, channels: int, device: jax.Device) -> None:
  """Checks that a device supports an attention implementation.

  Args:
    attention: See `Execution.attention`.
    channels: Inner channels of the non-local block.
    device: A device that the network runs on.

  Raises:
    UserError: If the device or the number of channels is not supported.
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
    if channels not in FLASH_CHANNELS:
      raise UserError(
        f'attention is flash, which takes {", ".join(map(str, FLASH_CHANNELS))} inner channels, '
        f'and the non-local block has {channels}; leave it at blocks, or change the width.'
      )
    return
  capability = device.compute_capability
  if channels > most or channels % 8:
    raise UserError(
      f'attention is cudnn, which on {device.device_kind} (compute capability '
      f'{capability}) takes a multiple of 8 inner channels up to {most}, and the non-local block '
      f'has {channels}; leave it at blocks, or change the width.'
    )
