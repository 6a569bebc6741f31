"""Decodes the brushes of Label Studio."""

from typing import Any

import numpy as np

_BITS = [f'{byte:08b}' for byte in range(256)]


def alpha_in(data: Any, pixels: int) -> np.ndarray:
  """Decodes a brush: an RGBA image in runs of values, of which the opacity counts.

  Bits, most significant first: 32 for the number of values, 5 for the bits of a value less 1, four
  times 4 for sizes of lengths less 1; then runs: 1 bit, whether one value is repeated, 2 for which
  size, the length less 1 in so many bits, and the value or values (rle-pack of
  https://github.com/thi-ng/umbrella).

  Args:
    data: A list of bytes.
    pixels: How many there must be.

  Returns:
    (pixels,) bool, where the brush covers the image.

  Raises:
    ValueError: If it is no such list, or has another number of pixels.
  """
  if not isinstance(data, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in data):
    raise ValueError('has an rle that is no list of bytes')
  if len(data) > 100 + 7 * pixels:
    raise ValueError('has an rle that is longer than one of single values')
  bits = ''.join(map(_BITS.__getitem__, data))
  position = 0

  def read(count: int) -> int:
    nonlocal position
    position += count
    if position > len(bits):
      raise ValueError('has an rle that breaks off')
    return int(bits[position - count : position], 2)

  total = read(32)
  if total != 4 * pixels:
    raise ValueError(f'has an rle of {total / 4:g} pixels, and not {pixels}')
  if read(5) != 7:
    raise ValueError('has an rle of values that are not of 8 bits')
  sizes = [read(4) + 1 for _ in range(4)]
  values = np.empty(total, np.uint8)
  start = 0
  while start < total:
    repeated = read(1)
    length = read(sizes[read(2)]) + 1
    if start + length > total:
      raise ValueError('has an rle whose runs are too long')
    content = read(8 if repeated else 8 * length)
    if repeated:
      values[start : start + length] = content
    else:
      values[start : start + length] = np.frombuffer(content.to_bytes(length, 'big'), np.uint8)
    start += length
  return values.reshape(-1, 4)[:, 3] > 0
