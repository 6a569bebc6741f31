"""Refusing a .pth file that was made to harm takes little time and little memory."""

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nonlocal_jax.torch_format.writer import write_torch_checkpoint

SECONDS = 2  # of one core
MEMORY = 2**28  # bytes more than an empty file's refusal takes

# Reads each file in a process of its own, as `load` does; a fork spares it the imports.
READ_ALL = """
import json, os, sys
from pathlib import Path
from nonlocal_jax.errors import UserError
from nonlocal_jax.weights.loading import read_torch_weights

def read(path):
  try:
    read_torch_weights(Path(path))
    return 'read'
  except UserError as error:
    return str(error)

for path in sys.argv[1:]:
  here, there = os.pipe()
  child = os.fork()
  if child == 0:
    said = 'no UserError'
    try:
      said = read(path)
    except BaseException as error:
      said = f'no UserError but {type(error).__name__}'
    finally:
      os.write(there, said[:5000].encode())
      os._exit(0)
  os.close(there)
  with os.fdopen(here) as pipe:
    said = pipe.read()
  _, status, used = os.wait4(child, 0)
  seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
  print(json.dumps([Path(path).stem, said, status, seconds, peak]), flush=True)
"""

BEGINNING = b'\x80\x02'
LEGACY = b''.join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
OPCODES = 400_000  # more than are allowed
WIDE = '\N{GRINNING FACE}'.encode()


def long1(value: int) -> bytes:
  data = value.to_bytes(8, 'little', signed=True)
  return pickle.LONG1 + b'\x08' + data


def text(value: bytes) -> bytes:
  return pickle.BINUNICODE + struct.pack('<I', len(value)) + value


def storage(key: bytes, length: int) -> bytes:
  names = text(b'storage') + b'ctorch\nFloatStorage\n' + text(key) + text(b'cpu')
  return b'(' + names + long1(length) + b'tQ'


def keys_of_equal_hash(count: int) -> list[tuple[int, int]]:
  """Pairs of integers that Python's hash of tuples (xxHash without a secret) maps to one value."""
  first, second, offset = 11400714785074694791, 14029467366897019727, 2870177450012600261
  with np.errstate(over='ignore'):
    a = np.arange(count * 9, dtype=np.uint64)
    mixed = np.uint64(offset) + a * np.uint64(second)
    mixed = (mixed << np.uint64(31)) | (mixed >> np.uint64(33))
    mixed *= np.uint64(first)
    b = ((np.uint64(12345) - mixed) * np.uint64(pow(second, -1, 2**64))).view(np.int64)
  small = np.abs(b) < 2**60
  return list(zip(a[small].tolist()[:count], b[small].tolist()[:count], strict=True))


def tuple_keys() -> bytes:
  keys = keys_of_equal_hash(60_000)
  assert len(keys) == 60_000
  assert len(set(map(hash, keys))) == 1
  return b'}(' + b''.join(long1(a) + long1(b) + b'\x86N' for a, b in keys) + b'u.'


def equal_texts(size: int) -> bytes:
  """A dict whose one key is looked up again and again by an equal text that is another object."""
  key = text(b'k' * size)
  return b'}q\x01' + key + b'Ns0' + key + b'q\x020' + b'h\x01h\x02Ns0' * 60_000 + b'N.'


def many_dimensions() -> bytes:
  shape = b'(' + b'K\x01' * 64 + b'tq\x02'
  arguments = b'(' + storage(b'0', 1) + b'K\x00' + shape + b'h\x02\x89Ntq\x01'
  return REBUILD + b'q\x000' + arguments + b'(' + b'h\x00h\x01R' * 90_000 + b't.'


def copies(function: bytes, argument: bytes) -> bytes:
  return function + b'q\x000' + argument + b'\x85q\x010(' + b'h\x00h\x01R' * 90_000 + b't.'


def array_copies() -> bytes:
  data = pickle.SHORT_BINSTRING + b'\x01b'
  new = (
    b'cnumpy.core.multiarray\n_reconstruct\nq\x000cnumpy\nndarray\n(K\x00t' + data + b'\x87q\x010'
  )
  state = b'(K\x01K\x00' + data + b'\x89' + text(b'x') + b'tq\x020'
  return new + state + b'(' + b'h\x00h\x01R' * 90_000 + b't.'


