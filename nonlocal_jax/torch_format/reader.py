"""Reads PyTorch checkpoints (.pth) without PyTorch: both formats of `torch.save`."""

import contextlib
import dataclasses
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nonlocal_jax.errors import UserError
from nonlocal_jax.torch_format.bounded_file import BoundedFile, RefusedError
from nonlocal_jax.torch_format.tensors import Storages, tensor_names, to_native
from nonlocal_jax.torch_format.unpickler import Inert, plain_names, read_pickle

_ZIP_MAGIC = b'PK\x03\x04'
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_MAGIC_BYTES = _LEGACY_MAGIC.to_bytes(10, 'little')
_LEGACY_PROTOCOL = 1001
_TABLE_LIMIT = 2**22  # bytes; PyTorch takes about 70 for each tensor

# Files that are mistaken for checkpoints, by their magic bytes: offset, bytes, description.
_OTHER_FORMATS = (
  (0, b'\x80', 'a pickle that torch.save did not write'),
  (0, b'\xff\xd8\xff', 'a JPEG image'),
  (0, b'\x89PNG', 'a PNG image'),
  (0, b'\x89HDF', 'an HDF5 file'),
  (0, b'\x1f\x8b', 'compressed with gzip'),
  (0, b'<', 'a web page or XML, perhaps the error message of a download'),
  (0, b'version https://git-lfs', 'the pointer of Git LFS to a file, which `git lfs pull` fetches'),
  (8, b'{"', 'a safetensors file'),
  (257, b'ustar', "a tar archive, maybe PyTorch's oldest format: let PyTorch save it again"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
  """The weights in a PyTorch file and its metadata.

  Attributes:
    state_dict: Weights by name; arrays may share memory.
    meta: The file's `meta`, {} if it has none. It holds e.g. CLASSES and PALETTE if
      MMSegmentation 0.x wrote it, dataset_meta and cfg if 1.x did.
    has_average: Whether the file has an `ema_state_dict`. MMEngine then saves the moving average as
      the weights, and what was averaged there.
    has_checksums: Whether the file has checksums, which were compared. PyTorch's legacy format has
      none, and `torch.serialization.set_crc32_options` leaves them out.
  """

  state_dict: dict[str, np.ndarray]
  meta: dict[str, Any]
  has_average: bool
  has_checksums: bool


def read_torch_checkpoint(path: str | os.PathLike[str]) -> TorchCheckpoint:
  """Reads the weights in a PyTorch file: a bare state dict, or a dict that has it as 'state_dict'.

  Args:
    path: The file.

  Returns:
    The weights, in the file's dtypes and shapes, and its meta.

  Raises:
    UserError: As `read_torch_file`, or if the file holds no state dict.
  """
  contents, has_checksums = _read_path(path)
  with _errors_that_name(path):
    meta = contents.get('meta') if type(contents) is dict else None
    meta = meta if type(meta) is dict else {}
    has_average = type(contents) is dict and 'ema_state_dict' in contents
    return TorchCheckpoint(_state_dict(contents), meta, has_average, has_checksums)


def read_torch_file(path: str | os.PathLike[str]) -> Any:
  """Reads a file of `torch.save` without executing anything in it.

  Args:
    path: The file, in the format of PyTorch 1.6 and later (zip) or of those before (legacy).

  Returns:
    The saved object: dicts, lists, tuples, scalars and strings, with an np.ndarray for each tensor
    in its dtype, shape and strides. Tensors that share a storage give arrays that share memory.
    Names and objects of no use here are `Inert`.

  Raises:
    UserError: If there is no such file, if it is none of PyTorch's, is damaged, or names what is
      not known as harmless.
  """
  return _read_path(path)[0]


def _read_path(path: str | os.PathLike[str]) -> tuple[Any, bool]:
  """Returns the object in a file, and whether it was compared with checksums."""
  with _errors_that_name(path):
    if not Path(path).exists():
      raise RefusedError('does not exist: expected the path of a PyTorch checkpoint (.pth)')
    if not Path(path).is_file():
      raise RefusedError('is not a file: expected the path of a PyTorch checkpoint (.pth)')
    with open(path, 'rb') as file:
      return _read(BoundedFile(file, os.fstat(file.fileno()).st_size))


@contextlib.contextmanager
def _errors_that_name(path: str | os.PathLike[str]) -> Iterator[None]:
  try:
    yield
  except RefusedError as error:
    raise UserError(f'{path} {error}.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error


def _state_dict(contents: Any) -> dict[str, np.ndarray]:
  expected = "expected weights by name, or a dict that has them under 'state_dict'"
  if type(contents) is not dict:
    raise RefusedError(f'holds no state dict but an object of type {_type(contents)}: {expected}')
  weights = contents.get('state_dict', contents)
  if type(weights) is not dict or not weights:
    raise RefusedError(f'holds an empty state dict or none ({_type(weights)}): {expected}')
  state_dict = {}
  for name, value in weights.items():
    if type(name) is not str or not isinstance(value, np.ndarray):
      shown = ascii(name[:80] if type(name) is str else name)[:80]
      raise RefusedError(f'has {_type(value)} under {shown}, not a tensor: {expected}')
    state_dict[name] = value
  return state_dict


def _type(value: Any) -> str:
  return value.name if type(value) is Inert else type(value).__name__


def _read(file: BoundedFile) -> tuple[Any, bool]:
  if file.size == 0:
    raise RefusedError('is empty: expected a PyTorch checkpoint, download or copy it again')
  head = file.file.read(512)
  file.file.seek(0)
  if head.startswith(_ZIP_MAGIC):
    return _read_zip(file)
  if _LEGACY_MAGIC_BYTES in head[:32]:
    return _read_legacy(file), False
  other = (what for position, start, what in _OTHER_FORMATS if head[position:].startswith(start))
  what = next(other, f'a file that begins with {head[:8]!r}')
  raise RefusedError(f'is {what}: expected a checkpoint written by torch.save')


def _read_zip(file: BoundedFile) -> tuple[Any, bool]:
  """PyTorch 1.6 and later: an uncompressed zip archive with data.pkl and a member per storage."""
  members = _zip_members(file)
  roots = [match[1] for match in map(re.compile(r'([^/]+/)data\.pkl').fullmatch, members) if match]
  if not roots:
    raise RefusedError(
      'is a zip archive without data.pkl: expected a checkpoint written by torch.save; '
      'if there is one inside, unpack it'
    )
  root = roots[0]
  if f'{root}constants.pkl' in members:
    raise RefusedError(
      'is a TorchScript archive: expected a checkpoint, so save the state dict of its model '
      'with torch.save'
    )
  has_checksums = any(member.CRC for member in members.values())

  def check(member: zipfile.ZipInfo, checksum: int) -> None:
    if has_checksums and checksum != member.CRC:
      raise RefusedError(
        f'is damaged: the checksum of its member {member.filename[:80]!a} differs, download or '
        'copy it again'
      )

  byte_order = 'little'
  if f'{root}byteorder' in members:
    member = members[f'{root}byteorder']
    data = file.read(min(_seek_member(file, member), 8))
    check(member, zlib.crc32(data))
    byte_order = data.decode('ascii', 'replace')
    if byte_order not in ('little', 'big'):
      raise RefusedError(f'is damaged: it gives its byte order as {byte_order!a}')

  member = members[f'{root}data.pkl']
  size = _seek_member(file, member)
  start = file.file.tell()
  check(member, file.crc32(size))
  file.file.seek(start)
  storages = Storages(file)
  names = {**plain_names(file), **tensor_names(file, byte_order)}
  contents = read_pickle(file, names, storages.load)
  if file.file.tell() > start + size:
    raise _damaged_member(member)
  found = {key: members.get(f'{root}data/{key}') for key in storages.by_key}
  for key, member in found.items():
    if member is None:
      raise RefusedError(f'is damaged: the storage {key[:80]!a} of its pickle is missing')
  for key, storage in storages.by_key.items():
    member = members[f'{root}data/{key}']
    size = _seek_member(file, member)
    if size // storage.itemsize != storage.size:
      raise RefusedError(
        f'is damaged: the storage {key[:80]!a} has {size:,} bytes, not {storage.size:,} values '
        f'of {storage.dtype}'
      )
    file.read_into(storage)
    rest = file.read(size - storage.nbytes)
    check(member, zlib.crc32(rest, zlib.crc32(storage.view(np.uint8).data)))
    to_native(storage, byte_order)
  return contents, has_checksums


class _TableOfContents(io.RawIOBase):
  """The file as `zipfile` may read it: not more of it than a table of contents may have.

  It makes an object for each of its entries before anything is known about them.
  """

  def __init__(self, file: BoundedFile):
    super().__init__()
    self._file = file.file

  def read(self, size: int = -1, /) -> bytes:
    if size < 0:  # the end of the file, after a seek
      size = _TABLE_LIMIT
    if size > _TABLE_LIMIT:
      raise RefusedError('is a zip archive with more members than a checkpoint needs')
    return self._file.read(size)

  def seek(self, offset: int, whence: int = 0, /) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def seekable(self) -> bool:
    return True


def _zip_members(file: BoundedFile) -> dict[str, zipfile.ZipInfo]:
  try:
    with zipfile.ZipFile(_TableOfContents(file)) as archive:
      members = {member.filename: member for member in archive.infolist()}
      count = len(archive.infolist())
  except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
    raise RefusedError(
      'begins like a PyTorch file (zip) but its table of contents is missing or damaged: '
      'it is probably cut off, download or copy it again'
    ) from error
  if len(members) < count:
    raise RefusedError('is damaged: its table of contents has several members of one name')
  return members


def _seek_member(file: BoundedFile, member: zipfile.ZipInfo) -> int:
  """Seeks to the data of a member and returns its size."""
  if member.compress_type != zipfile.ZIP_STORED:
    raise RefusedError(
      'is a compressed zip archive, which torch.save never writes: it is not loaded'
    )
  if member.compress_size != member.file_size or not 0 <= member.header_offset < file.size:
    raise _damaged_member(member)
  file.file.seek(member.header_offset)
  header = file.read(30)
  name_size, extra_size = struct.unpack('<HH', header[26:])
  name = file.read(name_size)
  start = member.header_offset + len(header) + name_size + extra_size
  is_named = name == member.orig_filename.encode('utf-8' if member.flag_bits & 0x800 else 'cp437')
  is_inside = start + member.file_size <= file.size
  if not (header.startswith(_ZIP_MAGIC) and is_named and is_inside):
    raise _damaged_member(member)
  file.file.seek(start)
  return member.file_size


def _damaged_member(member: zipfile.ZipInfo) -> RefusedError:
  return RefusedError(
    f'is damaged: its member {member.filename[:80]!a} is not where its table of contents says, '
    'download or copy it again'
  )


def _read_legacy(file: BoundedFile) -> Any:
  """PyTorch before 1.6: five pickles, then the data of the storages, always little-endian."""
  magic, protocol, _system = (read_pickle(file, {}) for _ in range(3))
  if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
    raise RefusedError(
      f'is damaged: it begins like a file of torch.save, but its protocol is not {_LEGACY_PROTOCOL}'
    )
  storages = Storages(file)
  names = {**plain_names(file), **tensor_names(file, 'little')}
  contents = read_pickle(file, names, storages.load)
  keys = read_pickle(file, {})
  if type(keys) is not list or not all(type(key) is str and len(key) <= 256 for key in keys):
    raise RefusedError('is damaged: no list of storages follows its pickle')
  if len(keys) != len(storages.by_key) or set(keys) != storages.by_key.keys():
    raise RefusedError('is damaged: the storages that it lists are not those that its pickle uses')
  for key in keys:
    storage = storages.by_key[key]
    (length,) = struct.unpack('<q', file.read(8))
    if length != storage.size:
      raise RefusedError(
        f'is damaged: the storage {key[:80]!a} has {length:,} values, not {storage.size:,}'
      )
    file.read_into(storage)
    to_native(storage, 'little')
  return contents
