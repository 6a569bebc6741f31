"""Reads untrusted files: never past the end, and with memory limited by the file's size."""

import io

import numpy as np

_LINE_LIMIT = 256


class RefusedError(Exception):
  """Raised for refused files; the message continues a sentence that begins with the path."""


class BoundedFile:
  """An open binary file with its size and a budget for memory allocated at its request.

  Args:
    file: The file, seekable and buffered.
    size: Its size in bytes.
  """

  def __init__(self, file: io.BufferedIOBase, size: int):
    self.file = file
    self.size = size
    self._allowance = 2 * size + 2**24

  def read(self, nbytes: int) -> bytes:
    """Reads the next `nbytes` bytes.

    Args:
      nbytes: How many.

    Returns:
      Exactly so many bytes.

    Raises:
      RefusedError: If the file ends before.
    """
    # A large read would allocate its result first, so the size is checked before.
    if nbytes > 4096 and nbytes > self.size - self.file.tell():
      raise _cut_off()
    data = self.file.read(nbytes)
    if len(data) != nbytes:
      raise _cut_off()
    return data

  def read_into(self, array: np.ndarray) -> None:
    """Fills an array with the next bytes.

    Args:
      array: One contiguous dimension, any dtype.

    Raises:
      RefusedError: If the file ends before.
    """
    rest = memoryview(array.view(np.uint8).data)
    while len(rest):
      count = self.file.readinto(rest)
      if not count:
        raise _cut_off()
      rest = rest[count:]

  def read_line(self) -> str:
    """Reads a line without its newline.

    Raises:
      RefusedError: If no newline follows soon.
    """
    line = self.file.readline(_LINE_LIMIT)
    if not line.endswith(b'\n'):
      raise _cut_off()
    return line[:-1].decode()

  def allow(self, nbytes: int) -> None:
    """Takes `nbytes` from the budget; call it before allocating them.

    Args:
      nbytes: How many, 0 or more.

    Raises:
      RefusedError: If the file has now asked for more than twice its size.
    """
    self._allowance -= nbytes
    if self._allowance < 0:
      raise RefusedError(
        'is damaged or made to do harm: it asks for more memory than its size explains'
      )


def _cut_off() -> RefusedError:
  return RefusedError('ends too early: it is cut off or damaged, download or copy it again')
