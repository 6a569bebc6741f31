"""Reads the pickles inside PyTorch files without executing anything that they name.

Python's own `pickle` imports and calls whatever a file names, with whatever state the file gives.
Here a small machine follows the opcodes that `torch.save` writes, builds plain containers, and
calls nothing but stand-ins for a fixed list of names.
"""

import dataclasses
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np

from nonlocal_jax.torch_format.bounded_file import BoundedFile, RefusedError

_NDIM_LIMIT = 64
_ITEM_NBYTES = 128  # about what one item of a Python container takes
_NAME_LIMIT = 256  # characters of a dotted name
_KEY_LIMIT = 4096  # characters of a key: equal ones are compared again at each use
_TUPLE_KEYS_LIMIT = 1000  # uses in a file: their hashes can be made equal, and then each is slow
_HEADER_NBYTES = 64  # about what a text or an integer takes beside its contents
_SHOWN = 100  # characters of a name that messages show
# What Python raises where a pickle makes no sense to the machine or to the stand-ins.
_NONSENSE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)
_HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'

Names = Mapping[str, Callable[..., Any] | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Inert:
  """An inert placeholder for a class, function, dtype or foreign object in a pickle.

  Attributes:
    name: The dotted name.
  """

  name: str


def read_pickle(
  file: BoundedFile, names: Names, load_persistent: Callable[[Any], Any] | None = None
) -> Any:
  """Reads the pickle that begins where `file` stands, up to its end.

  Args:
    file: The file.
    names: The dotted names that the pickle may use: each with the function that stands in for it,
      or with None where it may be named but not called. See `plain_names`.
    load_persistent: Gives the object behind a persistent id; in PyTorch files, a storage. None
      allows no such id.

  Returns:
    Scalars, strings, numpy arrays and `Inert` objects in nested dicts, lists, tuples and sets.
    Ordered and default dicts and counters come as dicts.

  Raises:
    RefusedError: If the pickle uses another name, asks for too much, or is damaged.
  """
  try:
    return _run(file, names, load_persistent)
  except _NONSENSE as error:
    raise RefusedError(
      f'is damaged: its pickle makes no sense up to byte {file.file.tell()}, '
      'download or copy the file again'
    ) from error


def is_shape(value: Any) -> bool:
  """Returns whether `value` is a valid shape, or valid strides counted in elements."""
  return (
    type(value) is tuple
    and len(value) <= _NDIM_LIMIT
    and all(type(n) is int and 0 <= n < 2**63 for n in value)
  )


def plain_names(file: BoundedFile) -> Names:
  """The names that are not PyTorch's: Python's containers, numpy's arrays, MMEngine's logs.

  Args:
    file: The file whose budget covers the copies that the stand-ins make.

  Returns:
    Names for `read_pickle`.
  """
  keys = _Keys()

  def make_dict(items: Any = ()) -> dict[Any, Any]:
    file.allow(_ITEM_NBYTES * len(items))
    return _insert({}, items.items() if type(items) is dict else items, keys)

  def make_set(items: Any = ()) -> set[Any]:
    file.allow(_ITEM_NBYTES * len(items))
    return set(map(keys.check, items))

  def encode(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
      raise ValueError(encoding)
    file.allow(len(text))
    return text.encode('latin1')

  builtins = {
    'bytes': lambda: b'',
    'complex': _complex,
    'frozenset': lambda items=(): frozenset(make_set(items)),
    'getattr': _method_of_history_buffer,
    'set': make_set,
    **dict.fromkeys(('bool', 'dict', 'float', 'int', 'list', 'str', 'tuple')),
  }
  multiarray = {'_reconstruct': _empty_array, 'scalar': _scalar}
  return {
    **_in_modules(('builtins', '__builtin__'), builtins),
    **_in_modules(('numpy.core.multiarray', 'numpy._core.multiarray'), multiarray),
    'numpy.dtype': _dtype,
    'numpy.ndarray': None,
    '_codecs.encode': encode,
    'collections.Counter': make_dict,
    'collections.OrderedDict': make_dict,
    'collections.defaultdict': lambda _factory=None, items=(): make_dict(items),
    'mmcv.utils.config.ConfigDict': make_dict,
    'mmengine.config.config.ConfigDict': make_dict,
    _HISTORY_BUFFER: lambda: Inert(_HISTORY_BUFFER),
    **dict.fromkeys(f'{_HISTORY_BUFFER}.{name}' for name in ('current', 'max', 'mean', 'min')),
  }


def _in_modules(modules: Iterable[str], names: Names) -> Names:
  return {f'{module}.{name}': call for module in modules for name, call in names.items()}


def _run(file: BoundedFile, names: Names, load_persistent: Callable[[Any], Any] | None) -> Any:
  """The pickle machine: a stack of objects, the positions of its marks, and a memo."""
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}
  inert: dict[str, Inert] = {}
  keys = _Keys()

  def unpack(layout: str) -> Any:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]

  def raw(nbytes: int) -> bytes:
    file.allow(nbytes + _HEADER_NBYTES)
    return file.read(nbytes)

  def text(nbytes: int) -> str:
    data = raw(nbytes)
    # Python takes one byte for each character up to U+00FF, and up to four for all if one is above.
    if not data.isascii() and np.frombuffer(data, np.uint8).max() > 0xC3:
      file.allow(3 * nbytes)
    return data.decode('utf-8', 'surrogatepass')

  def named(module: Any, attribute: Any) -> Inert:
    name = _name(names, module, attribute)
    return inert.setdefault(name, Inert(name))

  def pop(count: int) -> tuple[Any, ...]:
    items = tuple(stack[-count:])
    del stack[-count:]
    return items

  def pop_to_mark() -> list[Any]:
    height = marks.pop()
    items = stack[height:]
    del stack[height:]
    return items

  for count in range(file.opcodes):
    opcode = file.read(1)
    # Compared in order, so the most frequent come first.
    match opcode:
      case pickle.BINPUT:
        memo[unpack('<B')] = stack[-1]
      case pickle.BINGET:
        stack.append(memo[unpack('<B')])
      case pickle.LONG_BINPUT:
        memo[unpack('<I')] = stack[-1]
      case pickle.LONG_BINGET:
        stack.append(memo[unpack('<I')])
      case pickle.BININT1:
        stack.append(unpack('<B'))
      case pickle.BINUNICODE:
        stack.append(text(unpack('<I')))
      case pickle.MARK:
        marks.append(len(stack))
      case pickle.TUPLE:
        stack.append(tuple(pop_to_mark()))
      case pickle.EMPTY_TUPLE:
        stack.append(())
      case pickle.TUPLE1:
        stack.append(pop(1))
      case pickle.TUPLE2:
        stack.append(pop(2))
      case pickle.TUPLE3:
        stack.append(pop(3))
      case pickle.REDUCE | pickle.NEWOBJ:
        stack[-2:] = [_call(names, *stack[-2:])]
      case pickle.BINPERSID if load_persistent is not None:
        stack[-1] = load_persistent(stack[-1])
      case pickle.BININT2:
        stack.append(unpack('<H'))
      case pickle.BININT:
        stack.append(unpack('<i'))
      case pickle.NEWFALSE:
        stack.append(False)
      case pickle.NEWTRUE:
        stack.append(True)
      case pickle.NONE:
        stack.append(None)
      case pickle.BINFLOAT:
        stack.append(unpack('>d'))
      case pickle.LONG1:
        stack.append(int.from_bytes(raw(unpack('<B')), 'little', signed=True))
      case pickle.EMPTY_DICT:
        stack.append({})
      case pickle.SETITEM:
        _insert(stack[-3], [pop(2)], keys)
      case pickle.SETITEMS:
        items = pop_to_mark()
        _insert(stack[-1], zip(items[::2], items[1::2], strict=True), keys)
      case pickle.EMPTY_LIST:
        stack.append([])
      case pickle.APPEND:
        _extend(stack[-2], pop(1), keys)
      case pickle.APPENDS:
        items = pop_to_mark()
        _extend(stack[-1], items, keys)
      case pickle.EMPTY_SET:
        stack.append(set())
      case pickle.ADDITEMS:
        items = pop_to_mark()
        _extend(stack[-1], items, keys)
      case pickle.FROZENSET:
        stack.append(frozenset(map(keys.check, pop_to_mark())))
      case pickle.GLOBAL:
        stack.append(named(file.read_line(), file.read_line()))
      case pickle.STACK_GLOBAL:
        stack.append(named(*pop(2)))
      case pickle.BUILD:
        _set_state(stack[-2], stack[-1], file)
        del stack[-1]
      case pickle.SHORT_BINUNICODE | pickle.SHORT_BINSTRING:
        stack.append(text(unpack('<B')))
      case pickle.BINSTRING:
        stack.append(text(unpack('<I')))
      case pickle.SHORT_BINBYTES:
        stack.append(raw(unpack('<B')))
      case pickle.BINBYTES:
        stack.append(raw(unpack('<I')))
      case pickle.MEMOIZE:
        memo[len(memo)] = stack[-1]
      case pickle.POP:
        del stack[-1]
      case pickle.PROTO:
        file.read(1)
      case pickle.FRAME:
        file.read(8)
      case pickle.STOP:
        (result,) = stack
        file.opcodes -= count
        return result
      case _:
        raise RefusedError(
          f'is damaged or was not written by torch.save: its pickle has the opcode {opcode!a}'
        )
  raise RefusedError(
    'holds more objects than weights, optimizer and logs need (its pickles have too many opcodes): '
    "save the weights alone, with torch.save({'state_dict': model.state_dict()}, path)"
  )


