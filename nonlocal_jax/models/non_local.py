"""The non-local block (https://arxiv.org/abs/1711.07971), usable on its own in any NNX model."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models.layers import KAIMING_FAN_OUT, BatchNorm, conv
from nonlocal_jax.ops.attention import (
  Attention,
  cudnn_attention,
  over_query_blocks,
  softmax_attention,
)
from nonlocal_jax.ops.flash_attention import flash_attention
from nonlocal_jax.ops.masking import valid_mask

Mode = Literal['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation']
_SOFTMAX_MODES = ('embedded_gaussian', 'gaussian')

_SMALL_NORMAL = nnx.initializers.normal(0.01)

# On CPUs the keys of a block are used while they are in the cache, and so are the pairwise weights.
_KEYS_ON_CPU = 4096


def max_pairwise_weights(backend: str) -> int:
  """How many pairwise weights are held at a time, over the whole batch.

  64 MiB in float32; an eighth of that on CPUs.

  Args:
    backend: See `jax.default_backend`.
  """
  return 2**21 if backend == 'cpu' else 2**24


class NonLocalBlock(nnx.Module):
  """`x + norm(conv_out(y))`, where y is at each position a weighted mean of `g(x)` over all.

  The weights of position i over positions j come from a pairwise function (section 3.2 of the
  paper; mmcv `NonLocal2d`):

  - embedded_gaussian: `softmax_j(theta_i . phi_j / sqrt(d))`, without the root if `use_scale` is
    off;
  - gaussian: `softmax_j(x_i . x_j)`;
  - dot_product: `theta_i . phi_j / keys`;
  - concatenation: `relu(w . [theta_i, phi_j]) / keys`.

  Queries are processed in blocks, each recomputed in the backward pass, so that memory grows with
  the number of positions, not with its square; with a softmax so are keys.

  Attributes:
    attention: How the embedded Gaussian is computed: by such 'blocks', or in one by 'cudnn' on an
      NVIDIA GPU, see `attention.cudnn_attention` for its precision and limits.
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
    query_block: int | None = None,
    key_block: int | None = None,
    attention: Attention = 'blocks',
    rngs: nnx.Rngs,
  ):
    """Makes the block.

    Args:
      channels: Channels of input and output.
      reduction: The inner convolutions have `channels // reduction` channels, at least one.
      mode: The pairwise function.
      use_scale: Whether the embedded Gaussian divides by the root of the inner channels.
      sub_sample: Whether keys and values are max-pooled 2x2 first, which quarters their number.
      norm: Whether `conv_out` is followed by batch normalisation (then it has no bias).
      zero_init: Whether the last normalisation, or without it `conv_out`, starts at zero and so the
        block as the identity, which a pretrained network keeps working around (section 4.1 of the
        paper). Training from scratch on little data, the block opens sooner when off.
      query_block: Queries processed at a time; None chooses so that `max_pairwise_weights` are
        held.
      key_block: Keys processed at a time by a softmax; None for all, on CPUs for 4096.
      attention: See the class.
      rngs: Source of the initial values.

    Raises:
      ValueError: If `mode` or `attention` is unknown, or options do not go together.
    """
    if mode not in get_args(Mode):
      raise ValueError(f'mode is {mode!r}, expected one of {", ".join(get_args(Mode))}')
    if attention not in get_args(Attention):
      expected = ', '.join(get_args(Attention))
      raise ValueError(f'attention is {attention!r}, expected one of {expected}')
    if attention != 'blocks' and (mode != 'embedded_gaussian' or query_block or key_block):
      raise ValueError(
        f"attention is {attention!r}, which has no blocks and is for mode 'embedded_gaussian'"
      )
    if key_block and mode not in _SOFTMAX_MODES:
      raise ValueError(f'key_block is {key_block}, but mode {mode!r} has no softmax over keys')
    inner = max(channels // reduction, 1)
    self.mode = mode
    self.use_scale = use_scale
    self.sub_sample = sub_sample
    self.query_block = query_block
    self.key_block = key_block
    self.attention: Attention = attention

    def embedding() -> nnx.Conv:
      return conv(channels, inner, 1, use_bias=True, kernel_init=_SMALL_NORMAL, rngs=rngs)

    self.g = embedding()
    self.theta = embedding() if mode != 'gaussian' else None
    self.phi = embedding() if mode != 'gaussian' else None
    self.concat_project = conv(2 * inner, 1, 1, rngs=rngs) if mode == 'concatenation' else None
    self.bn = BatchNorm(channels) if norm else None
    if self.bn is not None and zero_init:
      self.bn.scale[...] = jnp.zeros_like(self.bn.scale[...])
    last_is_zero = zero_init and not norm
    self.conv_out = conv(
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
    """Adds to each position what it draws from all others.

    Args:
      x: (n, h, w, channels) float32.
      train: Whether batch normalisation uses and folds in the batch's statistics.
      sizes: (n, 2) integers, at least 1, height and width of each image without the padding at its
        bottom and right (at least 2 with `sub_sample`); positions in the padding then give nothing
        to the others. None for no padding.

    Returns:
      The same shape.
    """
    pool = (lambda y: nnx.max_pool(y, (2, 2), (2, 2))) if self.sub_sample else (lambda y: y)
    queries = _positions(x if self.theta is None else self.theta(x))
    keys = _positions(pool(x if self.phi is None else self.phi(x)))
    values = pool(self.g(x))
    present = None
    if sizes is not None:
      present = valid_mask(sizes // 2 if self.sub_sample else sizes, values.shape[1:3])
      present = present.reshape(len(present), -1)
    y = self._aggregate(queries, keys, _positions(values), present)
    y = self.conv_out(y.reshape(*x.shape[:-1], y.shape[-1]))
    return x + (y if self.bn is None else self.bn(y, train=train))

  def _aggregate(
    self, queries: jax.Array, keys: jax.Array, values: jax.Array, present: jax.Array | None
  ) -> jax.Array:
    """Queries (n, q, d), keys (n, k, d), values (n, k, e), present (n, k) -> (n, q, e)."""
    n, num_keys, channels = keys.shape
    backend = jax.default_backend()
    key_block = self.key_block or num_keys
    if self.key_block is None and backend == 'cpu' and self.mode in _SOFTMAX_MODES:
      key_block = min(num_keys, _KEYS_ON_CPU)
    block = self.query_block or max(max_pairwise_weights(backend) // (n * key_block), 1)
    if present is not None:
      values = jnp.where(present[..., None], values, 0)
      num_keys = present.sum(axis=1)[:, None, None]
    if self.mode == 'dot_product':
      # Associativity: (theta phi^T) g = theta (phi^T g), which needs no pairwise matrix at all.
      return queries @ (jnp.swapaxes(keys, 1, 2) @ values / num_keys)
    if self.mode == 'concatenation':
      assert self.concat_project is not None
      project = self.concat_project.kernel[...].astype(keys.dtype).reshape(2, channels)
      query_part = queries @ project[0][:, None]  # (n, q, 1)
      key_part = (keys @ project[1])[:, None, :]  # (n, 1, k)

      def from_concatenation(part: jax.Array) -> jax.Array:
        return jax.nn.relu(part + key_part) / num_keys @ values

      return over_query_blocks(from_concatenation, query_part, block)
    scale = channels**-0.5 if self.mode == 'embedded_gaussian' and self.use_scale else 1.0
    if self.attention == 'flash':
      return flash_attention(queries, keys, values, scale=scale, key_mask=present)
    if self.attention == 'cudnn':
      return cudnn_attention(queries, keys, values, scale=scale, present=present)
    return softmax_attention(
      queries, keys, values, scale=scale, present=present, query_block=block, key_block=key_block
    )


def _positions(x: jax.Array) -> jax.Array:
  """(n, h, w, c) -> (n, h * w, c)."""
  return x.reshape(x.shape[0], -1, x.shape[-1])
