"""Masks for batches of images that are zero-padded to one shape."""

import jax
import jax.numpy as jnp


def valid_mask(sizes: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Marks the pixels of a padded batch that belong to its images.

  Args:
    sizes: (n, 2) integers, height and width of each image; the padding is at the bottom and right.
    shape: (h, w), padding included.

  Returns:
    (n, h, w) bool, True inside the image.
  """
  rows = jnp.arange(shape[0])[:, None] < sizes[:, 0, None, None]
  columns = jnp.arange(shape[1]) < sizes[:, 1, None, None]
  return rows & columns


def mask_padding(x: jax.Array, sizes: jax.Array | None) -> jax.Array:
  """Sets the padding to zero, so that convolutions treat it like their own zero padding.

  Args:
    x: (n, h, w, c).
    sizes: See `valid_mask`; None for no padding.

  Returns:
    (n, h, w, c), the dtype of `x`.
  """
  _, height, width, _ = x.shape
  return x if sizes is None else jnp.where(valid_mask(sizes, (height, width))[..., None], x, 0)


def strided_sizes(sizes: jax.Array | None, stride: int) -> jax.Array | None:
  """Returns the image sizes after a strided layer, `ceil(sizes / stride)`; None for None."""
  return sizes if sizes is None else (sizes + (stride - 1)) // stride