def _name(names: Names, module: Any, attribute: Any) -> str:
  if type(module) is not str or type(attribute) is not str:
    raise TypeError('a name is not text')
  if len(module) + len(attribute) > _NAME_LIMIT:
    raise ValueError('a name is too long')
  name = f'{module}.{attribute}'
  if name not in names:
    raise RefusedError(
      f'names {name[:_SHOWN]!a}, which weights do not need and which is therefore not loaded: '
      "save the weights alone, with torch.save({'state_dict': model.state_dict()}, path)"
    )
  return name


def _call(names: Names, named: Any, arguments: Any) -> Any:
  call = names.get(named.name) if type(named) is Inert else None
  if call is None or type(arguments) is not tuple:
    what = named.name[:_SHOWN] if type(named) is Inert else type(named).__name__
    raise RefusedError(f'calls {what!a} in its pickle, which no checkpoint does: it is not loaded')
  return call(*arguments)


def _set_state(target: Any, state: Any, file: BoundedFile) -> None:
  """BUILD: fills numpy's objects; what others keep beside their items is dropped."""
  if type(target) is np.ndarray and target.size == 0:
    _version, shape, dtype, is_fortran, data = state
    if not (_is_number(dtype) and is_shape(shape) and type(data) is bytes):
      raise ValueError('not the state of an array of numbers')
    if len(data) != math.prod(shape) * dtype.itemsize:
      raise ValueError('data and shape disagree')
    file.allow(len(data))
    cast(Any, target).__setstate__((1, shape, dtype, is_fortran is True, data))
  elif isinstance(target, np.dtype):
    byte_order = state[1]
    if type(byte_order) is not str or byte_order not in ('<', '>', '|', '='):
      raise ValueError('not the state of a dtype of numbers')
    cast(Any, target).__setstate__((3, byte_order, None, None, None, -1, -1, 0))
  elif type(target) not in (dict, Inert):
    raise TypeError(f'{type(target)} takes no state')


