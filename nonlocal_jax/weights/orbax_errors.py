"""One sentence for whatever Orbax raises."""

import contextlib
import errno
import gc
import logging as python_logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, Self

from absl import logging

from nonlocal_jax.errors import UserError

_QUIET_SECS = 0.2  # without a message from what Orbax abandoned, after which no more are expected
_MOST_SECS = 5.0
_ASYNCIO_LOG = python_logging.getLogger('asyncio')


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
  """Turns whatever Orbax raises into one error, without the lines that its threads add.

  Hooks, filters of warnings and absl's verbosity are as before when the error is raised.

  Args:
    what: Which of the user's files cannot be read or written.

  Raises:
    UserError: `what` and the reason.
  """
  with QuietThreads() as quiet:
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # damaged files, full disks: Orbax has no narrower type for them
      line = (str(error).strip().splitlines() or [type(error).__name__])[0]
      # TensorStore adds a thousand characters of JSON, and before or after it a code or none.
      reason = re.split(r' \[(?=\w+=)', line, maxsplit=1)[0]
      last = reason.rpartition(': ')[2]
      if '[os_error_code=' in line or last in map(os.strerror, errno.errorcode):
        reason = last
      quiet.wait_for_abandoned(error)
      raise UserError(f'{what}: {reason}.') from error


class QuietThreads:
  """While this context lasts, Orbax's threads do not print errors that the main one will raise.

  They do so by four ways: hooks of threads and of what is collected, absl's log, and asyncio's.
  """

  def __enter__(self) -> Self:
    """Replaces the hooks."""
    self._hooks = sys.unraisablehook, threading.excepthook
    self._verbosity = logging.get_verbosity()
    self._last_message = -float('inf')
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook, threading.excepthook = self._on_unraisable, self._on_thread
    _ASYNCIO_LOG.addFilter(self._is_kept)
    return self

  def __exit__(self, *unused) -> None:
    """Puts them back."""
    sys.unraisablehook, threading.excepthook = self._hooks
    logging.set_verbosity(self._verbosity)
    _ASYNCIO_LOG.removeFilter(self._is_kept)

  def wait_for_abandoned(self, error: Exception) -> None:
    """Waits until reads and writes that Orbax gave up have complained of that.

    Args:
      error: The error at which it gave up, whose frames hold some of them.
    """
    with warnings.catch_warnings():
      # Of several writes it drops the rest at a first error; Python warns when it collects them.
      warnings.filterwarnings(
        'ignore', r"coroutine 'async_serialize.*' was never awaited", RuntimeWarning
      )
      reason: BaseException | None = error
      while reason is not None:
        traceback.clear_frames(reason.__traceback__)
        reason = reason.__cause__ or reason.__context__
      gc.collect()
      started = time.monotonic()
      while time.monotonic() - max(started, self._last_message) < _QUIET_SECS:
        if time.monotonic() - started > _MOST_SECS:
          break
        time.sleep(0.02)

  def _on_unraisable(self, unraisable: Any) -> None:
    """Drops what is said of reads and writes that end after Orbax gave up."""
    if str(unraisable.exc_value) == 'Event loop is closed':
      self._last_message = time.monotonic()
    else:
      self._hooks[0](unraisable)

  def _on_thread(self, arguments: Any) -> None:
    """Drops errors of Orbax's threads."""
    if type(arguments.thread).__module__.startswith('orbax.'):
      self._last_message = time.monotonic()
    else:
      self._hooks[1](arguments)

  def _is_kept(self, record: python_logging.LogRecord) -> bool:
    """Drops what asyncio says of reads whose errors nobody asked for, as another had come first."""
    if 'exception was never retrieved' not in record.getMessage():
      return True
    self._last_message = time.monotonic()
    return False
