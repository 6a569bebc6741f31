"""Breaks images and label maps in every way, and reads them for prediction and for preparation.

    python -m tests.campaigns.broken_images --count=2000 --seed=0

Each file must be read as the whole one, or refused with a `UserError`. JPEG, WebP, BMP, TIFF and
GIF have no checksums, and neither has a PNG file whose checksum was made anew: where these are read
with other pixels, it is counted apart, except in preparation if the size is another. A crash, a
file that takes more than 20 seconds, more than 4 GiB or any other exception is a fault.
"""

import argparse
import collections
import functools
import io
import json
import resource
import select
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from nonlocal_jax.data.layouts import Sample
from nonlocal_jax.data.transforms import decode_image, decode_label
from nonlocal_jax.data.validation import read_sample
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.images import read_image

_SECONDS, _BYTES = 20, 4 << 30
_SIZE = (48, 64)  # (height, width)
_SIDES = (0, 1, 47, 63, 65, 255, 4096, 11_000, 40_000, 2**16 - 1, 2**31 - 1, 2**32 - 1)


@functools.cache
def whole_files() -> dict[str, tuple[str, bytes, str]]:
  """Returns suffix, contents and role ('image' or 'label') of each kind of file, by its name."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
  array = cv2.resize(coarse, _SIZE[::-1], interpolation=cv2.INTER_CUBIC)
  rgb = Image.fromarray(array)
  files: dict[str, tuple[str, bytes, str]] = {}

  def add(name: str, image: Image.Image, kind: str, **options) -> None:
    file = io.BytesIO()
    image.save(file, kind, **options)
    suffix = {'JPEG': 'jpg', 'TIFF': 'tif', 'JPEG2000': 'jp2'}.get(kind, kind.lower())
    files[name] = suffix, file.getvalue(), 'image'

  add('JPEG', rgb, 'JPEG', quality=90)
  add('JPEG, progressive', rgb, 'JPEG', quality=90, progressive=True)
  add('JPEG, gray', rgb.convert('L'), 'JPEG')
  add('JPEG, CMYK', rgb.convert('CMYK'), 'JPEG')
  add('PNG', rgb, 'PNG')
  add('PNG, alpha', rgb.convert('RGBA'), 'PNG')
  add('PNG, palette', rgb.convert('P', palette=Image.Palette.ADAPTIVE), 'PNG')
  add('PNG, 16 bits', Image.fromarray(array[..., 0].astype(np.uint16) * 257), 'PNG')
  add('PNG, 1 bit', rgb.convert('1'), 'PNG')
  add('WebP', rgb, 'WEBP', quality=80)
  add('WebP, lossless', rgb, 'WEBP', lossless=True)
  add('BMP', rgb, 'BMP')
  add('TIFF', rgb, 'TIFF')
  add('TIFF, LZW', rgb, 'TIFF', compression='tiff_lzw')
  add('TIFF, deflate', rgb, 'TIFF', compression='tiff_adobe_deflate')
  add('GIF', rgb.convert('P', palette=Image.Palette.ADAPTIVE), 'GIF')
  add('JPEG 2000', rgb, 'JPEG2000')
  for bits in (1, 2, 4, 8):
    label = cv2.resize(
      rng.integers(0, 2**bits, (6, 8), np.uint8), _SIZE[::-1], interpolation=cv2.INTER_NEAREST
    )
    files[f'label, {bits} bits'] = 'png', _png(label, bits, color=0), 'label'
    files[f'label, palette of {bits} bits'] = 'png', _png(label, bits, color=3), 'label'
  return files


def _png(label: np.ndarray, bits: int, *, color: int) -> bytes:
  """A PNG file with samples of 1 to 8 bits, gray (0) or of a palette (3)."""
  unpacked = np.unpackbits(label[..., None], axis=-1)[..., 8 - bits :].reshape(len(label), -1)
  rows = np.packbits(unpacked, axis=-1)
  header = struct.pack('>IIBBBBB', *label.shape[::-1], bits, color, 0, 0, 0)
  palette = [(b'PLTE', bytes(3 * i % 256 for i in range(3 << bits)))] if color == 3 else []
  data = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
  chunks = [(b'IHDR', header), *palette, (b'IDAT', data), (b'IEND', b'')]
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    for kind, body in chunks
  )


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
  place, changed = int(rng.integers(8 * len(data))), bytearray(data)
  changed[place // 8] ^= 1 << place % 8
  return bytes(changed)


def _several(data: bytes, rng: np.random.Generator) -> bytes:
  for _ in range(int(rng.integers(2, 20))):
    data = _flipped(data, rng)
  return data


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
  return data[: int(rng.integers(len(data)))]


def _hole(data: bytes, rng: np.random.Generator) -> bytes:
  start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
  filling = rng.integers(0, 256, stop - start, np.uint8).tobytes()
  return data[:start] + (filling if rng.random() < 0.5 else bytes(stop - start)) + data[stop:]


def _missing(data: bytes, rng: np.random.Generator) -> bytes:
  start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
  return data[:start] + data[stop:]


def _twice(data: bytes, rng: np.random.Generator) -> bytes:
  start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
  return data[:stop] + data[start:]


def _wrong_header(data: bytes, rng: np.random.Generator) -> bytes:
  others = [other for _, other, _ in whole_files().values()]
  other = others[int(rng.integers(len(others)))]
  length = int(rng.choice([2, 4, 8, 16, 32]))
  return other[:length] + data[length:]


def _other_size(data: bytes, rng: np.random.Generator) -> bytes:
  """Puts another number in the place of a side in the header; checksums are made anew."""
  side, name = int(rng.choice(_SIDES)), int(rng.choice(_SIZE))
  for form in ('>I', '<I', '>H', '<H'):
    place = data[:400].find(struct.pack(form, name))
    if place >= 0:
      number = struct.pack(form, side % 256 ** struct.calcsize(form))
      data = data[:place] + number + data[place + len(number) :]
      break
  return _with_checksum(data)


def _other_kind(data: bytes, rng: np.random.Generator) -> bytes:
  """Changes bits and color type of a PNG file, or another byte near the start; checksums anew."""
  changed = bytearray(data)
  place = int(rng.choice([24, 25, 26, 27, 28])) if data[:4] == b'\x89PNG' else int(rng.integers(40))
  changed[place] = int(rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255]))
  return _with_checksum(bytes(changed))


def _with_checksum(data: bytes) -> bytes:
  if data[:4] != b'\x89PNG':
    return data
  return data[:29] + struct.pack('>I', zlib.crc32(data[12:29])) + data[33:]


_BREAKS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
  'one bit': _flipped,
  'several bits': _several,
  'cut off': _cut,
  'a hole': _hole,
  'a part missing': _missing,
  'a part twice': _twice,
  'header of another': _wrong_header,
  'another size': _other_size,
  'another kind': _other_kind,
}
_FORGED = ('another size', 'another kind')


def case(index: int, seed: int) -> tuple[str, str, str, bytes, str]:
  """Returns name and suffix of the file, how it was broken, its contents and its role."""
  rng = np.random.default_rng([seed, index])
  files = whole_files()
  name = list(files)[index % len(files)]
  suffix, data, role = files[name]
  how = list(_BREAKS)[index // len(files) % len(_BREAKS)]
  return name, suffix, how, _BREAKS[how](data, rng), role


def outcome(index: int, seed: int, folder: Path) -> list[tuple[str, str]]:
  """Reads one broken file; returns what each reader made of it."""
  name, suffix, how, data, role = case(index, seed)
  whole = whole_files()[name][1]
  has_checksums = suffix == 'png' and how not in _FORGED
  broken = folder / f'broken.{suffix}'
  broken.write_bytes(data)
  found = []
  if role == 'image':
    expected = decode_image(whole)

    def audited() -> np.ndarray:
      label = folder / 'label.png'
      Image.fromarray(np.zeros(_SIZE, np.uint8)).save(label)
      return decode_image(read_sample(Sample('x', broken, label)).image)

    readers = {'prediction': lambda: read_image(broken), 'preparation': audited}
  else:
    expected = decode_label(whole)

    def labels() -> np.ndarray:
      image = folder / 'image.png'
      Image.fromarray(np.zeros((*_SIZE, 3), np.uint8)).save(image)
      return decode_label(read_sample(Sample('x', image, broken)).label)

    readers = {'preparation': labels}
  for reader, read in readers.items():
    try:
      result = read()
    except UserError:
      found.append((reader, 'refused'))
    except BaseException as error:  # noqa: BLE001 (which is what the campaign looks for)
      found.append((reader, f'fault: {type(error).__name__}: {error}'))
    else:
      if np.array_equal(result, expected):
        found.append((reader, 'identical'))
      elif has_checksums:
        found.append((reader, 'fault: other pixels in spite of checksums'))
      elif result.shape != expected.shape and reader == 'preparation':
        found.append((reader, 'fault: another size'))
      else:
        found.append((reader, 'other pixels'))
  return found


def work(start: int, stop: int, seed: int) -> None:
  """Reads files and prints a line on each; runs in a process of its own, which may crash."""
  resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
  with tempfile.TemporaryDirectory() as folder:
    for index in range(start, stop):
      print(json.dumps([index, outcome(index, seed, Path(folder))]), flush=True)


def outcomes(count: int, seed: int) -> dict[int, list[tuple[str, str]]]:
  """Runs `work` on all files, and goes on after the one that crashed or hung."""
  found: dict[int, list[tuple[str, str]]] = {}
  while len(found) < count:
    start = len(found)
    arguments = ['--count', str(count), '--seed', str(seed), '--start', str(start)]
    process = subprocess.Popen(
      [sys.executable, '-m', 'tests.campaigns.broken_images', *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    while len(found) < count:
      patience = _SECONDS if len(found) > start else 10 * _SECONDS  # the program starts first
      ready, _, _ = select.select([process.stdout], [], [], patience)
      line = process.stdout.readline() if ready else b''
      if not line:
        what = f'status {process.wait()}' if ready else f'longer than {_SECONDS} s'
        found[len(found)] = [('program', f'fault: {what}')]
        break
      index, of_file = json.loads(line)
      found[index] = of_file
    process.kill()
    process.wait()
  return found


def main() -> int:
  """Prints a table; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--count', type=int, default=2000, help='number of files')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--start', type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.start is not None:
    work(options.start, options.count, options.seed)
    return 0
  found = outcomes(options.count, options.seed)
  table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  faults = []
  for index, of_file in sorted(found.items()):
    name, _, how, _, _ = case(index, options.seed)
    for reader, what in of_file:
      table[f'{name}; {reader}'][what.partition(':')[0]] += 1
      if what.startswith('fault'):
        faults.append(f'{index}: {name}, {how}; {reader}: {what}')
  columns = ('identical', 'refused', 'other pixels', 'fault')
  print(f'{"":45}' + ''.join(f'{column:>14}' for column in columns))
  for name, counts in sorted(table.items()):
    print(f'{name:45}' + ''.join(f'{counts[column]:14}' for column in columns))
  print(f'{len(found)} files, {len(faults)} faults')
  print('\n'.join(faults))
  return int(bool(faults))


if __name__ == '__main__':
  sys.exit(main())
