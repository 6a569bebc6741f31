"""A process of a distributed run is two: one that computes, and its parent, which watches.

Where a partner is lost, JAX ends the computing process from C++ with a stack dump, or an exchange
between devices fails or waits. The parent learns what happened, see `runtime.partners`, says it in
one line and ends the computing process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from nonlocal_jax.cli.program import child_environment
from nonlocal_jax.cli.streams import write_errors_to
from nonlocal_jax.errors import STOPPED_STATUS, UserError
from nonlocal_jax.runtime.partners import Partners, Place

_VARIABLE = 'NONLOCAL_JAX_SUPERVISED'  # the descriptors that connect a process with its parent
_TICK_SECS = 0.1
_BEAT_SECS = 1.0
_START_SECS = 300.0  # until the first sign of life, which comes after imports
# Where a process fails because another was lost, the other is heard of within this time.
_VERDICT_SECS = 5.0
# Where all processes fail or stop for the same reason, each does so within this time.
_OWN_END_SECS = 3.0
# What libraries write to standard error is held back for this time, as it may be about the loss.
_HELD_SECS = 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ENDED = (0, STOPPED_STATUS)


def run_supervised(command: str, arguments: Sequence[str], place: Place, *, timeout: float) -> int:
  """Runs a command in a child process, as long as all processes of the run are there.

  Args:
    command: The command, as in `nonlocal-jax COMMAND`.
    arguments: Its options.
    place: The place of this process in the run.
    timeout: See `Partners`.

  Returns:
    The exit status.

  Raises:
    UserError: If a process of the run does not come, fails or is lost.
  """
  partners = Partners(place, timeout)
  partners.meet()
  options = (
    f'--coordinator={place.coordinator}',
    f'--processes={place.processes}',
    f'--process={place.process}',
  )
  program = [sys.executable, '-P', '-m', 'nonlocal_jax', command, *arguments, *options]
  with _Child(program) as child:
    try:
      status = _watch(child, partners, timeout)
    except UserError as error:
      partners.leave(str(error))
      raise
    partners.leave(None if status in _ENDED else _failure(partners.name, status, child.error))
    if child.error:
      child.wait(_OWN_END_SECS)  # its end may wait for the others
    return status


def _watch(child: '_Child', partners: Partners, timeout: float) -> int:
  """Waits for the child's end or error; returns the exit status.

  Raises:
    UserError: If another process fails or is lost, or the child hangs or is killed.
  """
  failed_at: float | None = None
  while True:
    reason = partners.poll(_TICK_SECS)
    if reason is not None:
      child.wait(_OWN_END_SECS, until=lambda: bool(child.error))
    child.listen()
    status, now = child.status(), time.monotonic()
    if child.error:
      child.relay(until=child.heard)
      return 1
    if status is None:
      if reason is None and child.is_silent(timeout):
        reason = f'{partners.name} has not answered for {timeout:g} s.'
      child.relay(until=now - _HELD_SECS)
    elif status in _ENDED or _signal_of(status) in _SIGNALS:
      child.relay()
      return 128 - status if status < 0 else status
    elif reason is None and status == -signal.SIGKILL:
      reason = f'{partners.name} was ended by SIGKILL, as the system does where memory is short.'
    if reason is not None:
      raise UserError(reason)
    if status is not None:
      failed_at = now if failed_at is None else failed_at
      if now - failed_at > _VERDICT_SECS:  # by itself: nobody else was lost
        child.relay()
        return 1 if status > 0 else 128 - status


def _failure(name: str, status: int, error: str) -> str:
  """Returns what the other processes say where this one fails."""
  if error:
    return f'{name} failed: {error.splitlines()[0]}'
  if number := _signal_of(status):
    return f'{name} was ended by {signal.Signals(number).name}.'
  return f'{name} failed; what it printed says why.'


def _signal_of(status: int) -> int:
  """Returns the signal that an exit status stands for; 0 for none."""
  return max(-status, status - 128, 0)


class _Child:
  """The process that computes; a context manager, at whose end it has ended.

  Attributes:
    error: The error that it reported; '' so far.
    heard: When it was heard last.
  """

  def __init__(self, program: Sequence[str]):
    """Starts it."""
    self.error, self._first = '', True
    self.heard = self._listened = time.monotonic()
    self._held: list[tuple[float, bytes]] = []
    self._reported = b''
    self._reports, report = os.pipe()
    lifeline, self._lifeline = os.pipe()
    self._errors, errors = os.pipe()
    for descriptor in (self._reports, self._errors):
      os.set_blocking(descriptor, False)
    passed = (os.dup(2), report, lifeline)
    self._process = subprocess.Popen(
      program,
      stderr=errors,
      pass_fds=passed,
      env={**child_environment(), _VARIABLE: json.dumps(passed)},
      process_group=0,  # Ctrl-C in a terminal reaches this process, which sends it on
    )
    for descriptor in (*passed, errors):
      os.close(descriptor)

  def __enter__(self) -> Self:
    """Sends signals on to it from here on."""
    self._wakeup = signal.set_wakeup_fd(-1)
    self._handlers = {
      number: signal.signal(number, lambda number, _: self._process.send_signal(number))
      for number in _SIGNALS
      if signal.getsignal(number) is not signal.SIG_IGN  # as with nohup
    }
    return self

  def __exit__(self, *unused) -> None:
    """Ends it."""
    if self.status() is None:
      self._process.kill()
      sys.stderr.write('\n')  # a progress bar may be on the last line
    self._process.wait()
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    for descriptor in (self._reports, self._lifeline, self._errors):
      os.close(descriptor)

  def status(self) -> int | None:
    """Returns its exit status, negative for a signal; None while it runs."""
    return self._process.poll()

  def wait(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
    """Waits for its end, or until something holds, at most some seconds."""
    deadline = time.monotonic() + seconds
    while self.status() is None and time.monotonic() < deadline and not until():
      time.sleep(_TICK_SECS)
      self.listen()

  def is_silent(self, timeout: float) -> bool:
    """Returns whether it has not been heard for some seconds."""
    return time.monotonic() - self.heard > (max(timeout, _START_SECS) if self._first else timeout)

  def listen(self) -> None:
    """Takes in what it reports and writes to standard error."""
    paused, self._listened = time.monotonic() - self._listened, time.monotonic()
    if paused > 2 * _BEAT_SECS + _OWN_END_SECS:  # both were stopped, and it has to come back first
      self.heard += paused
    if data := _read(self._reports):
      self.heard, self._first = time.monotonic(), False
      *lines, self._reported = (self._reported + data).split(b'\n')
      for line in filter(None, lines):
        self.error = json.loads(line)
    if data := _read(self._errors):
      self._held.append((time.monotonic(), data))

  def relay(self, until: float = float('inf')) -> None:
    """Writes what it wrote to standard error up to a time, the end by default."""
    while self._held and self._held[0][0] <= until:
      sys.stderr.write(self._held.pop(0)[1].decode(errors='replace'))


def _read(descriptor: int) -> bytes:
  """Reads what there is."""
  with contextlib.suppress(BlockingIOError):
    return os.read(descriptor, 1 << 20)
  return b''


def is_supervised() -> bool:
  """Returns whether this process has a parent that watches; see `connect_to_parent`."""
  return _VARIABLE in os.environ


def connect_to_parent() -> None:
  """Lets the parent of this process hear of its errors, and this process of the parent's end.

  What Python prints goes to the standard error of the parent. What libraries write to it, and
  tracebacks of errors that may follow from the loss of a partner, is left to the parent.
  """
  stderr, report, lifeline = json.loads(os.environ.pop(_VARIABLE))
  for descriptor in (stderr, report, lifeline):
    os.set_inheritable(descriptor, False)
  write_errors_to(stderr)
  _Reports.descriptor = report
  sys.excepthook = _leave_with_traceback
  threading.excepthook = lambda error: _print_for_parent(error.exc_value)
  threading.Thread(target=_beat, args=(report,), name='beat', daemon=True).start()
  threading.Thread(target=_follow, args=(lifeline,), name='lifeline', daemon=True).start()


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
  """Reports a `UserError` to the parent of this process, if there is one, before it ends."""
  try:
    yield
  except UserError as error:
    if _Reports.descriptor is not None:
      with contextlib.suppress(OSError):
        os.write(_Reports.descriptor, json.dumps(str(error)).encode() + b'\n')
    raise


class _Reports:
  """Where errors are reported.

  Attributes:
    descriptor: A pipe to the parent; None without one.
  """

  descriptor: int | None = None


def _beat(report: int) -> None:
  """Reports that this process runs."""
  with contextlib.suppress(OSError):
    while True:
      os.write(report, b'\n')
      time.sleep(_BEAT_SECS)


def _follow(lifeline: int) -> None:
  """Ends this process when its parent has ended: nobody watches it any more."""
  while os.read(lifeline, 1):
    pass
  os._exit(1)


def _leave_with_traceback(error_type, error: BaseException, trace) -> None:
  """Ends this process at once: at a regular end JAX would wait for the other processes."""
  del error_type, trace
  sys.stdout.flush()
  _print_for_parent(error)
  os._exit(1)


def _print_for_parent(error: BaseException | None) -> None:
  if error is not None:
    os.write(2, ''.join(traceback.format_exception(error)).encode(errors='replace'))
