"""Unpacking: only what is wanted, and nothing of an archive that is not as it should be."""

import dataclasses
import io
import resource
import struct
import tarfile
import types
import zipfile

import numpy as np
import pytest

from nonlocal_jax.data.archives import Contents, missing_files, unpack
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime import download

CONTENTS = Contents(
  inside='set/data',
  files={'images/*/*.jpg': 3, 'list.txt': 1},
  most_members=20,
  most_bytes=1_000_000,
)
RNG = np.random.default_rng(0)
WANTED = {
  'images/train/a.jpg': RNG.bytes(9000),
  'images/train/b.jpg': b'',
  'images/val/c.jpg': RNG.bytes(500),
  'list.txt': b'a\nb\n',
}
OTHERS = {
  'set/README': b'about',
  'set/data/images/notes.txt': b'-',
  'set/data/images/train/deep/d.jpg': b'-',
  'set/data/images/train/e.png': b'-',
  'set/data/images/train/._a.jpg': b'of macOS',
  'list.txt': b'of another folder',
}
FILES = {**{f'set/data/{path}': data for path, data in WANTED.items()}, **OTHERS}
FORMATS = ('a.zip', 'a.tar', 'a.tar.gz', 'a.tgz')


def write_archive(path, files=FILES, *, prefix='', more=()):
  """Packs files; `more` are members as ZipInfo or TarInfo, each with its data."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
      packed.writestr('set/data/images/', '')
      for name, data in files.items():
        packed.writestr(f'{prefix}{name}', data)
      for info, data in more:
        packed.writestr(info, data)
  else:
    with tarfile.open(path, 'w' if path.suffix == '.tar' else 'w:gz') as packed:
      folder = tarfile.TarInfo('set/data/images')
      folder.type = tarfile.DIRTYPE
      packed.addfile(folder)
      for name, data in files.items():
        packed.addfile(*tar_member(f'{prefix}{name}', data))
      for info, data in more:
        packed.addfile(info, io.BytesIO(data))
  return path


def tar_member(name, data=b'x', **fields):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for key, value in fields.items():
    setattr(info, key, value)
  return info, io.BytesIO(data)


def zip_member(name, mode=0):
  info = zipfile.ZipInfo(name)
  info.filename = name  # the constructor ends it at a zero byte
  info.external_attr = mode << 16
  return info


def contents_of(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def assert_refused(archive, sentence, contents=CONTENTS):
  """Whatever is beside the archive stays as it is."""
  before = sorted(archive.parent.rglob('*'))
  with pytest.raises(UserError, match=sentence) as raised:
    unpack(archive, archive.parent / 'new/folder', contents)
  assert '\n' not in str(raised.value)
  left = set(archive.parent.rglob('*')) - set(before)
  assert left <= {archive.parent / 'new'}


@pytest.mark.parametrize('prefix', ['', './'])
@pytest.mark.parametrize('name', FORMATS)
def test_only_the_wanted_files_are_unpacked(name, prefix, tmp_path, capfd):
  archive = write_archive(tmp_path / name, prefix=prefix)
  unpack(archive, tmp_path / 'new/folder', CONTENTS)
  assert contents_of(tmp_path / 'new') == {f'folder/{path}': WANTED[path] for path in WANTED}
  assert missing_files(tmp_path / 'new/folder', CONTENTS) == []
  (tmp_path / 'new/folder/images/val/c.jpg').unlink()
  (tmp_path / 'new/folder/list.txt').unlink()
  assert missing_files(tmp_path / 'new/folder', CONTENTS) == [
    '2 of 3 set/data/images/*/*.jpg',
    '0 of 1 set/data/list.txt',
  ]
  assert f'Unpacking {name}' in capfd.readouterr().err


def test_modes_of_the_archive_have_no_effect(tmp_path):
  files = dict(FILES)
  data = files.pop('set/data/list.txt')
  member = tar_member('set/data/list.txt', data, mode=0o6777, uid=12, uname='other')
  with tarfile.open(tmp_path / 'a.tar', 'w') as packed:
    for name, other in files.items():
      packed.addfile(*tar_member(name, other))
    packed.addfile(*member)
  unpack(tmp_path / 'a.tar', tmp_path / 'new', CONTENTS)
  assert (tmp_path / 'new/list.txt').stat().st_mode & 0o7111 == 0


def with_tar(**members):
  """A hostile .tar: the usual files, and more."""
  return lambda folder: write_archive(
    folder / 'a.tar', more=[(tar_member(**fields)[0], b'x') for fields in members.values()]
  )


def with_zip(name, mode=0):
  return lambda folder: write_archive(folder / 'a.zip', more=[(zip_member(name, mode), b'x')])


def replaced(name, suffix):
  """The usual files, with one of them below another name."""
  files = {(name if key == 'set/data/list.txt' else key): data for key, data in FILES.items()}
  return lambda folder: write_archive(folder / f'a{suffix}', files)


OUTSIDE = [
  '../x',
  'set/../../x',
  '/tmp/x',
  'set/data/images/../../../../x',
  'C:/x',
  'c:x',
  'set\\..\\x',
]
HOSTILE = [
  *((with_zip(name), 'names a path outside') for name in (*OUTSIDE, 'set/data/list.txt\0.jpg')),
  *((with_tar(x={'name': name}), 'names a path outside') for name in OUTSIDE),
  (with_zip('set/data/images/val', 0o120777), "holds a link, 'set/data/images/val'"),
  (with_zip('set/data/pipe', 0o010666), "holds a device, 'set/data/pipe'"),
  *(
    (with_tar(x={'name': 'set/data/x', 'type': kind, 'linkname': '/etc/passwd'}), f'holds a {what}')
    for kind, what in [
      (tarfile.SYMTYPE, 'link'),
      (tarfile.LNKTYPE, 'link'),
      (tarfile.CHRTYPE, 'device'),
      (tarfile.BLKTYPE, 'device'),
      (tarfile.FIFOTYPE, 'device'),
      (b'Z', 'device'),
    ]
  ),
  (with_zip('set/data/./list.txt'), 'twice'),
  (with_tar(x={'name': 'set/data//list.txt'}), 'twice'),
  (with_zip('set/data/images/train'), "a file where a folder belongs, 'images/train'"),
  (with_tar(x={'name': 'set/data/images'}), "a file where a folder belongs, 'images'"),
  (
    with_tar(x={'name': 'set/data/images/val/f.jpg', 'type': tarfile.DIRTYPE}),
    'has a folder where a file belongs',
  ),
  *(
    (replaced('set/data/other.txt', suffix), 'holds 0 of 1 set/data/list.txt')
    for suffix in ('.zip', '.tar', '.tgz')
  ),
  (with_zip('set/data/images/val/f.jpg'), r'holds 4 of 3 set/data/images/\*/\*.jpg'),
]


@pytest.mark.parametrize(('write', 'sentence'), HOSTILE)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_hostile_archives_are_refused(write, sentence, tmp_path):
  assert_refused(write(tmp_path), sentence)


@pytest.mark.parametrize('name', FORMATS)
def test_bombs_are_refused_before_anything_is_written(name, tmp_path):
  packed = write_archive(tmp_path / name, {**FILES, 'set/bomb': b'\0' * 2_000_000})
  assert packed.stat().st_size < 50_000 or name == 'a.tar'
  assert_refused(packed, 'unpacks to more than 1,000,000 bytes')
  many = {f'set/data/{index}': b'' for index in range(30)}
  assert_refused(write_archive(tmp_path / name, {**FILES, **many}), 'has more than 20 members')


def test_a_zip_that_says_less_than_it_holds(tmp_path):
  """A size in the directory that is too small: no more than it says is ever written."""
  path = write_archive(tmp_path / 'a.zip', {**FILES, 'set/data/list.txt': b'\0' * 100_000})
  data = path.read_bytes()
  assert data.count(struct.pack('<I', 100_000)) == 2  # in the file's header and the directory
  path.write_bytes(data.replace(struct.pack('<I', 100_000), struct.pack('<I', 10)))
  assert_refused(path, r'is damaged \(')


@pytest.mark.parametrize('kind', [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize('size', [1 << 40, -512])
def test_headers_that_would_fill_the_memory(kind, size, tmp_path):
  info = tarfile.TarInfo('x')
  info.type, info.size = kind, size
  (tmp_path / 'a.tar').write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
  assert_refused(tmp_path / 'a.tar', r'is damaged \(')


def test_a_file_of_negative_size(tmp_path):
  info = tarfile.TarInfo('set/data/x')
  info.size = -1024
  (tmp_path / 'a.tar').write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 3 + bytes(1024))
  assert_refused(tmp_path / 'a.tar', 'unpacks to more than')


@pytest.mark.parametrize('name', FORMATS)
def test_truncated_archives(name, tmp_path):
  data = write_archive(tmp_path / name).read_bytes()
  end = len(data) - (10_240 - 1024 if name == 'a.tar' else 0)  # tar files end in zeros
  for length in [0, 1, 100, *range(512, end, max(end // 25, 1))]:
    (tmp_path / name).write_bytes(data[:length])
    assert_refused(tmp_path / name, r'is damaged \(|holds .* of ')


def test_damaged_bytes_of_a_zip_are_found(tmp_path):
  path = write_archive(tmp_path / 'a.zip')
  data = path.read_bytes()
  refused = 0
  for position in range(0, len(data), len(data) // 150):
    damaged = bytearray(data)
    damaged[position] ^= 0x55
    path.write_bytes(damaged)
    folder = tmp_path / f'new{position}'
    try:
      unpack(path, folder, CONTENTS)
    except UserError:
      refused += 1
      assert not folder.exists()
    else:
      assert contents_of(folder) == WANTED
  assert refused > 100


def test_what_is_no_archive(tmp_path):
  for name in FORMATS:
    (tmp_path / name).write_bytes(b'<html>Not found</html>' * 100)
    assert_refused(tmp_path / name, r'is damaged \(.*\): delete it, and it is downloaded anew\.')
  assert_refused(tmp_path / 'none.zip', 'cannot be unpacked into .*: No such file')


def test_an_encrypted_archive(tmp_path):
  path = write_archive(tmp_path / 'a.zip')
  data = bytearray(path.read_bytes())
  for signature, flags in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
    start = -1
    while (start := data.find(signature, start + 1)) >= 0:
      data[start + flags] |= 1
  path.write_bytes(data)
  assert_refused(path, r'is damaged \(.*password')


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  archive = write_archive(tmp_path / 'a.tgz')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
  try:
    assert_refused(archive, 'a.tgz cannot be unpacked into .*: File too large')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  usage = types.SimpleNamespace(free=20_000)
  monkeypatch.setattr(download.shutil, 'disk_usage', lambda folder: usage)
  assert_refused(archive, r'Unpacking a\.tgz needs 20,480 bytes in .*, where 20,000 bytes are free')


def test_existing_folders_stay_and_leftovers_go(tmp_path):
  archive = write_archive(tmp_path / 'a.zip')
  (tmp_path / 'new').mkdir()
  (tmp_path / 'new/mine').write_text('mine')
  with pytest.raises(UserError, match='is there already'):
    unpack(archive, tmp_path / 'new', CONTENTS)
  assert contents_of(tmp_path / 'new') == {'mine': b'mine'}
  # As an interrupted call left it.
  (tmp_path / '.other.partial/images').mkdir(parents=True)
  (tmp_path / '.other.partial/images/half.jpg').write_text('half')
  unpack(archive, tmp_path / 'other', CONTENTS)
  assert contents_of(tmp_path / 'other') == WANTED
  assert not (tmp_path / '.other.partial').exists()


def test_limits_are_those_of_the_archive_and_not_more(tmp_path):
  archive = write_archive(tmp_path / 'a.tar')
  members, total = len(FILES) + 1, sum(map(len, FILES.values()))
  for limits, sentence in [
    ({'most_members': members - 1}, 'members'),
    ({'most_bytes': total - 1}, 'bytes'),
  ]:
    assert_refused(archive, sentence, dataclasses.replace(CONTENTS, **limits))
  exact = dataclasses.replace(CONTENTS, most_members=members, most_bytes=total)
  unpack(archive, tmp_path / 'new', exact)
  assert contents_of(tmp_path / 'new') == WANTED
