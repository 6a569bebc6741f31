"""Measures the speed and memory of the network on this machine.

    nonlocal-jax benchmark --out=DIR
    nonlocal-jax benchmark --only inference training
    nonlocal-jax benchmark --data=DIR --num-classes=11 --ignore-label=11 --eval-scale=480x360

Each measurement runs in its own process, on one device (the evaluation on all). Prints the results
and writes them to OUT/results.json.
"""

import argparse
import datetime
import glob
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax

from nonlocal_jax.cli.benchmark_plan import planned
from nonlocal_jax.cli.benchmark_process import Child, run_child
from nonlocal_jax.cli.program import Parser, path_option
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.pretrained import Precision
from nonlocal_jax.models.config import STAGE_BLOCKS
from nonlocal_jax.runtime.devices import describe, say_advice_on_cuda
from nonlocal_jax.runtime.files import unfinished, write_whole
from nonlocal_jax.runtime.progress import progress_bar

Record = Mapping[str, Any]

RESULTS = 'results.json'
SECTIONS = (
  'ceiling',
  'inference',
  'training',
  'evaluation',
  'folder',
  'pipeline',
  'compile',
  'network',
  'non_local',
)
_POSITIONS = (1024, 4096, 16384, 65536, 131072)
_SIZES = ((512, 512), (512, 1024), (769, 769), (1024, 2048))
_NO_FIGURES = ('section', 'label', 'side', 'options', 'run', 'jax')


class Defaults(NamedTuple):
  """Defaults of options that depend on the device."""

  train_sizes: Sequence[tuple[int, int, int]]
  dtypes: Sequence[str]
  precisions: Sequence[str]
  repeats: int


