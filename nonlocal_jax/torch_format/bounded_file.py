"""Reads untrusted files: never past the end, and with bounded work and memory."""

import io
import zlib

import numpy as np

_LINE_LIMIT = 256
_CHUNK = 2**20
# Three times what a ResNet-101 with AdamW, a moving average and logs takes: 88,000.
_OPCODES_LIMIT = 300_000
# What lies beside the weights; the logs of 160,000 iterations take 75 MiB.
_OBJECTS_LIMIT = 112 * 2**20  # bytes in all
_OBJECT_LIMIT = 32 * 2**20  # bytes of one of them


class RefusedError(Exception):
  """Raised for refused files; the message continues a sentence that begins with the path."""


class BoundedFile:
  """An open binary file with budgets for what is made at its request.

  Attributes:
    file: The file.
    size: Its size in bytes.
    opcodes: How many more opcodes its pickles may have.

  Args:
    file: The file, seekable and buffered.
    size: Its size in bytes.
  """

  def __init__(self, file: io.BufferedIOBase, size: int):
    self.file = file
    self.size = size
    self.opcodes = _OPCODES_LIMIT
    self._for_data = size
    self._for_objects = min(_OBJECTS_LIMIT, 2**24 + 4 * size)

  def read(self, nbytes: int) -> bytes:
    """Reads the next `nbytes` bytes.

    Args:
      nbytes: How many.

    Returns:
      Exactly so many bytes.

    Raises:
      RefusedError: If the file ends before, or these are more than any object needs.
    """
    # A large read would allocate its result first, so the size is checked before.
    if nbytes > 4096:
      if nbytes > self.size - self.file.tell():
        raise _cut_off()
      if nbytes > _OBJECT_LIMIT:
        raise _wants_too_much()
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

  def crc32(self, nbytes: int) -> int:
    """The CRC-32 of the next `nbytes` bytes.

    Raises:
      RefusedError: If the file ends before.
    """
    value = 0
    while nbytes:
      data = self.read(min(nbytes, _CHUNK))
      value = zlib.crc32(data, value)
      nbytes -= len(data)
    return value

  def read_line(self) -> str:
    """Reads a line without its newline.

    Raises:
      RefusedError: If no newline follows soon.
    """
    line = self.file.readline(_LINE_LIMIT)
    if not line.endswith(b'\n'):
      raise _cut_off()
    return line[:-1].decode()

  def allow_data(self, nbytes: int) -> None:
    """Takes `nbytes` from the budget for data of tensors; call it before allocating them.

    Args:
      nbytes: How many, 0 or more.

    Raises:
      RefusedError: If the tensors now have more bytes than the file.
    """
    self._for_data -= nbytes
    if self._for_data < 0:
      raise _wants_too_much()

  def allow(self, nbytes: int) -> None:
    """Takes `nbytes` from the budget for all other objects; call it before making them.

    Args:
      nbytes: About how many, 0 or more.

    Raises:
      RefusedError: If the objects are now larger than what lies beside weights ever is.
    """
    self._for_objects -= nbytes
    if self._for_objects < 0:
      raise _wants_too_much()


def _cut_off() -> RefusedError:
  return RefusedError('ends too early: it is cut off or damaged, download or copy it again')


def _wants_too_much() -> RefusedError:
  return RefusedError(
    'is damaged or made to do harm: it asks for more memory than its weights explain; save the '
    "weights alone, with torch.save({'state_dict': model.state_dict()}, path)"
  )
