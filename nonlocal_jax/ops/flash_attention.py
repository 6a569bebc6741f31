"""Softmax attention in one kernel on GPUs (https://arxiv.org/abs/2307.08691)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nonlocal_jax.ops.attention import over_query_blocks

_MASKED = -1e30  # a score; its exponential is 0 beside that of any other
_LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
  """How a kernel works through queries and keys."""

  queries: int
  keys: int
  warps: int
  stages: int


_TILES = Tiles(queries=64, keys=32, warps=8, stages=2)
_HALF_TILES = Tiles(queries=128, keys=64, warps=8, stages=2)  # of 16-bit floats
_PAIRS_AT_ONCE = 2**24  # of queries and keys, in derivatives


def flash_attention(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  *,
  scale: float,
  present: jax.Array | None = None,
  tiles: Tiles | None = None,
  interpret: bool = False,
) -> jax.Array:
  """`softmax(scale * queries . keys) . values` without holding a score, differentiable both ways.

  Products of float32 are of the precision that `jax_default_matmul_precision` says: TF32 by
  default; 'highest' takes three TF32 products for one, and is as exact as float32. Derivatives are
  computed in blocks of queries, from the queries' normalisers.

  Args:
    queries: (n, q, d) floats, d a power of two.
    keys: (n, k, d), the same dtype.
    values: (n, k, d), the same dtype.
    scale: Factor of the scores.
    present: (n, k) bool, keys that count, the first one in any case; None for all.
    tiles: Of the kernel; None for what was fastest on an H100.
    interpret: Whether to run the kernel step by step on any device, for tests.

  Returns:
    (n, q, d) of the dtype of `values`.
  """
  if tiles is None:
    tiles = _TILES if queries.dtype.itemsize > 2 else _HALF_TILES
  bias = None
  if present is not None:
    bias = jnp.where(present, 0.0, _MASKED).astype(jnp.float32)
  return _attention(queries * (scale * _LOG2_E), keys, values, bias, tiles, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _attention(queries, keys, values, bias, tiles: Tiles, interpret: bool) -> jax.Array:
  """`softmax` to the base of 2; `bias` (n, k) is added to the scores."""
  return _forward(queries, keys, values, bias, tiles, interpret)[0]


def _forward(queries, keys, values, bias, tiles, interpret) -> tuple[jax.Array, jax.Array]:
  """The result, and for each query the logarithm of the sum of its weights, (n, q) float32."""
  n, num_queries, channels = queries.shape
  num_keys = keys.shape[1]
  missing = -num_keys % tiles.keys
  if missing:
    bias = jnp.zeros((n, num_keys), jnp.float32) if bias is None else bias
    bias = jnp.pad(bias, ((0, 0), (0, missing)), constant_values=_MASKED)
    keys, values = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (keys, values))
  rows = -(-num_queries // tiles.queries)
  queries = jnp.pad(queries, ((0, 0), (0, rows * tiles.queries - num_queries), (0, 0)))
  all_keys = pl.BlockSpec((None, num_keys + missing, channels), lambda i, j: (i, 0, 0))
  few_queries = pl.BlockSpec((None, tiles.queries, channels), lambda i, j: (i, j, 0))
  mask = None if bias is None else pl.BlockSpec((None, num_keys + missing), lambda i, j: (i, 0))
  result, log_sum = pl.pallas_call(
    functools.partial(_kernel, tile=tiles.keys, precision=_precision(queries.dtype, interpret)),
    grid=(n, rows),
    in_specs=[few_queries, all_keys, all_keys, mask],
    out_specs=[few_queries, pl.BlockSpec((None, tiles.queries), lambda i, j: (i, j))],
    out_shape=[
      jax.ShapeDtypeStruct(queries.shape, values.dtype),
      jax.ShapeDtypeStruct(queries.shape[:2], jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    interpret=interpret,
    name='attention',
  )(queries, keys, values, bias)
  return result[:, :num_queries], log_sum[:, :num_queries]


def _kernel(queries, keys, values, bias, result, log_sum, *, tile: int, precision) -> None:
  """A few queries, (queries, channels), over all keys, (keys, channels)."""
  q = queries[...]
  dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

  def add_keys(index, sums):
    largest, total, weighted = sums
    few = pl.ds(index * tile, tile)
    scores = dot(q, keys[few, :], (((1,), (1,)), ((), ())))  # (queries, tile)
    if bias is not None:
      scores += bias[few][None]
    new_largest = jnp.maximum(largest, scores.max(axis=1))
    weights = jnp.exp2(scores - new_largest[:, None])
    rescale = jnp.exp2(largest - new_largest)
    v = values[few, :]
    product = dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
    return (
      new_largest,
      total * rescale + weights.sum(axis=1),
      weighted * rescale[:, None] + product,
    )

  start = (
    jnp.full(q.shape[:1], -jnp.inf, jnp.float32),
    jnp.zeros(q.shape[:1], jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  largest, total, weighted = lax.fori_loop(0, keys.shape[0] // tile, add_keys, start)
  result[...] = (weighted / total[:, None]).astype(result.dtype)
  log_sum[...] = largest + jnp.log2(total)


def _precision(dtype: jax.typing.DTypeLike, interpret: bool) -> lax.PrecisionLike:
  if interpret or dtype != jnp.float32:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
  if str(jax.config.jax_default_matmul_precision) in ('highest', 'float32'):
    return lax.DotAlgorithmPreset.TF32_TF32_F32_X3
  return lax.DotAlgorithmPreset.TF32_TF32_F32


@_attention.defjvp
def _attention_jvp(tiles, interpret, primals, tangents):
  queries, keys, values, bias = primals
  d_queries, d_keys, d_values, _ = tangents
  result, log_sum = _forward(queries, keys, values, bias, tiles, interpret)

  def tangent(of_queries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    q, log_sum, d_q = of_queries
    scores = _pairwise(q, keys)
    if bias is not None:
      scores += bias[:, None]
    weights = jnp.exp2(scores - log_sum)
    d_scores = (_pairwise(d_q, keys) + _pairwise(q, d_keys)) * math.log(2)
    d_weights = weights * (d_scores - jnp.sum(weights * d_scores, axis=-1, keepdims=True))
    dtype = values.dtype
    return d_weights.astype(dtype) @ values + weights.astype(dtype) @ d_values

  block = max(_PAIRS_AT_ONCE // (len(keys) * keys.shape[1]), 1)
  return result, over_query_blocks(
    jax.checkpoint(tangent), (queries, log_sum[..., None], d_queries), block
  )


def _pairwise(queries: jax.Array, keys: jax.Array) -> jax.Array:
  """(n, q, d), (n, k, d) -> (n, q, k) float32."""
  return jnp.einsum('nqd,nkd->nqk', queries, keys, preferred_element_type=jnp.float32)
