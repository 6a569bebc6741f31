"""The Orbax checkpoints of a training run: network, optimizer and data iterator."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import sealed, unfinished, unsealed
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.weights.arrays import Arrays, checksum, from_arrays, to_arrays
from nonlocal_jax.weights.orbax_errors import QuietThreads, one_error

CHECKPOINTS = 'checkpoints'
BEST = 'best'  # subfolder of a workdir with the weights of the best mIoU
SET_ASIDE = 'unreadable_checkpoints'
_UNFINISHED = '*.orbax-checkpoint-tmp*'  # names that Orbax gives to what it is writing


def has_checkpoint(workdir: Path) -> bool:
  """Whether `workdir` holds a complete checkpoint; unfinished ones have other names."""
  directory = workdir / CHECKPOINTS
  return directory.is_dir() and any(entry.name.isdigit() for entry in directory.iterdir())


def chosen_weights(path: Path) -> str | None:
  """Says which weights of a workdir `load_weights` takes, and where the best are.

  Args:
    path: Weights of any kind.

  Returns:
    A sentence; None if `path` is no workdir.
  """
  if not path.is_dir() or not has_checkpoint(path):
    return None
  newest = max(int(entry.name) for entry in (path / CHECKPOINTS).iterdir() if entry.name.isdigit())
  best = path / BEST
  others = f'; those with the best mIoU are in {best}' if has_checkpoint(best) else ''
  return f'The weights are those of step {newest:,}, the newest in {path}{others}.'


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    step: Steps taken.
    model: Parameters and running statistics.
    training: What else was saved, as a pytree of arrays.
    data: State of the iterator over training batches.
  """

  step: int
  model: nnx.State
  training: Any
  data: dict[str, int]


