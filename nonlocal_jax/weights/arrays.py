"""A network's state as plain arrays by name, and a checksum of any arrays."""

import zlib
from typing import Any

import jax
import numpy as np
from flax import nnx

Arrays = dict[str, Any]


def to_arrays(state: nnx.State) -> Arrays:
  """A network's state as a flat dictionary, e.g. 'backbone.layer1.0.conv1.kernel'."""
  return {
    '.'.join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)
  }


def from_arrays(arrays: Arrays, like: nnx.State) -> nnx.State:
  """The inverse of `to_arrays`, in the structure of `like`."""
  return nnx.from_flat_state(
    {
      path: variable.replace(arrays['.'.join(map(str, path))])
      for path, variable in nnx.to_flat_state(like)
    }
  )


def checksum(tree: Any) -> int:
  """CRC-32 of the bytes of all arrays of a pytree, in its order."""
  value = 0
  for leaf in jax.tree.leaves(tree):
    value = zlib.crc32(np.ascontiguousarray(leaf).data, value)
  return value
