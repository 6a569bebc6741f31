"""Damages archives at random and unpacks them: nothing but the wanted files may come of it.

    python -m tests.campaigns.hostile_archives --count=3000

Each archive has bytes changed, cut out, doubled or zeroed, mostly in its headers, or a member that
no dataset has. It must be refused in one sentence, or unpacked to wanted names only, of a zip with
the bytes that were packed. Nothing else may change; time and memory are limited. Prints what was
tried, and exits with 1 if there was a fault.
"""

import argparse
import contextlib
import io
import random
import re
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from nonlocal_jax.data.archives import Contents, unpack
from nonlocal_jax.errors import UserError

CONTENTS = Contents('set', {'images/*.jpg': 4, 'list.txt': 1}, most_members=30, most_bytes=10**6)
SECONDS, KIBIBYTES = 10, 200_000
NAMES = [
  *('set/images/1.jpg', 'set/images', 'set/list.txt/x', '../x', '/tmp/x', 'set/../../x', 'set/.'),
  *(
    'set/images/\xff.jpg',
    'set/images/' + 'n' * 300 + '.jpg',
    '',
    'set',
    'C:\\x',
    'set/images/9.jpg',
  ),
]


def wanted_files(rng: random.Random) -> dict[str, bytes]:
  """The files that an archive should have."""
  files = {f'images/{index}.jpg': rng.randbytes(rng.randrange(3000)) for index in range(4)}
  return {**files, 'list.txt': b'0\n1\n2\n3\n'}


def pack(form: str, files: dict[str, bytes], rng: random.Random) -> bytes:
  """An archive, in half of the cases with a member more, of any kind and name."""
  packed = io.BytesIO()
  more = rng.choice([None, rng.choice(NAMES)])
  kind = bytes([rng.choice([*b'0123456789LKSgx', rng.randrange(256)])])
  if form == 'zip':
    with zipfile.ZipFile(packed, 'w', rng.choice([0, 8, 12, 14])) as archive:
      for name, data in files.items():
        archive.writestr(f'set/{name}', data)
      if more is not None:
        info = zipfile.ZipInfo(more or 'x')
        info.external_attr = rng.getrandbits(32)
        archive.writestr(info, b'x')
    return packed.getvalue()
  with tarfile.open(fileobj=packed, mode='w', format=rng.choice([1, 2])) as archive:
    for name, data in files.items():
      info = tarfile.TarInfo(f'set/{name}')
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
    if more is not None:
      info = tarfile.TarInfo(more)
      info.type, info.linkname, info.size = kind, rng.choice(NAMES), rng.choice([0, 1, 600])
      archive.addfile(info, io.BytesIO(b'1' * info.size))
  return packed.getvalue()


def damaged(data: bytes, form: str, rng: random.Random) -> bytes:
  """The archive with up to five changes; those of tar keep the checksums of headers right."""
  changed = bytearray(data)
  for _ in range(rng.randrange(6)):
    if not changed:
      break
    start = rng.randrange(len(changed))
    if form != 'zip' and rng.random() < 0.8:
      start = start // 512 * 512 + rng.choice([*range(345), *range(124, 158)])
    elif form == 'zip' and rng.random() < 0.7:
      signature = rng.choice([b'PK\1\2', b'PK\3\4', b'PK\5\6'])
      start = max(changed.find(signature, start), 0) + rng.randrange(46)
    match rng.randrange(5):
      case 0:
        changed[start : start + 1] = rng.randbytes(1)
      case 1:
        changed[start : start + 4] = rng.choice([b'\xff' * 4, b'\0' * 4, b'\x80\0\0\0'])
      case 2:
        del changed[start : start + rng.randrange(600)]
      case 3:
        changed[start:start] = changed[start : start + 512 * rng.randrange(4)]
      case 4:
        del changed[start:]
  if form != 'zip':
    for start in range(0, len(changed) - 511, 512):
      if changed[start + 257 : start + 262] == b'ustar' and rng.random() < 0.9:
        header = changed[start : start + 512]
        header[148:156] = b' ' * 8
        changed[start + 148 : start + 156] = b'%06o\0 ' % sum(header)
  return bytes(changed)


def compressed(data: bytes, rng: random.Random) -> bytes:
  """A .tgz file; some are cut off or have wrong bytes as well."""
  packer = zlib.compressobj(wbits=31)
  packed = bytearray(packer.compress(data) + packer.flush())
  if rng.random() < 0.2:
    packed[rng.randrange(len(packed))] ^= rng.randrange(1, 256)
  return bytes(packed if rng.random() < 0.9 else packed[: rng.randrange(len(packed))])


def try_one(seed: int, folder: Path) -> tuple[str, str]:
  """Unpacks one archive; returns its format and how it ended, with a ! if that is a fault."""
  rng = random.Random(seed)
  form = rng.choice(['zip', 'tar', 'tgz'])
  files = wanted_files(rng)
  data = damaged(pack(form, files, rng), form, rng)
  archive = folder / f'a.{form}'
  data = compressed(data, rng) if form == 'tgz' else data
  archive.write_bytes(data)
  (folder / 'mine').write_text('mine')
  started = time.monotonic()
  try:
    with contextlib.redirect_stderr(io.StringIO()):
      unpack(archive, folder / 'new', CONTENTS)
    ended = 'unpacked'
  except UserError as error:
    ended = 'refused' if '\n' not in str(error) else f'! lines: {error}'
  except Exception as error:  # noqa: BLE001, any is a fault
    ended = f'! {type(error).__name__}: {error}'
  if time.monotonic() - started > SECONDS:
    ended = '! slow'
  paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob('*')}
  found = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
  if found.pop('mine') != b'mine' or found.pop(archive.name) != data:
    ended = '! changed another file'
  if any(path.is_symlink() for path in paths.values()):
    ended = '! a link'
  names = sorted(re.sub(r'^new/images/[^/]*\.jpg$', '*', name) for name in found)
  same = form != 'zip' or sorted(found.values()) == sorted(files.values())
  if ended == 'unpacked' and not (names == ['*'] * 4 + ['new/list.txt'] and same):
    ended = f'! holds {sorted(found)}'
  if not ended.startswith('unpacked') and found:
    ended = f'! left {sorted(found)}'
  return form, ended


def main() -> None:
  """Tries all."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=3000)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  warnings.simplefilter('ignore')  # of zipfile, on names that are packed twice
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  counts: Counter[tuple[str, str]] = Counter()
  for seed in range(options.seed, options.seed + options.count):
    folder = Path(tempfile.mkdtemp())
    form, ended = try_one(seed, folder)
    shutil.rmtree(folder)
    counts[form, ended] += 1
    if ended.startswith('!'):
      print(f'seed {seed}: {form}: {ended}')
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  print('| format | ended | archives |\n|---|---|---|')
  for (form, ended), count in sorted(counts.items()):
    print(f'| {form} | {ended[:60]} | {count:,} |')
  print(f'The memory grew by {grown:,} KiB.')
  sys.exit(any(ended.startswith('!') for _, ended in counts) or grown > KIBIBYTES)


if __name__ == '__main__':
  main()
