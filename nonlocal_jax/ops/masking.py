"""The padding of a batch of images of several sizes."""

import jax
import jax.numpy as jnp


def valid_mask(sizes: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Where the images of a padded batch are.

  Args:
    sizes: (n, 2) integers, height and width of each image without the padding at its bottom and
      right.
    shape: (h, w) with the padding.

  Returns:
    (n, h, w) bool.
  """
  rows = jnp.arange(shape[0])[:, None] < sizes[:, 0, None, None]
  columns = jnp.arange(shape[1]) < sizes[:, 1, None, None]
  return rows & columns


def mask_padding(x: jax.Array, sizes: jax.Array | None) -> jax.Array:
  """Sets the padding to zero, so that a convolution sees there what it sees beyond a border.

  Args:
    x: (n, h, w, c).
    sizes: See `valid_mask`; None for no padding.

  Returns:
    The same shape.
  """
  return x if sizes is None else jnp.where(valid_mask(sizes, x.shape[1:3])[..., None], x, 0)


def strided_sizes(sizes: jax.Array | None, stride: int) -> jax.Array | None:
  """Sizes after a layer of a stride: `ceil(sizes / stride)`; None stays."""
  return sizes if sizes is None else (sizes + (stride - 1)) // stride
