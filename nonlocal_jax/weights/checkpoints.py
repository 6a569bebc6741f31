"""Orbax checkpoints: weights alone with their description, and the state of a training run."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
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
    with _one_error(f'{directory} cannot be written'):
      with ocp.Checkpointer(_array_handler()) as checkpointer:
        checkpointer.save(partial / WEIGHTS, ocp.args.PyTreeSave(to_arrays(state)))
      (partial / DESCRIPTION).write_text(description.to_json())
      partial.rename(directory)
  except BaseException:
    _remove(partial)
    raise


def _remove(directory: Path, *, quiet_seconds: float = 1, patience: float = 10) -> None:
  """Removes a directory that writes abandoned by Orbax may still make anew for a moment."""
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
  with _one_error(f'the weights in {directory} cannot be read'):
    if (directory / WEIGHTS).is_dir():
      with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((directory / WEIGHTS).absolute(), target)
    else:
      with RunCheckpoints(directory, keep=None) as checkpoints:
        arrays = checkpoints.restore_model(target)
        steps = dict.fromkeys(description.num_batches_tracked, checkpoints.latest_step())
        description = dataclasses.replace(description, num_batches_tracked=steps)
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


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
  """Turns whatever Orbax raises into one error, without the lines that its threads add.

  Raises:
    UserError: `what` and the reason.
  """
  hook, verbosity = sys.unraisablehook, logging.get_verbosity()
  sys.unraisablehook = _unless_abandoned(hook)
  logging.set_verbosity(logging.FATAL)
  try:
    yield
    sys.unraisablehook = hook  # after an error, threads that Orbax abandoned have more to say
  except UserError:
    raise
  except Exception as error:  # damaged files, full disks: Orbax has no narrower type for them
    lines = str(error).strip().splitlines() or [type(error).__name__]
    system_error = re.search(r'([^:]*) \[os_error_code', lines[0])
    raise UserError(f'{what}: {system_error[1].strip() if system_error else lines[0]}.') from error
  finally:
    logging.set_verbosity(verbosity)


def _unless_abandoned(hook: Callable[[Any], object]) -> Callable[[Any], object]:
  """`hook`, but silent about reads and writes still under way when Orbax gave up at a first one."""

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
