"""Saves and loads weights with their description, by Orbax."""

import dataclasses
import glob
import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.runtime.files import parse_object, sealed, unfinished, unsealed
from nonlocal_jax.weights.arrays import Arrays, checksum, from_arrays, to_arrays
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.orbax_errors import one_error
from nonlocal_jax.weights.run_checkpoints import RunCheckpoints

DESCRIPTION = 'model.json'
WEIGHTS = 'weights'
CHECKSUMS = 'checksums.json'


def save_weights(directory: Path, state: nnx.State, description: ModelDescription) -> None:
  """Writes weights and their description atomically: a directory that exists is complete.

  Args:
    directory: Where to; must not exist.
    state: Parameters and running statistics of the network.
    description: What they are.

  Raises:
    UserError: If `directory` exists.
  """
  if directory.exists():
    raise UserError(f'{directory} exists; remove it or choose another directory.')
  partial = directory.absolute().with_name(f'.{directory.name}.{os.getpid()}.partial')
  try:
    with (
      unfinished(partial.parent, f'{glob.escape(partial.name)}*'),
      one_error(f'{directory} cannot be written'),
    ):
      with ocp.Checkpointer(_array_handler()) as checkpointer:
        checkpointer.save(partial / WEIGHTS, ocp.args.PyTreeSave(to_arrays(state)))
      checksums = sealed({'weights': checksum(to_arrays(state))})
      (partial / CHECKSUMS).write_text(json.dumps(checksums) + '\n')
      (partial / DESCRIPTION).write_text(description.to_json())
      partial.rename(directory)
  except BaseException:
    _remove(partial)
    raise


def _remove(directory: Path, *, quiet_seconds: float = 1, patience: float = 10) -> None:
  """Removes a directory that unfinished background writes of Orbax may recreate for a moment."""
  gone_since = None
  deadline = time.monotonic() + patience
  while time.monotonic() < deadline:
    if directory.exists():
      shutil.rmtree(directory, ignore_errors=True)
      gone_since = None
    now = time.monotonic()
    gone_since = now if gone_since is None else gone_since
    if now - gone_since > quiet_seconds:
      return
    time.sleep(0.05)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
  """Orbax's handler without copying host arrays before writing: nobody changes them."""
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, handlers.ArrayHandler()),
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def load_weights(directory: Path) -> tuple[ModelDescription, nnx.State]:
  """Loads weights from a directory written by `save_weights` or a training run.

  Args:
    directory: The directory; of a run's workdir the newest checkpoint is loaded.

  Returns:
    The description, and parameters and running statistics as host arrays.

  Raises:
    UserError: If `directory` holds no weights, they cannot be read, or their checksum differs.
  """
  description = read_description(directory)
  like = state_shapes(description.config)
  # Host arrays, because the run may have had other devices.
  target = {
    name: ocp.utils.to_shape_dtype_struct(np.empty(array.shape, array.dtype))
    for name, array in to_arrays(like).items()
  }
  with one_error(f'the weights in {directory} cannot be read'):
    if (directory / WEIGHTS).is_dir():
      with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((directory / WEIGHTS).absolute(), target)
      _check(directory, arrays)
    else:
      with RunCheckpoints(directory, keep=None) as checkpoints:
        step, arrays = checkpoints.restore_model(target)
        steps = dict.fromkeys(description.num_batches_tracked, step)
        description = dataclasses.replace(description, num_batches_tracked=steps)
  return description, from_arrays(arrays, like)


def _check(directory: Path, arrays: Arrays) -> None:
  """Compares arrays with the checksum in a converted directory; earlier versions wrote none."""
  path = directory / CHECKSUMS
  if not path.exists():
    return
  if unsealed(parse_object(path.read_bytes()))['weights'] != checksum(arrays):
    raise UserError(
      f'The weights in {directory} are damaged (their checksum differs): write them again.'
    )


def read_description(directory: Path) -> ModelDescription:
  """Reads the description in a converted directory or a workdir.

  Raises:
    UserError: If it is neither.
  """
  path = directory / DESCRIPTION
  if not path.is_file():
    raise UserError(
      f'{directory} has no {DESCRIPTION}: give a .pth file, a converted directory or the workdir '
      'of a training run.'
    )
  return ModelDescription.from_json(path.read_bytes(), source=str(path))