class _Keys:
  """Checks keys of dicts and members of sets; counts those of which many can be slow."""

  def __init__(self):
    self._tuples = _TUPLE_KEYS_LIMIT

  def check(self, value: Any) -> Any:
    """Returns `value` if it is quick and safe to hash and to compare."""
    if type(value) is not tuple:
      return _scalar_key(value)
    self._tuples -= 1
    if self._tuples < 0:
      raise ValueError('too many tuples as keys')
    return _tuple_key(value)


def _tuple_key(value: Any, depth: int = 2) -> Any:
  """No long or deep tuple."""
  if type(value) is not tuple:
    return _scalar_key(value)
  if len(value) > 8 or depth == 0:
    raise TypeError('unhashable')
  for item in value:
    _tuple_key(item, depth - 1)
  return value


def _scalar_key(value: Any) -> Any:
  """No huge integer and no huge text."""
  fits = value is None or type(value) in (bool, float)
  fits = fits or (type(value) in (str, bytes) and len(value) <= _KEY_LIMIT)
  if not (fits or (type(value) is int and abs(value) < 2**60)):
    raise TypeError('unhashable')
  return value


def _insert(target: Any, items: Iterable[tuple[Any, Any]], keys: _Keys) -> dict[Any, Any]:
  if type(target) is not dict:
    raise TypeError('not a dict')
  for key, value in items:
    target[keys.check(key)] = value
  return target


def _extend(target: Any, items: Iterable[Any], keys: _Keys) -> None:
  if type(target) is list:
    target.extend(items)
  elif type(target) is set:
    target.update(map(keys.check, items))
  else:
    raise TypeError('neither list nor set')


def _method_of_history_buffer(owner: Any, name: Any) -> Inert:
  if type(owner) is not Inert or owner.name != _HISTORY_BUFFER or type(name) is not str:
    raise RefusedError(f'calls getattr on something else than {_HISTORY_BUFFER}: it is not loaded')
  return Inert(f'{_HISTORY_BUFFER}.{name}')


def _complex(real: Any, imag: Any) -> complex:
  if type(real) is not float or type(imag) is not float:
    raise TypeError('not the parts of a complex number')
  return complex(real, imag)


def _empty_array(_class: Any, _shape: Any, _code: Any) -> np.ndarray:
  return np.empty(0, np.int8)


def _dtype(code: Any, _align: Any = False, _copy: Any = True) -> np.dtype:
  if type(code) is not str or not re.fullmatch(r'[biufc]\d{1,2}', code):
    raise ValueError('not a dtype of numbers')
  return np.dtype(code, copy=True)


def _is_number(dtype: Any) -> bool:
  return isinstance(dtype, np.dtype) and dtype.kind in 'biufc'


def _scalar(dtype: Any, data: Any) -> np.generic:
  if not _is_number(dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
    raise ValueError('not a number')
  return np.frombuffer(data, dtype)[0]
