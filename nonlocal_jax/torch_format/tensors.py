"""Tensors of PyTorch files as NumPy arrays: storages, allocated once, and views of them."""

import math
import sys
from typing import Any, cast

import ml_dtypes
import numpy as np

from nonlocal_jax.torch_format.bounded_file import BoundedFile, RefusedError
from nonlocal_jax.torch_format.unpickler import Inert, Names, is_shape

_DTYPES = {
  **{f'torch.{name}': np.dtype(name) for name in (
    'bool', 'uint8', 'uint16', 'uint32', 'uint64', 'int8', 'int16', 'int32', 'int64',
    'float16', 'float32', 'float64', 'complex64', 'complex128',
  )},
  **{f'torch.{name}': np.dtype(getattr(ml_dtypes, name)) for name in (
    'bfloat16', 'float8_e4m3fn', 'float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz',
  )},
}  # fmt: skip
_STORAGE_DTYPES = {
  'torch.BoolStorage': _DTYPES['torch.bool'],
  'torch.ByteStorage': _DTYPES['torch.uint8'],
  'torch.CharStorage': _DTYPES['torch.int8'],
  'torch.ShortStorage': _DTYPES['torch.int16'],
  'torch.IntStorage': _DTYPES['torch.int32'],
  'torch.LongStorage': _DTYPES['torch.int64'],
  'torch.HalfStorage': _DTYPES['torch.float16'],
  'torch.BFloat16Storage': _DTYPES['torch.bfloat16'],
  'torch.FloatStorage': _DTYPES['torch.float32'],
  'torch.DoubleStorage': _DTYPES['torch.float64'],
  'torch.ComplexFloatStorage': _DTYPES['torch.complex64'],
  'torch.ComplexDoubleStorage': _DTYPES['torch.complex128'],
  'torch.storage.UntypedStorage': _DTYPES['torch.uint8'],
}


_KEY_LIMIT = 256  # characters of a storage's key, which is a short number
_ARRAY_NBYTES = 128  # about what an array takes beside its data


class Storage(np.ndarray):
  """The memory behind tensors: contiguous, one-dimensional, of the dtype in the file."""


class Storages:
  """The storages of one file by their keys, each allocated once; their data are read later.

  Args:
    file: The file.
  """

  def __init__(self, file: BoundedFile):
    self.by_key: dict[str, Storage] = {}
    self._file = file

  def load(self, persistent_id: Any) -> Storage:
    """The storage with a persistent id.

    Args:
      persistent_id: ('storage', class, key, device, length), and in the legacy format also None or
        a view (key, start, length).

    Returns:
      The storage or a view into it, as yet without its data.

    Raises:
      RefusedError: If it is larger than the file.
      ValueError: If the id is invalid; like others that `read_pickle` translates.
    """
    kind, storage_class, key, _device, length, *view = persistent_id
    is_key = type(key) is str and len(key) <= _KEY_LIMIT
    if kind != 'storage' or not is_key or not is_shape((length,)):
      raise ValueError('not the id of a storage')
    dtype = _STORAGE_DTYPES[storage_class.name]
    if key not in self.by_key:
      self.by_key[key] = self._new(length, dtype)
    storage = self.by_key[key]
    if storage.size != length or (storage.dtype != dtype and length > 0):
      raise ValueError('one storage with two lengths or dtypes')
    if view and view[0] is not None:
      _view_key, start, size = view[0]
      if not is_shape((start, size)) or start + size > length:
        raise ValueError('a view outside its storage')
      storage = storage[start : start + size]
    return cast(Storage, storage.view(dtype))

  def _new(self, length: int, dtype: np.dtype) -> Storage:
    if length * dtype.itemsize > self._file.size:
      raise RefusedError(
        f'is cut off or damaged, download or copy it again: it should hold {length:,} values of '
        f'{dtype} in one place, which is more than the whole file'
      )
    self._file.allow_data(length * dtype.itemsize)
    return np.empty(length, dtype).view(Storage)


def to_native(storage: Storage, byte_order: str) -> None:
  """Swaps a storage's bytes in place where it was read in another byte order than this machine's.

  Args:
    storage: The storage, just read.
    byte_order: 'little' or 'big', as in the file.
  """
  if byte_order != sys.byteorder:
    storage.byteswap(inplace=True)


def tensor_names(file: BoundedFile, byte_order: str) -> Names:
  """PyTorch's names in checkpoints.

  Args:
    file: The file whose budget covers tensors that are larger than their storage.
    byte_order: 'little' or 'big', as in the file.

  Returns:
    Names for `read_pickle`, to be used with the `load` of a `Storages`.
  """

  def tensor(
    storage: Any,
    start: Any,
    shape: Any,
    strides: Any,
    _requires_grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
  ) -> np.ndarray:
    return _view(file, storage, storage.dtype, start, shape, strides, metadata)

  def tensor_with_dtype(
    storage: Any,
    start: Any,
    shape: Any,
    strides: Any,
    _requires_grad: Any,
    _hooks: Any,
    dtype: Inert,
    metadata: Any = None,
  ) -> np.ndarray:
    numpy_dtype = _DTYPES[dtype.name]
    if byte_order != sys.byteorder and numpy_dtype.itemsize > 1:
      raise RefusedError(
        f'has values of {dtype.name} in {byte_order}-endian order, which this machine cannot read: '
        'convert them to another dtype where they were saved'
      )
    return _view(file, storage, numpy_dtype, start, shape, strides, metadata)

  def size(shape: Any) -> tuple[int, ...]:
    if not is_shape(shape):
      raise ValueError('not a shape')
    return shape

  return {
    **dict.fromkeys(_DTYPES),
    **dict.fromkeys(_STORAGE_DTYPES),
    'torch.Size': size,
    'torch.device': lambda _kind, _index=None: Inert('torch.device'),
    'torch._utils._rebuild_tensor': tensor,
    'torch._utils._rebuild_tensor_v2': tensor,
    'torch._utils._rebuild_tensor_v3': tensor_with_dtype,
    'torch._utils._rebuild_parameter': lambda data, _requires_grad, _hooks: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, _requires_grad, _hooks, _state: data,
  }


def _view(
  file: BoundedFile,
  storage: Any,
  dtype: np.dtype,
  start: Any,
  shape: Any,
  strides: Any,
  metadata: Any,
) -> np.ndarray:
  """An array of `shape` over a storage; `start` and `strides` count elements."""
  if type(metadata) is dict and metadata:
    raise RefusedError(
      'has a lazily conjugated or negated tensor, which is not read here: '
      'save its resolve_conj() or resolve_neg()'
    )
  if type(storage) is not Storage or not is_shape((start,)):
    raise TypeError('not a storage and a place in it')
  if not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
    raise ValueError('not a shape and strides')
  size = math.prod(shape)
  file.allow(_ARRAY_NBYTES + 16 * len(shape))
  if size == 0:
    return np.empty(shape, dtype)
  last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if (last + 1) * dtype.itemsize > storage.nbytes:
    raise RefusedError(
      f'is damaged: its tensor of shape {str(shape)[:80]} does not fit into its storage of '
      f'{storage.nbytes:,} bytes, download or copy the file again'
    )
  # Repeated elements cost nothing here, but they do as soon as somebody copies the array.
  file.allow(max(0, size * dtype.itemsize - storage.nbytes))
  byte_strides = [stride * dtype.itemsize for stride in strides]
  return np.ndarray(shape, dtype, storage, start * dtype.itemsize, byte_strides)
