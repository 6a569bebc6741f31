"""Flips single bits in each kind of file that this package writes: the same result, or a refusal.

    python -m tests.campaigns.flipped_bits --count=500
    python -m tests.campaigns.flipped_bits --count=500 --kind='prepared copy'

Each try flips one bit of one file, reads the files as a command does, and puts the bit back. A
fault is a result that differs, or an exception other than UserError. Lines of a log that are
damaged may be left out. A dataset.json has no checksum, because people write
it: it may give other values if they are what it says.
"""

import argparse
import collections
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.data.datasets import read_description as read_dataset
from nonlocal_jax.data.preparation import prepare
from nonlocal_jax.data.prepared import open_prepared
from nonlocal_jax.data.synthetic import write_demo_set
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.report import METRICS, ReportFacts, read_report, write_report
from nonlocal_jax.models import NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.training.log import LOG, TrainingLog, read_log
from nonlocal_jax.training.run_files import CONFIG, check_same_run, write_run_files
from nonlocal_jax.weights.arrays import checksum, to_arrays
from nonlocal_jax.weights.checkpoints import load_weights, read_description, save_weights
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.run_checkpoints import CHECKPOINTS, RunCheckpoints


class Kind(NamedTuple):
  """Files of one kind.

  Attributes:
    files: The files, whose bits are flipped.
    read: Reads them; the result can be compared.
    allowed: Whether a result that differs is right, given the intact one.
  """

  files: list[Path]
  read: Callable[[], Any]
  allowed: Callable[[Any, Any], bool] = lambda found, expected: False


NETWORK = NonLocalNetConfig.from_depth(14, width=2, num_classes=3)
DESCRIPTION = ModelDescription(
  config=NETWORK,
  protocol=EvalProtocol(scale=(96, 64)),
  dataset='custom',
  classes=('road', 'tree', 'sky'),
  palette=((0, 0, 0), (1, 2, 3), (9, 9, 9)),
  source='a campaign',
  sha256=None,
  num_batches_tracked={'backbone': 0, 'decode_head': 0, 'auxiliary_head': 0},
)
SETTINGS = {
  'name': 'campaign',
  'optimizer': {'lr': 0.01, 'momentum': 0.9},
  'train': {'steps': 40, 'crop': [64, 64]},
}


def network_state() -> nnx.State:
  values = np.random.default_rng(0)
  return nnx.from_flat_state(
    (path, variable.replace(values.uniform(0.1, 1, variable.shape).astype(np.float32)))
    for path, variable in nnx.to_flat_state(state_shapes(NETWORK))
  )


def files_below(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob('*') if path.is_file() and path.stat().st_size)


def converted_directory(folder: Path) -> Kind:
  save_weights(folder / 'converted', network_state(), DESCRIPTION)

  def read() -> Any:
    description, state = load_weights(folder / 'converted')
    return description, checksum(to_arrays(state))

  return Kind(files_below(folder / 'converted'), read)


def run_checkpoint(folder: Path) -> Kind:
  state = network_state()
  training = {'momentum': np.arange(300.0, dtype=np.float32), 'step': np.array(7, np.int32)}
  with RunCheckpoints(folder, keep=3) as checkpoints:
    checkpoints.save(7, model=state, training=training, data={'position': 56})
    checkpoints.wait()

  def read() -> Any:
    with RunCheckpoints(folder, keep=3) as checkpoints:
      found = checkpoints.restore(model=state, training=training)
    model, rest = checksum(to_arrays(found.model)), checksum(found.training)
    return found.step, model, rest, found.data

  return Kind(files_below(folder / CHECKPOINTS), read)


def model_json(folder: Path) -> Kind:
  write_run_files(folder, SETTINGS, DESCRIPTION)
  return Kind([folder / 'model.json'], lambda: read_description(folder))


def config_json(folder: Path) -> Kind:
  write_run_files(folder, SETTINGS, DESCRIPTION)
  return Kind([folder / CONFIG], lambda: check_same_run(folder, SETTINGS, {}))


def log_jsonl(folder: Path) -> Kind:
  with TrainingLog(folder, batch_size=4, start=0) as log:
    for step in range(1, 21):
      values = {'loss': 1 / step, 'loss_auxiliary': 2 / step, 'accuracy': 0.5}
      log.write(step, values, lr=0.01)

  def fewer(found: Any, expected: Any) -> bool:
    return len(found) < len(expected) and all(line in expected for line in found)

  def read() -> Any:
    timing = ('images_per_second', 'waiting_for_data')  # what the checksums leave out
    lines = read_log(folder / LOG)
    return [{key: x for key, x in line.items() if key not in timing} for line in lines]

  return Kind([folder / LOG], read, fewer)


