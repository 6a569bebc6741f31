"""FlashAttention (https://arxiv.org/abs/2307.08691) as a Pallas kernel with float32 accuracy."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nonlocal_jax.ops.attention import FLASH_CHANNELS, softmax_attention

_MASKED = -1e30  # a score whose weight is zero
_LARGEST = 8  # float16 operands are scaled to below 2^8, so that few of them are subnormal
_LOW_BITS = 11  # the low part of an operand is 2^-11 times the high part
_PAIRS_AT_ONCE = 2**24  # query-key pairs held at a time when differentiating


class Tiles(NamedTuple):
  """Tile sizes and launch parameters of the kernel.

  Attributes:
    queries: Queries per program.
    keys: Keys per tile.
    warps: Warps per program.
    stages: Pipeline stages of the loads.
  """

  queries: int
  keys: int
  warps: int
  stages: int


_TILES = {1: Tiles(128, 64, 8, 2), 2: Tiles(128, 64, 8, 1)}  # by parts; fastest on an H100


def flash_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  key_mask: jax.Array | None = None,
  parts: int | None = None,
  tiles: Tiles | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Computes `softmax(scale * queries @ keys.T) @ values` without storing scores in memory.

  float32 operands are scaled by powers of two and split into float16 parts, whose products run on
  tensor cores several times faster than TF32. Forward- and reverse-mode derivatives are computed by
  `attention.softmax_attention`.

  Args:
    queries: (n, q, d) floats, d one of `attention.FLASH_CHANNELS`.
    keys: (n, k, d), the same dtype.
    values: (n, k, d), the same dtype.
    scale: Factor of the scores.
    key_mask: (n, k) bool, False for keys to ignore; the first key must not be masked. None to
      attend to all keys.
    parts: float16 parts per float32 operand: 1 keeps 11 bits like TF32, 2 keep 22 bits. None for 1
      at the default `jax_default_matmul_precision`, else 2. 16-bit operands always have one part.
    tiles: Tile sizes of the kernel; None for the fastest on an H100.
    interpret: Whether to run the kernel in Pallas' interpreter, on any device, for tests.

  Returns:
    (n, q, d), the dtype of `values`.

  Raises:
    ValueError: If the kernel does not support d channels.
  """
  if queries.shape[-1] not in FLASH_CHANNELS:
    raise ValueError(
      f'queries have {queries.shape[-1]} channels, expected one of '
      f'{", ".join(map(str, FLASH_CHANNELS))}; use softmax_attention'
    )
  if queries.dtype.itemsize == 2:
    parts = 1
  elif parts is None:
    precision = cast(Any, jax.config).jax_default_matmul_precision
    parts = 1 if precision in (None, 'default', 'tensorfloat32') else 2
  return _attention(
    queries, keys, values, key_mask, scale, parts, tiles or _TILES[parts], interpret
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6, 7))
def _attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  key_mask: jax.Array | None,
  scale: float,
  parts: int,
  tiles: Tiles,
  interpret: bool,
) -> jax.Array:
  n, num_queries, channels = queries.shape
  num_keys = keys.shape[1]
  missing = -num_keys % tiles.keys
  if missing and key_mask is None:
    key_mask = jnp.ones((n, num_keys), bool)
  bias = None
  if key_mask is not None:
    bias = jnp.pad(
      jnp.where(key_mask, 0.0, _MASKED), ((0, 0), (0, missing)), constant_values=_MASKED
    )
    bias = bias.astype(jnp.float32)
  keys, values = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (keys, values))
  rows = -(-num_queries // tiles.queries)
  padded = jnp.pad(queries, ((0, 0), (0, rows * tiles.queries - num_queries), (0, 0)))
  (q, q_exponent), (k, k_exponent), (v, v_exponent) = (
    _split(x, parts) for x in (padded, keys, values)
  )
  factor = jnp.ldexp(jnp.float32(scale * math.log2(math.e)), q_exponent + k_exponent)  # (n,)

  all_keys = pl.BlockSpec((None, num_keys + missing, channels), lambda i, j: (i, 0, 0))
  few_queries = pl.BlockSpec((None, tiles.queries, channels), lambda i, j: (i, j, 0))
  of_sample = pl.BlockSpec((None, 1), lambda i, j: (i, 0))
  of_keys = None if bias is None else pl.BlockSpec((None, num_keys + missing), lambda i, j: (i, 0))
  result = pl.pallas_call(
    functools.partial(_kernel, tile=tiles.keys),
    grid=(n, rows),
    in_specs=[[few_queries] * parts, [all_keys] * parts, [all_keys] * parts, of_sample, of_keys],
    out_specs=few_queries,
    out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
    compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    interpret=interpret,
    name='attention',
  )(q, k, v, factor[:, None], bias)
  result = jnp.ldexp(result[:, :num_queries], v_exponent[:, None, None])
  return result.astype(values.dtype)


@_attention.defjvp
def _attention_jvp(scale, parts, tiles, interpret, primals, tangents):
  queries, keys, values, key_mask = primals
  result = _attention(*primals, scale, parts, tiles, interpret)
  blocks = functools.partial(
    softmax_attention,
    scale=scale,
    key_mask=key_mask,
    query_block=max(_PAIRS_AT_ONCE // (len(keys) * keys.shape[1]), 1),
    key_block=keys.shape[1],
  )
  _, tangent = jax.jvp(blocks, (queries, keys, values), tangents[:3])
  return result, tangent


def _split(x: jax.Array, parts: int) -> tuple[list[jax.Array], jax.Array]:
  """Splits `x * 2^-exponent` into `parts` float16 parts; returns them and the (n,) exponents.

  The second part is stored multiplied by `2^_LOW_BITS`.
  """
  if x.dtype.itemsize == 2:
    return [x], jnp.zeros(len(x), jnp.int32)
  _, exponent = jnp.frexp(jnp.abs(x).max(axis=(1, 2)))
  exponent = exponent - _LARGEST
  x = jnp.ldexp(x, -exponent[:, None, None])
  # XLA removes a conversion to float16 and back, but keeps `reduce_precision`.
  high = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
  low = (x - high) * 2**_LOW_BITS
  return [part.astype(jnp.float16) for part in (high, low)[:parts]], exponent


def _parts(x: jax.Array, parts: int, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
  high = x.astype(dtype)
  if parts == 1:
    return [high]
  return [high, ((x - high.astype(jnp.float32)) * 2**_LOW_BITS).astype(dtype)]


def _kernel(
  queries: Sequence[jax.Ref],
  keys: Sequence[jax.Ref],
  values: Sequence[jax.Ref],
  factor: jax.Ref,
  bias: jax.Ref | None,
  result: jax.Ref,
  *,
  tile: int,
) -> None:
  """Attends from a tile of queries to all keys; operands are (positions, channels) in parts."""
  q = [part[...] for part in queries]
  score_factor = factor[0]
  weight_factor = 2.0**_LARGEST if len(q) > 1 or q[0].dtype == jnp.float16 else 1.0

  def add_keys(index, sums):
    largest, total, weighted = sums
    few = pl.ds(index * tile, tile)
    scores = _product(q, [part[few, :] for part in keys], contract=(1, 1)) * score_factor
    if bias is not None:
      scores += bias[few][None]
    new_largest = jnp.maximum(largest, scores.max(axis=1))
    weights = jnp.exp2(scores - new_largest[:, None])  # (queries, tile)
    rescale = jnp.exp2(largest - new_largest)
    v = [part[few, :] for part in values]
    weight_parts = _parts(weights * weight_factor, len(v), v[0].dtype)
    return (
      new_largest,
      total * rescale + weights.sum(axis=1),
      weighted * rescale[:, None] + _product(weight_parts, v, contract=(1, 0)),
    )

  start = (
    jnp.full(q[0].shape[:1], -jnp.inf, jnp.float32),
    jnp.zeros(q[0].shape[:1], jnp.float32),
    jnp.zeros(q[0].shape, jnp.float32),
  )
  _, total, weighted = lax.fori_loop(0, keys[0].shape[0] // tile, add_keys, start)
  result[...] = weighted / (total * weight_factor)[:, None]


def _product(
  a: Sequence[jax.Array], b: Sequence[jax.Array], *, contract: tuple[int, int]
) -> jax.Array:
  """Multiplies operands given in parts; omits the product of the two low parts."""
  dot: Callable[[jax.Array, jax.Array], jax.Array] = functools.partial(
    lax.dot_general,
    dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  if len(a) == 1:
    return dot(a[0], b[0])
  return dot(a[0], b[0]) + (dot(a[0], b[1]) + dot(a[1], b[0])) * 2.0**-_LOW_BITS