PICKLES: dict[str, Callable[[], bytes]] = {
  'tuples of equal hash as keys': tuple_keys,
  'one tuple as a key, many times': lambda: (
    b'}q\x01K\x01K\x02\x86q\x020' + b'h\x01h\x02Ns0' * 70_000 + b'N.'
  ),
  'equal long texts as keys': lambda: equal_texts(2**20),
  'equal texts as keys': lambda: equal_texts(4000),
  'deep lists': lambda: b']' * 140_000 + b'a' * 139_999 + b'.',
  'deep tuples': lambda: b'N' + b'\x85' * 250_000 + b'.',
  'many lists': lambda: b'(' + b']' * OPCODES + b't.',
  'many sets': lambda: b'(' + b'\x8f' * OPCODES + b't.',
  'many names': lambda: b'(' + b'ctorch\nfloat32\n' * OPCODES + b't.',
  'a huge memo': lambda: (
    b'(N' + b''.join(b'r' + struct.pack('<I', 2**32 - 1 - i) for i in range(OPCODES)) + b't.'
  ),
  'many integers': lambda: b'(' + (b'\x8a\xff' + b'\x7f' * 255) * 250_000 + b't.',
  'many wide texts': lambda: b'(' + (b'\x8c\xff' + WIDE + b'a' * 251) * 250_000 + b't.',
  'an integer of millions of digits': lambda: (
    b'\x8b' + struct.pack('<i', 2**22) + b'\x7f' * 2**22 + b'.'
  ),
  'a giant text': lambda: text(b'a' * 50_000_000) + b'.',
  'a giant wide text': lambda: text(WIDE + b'a' * 30_000_000) + b'.',
  'giant texts': lambda: b'(' + text(b'a' * 30_000_000) * 3 + b't.',
  'giant bytes': lambda: b'(' + (b'B' + struct.pack('<I', 2**24) + bytes(2**24)) * 8 + b't.',
  'a giant name': lambda: text(b'a' * 20_000_000) + text(b'b' * 20_000_000) + b'\x93.',
  'a giant name of weights': lambda: b'}' + text('ä'.encode() * 10_000_000) + b'Ns.',
  'copies of a dict': lambda: copies(
    b'ccollections\nOrderedDict\n', b'(' + b'K\x01K\x02\x86' * 10_000 + b't'
  ),
  'copies of a text': lambda: copies(b'c_codecs\nencode\n', text(b'a' * 2**20) + text(b'latin1'))
  .replace(b'\x85q\x010', b'\x86q\x010'),
  'copies of an array': array_copies,
  'tensors of many dimensions': many_dimensions,
  'a storage of a claimed size': lambda: storage(b'0', 2**40) + b'.',
  "storages of the file's size": lambda: (
    b'(' + b''.join(storage(b'%d' % i, 2**20) for i in range(1000)) + text(b' ' * 2**22) + b't.'
  ),
  'many storages': lambda: (
    b'(' + b''.join(storage(b'%d' % i, 0) for i in range(30_000)) + b't.'
  ),
}  # fmt: skip


def stored_zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Callable:
  def write(path: Path) -> None:
    with zipfile.ZipFile(path, 'w', compression) as archive:
      for name, data in members.items():
        archive.writestr(name, data)

  return write


def many_members(count: int) -> Callable[[Path], None]:
  """A zip file whose table of contents has `count` entries, all of the same data."""

  def write(path: Path) -> None:
    pickled = BEGINNING + b'}.'
    name = b'x/data.pkl'
    local = struct.pack('<4s5H3I2H', b'PK\3\4', 20, *[0] * 4, 0, len(pickled), len(pickled), 10, 0)
    local += name + pickled
    entry = struct.pack(
      '<4s6H3I5H2I', b'PK\1\2', 20, 20, *[0] * 4, 0, len(pickled), len(pickled), 10, *[0] * 6
    )
    table = np.tile(np.frombuffer(entry + name, np.uint8), (count, 1))
    digits = np.arange(1, count)[:, None] // 10 ** np.arange(8, -1, -1) % 10
    table[1:, -9:] = digits + ord('0')
    end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 65535, 65535, table.size, len(local), 0)
    path.write_bytes(local + table.tobytes() + end)

  return write


# Enough of a network that its config is read; the rest of it is missing.
SOME = {
  'decode_head.conv_seg.weight': (3, 16, 1, 1),
  **{f'backbone.layer{stage}.0.conv1.weight': (2, 2, 1, 1) for stage in range(1, 5)},
}


def weights(more: dict[str, tuple[int, ...]], **meta: object) -> Callable[[Path], None]:
  def write(path: Path) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in {**SOME, **more}.items()}
    write_torch_checkpoint(path, arrays, meta)

  return write


