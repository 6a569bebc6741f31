"""Devices: one mesh, the batch sharded over it, everything else on each device."""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nonlocal_jax.errors import UserError

Platform = Literal['cpu', 'gpu', 'tpu']


def join_processes(
  coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
  """Makes this process one of several that work together; before anything else of JAX.

  Args:
    coordinator: HOST:PORT of the first process; None on Slurm, Open MPI and cloud TPUs, where it is
      found by itself, as are the others.
    count: Number of processes.
    index: Which of them this one is, from 0.

  Raises:
    UserError: If the others are not found.
  """
  try:
    jax.distributed.initialize(coordinator, count, index)
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'The other processes were not found ({error}): where they do not find each other by '
      'themselves, give --coordinator=HOST:PORT, --processes=COUNT and --process=INDEX.'
    ) from error


def is_first_process() -> bool:
  """Whether this process is the one that talks and writes; asks for no device."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def platform_of(devices: Sequence[jax.Device] | None = None) -> Platform:
  """The platform of devices that are all of one kind.

  Args:
    devices: The devices, which may be described ones; None for those of JAX's default backend.
  """
  platform = jax.default_backend() if devices is None else devices[0].platform
  return cast(Platform, {'cuda': 'gpu', 'rocm': 'gpu'}.get(platform, platform))


def platform_of_mesh(mesh: Mesh) -> Platform:
  """The platform of the devices of a mesh."""
  return platform_of(list(mesh.devices.flat))


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of one axis 'data' over `devices`, by default all."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ('data',), devices=devices, axis_types=(AxisType.Auto,))


def is_shared_by_processes(mesh: Mesh) -> bool:
  """Whether the devices of a mesh are those of several processes."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


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
