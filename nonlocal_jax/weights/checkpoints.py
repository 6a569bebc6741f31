"""Orbax checkpoints: weights alone with their description, and the state of a training run."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.weights.description import ModelDescription

DESCRIPTION = 'model.json'
WEIGHTS = 'weights'
CHECKPOINTS = 'checkpoints'

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


def save_weights(directory: Path, state: nnx.State, description: ModelDescription) -> None:
  """Writes weights and their description; a directory that exists is complete.

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
    with ocp.Checkpointer(_array_handler()) as checkpointer:
      checkpointer.save(partial / WEIGHTS, ocp.args.PyTreeSave(to_arrays(state)))
    (partial / DESCRIPTION).write_text(description.to_json())
    partial.rename(directory)
  except Exception as error:  # what Orbax raises for a full disk has no narrower type
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'{directory} cannot be written: {reason}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
  """Orbax's own, but host arrays are not copied before they are written: nobody changes them."""
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, handlers.ArrayHandler()),
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def load_weights(directory: Path) -> tuple[ModelDescription, nnx.State]:
  """Reads the weights that `save_weights` wrote, or the newest of a training run's workdir.

  Args:
    directory: The directory.

  Returns:
    The description, and parameters and running statistics as host arrays.

  Raises:
    UserError: If there are none.
  """
  description = read_description(directory)
  like = description.architecture.state_shapes()
  # Host arrays: the run may have had other devices.
  target = {
    name: ocp.utils.to_shape_dtype_struct(np.empty(array.shape, array.dtype))
    for name, array in to_arrays(like).items()
  }
  unraisable_hook = sys.unraisablehook
  sys.unraisablehook = _unless_abandoned_read(unraisable_hook)
  try:
    if (directory / WEIGHTS).is_dir():
      with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((directory / WEIGHTS).absolute(), target)
    else:
      with RunCheckpoints(directory, keep=None) as checkpoints:
        arrays = checkpoints.restore_model(target)
        steps = dict.fromkeys(description.num_batches_tracked, checkpoints.latest_step())
        description = dataclasses.replace(description, num_batches_tracked=steps)
  except UserError:
    raise
  except Exception as error:  # what Orbax raises for damaged files has no narrower type
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'the weights in {directory} cannot be read: {reason}') from error
  sys.unraisablehook = unraisable_hook
  return description, from_arrays(arrays, like)


def read_description(directory: Path) -> ModelDescription:
  """Reads what stands beside the weights in a converted directory or a workdir.

  Raises:
    UserError: If it is neither.
  """
  path = directory / DESCRIPTION
  if not path.is_file():
    raise UserError(
      f'{directory} has no {DESCRIPTION}: give a .pth file, a converted directory or the workdir '
      'of a training run.'
    )
  return ModelDescription.from_json(path.read_text(), source=str(path))


class RunCheckpoints:
  """The checkpoints of a training run, below its workdir: network, optimizer and place in the data.

  Use as a context manager: leaving waits for what is still being written.
  """

  def __init__(self, workdir: Path, *, keep: int | None):
    """Opens the checkpoints of the run in `workdir`; the newest `keep` stay, None for all."""
    self._workdir = workdir
    self._manager = ocp.CheckpointManager(
      (workdir / CHECKPOINTS).absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=keep is not None, cleanup_tmp_directories=keep is not None
      ),
    )

  def __enter__(self) -> 'RunCheckpoints':
    """Nothing to do."""
    return self

  def __exit__(self, *unused) -> None:
    """Waits for pending writes."""
    self._manager.close()

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(
    self, step: int, *, model: nnx.State, training: Any, iterator: grain.DatasetIterator
  ) -> None:
    """Writes in the background; nothing if `step` is there already.

    Args:
      step: Steps taken.
      model: Parameters and running statistics.
      training: Whatever else the next step needs, as a pytree of arrays.
      iterator: The iterator over training batches.
    """
    if step == self.latest_step():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(to_arrays(model)),
        training=ocp.args.StandardSave(training),
        data=grain.checkpoint.CheckpointSave(iterator),
      ),
      force=True,
    )

  def restore(
    self, *, model: nnx.State, training: Any, iterator: grain.DatasetIterator
  ) -> tuple[nnx.State, Any]:
    """Reads the newest checkpoint.

    Args:
      model: Parameters and running statistics of the same structure, shapes and shardings.
      training: A pytree of the same structure, shapes and shardings as was saved.
      iterator: Set to its place.

    Returns:
      The saved `model` and `training`.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (to_arrays(model), training))
    restored = self._manager.restore(
      self.latest_step(),
      args=ocp.args.Composite(
        model=ocp.args.StandardRestore(abstract[0]),
        training=ocp.args.StandardRestore(abstract[1]),
        data=grain.checkpoint.CheckpointRestore(iterator),
      ),
    )
    return from_arrays(restored.model, model), restored.training

  def restore_model(self, target: Arrays) -> Arrays:
    """Reads the network of the newest checkpoint as arrays like `target`.

    Raises:
      UserError: If there is no checkpoint.
    """
    step = self.latest_step()
    if step is None:
      raise UserError(f'{self._workdir} holds no checkpoint yet; train longer or give another.')
    args = ocp.args.Composite(model=ocp.args.StandardRestore(target))
    return self._manager.restore(step, args=args).model


def _unless_abandoned_read(hook: Callable[[Any], object]) -> Callable[[Any], object]:
  """`hook`, but silent about reads still under way when Orbax gave up at a first one."""

  def filtered(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  return filtered


def config_differences(saved: str, current: str) -> list[str]:
  """Keys whose values differ between two configs in JSON, e.g. 'model.width: 16, now 64'."""
  saved_values, current_values = (dict(_leaves(json.loads(text))) for text in (saved, current))
  return [
    f'{key} was {saved_values.get(key)}, now {current_values.get(key)}'
    for key in sorted(saved_values.keys() | current_values.keys())
    if saved_values.get(key) != current_values.get(key)
  ]


def _leaves(tree: Any, prefix: str = ''):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value
