"""Measures the speed and memory of the network on this machine.

    nonlocal-jax benchmark --out=DIR
    nonlocal-jax benchmark --only inference training
    nonlocal-jax benchmark --data=DIR --num-classes=11 --ignore-label=11 --eval-scale=480x360

Each measurement runs in its own process, on one device (the evaluation on all). Prints the results
and writes them to OUT/results.json.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from nonlocal_jax.cli.program import Parser, child_environment
from nonlocal_jax.data.synthetic import DEMO, write_demo_set
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.pretrained import Precision
from nonlocal_jax.models.config import STAGE_BLOCKS, NonLocalNetConfig
from nonlocal_jax.runtime.devices import describe, say_advice_on_cuda
from nonlocal_jax.runtime.files import given_path, write_whole
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.torch_format.writer import write_torch_checkpoint
from nonlocal_jax.weights.state_dict import to_state_dict

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
_ON_FOLDERS = ('evaluation', 'folder', 'pipeline')
_POSITIONS = (1024, 4096, 16384, 65536, 131072)
_SIZES = ((512, 512), (512, 1024), (769, 769), (1024, 2048))
_PIPELINE_BATCHES = 20
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
# Products and copies that fill the device, and are done in a second.
_CEILING = {False: {'side': 2048, 'gib': 0.25}, True: {'side': 8192, 'gib': 2.0}}


@dataclasses.dataclass(frozen=True)
class Child:
  """A measurement in its own process.

  Attributes:
    section: One of `SECTIONS`.
    label: The label within the section, e.g. '512x1024'.
    measure: The name of the measurement, see `measurements.MEASURES`.
    options: Its arguments.
    side: 'first' starts with an empty compilation cache, 'ours' with a filled one; 'theirs' is the
      peer.
    cached: Whether to use a compilation cache, which measurements of a section and label share.
    program: The arguments of Python, followed by `measure` and `options`.
  """

  section: str
  label: str
  measure: str
  options: dict[str, Any]
  side: Literal['first', 'ours', 'theirs'] = 'ours'
  cached: bool = False
  program: tuple[str, ...] = ('-m', 'nonlocal_jax.cli.measurements')


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
  with tempfile.TemporaryDirectory() as folder:
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
  add('--out', type=given_path, default=Path(out), metavar='DIR', help=f'default: {out}')
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
  add('--data', type=given_path, help='folder with images/{train,val}, labels/{train,val}')
  add('--num-classes', type=at_least_one, help='number of classes in --data')
  add('--ignore-label', type=int, nargs='*', default=(), help='in --data, besides 255')
  add('--eval-scale', type=sides, default=(2048, 512), metavar='WxH', help='default: 2048x512')
  add('--limit', type=at_least_one, default=50, help='images of each split; default: 50')
  add('--checkpoint', type=given_path, help='.pth file to evaluate; default: random weights')
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


def planned(
  options: argparse.Namespace, folder: Path, *, gpu: bool, peer: Path | None = None
) -> list[Child]:
  """Lists the measurements in order.

  Args:
    options: See `make_parser`.
    folder: A folder for the images and weights to evaluate.
    gpu: Whether JAX runs on a GPU. If so, the FLOPs of the network are counted as well, to compare
      with the peak of the GPU.
    peer: See `run`; it is measured `options.rounds` times.
  """
  network = {'width': options.width, 'depth': options.depth, 'classes': options.classes}
  wanted = set(options.only)
  if gpu and wanted & {'inference', 'training'}:
    wanted.add('network')
  data = {}
  if wanted.intersection(_ON_FOLDERS):
    data = evaluated_folder(options, folder)
    data |= {'width': options.width, 'depth': options.depth}
  children = []
  if 'ceiling' in wanted:
    children.append(Child('ceiling', '', 'ceiling', _CEILING[gpu]))
  if 'network' in wanted:
    sizes = [*options.sizes, *(size[:2] for size in options.train_sizes)]
    children.append(Child('network', '', 'network', {**network, 'sizes': sizes}))
  for label, measure, given in timed_calls(options, network, data):
    if measure not in wanted:
      continue
    ours = Child(measure, label, measure, given, cached=True)
    children.append(dataclasses.replace(ours, side='first'))
    if peer is None:
      children.append(ours)
      continue
    of_peer = {'stage_blocks': STAGE_BLOCKS[options.depth], 'device': 'cuda' if gpu else 'cpu'}
    if measure == 'folder':  # we read these from the checkpoint
      of_peer |= {name: data[name] for name in ('num_classes', 'width', 'depth')}
    theirs = Child(
      measure, label, measure, {**given, **of_peer}, side='theirs', program=(str(peer),)
    )
    children += [ours, theirs] * options.rounds
  if 'pipeline' in wanted:
    batches = {name: data[name] for name in ('data', 'num_classes', 'ignore_labels')}
    batches['batches'] = _PIPELINE_BATCHES
    children.append(Child('pipeline', '', 'pipeline', batches))
  if 'compile' in wanted:
    for depth in options.compile_depths:
      once = {**network, 'depth': depth, 'repeats': 1}
      *size, batch = options.train_sizes[0]
      training = {**once, 'size': size, 'batch': batch, 'dtype': options.dtypes[0]}
      children.append(Child('compile', f'training R-{depth}', 'training', training))
      inference = {**once, 'size': options.sizes[0], 'precision': options.precisions[0]}
      children.append(Child('compile', f'inference R-{depth}', 'inference', inference))
  if 'non_local' in wanted:
    block = {'channels': 8 * options.width, 'positions': options.positions}
    children.append(Child('non_local', '', 'non_local', block))
  return children


def evaluated_folder(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
  """Prepares images and weights to evaluate; returns arguments for the measurements."""
  from nonlocal_jax.cli.measurements import random_state

  source, num_classes = options.data, options.num_classes
  if source is None:
    source, num_classes = folder / 'synthetic', DEMO.num_classes
    write_demo_set(source, train=options.limit, val=options.limit)
  linked = folder / 'data'
  for split in ('train', 'val'):
    link_first(source, linked, split, options.limit)
  checkpoint = options.checkpoint
  if checkpoint is None:
    checkpoint = folder / 'random.pth'
    config = NonLocalNetConfig.from_depth(
      options.depth, width=options.width, num_classes=num_classes
    )
    arrays = to_state_dict(random_state(config), num_batches_tracked={})
    write_torch_checkpoint(checkpoint, arrays, meta={})
  return {
    'data': str(linked),
    'checkpoint': str(checkpoint.absolute()),
    'num_classes': num_classes,
    'ignore_labels': list(options.ignore_label),
  }


def link_first(source: Path, linked: Path, split: str, limit: int) -> None:
  """Creates a folder of links to the first images of a split and their labels.

  Raises:
    UserError: If there are no images with labels.
  """
  labels = {path.stem: path for path in (source / 'labels' / split).glob('*.png')}
  images = sorted(path for path in (source / 'images' / split).glob('*') if path.stem in labels)
  if not images:
    raise UserError(f'{source} has no images/{split} with labels/{split} of the same stems.')
  for kind in ('images', 'labels'):
    (linked / kind / split).mkdir(parents=True)
  for image in images[:limit]:
    label = labels[image.stem]
    (linked / 'images' / split / image.name).symlink_to(image.absolute())
    (linked / 'labels' / split / label.name).symlink_to(label.absolute())


def timed_calls(
  options: argparse.Namespace, network: dict[str, Any], data: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """Yields label, name and options of the measurements that both sides run."""
  repeated = {**network, 'repeats': options.repeats}
  for size in options.sizes:
    for precision in options.precisions:
      label = f'{size[0]}x{size[1]}, {precision}'
      yield label, 'inference', {**repeated, 'size': size, 'precision': precision}
  for *size, batch in options.train_sizes:
    for dtype in options.dtypes:
      label = f'{size[0]}x{size[1]}, batch {batch}, {dtype}'
      yield label, 'training', {**repeated, 'size': size, 'batch': batch, 'dtype': dtype}
  if data:
    for precision in options.precisions:
      yield precision, 'evaluation', {**data, 'scale': options.eval_scale, 'precision': precision}
      folder = {'data': data['data'], 'checkpoint': data['checkpoint'], 'precision': precision}
      yield precision, 'folder', folder


def run_child(child: Child, folder: Path, *, timeout: float | None = None) -> dict[str, Any]:
  """Runs a measurement; returns its results, or an `error` if it fails.

  Args:
    child: The measurement.
    folder: A folder for the compilation caches.
    timeout: The seconds after which it is stopped, which is an error; None for no limit.
  """
  with subprocess.Popen(
    [sys.executable, *child.program, child.measure, json.dumps(started(child))],
    env=environment_of(child, folder),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      process.kill()
      return {'error': f'took longer than {timeout:.0f} s'}
    except BaseException:
      process.terminate()
      raise
  if process.returncode < 0:
    return {'error': f'ended by {signal.Signals(-process.returncode).name}'}
  if process.returncode > 0:
    return {'error': last_line(stderr)}
  return json.loads(last_line(stdout))


def environment_of(child: Child, folder: Path) -> dict[str, str]:
  """Returns the environment of a measurement, see `run_child`."""
  environment = {**child_environment(), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  environment['JAX_TRACEBACK_FILTERING'] = 'off'  # so that the last line of stderr is the error
  if child.measure == 'network':
    # On other platforms JAX counts the FLOPs of compiled programs only.
    environment['JAX_PLATFORMS'] = 'cpu'
  if child.cached:
    cache = folder / 'compiled' / f'{child.section} {child.label}'
    environment |= {
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
    }
  return environment


def started(child: Child) -> dict[str, Any]:
  """Returns the arguments of a measurement that starts now."""
  if child.measure in ('inference', 'training') or child.side == 'theirs':
    return {**child.options, 'started': time.time()}
  return child.options


def last_line(text: str) -> str:
  """Returns the last nonempty line."""
  return next((line for line in reversed(text.splitlines()) if line.strip()), '')
