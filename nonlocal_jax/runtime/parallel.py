"""Data parallelism: a mesh over all devices, a sharded batch, replicated parameters."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import jax
import numpy as np
from jax._src import clusters
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.partners import Place

_DETECTION_SECS = 300
_HEARTBEAT_SECS = 100  # JAX's default

Platform = Literal['cpu', 'gpu', 'tpu']


def find_place(coordinator: str | None, processes: int | None, process: int | None) -> Place:
  """Completes the place of this process in a distributed run.

  Args:
    coordinator: HOST:PORT of the first process. None on Slurm, Open MPI and cloud TPUs, where JAX
      detects all three arguments.
    processes: Number of processes.
    process: Index of this process, from 0.

  Raises:
    UserError: If JAX does not detect what is missing, or the values do not fit together.
  """
  coordinator, reason = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS'), ''
  if None in (coordinator, processes, process):
    try:
      coordinator, processes, process, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, processes, process, None, None, _DETECTION_SECS
      )
    except (RuntimeError, ValueError, OSError, LookupError) as error:
      reason = f' ({error})'
  if coordinator is None or processes is None or process is None:
    raise UserError(
      f'The other processes were not detected{reason}: give coordinator (HOST:PORT of the first), '
      'processes (their number) and process (the index).'
    )
  if not 0 <= process < processes:
    raise UserError(f'process is {process}; of {processes} it must be one from 0.')
  return Place(coordinator, processes, process)


def join_processes(place: Place, *, timeout: float) -> None:
  """Initializes `jax.distributed`; must be called before any other use of JAX.

  Args:
    place: The place of this process.
    timeout: Seconds after which a parent ends processes that hang; JAX, which does so with a stack
      dump, gets more.

  Raises:
    UserError: If the other processes cannot be reached.
  """
  # Its C++ handler of SIGTERM would replace those of `runtime.signals`.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.process,
      heartbeat_timeout_seconds=math.ceil(max(_HEARTBEAT_SECS, 4 * timeout)),
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(f'The other processes were not found: {error}.') from error


def is_first_process() -> bool:
  """Returns whether this process prints and writes files; does not initialize devices."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def platform_of(devices: Sequence[jax.Device] | None = None) -> Platform:
  """Returns the platform of devices of one kind.

  Args:
    devices: The devices; they may come from `jax.experimental.topologies`. None for JAX's default
      backend.
  """
  platform = jax.default_backend() if devices is None else devices[0].platform
  return cast(Platform, {'cuda': 'gpu', 'rocm': 'gpu'}.get(platform, platform))


def platform_of_mesh(mesh: Mesh) -> Platform:
  """Returns the platform of the devices of a mesh."""
  return platform_of(list(mesh.devices.flat))


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with one axis 'data' over `devices`, by default all devices."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ('data',), devices=devices, axis_types=(AxisType.Auto,))


def is_shared_by_processes(mesh: Mesh) -> bool:
  """Returns whether the devices of a mesh belong to more than one process."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is replicated on all devices."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def local_rows(array: jax.Array) -> np.ndarray:
  """Returns this process's part of an array that is sharded along its first axis."""
  shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([shard.data for shard in shards])


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Transfers this process's share of a batch to its devices.

  Args:
    batch: Arrays whose first axis is this process's share of the global batch.
    mesh: See `data_mesh`.

  Returns:
    Global arrays whose first axis is split over the mesh.
  """
  sharding = over_batch(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
  }
