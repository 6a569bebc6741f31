"""Loads thousands of broken .pth files: each gives the intact file's arrays, or is refused.

    python -m tests.campaigns.broken_checkpoints --count=20000

Files of both formats of PyTorch, with the contents of MMSegmentation 0.x and 1.x, are broken at
random and loaded in this process. An exception other than UserError, a warning, more than 2 s of
one core or 256 MiB is a fault. So are other arrays or another description, but for two kinds of
files: the legacy format has no checksum, which the notes on such a file must say, and where a
checksum was repaired after the damage, there is nothing to notice.
"""

import argparse
import collections
import dataclasses
import io
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx
from mmengine.logging import HistoryBuffer

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.weights.arrays import to_arrays
from nonlocal_jax.weights.loading import TorchWeights, read_torch_weights
from nonlocal_jax.weights.mmseg_config_text import config_text
from nonlocal_jax.weights.state_dict import to_state_dict

SECONDS = 2
MEMORY = 2**28
NO_CHECKSUM = 'It has no checksums: damaged weights would not be noticed.'
NUMBERS = (0, 1, 127, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def intact_files() -> dict[str, bytes]:
  """Checkpoints of a tiny network."""
  config = NonLocalNetConfig.from_depth(14, width=2, num_classes=3)
  values = np.random.default_rng(0)
  state = nnx.from_flat_state(
    (path, variable.replace(values.uniform(0.1, 1, variable.shape).astype(np.float32)))
    for path, variable in nnx.to_flat_state(state_shapes(config))
  )
  arrays = {
    name: torch.tensor(np.array(array))
    for name, array in to_state_dict(state, {'backbone': 7, 'decode_head': 7}).items()
  }
  text = config_text(config, EvalProtocol(scale=(96, 64)))
  names = {'classes': ('road', 'tree', 'sky'), 'palette': [[0, 0, 0], [1, 2, 3], [9, 9, 9]]}
  first = {
    'meta': {
      'mmseg_version': '0.30.0',
      'CLASSES': names['classes'],
      'PALETTE': names['palette'],
      'seed': None,
      'iter': 7,
    },
    'state_dict': arrays,
  }
  averages = {f'module.{name}': array.clone() for name, array in list(arrays.items())[:5]}
  hub = {'log_scalars': collections.OrderedDict(loss=HistoryBuffer([0.5, 0.25], [1, 1]))}
  later = {
    'meta': {'cfg': text, 'seed': np.int64(3), 'dataset_meta': names, 'iter': 7},
    'state_dict': collections.OrderedDict(arrays),
    'ema_state_dict': averages,
    'message_hub': hub,
    'optimizer': {'state': {0: {'momentum_buffer': torch.ones(3)}}, 'param_groups': [{'lr': 0.1}]},
  }
  files = {}
  for name, contents in (('0.x', first), ('1.x', later)):
    for protocol in (2, 4):
      for is_zip in (True, False):
        file = io.BytesIO()
        torch.save(contents, file, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
        kind = 'zip' if is_zip else 'legacy'
        files[f'{kind}, {name}, protocol {protocol}'] = file.getvalue()
  return files


def flipped(data: bytes, rng: random.Random) -> bytes:
  broken = bytearray(data)
  for _ in range(rng.choice([1, 1, 1, 2, 8])):
    broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
  return bytes(broken)


def cut(data: bytes, rng: random.Random) -> bytes:
  at = rng.randrange(len(data))
  return data[:at] if rng.random() < 0.7 else data[at:]


def inserted(data: bytes, rng: random.Random) -> bytes:
  at, size = rng.randrange(len(data)), rng.choice([1, 4, 8, 64, 4096])
  new = rng.choice([bytes(size), rng.randbytes(size), data[at : at + size]])
  return data[:at] + new + data[at:]


def removed(data: bytes, rng: random.Random) -> bytes:
  at, size = rng.randrange(len(data)), rng.choice([1, 4, 8, 64, 4096])
  return data[:at] + data[at + size :]


def swapped(data: bytes, rng: random.Random) -> bytes:
  size = rng.choice([1, 4, 16, 64, 512])
  a, b = sorted(rng.randrange(max(len(data) - size, 1)) for _ in range(2))
  b = max(b, a + size)
  return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def numbered(data: bytes, rng: random.Random) -> bytes:
  at, size = rng.randrange(len(data)), rng.choice([1, 2, 4, 8])
  return data[:at] + rng.choice(NUMBERS).to_bytes(8, 'little')[:size] + data[at + size :]


def places_of_opcodes(pickled: bytes) -> list[int]:
  return [place for _, _, place in pickletools.genops(pickled) if place is not None]


def with_opcode(data: bytes, rng: random.Random) -> bytes:
  """Changes an opcode of a pickle, or an argument of one by a few bytes."""
  start = data.index(b'\x80', 0 if data.startswith(b'PK') else 50)
  end = len(data)
  if data.startswith(b'PK'):
    member = zipfile.ZipFile(io.BytesIO(data)).infolist()[0]
    end = start + member.file_size
  try:
    places = places_of_opcodes(data[start:end])
  except ValueError:
    places = list(range(100))
  broken = bytearray(data)
  place = start + rng.choice(places) + rng.choice([0, 0, 0, 1, 2])
  broken[place] = rng.choice([rng.randrange(256), ord(rng.choice('.0(tRbu}]eashjQqr)KMN'))])
  return bytes(broken)


def members_changed(data: bytes, rng: random.Random) -> bytes:
  """Writes members of a zip file twice, in another order, or under each other's names."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = [(member.filename, archive.read(member)) for member in archive.infolist()]
  a, b = (rng.randrange(len(members)) for _ in range(2))
  match rng.randrange(4):
    case 0:
      members.insert(a, members[b])
    case 1:
      members.insert(a, (members[b][0], members[a][1]))
    case 2:
      members[a], members[b] = members[b], members[a]
    case 3:
      del members[a]
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, 'w') as archive:
    warnings.simplefilter('ignore')  # about the names
    for name, contents in members:
      archive.writestr(name, contents)
  return file.getvalue()


def table_changed(data: bytes, rng: random.Random) -> bytes:
  """Changes the table of contents of a zip file: an entry twice, or two names exchanged."""
  end = data.rindex(b'PK\5\6')
  _, size, start = struct.unpack('<HII', data[end + 10 : end + 20])
  table = data[start : start + size]
  entries = [b'PK\1\2' + part for part in table.split(b'PK\1\2')[1:]]
  a, b = (rng.randrange(len(entries)) for _ in range(2))
  if rng.random() < 0.5:
    entries.insert(a, entries[b])
  else:
    (na,), (nb,) = (struct.unpack('<H', entries[i][28:30]) for i in (a, b))
    if na == nb:
      one, other = entries[a][46 : 46 + na], entries[b][46 : 46 + nb]
      entries[a] = entries[a][:46] + other + entries[a][46 + na :]
      entries[b] = entries[b][:46] + one + entries[b][46 + nb :]
  table = b''.join(entries)
  tail = data[end : end + 10] + struct.pack('<HII', len(entries), len(table), start)
  return data[:start] + table + tail + data[end + 20 :]


def repaired(data: bytes, rng: random.Random) -> bytes:
  """Breaks the pickle of a zip file and gives it the right checksum."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    members = {member.filename: archive.read(member) for member in archive.infolist()}
  name = next(name for name in members if name.endswith('data.pkl'))
  change = rng.choice([flipped, flipped, inserted, removed, swapped, numbered, with_opcode])
  try:
    members[name] = change(members[name], rng)
  except ValueError:
    members[name] = flipped(members[name], rng)
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for other, contents in members.items():
      archive.writestr(other, contents)
  return file.getvalue()


BOTH: dict[str, Callable[[bytes, random.Random], bytes]] = {
  'flipped bits': flipped,
  'cut': cut,
  'inserted': inserted,
  'removed': removed,
  'swapped blocks': swapped,
  'other numbers': numbered,
  'other opcodes': with_opcode,
}
OF_ZIP = {
  'members changed': members_changed,
  'table changed': table_changed,
  'checksum repaired': repaired,
}


def values(weights: TorchWeights) -> tuple[Any, ...]:
  """What has to be the same but for the file's own sha256."""
  arrays = {name: array.tobytes() for name, array in to_arrays(weights.state).items()}
  return arrays, dataclasses.replace(weights.description, sha256=None), weights.notes


def peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(path: Path, expected: tuple[Any, ...], *, may_differ: bool) -> tuple[str, str]:
  """Loads a broken file; returns the outcome, and what is wrong with it."""
  before, start = peak(), time.process_time()
  fault = ''
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      weights = read_torch_weights(path)
    found = values(weights)
    if found == expected:
      outcome = 'identical'
    else:
      outcome = 'other values'
      if not (may_differ or NO_CHECKSUM in weights.notes):
        fault = 'other values without a word'
  except UserError as error:
    outcome, text = 'refused', str(error)
    if not text.startswith(str(path)) or '\n' in text or not text.isprintable():
      fault = f'not one sentence about the file: {text[:200]!r}'
  except Exception:  # noqa: BLE001 (whatever it is, it is a fault)
    outcome, fault = 'fault', traceback.format_exc(limit=-3)
  if time.process_time() - start > SECONDS:
    fault = fault or f'took {time.process_time() - start:.1f} s'
  if peak() - before > MEMORY:
    fault = fault or f'took {(peak() - before) / 2**20:.0f} MiB'
  return ('fault' if fault else outcome), fault


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=20_000, help='how many files')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after so long')
  options = parser.parse_args()
  files = intact_files()
  rng = random.Random(options.seed)
  table = collections.defaultdict(collections.Counter)
  faults = collections.Counter()
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, 'broken.pth')
    expected = {}
    for name, data in files.items():
      path.write_bytes(data)
      expected[name] = values(read_torch_weights(path))
    for index in range(options.count):
      if time.monotonic() - started > options.seconds:
        break
      name = list(files)[index % len(files)]
      is_zip = name.startswith('zip')
      kinds = {**BOTH, **OF_ZIP} if is_zip else BOTH
      kind = rng.choice(list(kinds))
      path.write_bytes(kinds[kind](files[name], rng))
      may_differ = kind in ('checksum repaired', 'members changed')
      outcome, fault = attempt(path, expected[name], may_differ=may_differ)
      table[f'{name.partition(",")[0]}: {kind}'][outcome] += 1
      if fault:
        faults[fault] += 1
        if faults[fault] == 1:
          kept = Path(tempfile.gettempdir(), f'broken_checkpoint_{options.seed}_{index}.pth')
          kept.write_bytes(path.read_bytes())
          print(f'file {index} ({name}, {kind}), kept as {kept}: {fault}', file=sys.stderr)
  columns = ('tried', 'identical', 'refused', 'other values', 'fault')
  print(f'{"":28}' + ''.join(f'{column:>14}' for column in columns))
  totals = collections.Counter()
  for row, counts in sorted(table.items()):
    totals += counts
    counts['tried'] = counts.total()
    print(f'{row:28}' + ''.join(f'{counts[column]:14,}' for column in columns))
  totals['tried'] = totals.total()
  print(f'{"all":28}' + ''.join(f'{totals[column]:14,}' for column in columns))
  for fault, count in faults.most_common():
    print(f'\n{count} times: {fault}')
  sys.exit(1 if faults else 0)


if __name__ == '__main__':
  main()
