"""Softmax attention through cuDNN, and where that can be had."""

from typing import Literal

import jax
import jax.numpy as jnp

from nonlocal_jax.errors import UserError

Attention = Literal['blocks', 'cudnn']

# Since this compute capability cuDNN takes more channels.
_HOPPER = (9, 0)


def cudnn_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  present: jax.Array | None = None,
) -> jax.Array:
  """`softmax(scale * queries . keys) . values` through cuDNN, forwards and backwards.

  Queries, keys and values are rounded to bfloat16, whatever their dtype and
  `jax_default_matmul_precision`; the softmax within is float32.

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
  one_head = (_even(x).astype(jnp.bfloat16)[:, :, None] for x in (queries, keys, values))
  results = jax.nn.dot_product_attention(
    *one_head, scale=scale, key_value_seq_lengths=lengths, implementation='cudnn'
  )
  return results[:, :num_queries, 0].astype(values.dtype)


def _even(x: jax.Array) -> jax.Array:
  """Adds zeros to an odd number of positions, for which JAX refuses the gradient."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0)))


def check_attention(attention: Attention, channels: int, device: jax.Device) -> None:
  """Checks that a device can compute attention so.

  Args:
    attention: The value of `config.model.attention`.
    channels: Inner channels of the non-local block.
    device: One of those that compute.

  Raises:
    UserError: If it cannot.
  """
  if attention != 'cudnn':
    return
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    raise UserError(
      'config.model.attention is cudnn, which needs an NVIDIA GPU, and this program runs on '
      f'{device.device_kind}; leave it at blocks.'
    )
  capability = device.compute_capability
  most = 256 if tuple(map(int, capability.split('.'))) >= _HOPPER else 128
  if channels > most or channels % 8:
    raise UserError(
      f'config.model.attention is cudnn, which on {device.device_kind} (compute capability '
      f'{capability}) takes a multiple of 8 inner channels up to {most}, and the non-local block '
      f'has {channels}; leave it at blocks, or set config.model.width.'
    )
