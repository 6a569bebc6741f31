"""Whether a training step fits in the memory of a device, and what fits if it does not."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
from jax.sharding import Mesh

from nonlocal_jax.errors import UserError

_GIB = 2**30
# Few images need a little more than their share, and so does adding up gradients.
_MARGIN = 1.1
_OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'  # in the message of XLA's error


class StepMemory(NamedTuple):
  """Memory that a compiled training step needs on each device, in bytes.

  Attributes:
    held: Of its arguments and results, which are mostly the training state.
    temporary: Of everything that lives only during the step.
  """

  held: int
  temporary: int

  @classmethod
  def of(cls, compiled: jax.stages.Compiled) -> Self:
    """Returns the memory of a compiled step; results that replace arguments count once."""
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return cls(held - memory.alias_size_in_bytes, memory.temp_size_in_bytes)

  @property
  def total(self) -> int:
    """The sum."""
    return self.held + self.temporary

  def of_part(self, share: float) -> int:
    """Estimates the total of a step that computes a share of the images at once.

    Gradients and updates do not become smaller. Together they are about as large as the parameters
    and their momentum, which are held.
    """
    fixed = min(self.held, self.temporary)
    return int(self.held + fixed + _MARGIN * share * (self.temporary - fixed))


class StepOptions(NamedTuple):
  """What the memory of a training step depends on, and may be changed.

  Attributes:
    batch_size: Number of images, over all devices.
    devices: Number of devices.
    device_kind: Name of the devices.
    accumulate: Number of parts of the batch that are computed in sequence.
    rematerialize: Whether the backward pass recomputes residual blocks.
    has_batch_statistics: Whether batch normalization uses the statistics of the images that are
      computed at once.
  """

  batch_size: int
  devices: int
  device_kind: str
  accumulate: int
  rematerialize: bool
  has_batch_statistics: bool

  @property
  def at_once(self) -> int:
    """Number of images that a device computes at once."""
    return self.batch_size // self.devices // self.accumulate

  def __str__(self) -> str:
    """Returns a summary such as 'a training step that computes 4 images at once on each device'."""
    images = f'{self.at_once} image{"s" if self.at_once > 1 else ""}'
    return f'a training step that computes {images} at once on each device'


@dataclasses.dataclass(frozen=True)
class Remedy:
  """Options with which a training step fits.

  Attributes:
    values: New values of some of `StepOptions`.
    size: Memory on each device in bytes; None if it is not known.
    is_measured: Whether `size` is that of a compiled program, or an estimate.
  """

  values: Mapping[str, Any]
  size: int | None = None
  is_measured: bool = False


class StepTooLargeError(UserError):
  """Raised if a training step does not fit in the memory of a device.

  Attributes:
    found: What does not fit, and where.
    remedies: Options with which it fits, the best first.
    options: Those of the step.
  """

  def __init__(self, found: str, remedies: Sequence[Remedy], options: StepOptions):
    """Initializes the message."""
    self.found = found
    self.remedies = tuple(remedies)
    self.options = options
    super().__init__(self.message())

  def message(self, prefix: str = '') -> str:
    """Returns a sentence that names the remedies.

    Args:
      prefix: Put before the names of options.
    """
    if not self.remedies:
      return f'{self.found}; one image alone does not fit: make the crops smaller.'
    verb = 'try' if self.remedies[0].size is None else 'set'
    choices = ', or '.join(self._choice(remedy, prefix) for remedy in self.remedies)
    return f'{self.found}; {verb} {choices}.'

  def _choice(self, remedy: Remedy, prefix: str) -> str:
    notes = []
    if remedy.size is not None:
      notes.append(f'{"" if remedy.is_measured else "about "}{remedy.size / _GIB:.2f} GiB')
    if 'rematerialize' in remedy.values:
      notes.append('a third slower')
    if 'accumulate' in remedy.values and self.options.has_batch_statistics:
      notes.append('batch normalization then uses the statistics of each part')
    values = ' '.join(f'{prefix}{name}={value}' for name, value in remedy.values.items())
    return f'{values} ({"; ".join(notes)})' if notes else values


def memory_limit(mesh: Mesh) -> int | None:
  """Returns the bytes that this process may use on each of its devices; None if not limited."""
  stats = [device.memory_stats() for device in mesh.local_devices]
  return min((x['bytes_limit'] for x in stats if x and 'bytes_limit' in x), default=None)


def check_memory(
  memory: StepMemory,
  limit: int | None,
  options: StepOptions,
  rematerialized: Callable[[], StepMemory | None],
) -> None:
  """Checks that a training step fits in the memory of a device.

  Args:
    memory: What the step needs.
    limit: What a device has, in bytes; None for no check.
    options: Those of the step.
    rematerialized: Compiles the step with `rematerialize` and returns what it needs, or None if
      that fails. Called if the step does not fit and does not rematerialize.

  Raises:
    StepTooLargeError: If it does not fit; the message names options with which it does.
  """
  if limit is None or memory.total <= limit:
    return
  remedies = _fewer_images(memory, limit, options, {})
  if not options.rematerialize and (less := rematerialized()) is not None:
    values = {'rematerialize': True}
    if less.total <= limit:
      remedies.insert(0, Remedy(values, less.total, is_measured=True))
    elif not remedies:
      remedies = _fewer_images(less, limit, options, values)
  found = (
    f'{options} needs {memory.total / _GIB:.2f} GiB, and {options.device_kind} has '
    f'{limit / _GIB:.2f} GiB for it'
  )
  raise StepTooLargeError(found, remedies, options)


def _fewer_images(
  memory: StepMemory, limit: int, options: StepOptions, values: Mapping[str, Any]
) -> list[Remedy]:
  """Returns the smallest `accumulate` and the largest `batch_size` that are estimated to fit."""
  at_once = options.at_once
  sizes = {n: memory.of_part(n / at_once) for n in range(1, at_once)}
  fitting = [n for n, size in sizes.items() if size <= limit]
  remedies = []
  if parts := [n for n in fitting if at_once % n == 0]:
    accumulate = options.accumulate * at_once // parts[-1]
    remedies.append(Remedy({**values, 'accumulate': accumulate}, sizes[parts[-1]]))
  if fitting:
    batch_size = fitting[-1] * options.accumulate * options.devices
    remedies.append(Remedy({**values, 'batch_size': batch_size}, sizes[fitting[-1]]))
  return remedies


@contextlib.contextmanager
def explained_out_of_memory(options: StepOptions) -> Iterator[None]:
  """Replaces XLA's error when a device has no memory left to compile or run a training step.

  Args:
    options: Those of the step.

  Raises:
    StepTooLargeError: In place of XLA's error; the message names options that need less.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if _OUT_OF_MEMORY not in str(error):
      raise
    at_once = options.at_once
    remedies = [] if options.rematerialize else [Remedy({'rematerialize': True})]
    if at_once > 1:
      fewer = max(n for n in range(1, at_once // 2 + 1) if at_once % n == 0)
      remedies.append(Remedy({'accumulate': options.accumulate * at_once // fewer}))
      remedies.append(Remedy({'batch_size': fewer * options.accumulate * options.devices}))
    found = f'{options} runs out of memory on {options.device_kind}'
    raise StepTooLargeError(found, remedies, options) from error