class RunCheckpoints:
  """The checkpoints in a workdir, verified by checksums when they are read.

  Use as a context manager: leaving waits for what is still being written.
  """

  def __init__(self, workdir: Path, *, keep: int | None):
    """Opens the checkpoints in `workdir`; keeps the newest `keep`, or is read-only for None."""
    self._workdir = workdir
    self._writes = keep is not None
    self._directory = (workdir / CHECKPOINTS).absolute()
    self._what = f'the checkpoints in {self._directory} cannot be written'
    with one_error(self._what):
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=keep, create=keep is not None, cleanup_tmp_directories=keep is not None
        ),
      )

  def __enter__(self) -> Self:
    """From here on, errors of background writes are raised by `save` and `wait`, not printed."""
    self._unfinished = contextlib.ExitStack()
    if self._writes and is_first_process():
      self._unfinished.enter_context(unfinished(self._directory, _UNFINISHED))
    self._quiet = QuietThreads().__enter__()
    return self

  def __exit__(self, error_type: type[BaseException] | None, *unused) -> None:
    """Waits for pending writes."""
    with self._unfinished:
      try:
        with one_error(self._what):
          self._manager.close()
      except UserError:
        if error_type is None:  # otherwise there is an error already
          raise
      finally:
        self._quiet.__exit__()

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    *,
    model: nnx.State,
    training: Any = None,
    data: Mapping[str, float | None] | None = None,
  ) -> None:
    """Saves a checkpoint in the background; does nothing if `step` is already saved.

    Args:
      step: Steps taken.
      model: Parameters and running statistics.
      training: Whatever else the next step needs, as a pytree of arrays.
      data: Further numbers, such as the state of the iterator over training batches.

    Raises:
      UserError: If this checkpoint or the previous one cannot be written.
    """
    if step in self._manager.all_steps():
      return
    arrays = to_arrays(model)
    checksums = {'model': checksum(arrays), 'training': checksum(training)}
    items = {
      'model': ocp.args.StandardSave(arrays),
      'record': ocp.args.JsonSave(sealed({'checksums': checksums, 'data': dict(data or {})})),
    }
    if training is not None:
      items['training'] = ocp.args.StandardSave(training)
    with one_error(self._what):
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def wait(self) -> None:
    """Waits until pending checkpoints are written.

    Raises:
      UserError: If it cannot be written.
    """
    with one_error(self._what):
      self._manager.wait_until_finished()

  def restore(self, *, model: nnx.State, training: Any) -> Restored:
    """Restores the newest readable checkpoint.

    Newer ones that cannot be read are moved out of the way, with a warning.

    Args:
      model: Parameters and running statistics of the same structure, shapes and shardings.
      training: A pytree of the same structure, shapes and shardings as was saved.

    Raises:
      UserError: If none can be read.
    """
    unreadable = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self._restore(step, model, training)
      except UserError as error:
        unreadable.append((step, error))
        continue
      for broken, error in unreadable:
        self._set_aside(broken, error)
      return restored
    reasons = '; '.join(str(error).removesuffix('.') for _, error in unreadable)
    raise UserError(f'no checkpoint in {self._directory} can be read: {reasons}.')

  def restore_model(self, target: Arrays) -> tuple[int, Arrays]:
    """Restores step and network of the newest checkpoint, as arrays like `target`.

    Raises:
      UserError: If there is no checkpoint, or it cannot be read.
    """
    step = self.latest_step()
    if step is None:
      raise UserError(f'{self._workdir} holds no checkpoint yet; train longer or give another.')
    # As host arrays: the run may have had other devices and processes.
    as_host_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with one_error(self._unreadable(step)):
      restored: Any = self._manager.restore(
        step,
        args=ocp.args.Composite(
          model=ocp.args.PyTreeRestore(target, restore_args=as_host_arrays),
          record=ocp.args.JsonRestore(),
        ),
      )
    self._checked(step, restored.record, model=restored.model)
    return step, restored.model

  def data_of(self, step: int) -> dict[str, Any]:
    """Reads the `data` of a checkpoint; nothing if it cannot be read."""
    try:
      with one_error(self._unreadable(step)):
        restored: Any = self._manager.restore(
          step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )
      return self._checked(step, restored.record)
    except UserError:
      return {}

  def delete(self, step: int) -> None:
    """Deletes a checkpoint.

    Raises:
      UserError: If it cannot be deleted.
    """
    with one_error(self._what):
      self._manager.delete(step)

  def _restore(self, step: int, model: nnx.State, training: Any) -> Restored:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (to_arrays(model), training))
    with one_error(self._unreadable(step)):
      restored: Any = self._manager.restore(
        step,
        args=ocp.args.Composite(
          model=ocp.args.StandardRestore(abstract[0]),
          training=ocp.args.StandardRestore(abstract[1]),
          record=ocp.args.JsonRestore(),
        ),
      )
    data = self._checked(step, restored.record, model=restored.model, training=restored.training)
    return Restored(step, from_arrays(restored.model, model), restored.training, data)

  def _checked(self, step: int, record: Any, **items: Any) -> dict[str, Any]:
    """Returns `data` of a record, after its checksums, and those of `items`, were compared."""
    try:
      record = unsealed(record)
      expected, data = {name: record['checksums'][name] for name in items}, dict(record['data'])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise UserError(f'{self._unreadable(step)}: its record is damaged.') from error
    for name, item in items.items():
      if checksum(item) != expected[name]:
        raise UserError(f'{self._unreadable(step)}: the checksum of {name} differs.')
    return data

  def _unreadable(self, step: int) -> str:
    return f'the checkpoint of step {step} in {self._workdir} cannot be read'

  def _set_aside(self, step: int, error: UserError) -> None:
    place = self._workdir / SET_ASIDE / str(step)
    if is_first_process():
      place.parent.mkdir(exist_ok=True)
      number = 0
      while place.exists():
        number += 1
        place = place.with_name(f'{step}.{number}')
      (self._directory / str(step)).rename(place)
      print(f'warning: {error} It was moved to {place}.', file=sys.stderr)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'set aside {step}')
    self._manager.reload()