_ON_CPU = Defaults([(256, 256, 2), (512, 512, 1)], ['float32'], ['highest'], repeats=3)
# Batches of 4 are one GPU's part of a published batch. Short measurements are repeated more often.
_ON_GPU = Defaults(
  [(512, 512, 4), (769, 769, 2)],
  ['float32', 'bfloat16'],
  ['highest', 'high', 'default'],
  repeats=20,
)


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax benchmark`."""
  run(parse(make_parser('nonlocal-jax benchmark', __doc__), arguments), write=write_json)


def run(
  options: argparse.Namespace,
  *,
  write: Callable[[Path, Record, Record, Sequence[Record]], None],
  peer: Path | None = None,
) -> None:
  """Runs the measurements; prints and writes the results after each.

  Args:
    options: See `make_parser`.
    write: Writes the results; takes `options.out`, the machine, the options and the records so far.
    peer: A program with measurements of the same names, to alternate with ours.

  Raises:
    UserError: If JAX does not run or a measurement fails.
  """
  jax.config.update('jax_platforms', 'cpu')  # leaves the accelerators to the subprocesses
  with (
    tempfile.TemporaryDirectory() as folder,
    unfinished(Path(folder).parent, glob.escape(Path(folder).name)),
  ):
    machine = run_child(Child('machine', '', 'machine', {}), Path(folder))
    if 'error' in machine:
      raise UserError(f'JAX does not run here: {machine["error"]}')
    print(f'Runs on {describe(machine["device"], machine["devices"])}', file=sys.stderr)
    say_advice_on_cuda(machine['backend'])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = {**machine, 'processor': processor(), 'cores': os.cpu_count(), 'date': today}
    gpu = machine['backend'] == 'gpu'
    for name, value in (_ON_GPU if gpu else _ON_CPU)._asdict().items():
      if getattr(options, name) is None:
        setattr(options, name, value)
    children = planned(options, Path(folder), gpu=gpu, peer=peer)
    records = []
    with progress_bar(len(children), 'Measuring', unit='process') as bar:
      for child in children:
        bar.set_postfix_str(' '.join(filter(None, (child.section, child.label, child.side))))
        shown = {'section': child.section, 'label': child.label, 'side': child.side}
        records.append({**shown, 'options': child.options, **run_child(child, Path(folder))})
        write(options.out, machine, settings_of(options), records)
        bar.write(as_line(records[-1]))
        bar.update()
  print(f'Results are in {options.out}.')
  failed = [record for record in records if 'error' in record]
  if failed:
    raise UserError(
      f'{len(failed)} of {len(records)} measurements failed, see {options.out / RESULTS}.'
    )


def write_json(out: Path, machine: Record, settings: Record, records: Sequence[Record]) -> None:
  """Writes the results so far to `out`/results.json."""
  results = {'machine': machine, 'settings': settings, 'measurements': records}
  write_whole(out / RESULTS, json.dumps(results, indent=2) + '\n')


def as_line(record: Record) -> str:
  """Formats a result, e.g. 'inference 512x512 ours: seconds 0.44, peak_gib 0.9'."""
  title = ' '.join(filter(None, (record['section'], record['label'], record['side'])))
  shown = {key: value for key, value in record.items() if key not in _NO_FIGURES}
  figures = ', '.join(f'{key} {_number(value)}' for key, value in shown.items())
  return f'{title}: {figures}'


def _number(value: Any) -> str:
  if isinstance(value, Mapping):
    return ' '.join(f'{key} {_number(each)}' for key, each in value.items())
  if isinstance(value, Sequence) and not isinstance(value, str):
    return '/'.join(map(_number, value))
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def processor() -> str:
  """Returns the name of the processor."""
  cpuinfo = Path('/proc/cpuinfo')
  named = re.search(r'model name\s*:\s*(.*)', cpuinfo.read_text()) if cpuinfo.exists() else None
  return named[1] if named else platform.processor() or platform.machine()


def make_parser(program: str, description: str | None, *, out: str = 'runs/benchmark') -> Parser:
  """Creates the option parser.

  Args:
    program: See `Parser`.
    description: See `Parser`.
    out: The default of --out.
  """
  parser = Parser(program, description)
  add = parser.add_argument
  add('--out', type=path_option, default=Path(out), metavar='DIR', help=f'default: {out}')
  add(
    '--only',
    nargs='+',
    choices=SECTIONS,
    default=SECTIONS,
    metavar='NAME',
    help=f'some of {", ".join(SECTIONS)}; default: all',
  )
  add(
    '--repeats',
    type=at_least_one,
    help=f'timed calls; default: 3, {_ON_GPU.repeats} on a GPU',
  )
  add('--width', type=at_least_one, default=64, help='base channels; default: 64')
  add('--depth', type=int, choices=STAGE_BLOCKS, default=50, help='default: 50')
  add(
    '--compile-depths',
    type=int,
    nargs='+',
    choices=STAGE_BLOCKS,
    default=(50, 101),
    help='50 101',
  )
  add(
    '--classes',
    type=at_least_one,
    default=150,
    help='for random images; default: 150',
  )
  add(
    '--sizes',
    type=sides,
    nargs='+',
    default=_SIZES,
    metavar='HxW',
    help='for inference',
  )
  add(
    '--train-sizes',
    type=sides,
    nargs='+',
    metavar='HxWxBATCH',
    help='for training',
  )
  add(
    '--dtypes',
    nargs='+',
    choices=('float32', 'bfloat16'),
    help='dtypes of activations in training; default: float32, both on a GPU',
  )
  add(
    '--precisions',
    nargs='+',
    choices=get_args(Precision),
    help='of predictions; default: highest, on a GPU all of highest, high and default',
  )
  add(
    '--positions',
    type=at_least_one,
    nargs='+',
    default=_POSITIONS,
    help='for non_local',
  )
  add('--data', type=path_option, help='folder with images/{train,val}, labels/{train,val}')
  add('--num-classes', type=at_least_one, help='number of classes in --data')
  add('--ignore-label', type=int, nargs='*', default=(), help='in --data, besides 255')
  add('--eval-scale', type=sides, default=(2048, 512), metavar='WxH', help='default: 2048x512')
  add('--limit', type=at_least_one, default=50, help='images of each split; default: 50')
  add('--checkpoint', type=path_option, help='.pth file to evaluate; default: random weights')
  return parser


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
  """Parses and checks the options.

  Raises:
    UserError: If an option is invalid.
  """
  options = parser.parse(arguments)
  of_options = {
    '--sizes': (options.sizes, 2),
    '--train-sizes': (options.train_sizes or (), 3),
    '--eval-scale': ([options.eval_scale], 2),
  }
  for option, (values, count) in of_options.items():
    if any(len(value) != count for value in values):
      parser.error(f'{option} takes {count} numbers with x between them')
  if options.checkpoint is not None and not options.checkpoint.is_file():
    raise UserError(f'There is no file {options.checkpoint}: give a .pth file.')
  if options.data is not None and options.num_classes is None:
    raise UserError('--data needs --num-classes, the number of classes in its label files.')
  return options


def sides(text: str) -> tuple[int, ...]:
  """Parses '512x1024' or '256x256x2'."""
  return tuple(map(at_least_one, text.split('x')))


def at_least_one(text: str) -> int:
  """Parses a positive integer.

  Raises:
    ValueError: If it is not positive.
  """
  if int(text) < 1:
    raise ValueError(text)
  return int(text)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the options as values that JSON can hold."""
  return {
    name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
  }