def metrics_json(folder: Path) -> Kind:
  facts = ReportFacts(
    config=SETTINGS, protocol=DESCRIPTION.protocol, images=3, step=40, more_scores=False
  )
  dataset = custom_dataset(3)
  write_report(folder, np.array([[5, 1, 0], [2, 9, 1], [0, 3, 7]]), dataset, facts, seconds=1)
  return Kind([folder / METRICS], lambda: read_report(folder))


def prepared_copy(folder: Path) -> Kind:
  write_demo_set(folder / 'source', train=6, val=2)
  dataset = custom_dataset(8)
  prepare(dataset, str(folder / 'source'), splits=('train', 'val'), data_dir=str(folder / 'data'))
  shutil.rmtree(folder / 'source')

  def read() -> Any:
    splits = open_prepared(dataset, data_dir=str(folder / 'data'))
    return {
      name: (split.source, split.description, split.sizes, split.left_out, split.label_values)
      for name, split in splits.items()
    }, [hashlib.sha256(repr(sample).encode()).digest() for x in splits.values() for sample in x]

  return Kind([path for path in files_below(folder / 'data') if '.lock' not in path.name], read)


def dataset_json(folder: Path) -> Kind:
  fields = {'classes': ['road', 'tree', 'sky'], 'ignore_labels': [7], 'label_map': [0, 1, 2, 255]}
  path = folder / 'dataset.json'
  path.write_text(json.dumps(fields))

  def as_it_says(found: Any, expected: Any) -> bool:
    says = json.loads(path.read_bytes())
    return json.loads(json.dumps(found)) == says

  return Kind([path], lambda: dict(read_dataset(str(folder))), as_it_says)


def compilation_cache(folder: Path) -> Kind:
  cache = {
    'jax_compilation_cache_dir': str(folder),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in cache.items():
    jax.config.update(name, value)
  x = jnp.linspace(-1, 1, 96).reshape(8, 12)

  def read() -> Any:
    jax.clear_caches()
    y = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0) * 3)(x)
    return np.asarray(y).tobytes()

  read()
  return Kind(files_below(folder), read)


KINDS = {
  'converted directory': converted_directory,
  'run checkpoint': run_checkpoint,
  'model.json': model_json,
  'config.json': config_json,
  'log.jsonl': log_jsonl,
  'metrics.json': metrics_json,
  'prepared copy': prepared_copy,
  'dataset.json': dataset_json,
  'compilation cache': compilation_cache,
}


def attempt(kind: Kind, expected: Any) -> tuple[str, str]:
  """Reads files of which one bit is flipped; returns the outcome, and what is wrong with it."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # JAX says so when it compiles again
      found = kind.read()
  except UserError as error:
    return ('fault', f'several lines: {error}') if '\n' in str(error) else ('refused', '')
  except Exception:  # noqa: BLE001 (whatever it is, it is a fault)
    return 'fault', traceback.format_exc(limit=-3)
  if found == expected:
    return 'identical', ''
  if kind.allowed(found, expected):
    return 'as it says', ''
  return 'fault', f'another result: {str(found)[:300]}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=500, help='how many bits of each kind')
  parser.add_argument('--kind', choices=list(KINDS), action='append', help='only this kind')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--seconds', type=float, default=float('inf'), help='for each kind')
  options = parser.parse_args()
  columns = ('tried', 'identical', 'refused', 'as it says', 'fault')
  print(f'{"":36}' + ''.join(f'{column:>12}' for column in columns))
  failed = False
  for name in options.kind or KINDS:
    rng = random.Random(options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
      kind = KINDS[name](Path(folder))
      expected = kind.read()
      table = collections.defaultdict(collections.Counter)
      faults = collections.Counter()
      for index in range(options.count):
        if time.monotonic() - started > options.seconds:
          break
        path = kind.files[index % len(kind.files)]
        intact = path.read_bytes()
        broken = bytearray(intact)
        bit = rng.randrange(8 * len(intact))
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        outcome, fault = attempt(kind, expected)
        path.write_bytes(intact)
        table[path.relative_to(folder).as_posix()[-34:]][outcome] += 1
        if fault:
          faults[fault] += 1
          if faults[fault] == 1:
            around = broken[max(bit // 8 - 30, 0) : bit // 8 + 30]
            print(f'{name}: bit {bit} of {path}, {bytes(around)!r}: {fault}', file=sys.stderr)
    counts = sum(table.values(), collections.Counter())
    for row, found in {name: counts, **(table if len(table) > 1 else {})}.items():
      label = row if row == name else f'  {row}'
      found['tried'] = sum(found[column] for column in columns[1:])
      print(f'{label:36}' + ''.join(f'{found[column]:12,}' for column in columns), flush=True)
    failed = failed or bool(faults)
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  main()
