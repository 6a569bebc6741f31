"""Writes PyTorch checkpoints (.pth) without PyTorch, in the format of PyTorch 1.6 and later."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import whole_file

_ALIGNMENT = 64  # bytes; lets PyTorch memory-map the data
_STORAGE_CLASSES = {np.dtype(np.float32): 'FloatStorage', np.dtype(np.int64): 'LongStorage'}


def write_torch_checkpoint(
  path: Path, state_dict: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
  """Writes what `torch.save({'meta': meta, 'state_dict': state_dict}, path)` would.

  Args:
    path: The file; must not exist. It is written atomically.
    state_dict: float32 and int64 arrays by name, of any strides.
    meta: Strings, numbers, lists, tuples and dicts.

  Raises:
    UserError: If `path` exists or cannot be written.
  """
  if path.exists():
    raise UserError(f'{path} exists; remove it or choose another name.')
  with whole_file(path) as partial, zipfile.ZipFile(partial, 'w') as archive:
    _add(archive, 'archive/data.pkl', _pickle(state_dict, meta))
    _add(archive, 'archive/byteorder', b'little')
    for key, array in enumerate(state_dict.values()):
      little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder('<'))
      _add(archive, f'archive/data/{key}', little_endian.reshape(-1).view(np.uint8))
    _add(archive, 'archive/version', b'3\n')


def _add(archive: zipfile.ZipFile, name: str, data: bytes | np.ndarray) -> None:
  """Adds a member whose data are aligned, by a padding field in its header."""
  member = zipfile.ZipInfo(name)
  assert archive.fp is not None
  unpadded = archive.fp.tell() + 30 + len(name) + 4  # a member's header, its name, the field's
  padding = -unpadded % _ALIGNMENT
  member.extra = b'FB' + struct.pack('<H', padding) + bytes(padding)
  member.file_size = len(data)
  with archive.open(member, 'w') as file:
    file.write(data.data if isinstance(data, np.ndarray) else data)


def _pickle(state_dict: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
  """Pickles both; each array is a call of PyTorch's function that rebuilds it from its storage."""
  tensors = (
    _plain(name) + _tensor(str(key), array) for key, (name, array) in enumerate(state_dict.items())
  )
  weights = pickle.EMPTY_DICT + pickle.MARK + b''.join(tensors) + pickle.SETITEMS
  items = _plain('meta') + _plain(dict(meta)) + _plain('state_dict') + weights
  head = pickle.PROTO + b'\x02'
  return head + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor(key: str, array: np.ndarray) -> bytes:
  strides = [1]
  for size in reversed(array.shape[1:]):
    strides.insert(0, strides[0] * size)
  storage_class = _global('torch', _STORAGE_CLASSES[array.dtype.newbyteorder('=')])
  storage = (
    _tuple(_plain('storage'), storage_class, _plain(key), _plain('cpu'), _plain(array.size))
    + pickle.BINPERSID
  )
  offset, requires_grad = _plain(0), _plain(False)
  hooks = _global('collections', 'OrderedDict') + pickle.EMPTY_TUPLE + pickle.REDUCE
  shape, strides_ = _plain(array.shape), _plain(tuple(strides[: array.ndim]))
  arguments = _tuple(storage, offset, shape, strides_, requires_grad, hooks)
  return _global('torch._utils', '_rebuild_tensor_v2') + arguments + pickle.REDUCE


def _plain(value: Any) -> bytes:
  """The opcodes that put a plain value on the stack."""
  return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


def _tuple(*items: bytes) -> bytes:
  return pickle.MARK + b''.join(items) + pickle.TUPLE
