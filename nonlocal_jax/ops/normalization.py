"""Normalization of images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.ops.masking import mask_padding
from nonlocal_jax.protocol import IMAGENET_MEAN, IMAGENET_STD


def normalize(
  images: jax.typing.ArrayLike,
  *,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
  sizes: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  """Computes `(images - mean) / std` for each channel.

  >>> images = np.full((1, 2, 2, 3), 255, np.uint8)
  >>> normalize(images, mean=(127.5,) * 3, std=(127.5,) * 3).tolist()[0][0][0]
  [1.0, 1.0, 1.0]

  Args:
    images: (n, h, w, c) of any real dtype; RGB in [0, 255] for the default `mean` and `std`.
    mean: Mean of each channel.
    std: Standard deviation of each channel.
    sizes: (n, 2) integers, height and width of each image without the padding at its bottom and
      right. The padding is set to zero. None for no padding.

  Returns:
    (n, h, w, c) float32.

  Raises:
    ValueError: If `images` have another shape, or `mean` or `std` does not have one value per
      channel.
  """
  images = jnp.asarray(images)
  if images.ndim != 4:
    raise ValueError(f'images have shape {images.shape}, expected (n, h, w, c)')
  channels = images.shape[-1]
  if not channels == len(mean) == len(std):
    raise ValueError(
      f'images have {channels} channels, but mean has {len(mean)} values and std {len(std)}; '
      'give one for each channel'
    )
  # Multiplies by the reciprocal like mmcv's `imnormalize`: bitwise equal with and without jit.
  reciprocal = (1 / np.asarray(std)).astype(np.float32)
  normalized = (images.astype(jnp.float32) - np.asarray(mean, np.float32)) * reciprocal
  return mask_padding(normalized, None if sizes is None else jnp.asarray(sizes))
