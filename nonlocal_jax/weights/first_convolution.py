"""Adapts pretrained weights to images with another number of channels."""

import jax
import numpy as np
from flax import nnx

_KERNEL = ('backbone', 'stem', 0, 'conv', 'kernel')


def with_channels(state: nnx.State, channels: int) -> nnx.State:
  """Gives the first convolution another number of input channels.

  Each new channel gets the mean of the kernel over the old ones, times old / new channels, so that
  an image whose channels are all the same has the features that it had in the old ones.

  Args:
    state: Parameters as host arrays, with those of the backbone.
    channels: The new number.

  Returns:
    The same state; the first kernel is (3, 3, channels, width / 2).
  """
  adapted, found = [], False
  for path, variable in nnx.to_flat_state(state):
    if path == _KERNEL:
      found = True
      kernel = np.asarray(jax.device_get(variable[...]))
      mean = kernel.mean(axis=2, keepdims=True, dtype=np.float64) * (kernel.shape[2] / channels)
      variable = variable.replace(np.repeat(mean, channels, axis=2).astype(kernel.dtype))
    adapted.append((path, variable))
  assert found
  return nnx.from_flat_state(adapted)
