"""The reader of PyTorch files against torch.load, and against files made to harm."""

import codecs
import collections
import copy
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from nonlocal_jax.errors import UserError
from nonlocal_jax.torch_format.reader import read_torch_checkpoint, read_torch_file

NEWER_DTYPES = ('uint16', 'uint32', 'uint64', 'float8_e4m3fn', 'float8_e5m2')
DTYPES = (
  'bool', 'uint8', 'int8', 'int16', 'int32', 'int64', 'float16', 'bfloat16', 'float32', 'float64',
  'complex64', 'complex128', *NEWER_DTYPES,
)  # fmt: skip
LAYOUTS = {
  'contiguous': lambda t: t,
  'transposed': lambda t: t.permute(2, 0, 1),
  'strided': lambda t: t[1:, ::2, ::3],
  'channels last': lambda t: t[None].contiguous(memory_format=torch.channels_last),
  'expanded': lambda t: t[:, :1].expand(-1, 4, -1),
  'scalar': lambda t: t[1, 2, 1],
  'empty': lambda t: t[:0],
  'shared': lambda t: {'all': t, 'row': t[1], 'column': t[:, 0], 'again': t},
  'parameter': lambda t: torch.nn.Parameter(t, requires_grad=False),
}
FORMATS = ('zip', 'legacy')


def save(path: Path, contents: object, file_format: str, **options: object) -> Path:
  torch.save(contents, path, _use_new_zipfile_serialization=file_format == 'zip', **options)
  return path


def random_tensor(dtype: str) -> torch.Tensor:
  """Any bit pattern, NaNs of all kinds among them, of shape (3, 4, 5)."""
  torch_dtype = getattr(torch, dtype)
  if dtype == 'bool':
    return torch.rand(3, 4, 5) < 0.5
  nbytes = 3 * 4 * 5 * torch_dtype.itemsize
  return torch.randint(256, (nbytes,), dtype=torch.uint8).view(torch_dtype).reshape(3, 4, 5)


def assert_same(actual: object, expected: object) -> None:
  """Same types, shapes, strides and bits, all the way down."""
  if isinstance(expected, torch.Tensor):
    assert type(actual) is np.ndarray
    assert str(actual.dtype) == str(expected.dtype).removeprefix('torch.')
    assert actual.shape == tuple(expected.shape)
    if expected.numel() > 1:
      assert actual.strides == tuple(s * actual.itemsize for s in expected.stride())
    bits = expected.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    assert actual.tobytes() == bits.tobytes()
  elif isinstance(expected, dict):
    assert list(actual) == list(expected)
    for key in expected:
      assert_same(actual[key], expected[key])
  elif isinstance(expected, list | tuple):
    assert isinstance(actual, list | tuple)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
      assert_same(one, other)
  elif isinstance(expected, np.ndarray | np.generic):
    assert (type(actual), actual.dtype) == (type(expected), expected.dtype)
    np.testing.assert_array_equal(actual, expected)
  else:
    assert (type(actual), actual) == (type(expected), expected)


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_tensors_are_bit_equal_with_torch_load(tmp_path, dtype, file_format):
  torch.manual_seed(DTYPES.index(dtype))
  for name, layout in LAYOUTS.items():
    contents = {'x': layout(random_tensor(dtype))}
    path = save(tmp_path / f'{name}.pth', contents, file_format)
    # torch.load cannot read its own legacy files of newer dtypes.
    readable = file_format == 'zip' or dtype not in NEWER_DTYPES
    expected = torch.load(path, weights_only=False) if readable else contents
    assert_same(read_torch_file(path), expected)