def doubled(depth: int) -> list:
  """Lists that hold one another twice: quick to make, and of 2^depth items when they are shown."""
  value: list = []
  for _ in range(depth):
    value = [value, value]
  return value


BLOCKS = {f'backbone.layer{s}.{i}.x': (1,) for s in range(1, 5) for i in range(66)}
NAMED = 'decode_head.nl_block.theta.conv.weight'
FILES: dict[str, Callable[[Path], None]] = {
  'nothing': lambda path: path.write_bytes(b''),
  'near names': weights({f'{NAMED}{i}': (1,) for i in range(1000)}),
  'many near names': weights({f'{NAMED}{i}': (1,) for i in range(9_000)}),
  'long near names': weights({f'{NAMED * 100}{i}': (1,) for i in range(1000)}),
  'many blocks': weights(BLOCKS),
  'as many blocks as allowed': weights(dict(list(BLOCKS.items())[66:129])),
  'many classes': weights({'decode_head.conv_seg.weight': (2**17, 1, 1, 1)}),
  'many channels': weights({'backbone.layer1.0.conv1.weight': (2**20, 1, 1, 1)}),
  'many inputs': weights({'backbone.stem.0.weight': (1, 2**20, 1, 1)}),
  'config of integers of many digits': weights({}, cfg=f'model = dict(x=0x{"f" * 90_000})'),
  'config of decimal digits': weights({}, cfg=f'model = dict(x={"9" * 90_000})'),
  'config of a huge mean': weights(
    {}, cfg=f'model = dict(data_preprocessor=dict(mean=[0x{"f" * 5000}] * 3))'
  ),
  'config in brackets': weights({}, cfg='(' * 90_000),
  'config of minuses': weights({}, cfg=f'x = {"-" * 90_000}1'),
  'config of assignments': weights({}, cfg='x=1;' * 24_000 + 'model = dict(x=1)'),
  'config of a list': weights({}, cfg=f'model = dict(x=[{"1," * 49_000}])'),
  'config of attributes': weights({}, cfg=f'x = a{".a" * 49_000}'),
  'a long config': weights({}, cfg='x = 1\n' * 4_000_000),
  'lists of lists as the version': weights({}, cfg='model = dict()', mmseg_version=doubled(60)),
  'lists of lists as classes': weights({}, CLASSES=doubled(60), PALETTE=doubled(60)),
  'a test protocol of lists': weights(
    {}, cfg='model = dict()', nonlocal_jax=f'[{"[]," * 5_000_000}0]'
  ),
  'a test protocol in brackets': weights({}, cfg='model = dict()', nonlocal_jax='[' * 90_000),
  'a million members': many_members(1_000_000),
  'members up to the limit': many_members(70_000),
  'a zip bomb': stored_zip({'x/data.pkl': bytes(2**28)}, zipfile.ZIP_DEFLATED),
  'a zip bomb beside the weights': stored_zip(
    {'x/data.pkl': BEGINNING + b'}.', 'x/byteorder': bytes(2**28)}, zipfile.ZIP_DEFLATED
  ),
}


def hostile_files(folder: Path) -> Iterator[Path]:
  for name, make in FILES.items():
    path = folder / f'{name}.pth'
    make(path)
    yield path
  for name, make in PICKLES.items():
    pickled = BEGINNING + make()
    path = folder / f'{name} (zip).pth'
    stored_zip({'x/data.pkl': pickled, 'x/data/0': bytes(4)})(path)
    yield path
    path = folder / f'{name} (legacy).pth'
    path.write_bytes(LEGACY + pickled + pickle.dumps([], 2))
    yield path


@pytest.mark.slow
def test_refusals_take_little_time_and_memory(tmp_path):
  paths = list(hostile_files(tmp_path))
  done = subprocess.run(
    [sys.executable, '-c', READ_ALL, *map(str, paths)],
    check=True,
    cwd=Path(__file__).parents[1],
    capture_output=True,
    text=True,
  )
  results = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
  assert len(results) == len(paths)
  least = results['nothing'][-1]
  faults = []
  for name, (said, status, seconds, peak) in results.items():
    print(f'{seconds:6.2f} s {(peak - least) / 2**20:6.0f} MiB  {name}: {said[-100:]}')
    is_one_sentence = said.startswith(str(tmp_path)) and said.endswith('.') and '\n' not in said
    is_short = len(said) < len(str(tmp_path)) + 1700
    if not (is_one_sentence and is_short and status == 0):
      faults.append((name, said[:300], status))
    if seconds > SECONDS or peak - least > MEMORY:
      faults.append((name, seconds, peak - least))
  assert not faults
