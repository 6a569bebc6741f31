"""One sentence for whatever Orbax raises."""

import contextlib
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

from absl import logging

from nonlocal_jax.errors import UserError


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
  """Turns whatever Orbax raises into one error, without the lines that its threads add.

  Args:
    what: Which of the user's files cannot be read or written.

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
    # Of several writes it drops the rest at a first error; Python warns when it collects them.
    warnings.filterwarnings(
      'ignore', r"coroutine 'async_serialize.*' was never awaited", RuntimeWarning
    )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    system_error = re.search(r'([^:]*) \[os_error_code', lines[0])
    raise UserError(f'{what}: {system_error[1].strip() if system_error else lines[0]}.') from error
  finally:
    logging.set_verbosity(verbosity)


class QuietThreads:
  """While this context lasts, Orbax's threads do not print errors that the main one will raise.

  They do so by three ways: hooks of threads and of what is collected, and absl's log.
  """

  def __enter__(self) -> Self:
    """Replaces the hooks."""
    self._hooks = sys.unraisablehook, threading.excepthook
    self._verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _unless_abandoned(sys.unraisablehook)
    threading.excepthook = _unless_of_orbax(threading.excepthook)
    return self

  def __exit__(self, error_type: type[BaseException] | None, *unused) -> None:
    """Puts them back; after an error threads that Orbax abandoned have more to say."""
    if error_type is None:
      sys.unraisablehook, threading.excepthook = self._hooks
      logging.set_verbosity(self._verbosity)


def _unless_of_orbax(hook: Callable[[Any], object]) -> Callable[[Any], object]:
  def filtered(arguments: Any) -> None:
    if not type(arguments.thread).__module__.startswith('orbax.'):
      hook(arguments)

  return filtered


def _unless_abandoned(hook: Callable[[Any], object]) -> Callable[[Any], object]:
  """`hook`, but silent about reads and writes still under way when Orbax gave up at a first one."""

  def filtered(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  return filtered
