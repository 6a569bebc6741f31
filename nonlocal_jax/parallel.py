"""Devices: one mesh, the batch sharded over it, everything else on each device."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of one axis 'data' over `devices`, by default all."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ('data',), devices=devices, axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that each device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose first axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this process's share of a batch on its devices.

  Args:
    batch: Arrays whose first axis is this process's part of the global batch.
    mesh: See `data_mesh`.

  Returns:
    Global arrays, first axis split over the mesh.
  """
  sharding = over_batch(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
  }
