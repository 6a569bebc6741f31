"""Standard output and error that never end a program: what nobody can read any more is dropped."""

import contextlib
import io
import os
import sys


class _UnfailingFile(io.FileIO):
  """A file descriptor that is connected to the null device after its first error.

  Attributes:
    error: That error; None so far, and for a reader that closed its pipe, as `| head` does.
  """

  error: OSError | None = None

  def write(self, data) -> int | None:
    """Writes bytes; returns how many."""
    try:
      return super().write(data)
    except BrokenPipeError:
      pass
    except OSError as error:
      self.error = error
    _connect_to_null(self.fileno())
    return len(data)


def keep_streams_open() -> None:
  """Makes standard input, output and error usable, whatever they are connected to.

  Where a program is started without them, other files would take their descriptors, and whatever
  writes to standard error would write into these files. Characters that the encoding of a stream
  lacks are written as escapes.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      _connect_to_null(descriptor)
  for name, descriptor in (('stdout', 1), ('stderr', 2)):
    stream = getattr(sys, name)
    if stream is None:  # Python was started without; the descriptor may be another file's by now
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 (for the rest of the program)
    elif stream is getattr(sys, f'__{name}__'):  # else somebody captures it
      with contextlib.suppress(OSError):
        stream.flush()
      is_live = descriptor == 2 or os.isatty(descriptor)
      setattr(sys, name, _unfailing(descriptor, stream.encoding, is_live=is_live))


def write_errors_to(descriptor: int) -> None:
  """Makes a descriptor Python's standard error, which ends no program either."""
  sys.stderr.flush()
  sys.stderr = _unfailing(descriptor, sys.stderr.encoding, is_live=True)


def output_error() -> OSError | None:
  """Flushes standard output; returns why some of it is lost, unless its reader has gone."""
  raw = getattr(getattr(sys.stdout, 'buffer', None), 'raw', None)
  if not isinstance(raw, _UnfailingFile):
    return None
  sys.stdout.flush()
  return raw.error


def _unfailing(descriptor: int, encoding: str, *, is_live: bool) -> io.TextIOWrapper:
  file = io.BufferedWriter(_UnfailingFile(descriptor, 'w', closefd=False))
  return io.TextIOWrapper(
    file, encoding=encoding, errors='backslashreplace', line_buffering=is_live
  )


def _connect_to_null(descriptor: int) -> None:
  null = os.open(os.devnull, os.O_RDWR)
  if null != descriptor:
    os.dup2(null, descriptor)
    os.close(null)
