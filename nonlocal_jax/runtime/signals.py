"""What SIGTERM and SIGINT do: a program leaves at once, a training run saves its state before.

Python calls signal handlers in the main thread, between two of its instructions: not while XLA
compiles there, and an exception that a handler raises inside a callback is lost. So a thread reads
the pipe that Python's C handler writes to. It neither unwinds the main thread, which may be
anywhere, nor ends the interpreter, which can crash while other threads compile. It replaces the
process by a small program that removes what is unfinished: from then on no other thread writes.
"""

import contextlib
import glob
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import ClassVar, Self

from nonlocal_jax.runtime.files import unfinished_patterns

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL_SECS = 1.0
_FLUSH_SECS = 0.5  # the main thread may hold the stream, or nobody reads it
_REMOVE = """
import contextlib, glob, os, shutil, sys
for path in [path for pattern in sys.argv[2:] for path in glob.glob(pattern)]:
  shutil.rmtree(path, ignore_errors=True)
  with contextlib.suppress(OSError):
    os.unlink(path)
sys.exit(int(sys.argv[1]))
"""


class LeaveOnSignals:
  """Context in which SIGTERM and SIGINT end the program at once, whatever it computes.

  The exit status is 143 or 130. Worker processes and subprocesses are stopped, and what
  `runtime.files.unfinished` knows is removed; `finally` clauses do not run. Within a `StopRequest`,
  this applies to the second signal. A signal that is ignored stays so, as with nohup.

  Must be entered in the main thread. Within another such context it changes nothing.
  """

  active: ClassVar[bool] = False

  def __init__(self, *, until_exit: bool = False):
    """Initializes the context.

    Args:
      until_exit: Whether to stay after the context ends, until the process does, which takes a
        while where threads and worker processes are left.
    """
    self._until_exit = until_exit

  def __enter__(self) -> Self:
    """Installs the handlers and starts the thread."""
    self._is_inner = LeaveOnSignals.active
    if self._is_inner:
      return self
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._before = _install(_leave_from_handler)
    self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, name='signals', daemon=True)
    self._thread.start()
    LeaveOnSignals.active = True
    return self

  def __exit__(self, *unused) -> None:
    """Restores what handled signals before."""
    if self._is_inner or self._until_exit:
      return
    LeaveOnSignals.active = False
    signal.set_wakeup_fd(self._wakeup_before)
    _restore(self._before)
    os.write(self._write, b'\0')
    self._thread.join()
    os.close(self._read)
    os.close(self._write)

  def _watch(self) -> None:
    while number := os.read(self._read, 1)[0]:
      if number not in _SIGNALS:
        continue
      request = StopRequest.current
      if request is None or request.is_repeated():
        _leave(number)


class StopRequest:
  """Context in which a first signal is only recorded and one that comes later exits the program.

  Signals within a second count as one: Slurm sends it to all processes of a job, and the parent of
  a process sends it on to it.

  Attributes:
    received: Name of the received signal; '' if none.
    seen: Whether `LeaveOnSignals` has seen a signal since the context was entered.
  """

  current: ClassVar['StopRequest | None'] = None

  def __init__(self, *, then: str = 'saving after this step'):
    """Initializes the request without a received signal.

    Args:
      then: What is said to happen after the first signal.
    """
    self._then = then
    self.received = ''
    self.seen = False
    self._seen_at = 0.0  # `time.monotonic()`

  def __enter__(self) -> Self:
    """Installs the signal handlers."""
    self._before = _install(self._handle)
    StopRequest.current = self
    return self

  def __exit__(self, *unused) -> None:
    """Restores the previous signal handlers."""
    StopRequest.current = None
    _restore(self._before)

  def is_repeated(self) -> bool:
    """Notes that a signal came; returns whether it is another one than the first."""
    if self.seen:
      return time.monotonic() - self._seen_at > _SAME_SIGNAL_SECS
    self.seen, self._seen_at = True, time.monotonic()
    return False

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.received:
      if self.is_repeated():
        if LeaveOnSignals.active:
          _leave(number)
        sys.exit(128 + number)
      return
    self.is_repeated()
    self.received = signal.Signals(number).name
    _say(f'{self.received}: {self._then}; once more to leave at once')


def _install(handler) -> dict[int, object]:
  """Installs a handler for each signal that is not ignored; returns the previous ones."""
  wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
  return {number: signal.signal(number, handler) for number in wanted}


def _restore(handlers) -> None:
  for number, handler in handlers.items():
    signal.signal(number, handler)


def _leave_from_handler(number: int, frame: FrameType | None) -> None:
  """Leaves where the pipe got nothing: an event loop may have exchanged it for its own."""
  _leave(number)


_leaving = threading.Lock()


def _leave(number: int) -> None:
  """Ends the process; returns only if another thread is about to."""
  if not _leaving.acquire(blocking=False):
    return
  # For the program that removes files, which inherits the mask.
  signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
  flushing = threading.Thread(target=_flush, daemon=True)
  flushing.start()
  flushing.join(_FLUSH_SECS)
  for child in _children():
    with contextlib.suppress(OSError):
      os.kill(child, signal.SIGTERM)
  _say('interrupted' if number == signal.SIGINT else f'stopped by {signal.Signals(number).name}')
  status, patterns = 128 + number, unfinished_patterns()
  if patterns and sys.executable:
    options = ['-I', '-S', '-c', _REMOVE, str(status), *patterns]
    with contextlib.suppress(OSError):
      os.execv(sys.executable, [sys.executable, *options])
  os._exit(status)


def _flush() -> None:
  with contextlib.suppress(OSError, ValueError):
    if sys.stdout is not None:
      sys.stdout.flush()


def _say(text: str) -> None:
  """Writes a line to standard error, if that does not have to wait.

  Not by `print`: the main thread may be within one, and cannot begin another.
  """
  with contextlib.suppress(OSError, ValueError):
    if select.select([], [2], [], 0)[1]:
      os.write(2, f'\n{text}\n'.encode())


def _children() -> set[int]:
  """Returns the ids of the child processes; without /proc, of multiprocessing's only."""
  children = {child.pid for child in multiprocessing.active_children() if child.pid}
  for path in glob.glob('/proc/self/task/*/children'):
    with contextlib.suppress(OSError):  # the thread has ended
      children |= set(map(int, Path(path).read_text().split()))
  return children
