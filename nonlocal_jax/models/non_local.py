"""The non-local block (https://arxiv.org/abs/1711.07971), usable on its own in any NNX model."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models.config import Execution, Mode
from nonlocal_jax.models.layers import KAIMING_FAN_OUT, LayerFactory
from nonlocal_jax.ops.attention import (
  Attention,
  check_attention,
  cudnn_attention,
  softmax_attention,
)
from nonlocal_jax.ops.blocks import map_blocks
from nonlocal_jax.ops.flash_attention import flash_attention
from nonlocal_jax.ops.masking import valid_mask

_SOFTMAX_MODES = ('embedded_gaussian', 'gaussian')

_SMALL_NORMAL = nnx.initializers.normal(0.01)


class NonLocalBlock(nnx.Module):
  """Non-local block (mmcv `NonLocal2d`): `x + norm(conv_out(y))` with `y_i = sum_j w_ij g(x_j)`.

  The weights `w_ij` come from a pairwise function (section 3.2 of the paper):

  - embedded_gaussian: `softmax_j(theta_i . phi_j / sqrt(d))`, without the square root if
    `use_scale` is False;
  - gaussian: `softmax_j(x_i . x_j)`;
  - dot_product: `theta_i . phi_j / keys`;
  - concatenation: `relu(w . [theta_i, phi_j]) / keys`.

  >>> block = NonLocalBlock(8, rngs=nnx.Rngs(0))
  >>> x = jnp.ones((2, 5, 6, 8))
  >>> block(x).shape
  (2, 5, 6, 8)
  >>> bool((block(x) == x).all())  # starts as the identity
  True

  Queries are processed in blocks that the backward pass recomputes, so memory grows linearly with
  the number of positions. The softmax modes also process keys in blocks.
  """

  NORMALIZED = (('conv_out', 'bn'),)

  def __init__(
    self,
    channels: int,
    *,
    reduction: int = 2,
    mode: Mode = 'embedded_gaussian',
    use_scale: bool = True,
    sub_sample: bool = False,
    norm: bool = True,
    zero_init: bool = True,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    attention: Attention | None = None,
    query_block: int | None = None,
    key_block: int | None = None,
    execution: Execution | None = None,
    rngs: nnx.Rngs,
  ):
    """Initializes the block.

    Args:
      channels: Number of input and output channels.
      reduction: The inner convolutions have `channels // reduction` channels, at least one.
      mode: The pairwise function.
      use_scale: Whether the embedded Gaussian divides by the square root of the inner channels.
      sub_sample: Whether keys and values are max-pooled 2x2 first, which quarters their number.
      norm: Whether batch normalization follows `conv_out`, which then has no bias.
      zero_init: Whether the scale of the normalization, or without it `conv_out`, is initialized to
        zero. The block is then the identity at first and does not disturb a pretrained network
        (section 4.1 of the paper). Turn it off to learn faster from scratch on little data.
      epsilon: See `layers.BatchNorm`.
      momentum: See `layers.BatchNorm`.
      attention: Overrides `execution.attention`; JAX's default backend must support it.
      query_block: Overrides `execution.query_block`.
      key_block: Overrides `execution.key_block`.
      execution: How the block is computed; None for the fastest on JAX's default backend.
      rngs: Source of the initial values.

    Raises:
      ValueError: If `mode` or `attention` is unknown, or options cannot be combined.
      UserError: If the default backend does not support `attention`.
    """
    if mode not in get_args(Mode):
      raise ValueError(f'mode is {mode!r}, expected one of {", ".join(get_args(Mode))}')
    chosen = {'attention': attention, 'query_block': query_block, 'key_block': key_block}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    execution = dataclasses.replace(execution or Execution.for_platform(), **changes)
    if execution.attention != 'blocks' and (
      mode != 'embedded_gaussian' or query_block or key_block
    ):
      raise ValueError(
        f'attention is {execution.attention!r}, which has no blocks and is for mode '
        "'embedded_gaussian'"
      )
    if key_block and mode not in _SOFTMAX_MODES:
      raise ValueError(f'key_block is {key_block}, but mode {mode!r} has no softmax over keys')
    inner = max(channels // reduction, 1)
    if attention is not None:
      check_attention(attention, inner, jax.local_devices()[0])
    self.channels = channels
    self.mode = mode
    self.use_scale = use_scale
    self.sub_sample = sub_sample
    self.execution = execution
    # 'matmul' has no forward mode of differentiation.
    convolution = 'products' if execution.convolution == 'matmul' else execution.convolution
    layers = LayerFactory(
      convolution=convolution,
      epsilon=epsilon,
      momentum=momentum,
      batch_norm=execution.batch_norm,
      groups=execution.batch_norm_groups,
    )

    def embedding() -> nnx.Conv:
      return layers.conv(channels, inner, 1, use_bias=True, kernel_init=_SMALL_NORMAL, rngs=rngs)

    self.g = embedding()
    self.theta = embedding() if mode != 'gaussian' else None
    self.phi = embedding() if mode != 'gaussian' else None
    self.concat_project = (
      layers.conv(2 * inner, 1, 1, rngs=rngs) if mode == 'concatenation' else None
    )
    self.bn = layers.norm(channels) if norm else None
    if self.bn is not None and zero_init:
      self.bn.scale[...] = jnp.zeros_like(self.bn.scale[...])
    last_is_zero = zero_init and not norm
    self.conv_out = layers.conv(
      inner,
      channels,
      1,
      use_bias=not norm,
      kernel_init=nnx.initializers.zeros if last_is_zero else KAIMING_FAN_OUT,
      rngs=rngs,
    )

  def __call__(
    self, x: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: (n, h, w, channels) floats.
      train: Whether batch normalization uses the statistics of the batch.
      sizes: (n, 2) integers, height and width of each image without the padding at its bottom and
        right, at least 1 (2 with `sub_sample`). Positions in the padding are masked as keys. None
        for no padding.

    Returns:
      (n, h, w, channels), the dtype of `x`.

    Raises:
      ValueError: If `x` has another shape, or is not of floats.
    """
    self._check(x)
    queries, keys = self._queries(x), _positions(self._keys(x))
    values = self._pooled(self.g(x))
    key_mask = self._key_mask(sizes, values)
    if key_mask is not None:
      key_mask = key_mask.reshape(len(key_mask), -1)
    y = self._aggregate(_positions(queries), keys, _positions(values), key_mask)
    y = self.conv_out(y.reshape(*x.shape[:-1], y.shape[-1]))
    return x + (y if self.bn is None else self.bn(y, train=train))

  def pairwise_weights(
    self, x: jax.Array, positions: jax.Array, *, sizes: jax.Array | None = None
  ) -> jax.Array:
    """Computes the weights `w_ij` of a few queries: how much each looks at every position.

    The matrix of all weights is not computed.

    Args:
      x: (n, h, w, channels) floats, the block's input.
      positions: (n, p, 2) integers, (row, column) of p queries in each image.
      sizes: See `__call__`.

    Returns:
      (n, p, h, w) float32, with `sub_sample` (n, p, h // 2, w // 2). 0 in the padding. The softmax
      modes' weights are not negative and sum to 1.

    Raises:
      ValueError: If `x` has another shape, or is not of floats.
    """
    self._check(x)
    at = jax.vmap(lambda of_image, where: of_image[where[:, 0], where[:, 1]])
    queries = self._queries(at(x, positions)[:, None])[:, 0]  # (n, p, d)
    keys = self._keys(x)
    key_mask = self._key_mask(sizes, keys)
    num_keys: int | jax.Array = keys.shape[1] * keys.shape[2]
    if key_mask is not None:
      num_keys = key_mask.sum(axis=(1, 2))[:, None, None, None]
    if self.mode == 'concatenation':
      query_part, key_part = self._concatenation_parts(queries, keys)
      weights = jax.nn.relu(query_part[..., None] + key_part[:, None, ..., 0]) / num_keys
    else:
      weights = jnp.einsum('npd,nhwd->nphw', queries, keys).astype(jnp.float32)
      if self.mode == 'dot_product':
        weights = weights / num_keys
    mask = True if key_mask is None else key_mask[:, None]
    if self.mode in _SOFTMAX_MODES:
      weights = jax.nn.softmax(self._scale * weights, axis=(2, 3), where=mask)
    return jnp.where(mask, weights, 0).astype(jnp.float32)

  def _check(self, x: jax.Array) -> None:
    if x.ndim != 4 or x.shape[-1] != self.channels or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'x is {x.shape} {x.dtype}, expected (n, h, w, {self.channels}) of a floating dtype'
      )

  def _queries(self, x: jax.Array) -> jax.Array:
    return x if self.theta is None else self.theta(x)

  def _keys(self, x: jax.Array) -> jax.Array:
    return self._pooled(x if self.phi is None else self.phi(x))

  def _pooled(self, x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (2, 2), (2, 2)) if self.sub_sample else x

  def _key_mask(self, sizes: jax.Array | None, keys: jax.Array) -> jax.Array | None:
    """(n, h, w) bool, False for keys (n, h, w, d) in the padding; None for no padding."""
    if sizes is None:
      return None
    _, height, width, _ = keys.shape
    return valid_mask(sizes // 2 if self.sub_sample else sizes, (height, width))

  @property
  def _scale(self) -> float:
    """Factor of the scores in the softmax modes."""
    has_scale = self.mode == 'embedded_gaussian' and self.use_scale
    return self.g.kernel.shape[-1] ** -0.5 if has_scale else 1.0

  def _concatenation_parts(
    self, queries: jax.Array, keys: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Queries and keys (..., d) -> their parts of `w . [theta_i, phi_j]`, each (..., 1)."""
    assert self.concat_project is not None
    kernel = self.concat_project.kernel[...].astype(keys.dtype)
    of_queries, of_keys = kernel.reshape(2, -1, 1)
    return queries @ of_queries, keys @ of_keys

  def _aggregate(
    self, queries: jax.Array, keys: jax.Array, values: jax.Array, key_mask: jax.Array | None
  ) -> jax.Array:
    """Queries (n, q, d), keys (n, k, d), values (n, k, e), key_mask (n, k) -> (n, q, e)."""
    n, num_keys, _ = keys.shape
    execution = self.execution
    key_block = num_keys
    if execution.key_block and self.mode in _SOFTMAX_MODES:
      key_block = min(num_keys, execution.key_block)
    block = execution.query_block or max(execution.pairwise_weights // (n * key_block), 1)
    if key_mask is not None:
      values = jnp.where(key_mask[..., None], values, 0)
      num_keys = key_mask.sum(axis=1)[:, None, None]
    if self.mode == 'dot_product':
      # (theta phi^T) g = theta (phi^T g), which needs no pairwise matrix.
      return queries @ (jnp.swapaxes(keys, 1, 2) @ values / num_keys)
    if self.mode == 'concatenation':
      query_part, key_part = self._concatenation_parts(queries, keys)  # (n, q, 1), (n, k, 1)

      def from_concatenation(part: jax.Array) -> jax.Array:
        return jax.nn.relu(part + key_part.mT) / num_keys @ values

      return map_blocks(from_concatenation, query_part, block, recompute=True)
    scale = self._scale
    if execution.attention == 'flash':
      return flash_attention(queries, keys, values, scale=scale, key_mask=key_mask)
    if execution.attention == 'cudnn':
      return cudnn_attention(queries, keys, values, scale=scale, key_mask=key_mask)
    return softmax_attention(
      queries, keys, values, scale=scale, key_mask=key_mask, query_block=block, key_block=key_block
    )


def _positions(x: jax.Array) -> jax.Array:
  """(n, h, w, c) -> (n, h * w, c)."""
  return x.reshape(x.shape[0], -1, x.shape[-1])