def random_contents(rng: random.Random, depth: int = 4) -> object:
  """Nested containers with leaves of every kind that a checkpoint has beside weights."""
  leaves = (
    lambda: torch.rand(rng.choice([(), (2,), (0, 3), (2, 3, 1)])),
    lambda: rng.choice([None, True, False, 0, 255, 65535, -1, 2**31, -(2**40), 2**70, 0.5, 1e300]),
    lambda: rng.choice(['', 'weight', 'ä€😀', 'x' * 300, b'', b'\x00\xff' * 200, 1 + 2j]),
    lambda: rng.choice([np.arange(6.0).reshape(2, 3).T, np.array([], '>i2'), np.ones(3, '>f4')]),
    lambda: rng.choice([np.float64(2.5), np.int32(3), np.bool_(True), {1, 'a'}, frozenset({2})]),
    lambda: rng.choice([torch.Size([2, 3]), collections.Counter('aab')]),
  )
  if depth == 0:
    return rng.choice(leaves)()
  items = [random_contents(rng, depth - rng.randint(1, depth)) for _ in range(rng.randrange(6))]
  keyed = [(rng.choice([i, str(i), (i, 'k'), i / 2]), item) for i, item in enumerate(items)]
  containers = (
    list, tuple, lambda _: dict(keyed), lambda _: collections.OrderedDict(keyed),
    lambda _: collections.defaultdict(list, keyed),
  )  # fmt: skip
  return rng.choice(containers)(items)


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('file_format', FORMATS)
def test_nested_contents_equal_those_of_torch_load(tmp_path, file_format, protocol):
  rng = random.Random(protocol)
  torch.manual_seed(0)
  for index in range(20):
    path = tmp_path / f'{index}.pth'
    save(path, random_contents(rng), file_format, pickle_protocol=protocol)
    assert_same(read_torch_file(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize('file_format', FORMATS)
def test_shared_storages_stay_shared(tmp_path, file_format):
  whole = torch.arange(12.0)
  path = save(tmp_path / 'a.pth', [whole, whole[4:].view(2, 4), whole.clone()], file_format)
  first, part, other = read_torch_file(path)
  first[5] = -1
  assert part[0, 1] == -1
  assert other[5] == 5


def test_view_metadata_of_old_legacy_files(tmp_path):
  """PyTorch up to 0.3 gave a storage inside another a view: (key, start, length)."""
  storage = PersistentId('storage', torch.FloatStorage, '0', 'cpu', 6, ('1', 2, 3))
  pickled = pickle_with_ids(rebuilt(storage, 1, (2,), (1,)))
  data = struct.pack('<q6f', 6, *range(6))
  path = write(tmp_path / 'view.pth', legacy_bytes(pickled, ['0'], data))
  assert_same(read_torch_file(path), torch.load(path, weights_only=False))
  np.testing.assert_array_equal(read_torch_file(path), [3, 4])


@pytest.mark.parametrize('dtype', ['int8', 'int16', 'bfloat16', 'float32', 'int64', 'complex64'])
def test_big_endian_zip_files(tmp_path, dtype):
  path = save(tmp_path / 'little.pth', {'x': random_tensor(dtype)[:, ::2]}, 'zip')
  unit = 4 if dtype == 'complex64' else getattr(torch, dtype).itemsize

  def to_big(name: str, data: bytes) -> bytes:
    if name.endswith('/byteorder'):
      return b'big'
    return np.frombuffer(data, f'<i{unit}').byteswap().tobytes() if '/data/' in name else data

  big = rewritten_zip(path, tmp_path / 'big.pth', to_big)
  assert_same(read_torch_file(big), torch.load(path))
  assert_same(read_torch_file(big), torch.load(big))


def test_legacy_data_are_little_endian_whatever_machine_wrote_them(tmp_path):
  path = save(tmp_path / 'a.pth', torch.arange(3.0), 'legacy')
  flagged = path.read_bytes().replace(b'little_endianq\x02\x88', b'little_endianq\x02\x89')
  assert flagged != path.read_bytes()
  write(path, flagged)
  assert_same(read_torch_file(path), torch.load(path))


def test_big_endian_values_without_a_storage_class_are_refused(tmp_path):
  path = save(tmp_path / 'a.pth', torch.ones(2, dtype=torch.uint16), 'zip')
  big = rewritten_zip(
    path, tmp_path / 'big.pth', lambda name, data: b'big' if name.endswith('/byteorder') else data
  )
  assert 'torch.uint16 in big-endian order' in refusal(big)


def mmseg_checkpoint(version: int) -> dict[str, object]:
  """What mmsegmentation 0.x publishes, and what 1.x saves in training."""
  model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
  model(torch.ones(2, 3, 4, 4)).sum().backward()
  optimizer.step()
  if version == 0:
    meta = {'CLASSES': ('road', 'car'), 'PALETTE': [[1, 2, 3], [4, 5, 6]], 'seed': None, 'iter': 8}
    return {'meta': meta, 'state_dict': model.state_dict()}
  history = HistoryBuffer([0.5, 0.25], [1, 1])
  return {
    'meta': {'seed': np.int64(3), 'dataset_meta': {'classes': ('road', 'car')}},
    'state_dict': model.state_dict(),
    'message_hub': {'log_scalars': collections.OrderedDict(loss=history)},
    'optimizer': optimizer.state_dict(),
    'param_schedulers': [{'power': 0.9, 'base_values': [0.01]}],
  }


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('version', [0, 1])
def test_mmseg_checkpoints(tmp_path, version, file_format):
  contents = mmseg_checkpoint(version)
  path = save(tmp_path / 'a.pth', contents, file_format)
  checkpoint = read_torch_checkpoint(path)
  assert_same(checkpoint.state_dict, contents['state_dict'])
  assert_same(checkpoint.meta, contents['meta'])
  if version == 1:
    history = read_torch_file(path)['message_hub']['log_scalars']['loss']
    assert history.name == 'mmengine.logging.history_buffer.HistoryBuffer'
    assert_same(read_torch_file(path)['optimizer'], contents['optimizer'])


@pytest.mark.parametrize('file_format', FORMATS)
def test_bare_state_dicts(tmp_path, file_format):
  weights = collections.OrderedDict(a=torch.ones(2), b=torch.zeros(()))
  for contents in (weights, {'state_dict': weights}):
    checkpoint = read_torch_checkpoint(save(tmp_path / 'a.pth', contents, file_format))
    assert_same(checkpoint.state_dict, weights)
    assert checkpoint.meta == {}


@pytest.mark.parametrize(
  ('contents', 'part'),
  [
    ([1], 'holds no state dict but an object of type list'),
    ({}, 'holds an empty state dict or none'),
    ({'state_dict': None}, 'holds an empty state dict or none (NoneType)'),
    ({'model': {'a': torch.ones(1)}, 'epoch': 3}, "has dict under 'model', not a tensor"),
    ({'state_dict': {'a': 'text'}}, "has str under 'a', not a tensor"),
  ],
)
def test_files_without_a_state_dict(tmp_path, contents, part):
  path = save(tmp_path / 'a.pth', contents, 'zip')
  assert part in refusal(path, read_torch_checkpoint)


def test_reads_without_torch_installed(tmp_path):
  path = save(tmp_path / 'a.pth', {'x': torch.ones(2, dtype=torch.bfloat16)}, 'zip')
  code = (
    "import sys; sys.modules['torch'] = None\n"
    'from nonlocal_jax.torch_format.reader import read_torch_file\n'
    f"assert read_torch_file({str(path)!r})['x'].tolist() == [1, 1]"
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize('file_format', FORMATS)
def test_memory_stays_near_the_size_of_the_file(tmp_path, file_format):
  contents = {str(i): torch.rand(2**18) for i in range(32)}
  path = save(tmp_path / 'a.pth', contents, file_format)
  del contents
  assert peak_memory(lambda: read_torch_file(path)) < 1.1 * path.stat().st_size


# Files made to harm.


class Reduced:
  """Pickled as a call of `function`, with `state` to set afterwards."""

  def __init__(self, function, *arguments, state=None):
    self.reduced = (function, arguments, state)

  def __reduce__(self):
    return self.reduced


class PersistentId(tuple):
  """Pickled as a persistent id."""

  def __new__(cls, *items):
    return super().__new__(cls, items)


class PicklerWithIds(pickle.Pickler):
  def persistent_id(self, obj):
    return tuple(obj) if isinstance(obj, PersistentId) else None


def pickle_with_ids(contents: object) -> bytes:
  buffer = io.BytesIO()
  PicklerWithIds(buffer, protocol=2).dump(contents)
  return buffer.getvalue()


def rebuilt(storage: PersistentId, start: int, shape: object, strides: object) -> Reduced:
  return Reduced(torch._utils._rebuild_tensor_v2, storage, start, shape, strides, False, None)


def float_storage(length: int, key: str = '0') -> PersistentId:
  return PersistentId('storage', torch.FloatStorage, key, 'cpu', length)


def legacy_bytes(pickled: bytes, keys: list[str] | None = None, data: bytes = b'') -> bytes:
  header = (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})
  beginning = b''.join(pickle.dumps(item, 2) for item in header)
  return beginning + pickled + pickle.dumps(keys or [], 2) + data


def zip_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', compression) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return buffer.getvalue()


def rewritten_zip(path: Path, new_path: Path, change) -> Path:
  with zipfile.ZipFile(path) as archive:
    members = {name: change(name, archive.read(name)) for name in archive.namelist()}
  return write(new_path, zip_bytes(members))


def write(path: Path, data: bytes) -> Path:
  path.write_bytes(data)
  return path


def refusal(path: Path, read=read_torch_file) -> str:
  """The message of the UserError that reading must give: one sentence that begins with the path."""
  with pytest.raises(UserError) as caught:
    read(path)
  message = str(caught.value)
  assert message.startswith(f'{path} ')
  assert message.endswith('.')
  assert '\n' not in message
  assert len(message) < len(str(path)) + 350
  return message


def peak_memory(function) -> int:
  tracemalloc.start()
  try:
    function()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def hostile_calls(marker: Path) -> dict[str, Reduced]:
  touch = f"open({str(marker)!r}, 'w').close()"
  return {
    f'{os.system.__module__}.system': Reduced(os.system, f'touch {marker}'),
    'eval': Reduced(eval, touch),
    'exec': Reduced(exec, touch),
    'Popen': Reduced(subprocess.Popen, ['touch', str(marker)]),
    'pathlib': Reduced(Path.touch, marker),
    'torch.serialization.load': Reduced(torch.load, str(marker)),
    'getattr': Reduced(getattr, collections.OrderedDict, 'fromkeys'),
  }


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('name', hostile_calls(Path('x')))
def test_nothing_that_a_file_names_is_run(tmp_path, name, file_format):
  marker = tmp_path / 'marker'
  contents = {'state_dict': {'a': torch.ones(2)}, 'meta': hostile_calls(marker)[name]}
  path = save(tmp_path / 'a.pth', contents, file_format)
  assert name in refusal(path)
  assert not marker.exists()


def test_the_hostile_files_would_run_elsewhere(tmp_path):
  """Otherwise the test above could not fail."""
  marker = tmp_path / 'marker'
  for name in (f'{os.system.__module__}.system', 'eval', 'exec', 'pathlib'):
    torch.load(save(tmp_path / 'a.pth', [hostile_calls(marker)[name]], 'zip'), weights_only=False)
    marker.unlink()


reconstruct = np.empty(0).__reduce__()[0]
ITEMS = [(i, i) for i in range(999)]
TEXT = 'x' * 99_999
HOSTILE_PICKLES = {
  'storage larger than the file': rebuilt(float_storage(2**40), 0, (1,), (1,)),
  'storage of negative length': rebuilt(float_storage(-1), 0, (1,), (1,)),
  'tensor past its storage': rebuilt(float_storage(4), 0, (5,), (1,)),
  'offset past the storage': rebuilt(float_storage(4), 4, (1,), (1,)),
  'negative offset': rebuilt(float_storage(4), -1, (1,), (1,)),
  'stride past the storage': rebuilt(float_storage(4), 0, (2, 2), (3, 1)),
  'negative stride': rebuilt(float_storage(4), 3, (2,), (-1,)),
  'huge expanded tensor': rebuilt(float_storage(4), 0, (2**40,), (0,)),
  'huge empty tensor': rebuilt(float_storage(4), 0, (2**62, 2**62, 0), (1, 1, 1)),
  'too many dimensions': rebuilt(float_storage(4), 0, (1,) * 100, (1,) * 100),
  'shape of floats': rebuilt(float_storage(4), 0, (1.0,), (1,)),
  'array as storage': rebuilt(np.ones(4), 0, (1,), (1,)),
  'one storage, two lengths': [float_storage(4), float_storage(2)],
  'one storage, two dtypes': [
    float_storage(4),
    PersistentId('storage', torch.IntStorage, '0', 'cpu', 4),
  ],
  'huge array': Reduced(
    reconstruct, np.ndarray, (0,), b'b', state=(1, (10**12,), np.dtype('f8'), False, b'')
  ),
  'array of objects': np.array([None], object),
  'array with too few data': Reduced(
    reconstruct, np.ndarray, (0,), b'b', state=(1, (2,), np.dtype('f8'), False, bytes(8))
  ),
  'state for a tensor': Reduced(
    torch._utils._rebuild_parameter, np.ones(3), 0, None, state=(1, (0,), np.dtype('f8'), 0, b'')
  ),
  'a thousand copies of a dict': [Reduced(collections.OrderedDict, ITEMS) for _ in range(999)],
  'a thousand copies of a text': [Reduced(codecs.encode, TEXT, 'latin1') for _ in range(999)],
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE_PICKLES)
def test_impossible_sizes_are_refused(tmp_path, name):
  pickled = pickle_with_ids(HOSTILE_PICKLES[name])
  legacy = legacy_bytes(pickled, ['0'], struct.pack('<q4f', 4, *range(4)))
  as_zip = zip_bytes({'x/data.pkl': pickled, 'x/data/0': bytes(16)})
  for data in (legacy, as_zip):
    path = write(tmp_path / 'a.pth', data)
    assert peak_memory(lambda path=path: refusal(path)) < 2**25


RAW_PICKLES = {
  'text longer than the file': b'\x80\x02X\xff\xff\xff\xff.',
  'bytes longer than the file': b'\x80\x03B\xff\xff\xff\xff.',
  'name without an end': b'\x80\x02c' + b'a' * 9999,
  'deep tuple as a key': b'\x80\x02})' + b'\x85' * 500_000 + b'Ns.',
  'list as a key': b'\x80\x02}]Ns.',
  'huge integer as a key': b'\x80\x02}\x8a\xff' + b'\x7f' * 255 + b'Ns.',
  'call of a class that may only be named': b'\x80\x02ctorch\nFloatStorage\n)R.',
  'call of a text': b'\x80\x02X\x01\x00\x00\x00a)R.',
  'call without arguments': b'\x80\x02ccollections\nOrderedDict\nNR.',
  'state for a list': b'\x80\x02]}b.',
  'items for a tuple': b'\x80\x02)(NNe.',
  'other opcode for a class': b'\x80\x02(i__builtin__\neval\n.',
  'number of the copyreg registry': b'\x80\x02\x82\x01.',
  'nothing on the stack': b'\x80\x02R.',
  'nothing in the memo': b'\x80\x02h\x05.',
  'no mark': b'\x80\x02t.',
  'no end': b'\x80\x02}',
  'too many opcodes': b'\x80\x02' + b'N0' * 1_000_001,
  'tensor as persistent id': b'\x80\x02K\x01Q.',
}


@pytest.mark.parametrize('name', RAW_PICKLES)
def test_malformed_pickles_are_refused(tmp_path, name):
  for data in (legacy_bytes(RAW_PICKLES[name]), zip_bytes({'x/data.pkl': RAW_PICKLES[name]})):
    refusal(write(tmp_path / 'a.pth', data))


def test_deep_nesting_does_not_overflow_the_stack(tmp_path):
  pickled = b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.'
  contents = read_torch_file(write(tmp_path / 'a.pth', zip_bytes({'x/data.pkl': pickled})))
  assert type(contents) is list
  assert len(contents) == 1


def test_state_cannot_change_what_is_called(tmp_path):
  """With Python's pickle this sets attributes of the class for the rest of the process."""
  pickled = b'\x80\x02ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemsNsb.'
  path = write(tmp_path / 'a.pth', zip_bytes({'x/data.pkl': pickled}))
  assert read_torch_file(path).name == 'collections.OrderedDict'
  assert collections.OrderedDict(a=1).items()


def zip_with_overlapping_members() -> bytes:
  """Many storages of 4 MiB whose data are the same 4 MiB of the file."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    storages = [float_storage(2**20, str(key)) for key in range(64)]
    archive.writestr('x/data.pkl', pickle_with_ids(storages))
    archive.writestr('x/data/0', bytes(2**22))
    for key in range(1, 64):
      member = copy.copy(archive.getinfo('x/data/0'))
      member.filename = f'x/data/{key}'
      archive.filelist.append(member)
  return buffer.getvalue()


ONE_STORAGE = pickle_with_ids(float_storage(4))
UNREADABLE = {
  'nothing': (b'', 'is empty'),
  'text': (b'hello world, this is no checkpoint', "is a file that begins with b'hello wo'"),
  'JPEG': (b'\xff\xd8\xff\xe0\x00\x10JFIF', 'is a JPEG image: expected a checkpoint written by'),
  'HTML': (b'<!DOCTYPE html><title>404</title>', 'is a web page or XML'),
  'LFS': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
  'gzip': (b'\x1f\x8b\x08\x00', 'is compressed with gzip'),
  'safetensors': (struct.pack('<Q', 9) + b'{"a":1}  ', 'is a safetensors file'),
  'plain pickle': (pickle.dumps({'a': 1}), 'is a pickle that torch.save did not write'),
  'tar': (bytes(257) + b'ustar' + bytes(300), 'is a tar archive'),
  'other zip': (zip_bytes({'model.pth': b'x'}), 'is a zip archive without data.pkl'),
  'zip with a similar name': (zip_bytes({'x/data_pkl': b''}), 'is a zip archive without data.pkl'),
  'TorchScript': (
    zip_bytes({'x/data.pkl': b'', 'x/constants.pkl': b'', 'x/code/x.py': b''}),
    'is a TorchScript archive',
  ),
  'compressed zip': (
    zip_bytes({'x/data.pkl': ONE_STORAGE, 'x/data/0': bytes(16)}, zipfile.ZIP_DEFLATED),
    'is a compressed zip archive',
  ),
  'overlapping members': (zip_with_overlapping_members(), 'asks for more memory'),
  'cut-off zip': (zip_bytes({'x/data.pkl': ONE_STORAGE})[:-40], 'probably cut off'),
  'zip without a storage': (zip_bytes({'x/data.pkl': ONE_STORAGE}), "storage '0' of its pickle is"),
  'zip with a short storage': (
    zip_bytes({'x/data.pkl': ONE_STORAGE, 'x/data/0': bytes(12)}),
    "the storage '0' has 12 bytes, not 4 values of float32",
  ),
  'zip with odd byte order': (
    zip_bytes({'x/data.pkl': ONE_STORAGE, 'x/byteorder': b'middle'}),
    "gives its byte order as 'middle'",
  ),
  'legacy cut off in its data': (
    legacy_bytes(ONE_STORAGE, ['0'], struct.pack('<q', 4) + bytes(15)),
    'ends too early: it is cut off or damaged, download or copy it again',
  ),
  'legacy with another length': (
    legacy_bytes(ONE_STORAGE, ['0'], struct.pack('<q', 3) + bytes(12)),
    "the storage '0' has 3 values, not 4",
  ),
  'legacy without a storage': (legacy_bytes(ONE_STORAGE), 'are not those that its pickle uses'),
  'legacy with a storage twice': (
    legacy_bytes(ONE_STORAGE, ['0', '0'], (struct.pack('<q', 4) + bytes(16)) * 2),
    'are not those that its pickle uses',
  ),
  'legacy of another protocol': (
    legacy_bytes(b'').replace(b'M\xe9\x03', b'M\xea\x03'),
    'its protocol is not 1001',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', UNREADABLE)
def test_messages_say_what_is_wrong(tmp_path, name):
  data, part = UNREADABLE[name]
  path = write(tmp_path / 'a.pth', data)
  assert part in refusal(path)


def test_messages_for_paths_without_a_file(tmp_path):
  assert 'does not exist' in refusal(tmp_path / 'missing.pth')
  assert 'is not a file' in refusal(tmp_path)


@pytest.mark.parametrize('file_format', FORMATS)
def test_whole_models_and_unknown_kinds_of_tensors_are_named(tmp_path, file_format):
  path = save(tmp_path / 'a.pth', torch.nn.Linear(1, 1), file_format)
  assert "names 'torch.nn.modules.linear.Linear'" in refusal(path)
  assert 'model.state_dict()' in refusal(path)
  save(path, torch.ones(2).to_sparse(), file_format)
  assert "names 'torch._utils._rebuild_sparse_tensor'" in refusal(path)
  save(path, torch.ones(2, dtype=torch.complex64).conj(), file_format)
  assert 'resolve_conj()' in refusal(path)


def mutated(data: bytes, rng: random.Random) -> bytes:
  """One to three of: a cut, a flipped bit, noise, a false size, a piece copied, a piece gone."""
  for _ in range(rng.randint(1, 3)):
    at, other = rng.randrange(len(data)), rng.randrange(len(data))
    size = rng.choice([1, 4, 8, rng.randint(1, 64)])
    match rng.randrange(6):
      case 0:
        data = data[: max(at, 1)]
      case 1:
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
      case 2:
        data = data[:at] + rng.randbytes(size) + data[at + size :]
      case 3:
        number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
        data = data[:at] + number.to_bytes(8, 'little')[:size] + data[at + min(size, 8) :]
      case 4:
        data = data[:at] + data[other : other + size] + data[at:]
      case 5:
        data = data[:at] + data[at + size :] or b'\x00'
  return data


def fuzz_seeds(folder: Path) -> list[bytes]:
  shared = torch.arange(20.0)
  tensors = {'a': shared[2:8].view(2, 3).T, 'b': shared, 'c': torch.ones(3, dtype=torch.uint16)}
  contents = (tensors, mmseg_checkpoint(1), {'state_dict': tensors, 'meta': {'CLASSES': ('a',)}})
  return [
    save(folder / 'seed.pth', item, file_format, pickle_protocol=protocol).read_bytes()
    for item in contents
    for file_format in FORMATS
    for protocol in (2, 4)
  ]


def test_mutated_files_are_read_or_refused(tmp_path):
  rng = random.Random(0)
  path = tmp_path / 'a.pth'
  outcomes = collections.Counter()
  seeds = fuzz_seeds(tmp_path)

  def attempt() -> None:
    try:
      read_torch_checkpoint(path)
      outcomes['read'] += 1
    except UserError:
      outcomes['refused'] += 1

  for index in range(1200):
    write(path, mutated(seeds[index % len(seeds)], rng))
    start = time.perf_counter()
    assert peak_memory(attempt) < 2**25
    assert time.perf_counter() - start < 5
  assert min(outcomes.values()) > 50, outcomes  # how many are read depends on PyTorch's layout


def test_no_flipped_bit_gives_other_values(tmp_path):
  tensors = {'a': torch.arange(500.0), 'b': torch.ones(7, 3, dtype=torch.bfloat16)}
  path = save(tmp_path / 'a.pth', {'state_dict': tensors}, 'zip')
  whole, expected = path.read_bytes(), torch.load(path)
  assert read_torch_checkpoint(path).has_checksums
  rng, refused = random.Random(0), 0
  for bit in rng.sample(range(8 * len(whole)), 800):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      contents = read_torch_file(path)
    except UserError:
      refused += 1
    else:
      assert_same(contents, expected)
  assert refused > 400


def test_files_without_checksums_are_read_and_known(tmp_path):
  tensors = {'a': torch.arange(5.0)}
  legacy = save(tmp_path / 'legacy.pth', tensors, 'legacy')
  before = torch.serialization.get_crc32_options()
  torch.serialization.set_crc32_options(False)
  try:
    plain = save(tmp_path / 'plain.pth', tensors, 'zip')
  finally:
    torch.serialization.set_crc32_options(before)
  for path in (legacy, plain):
    checkpoint = read_torch_checkpoint(path)
    assert not checkpoint.has_checksums
    assert_same(checkpoint.state_dict, tensors)
