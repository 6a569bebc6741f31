r"""Measures how fast the network is and how much memory it needs, beside MMSegmentation if wanted.

python scripts/benchmark.py --out=benchmarks
python scripts/benchmark.py --out=benchmarks --only inference training --peer
python scripts/benchmark.py --data=DIR --num-classes=11 --ignore-label=11 --eval-scale=480x360

Each measurement runs in a process of its own, on one device (the evaluation on all). After each,
writes OUT/results.md, OUT/scaling.png and OUT/results.json. On a GPU, results.md also holds shares
of its peak and what was published of a V100. --peer needs what requirements-dev.txt names.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.program import run_program
from nonlocal_jax.data.synthetic import DEMO, write_demo_set
from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import STAGE_BLOCKS, NonLocalNetConfig
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.torch_format.writer import write_torch_checkpoint
from nonlocal_jax.weights.state_dict import to_state_dict
from scripts.benchmark_measures import random_state
from scripts.benchmark_report import write_results

SECTIONS = ('inference', 'training', 'evaluation', 'pipeline', 'compile', 'network', 'non_local')
_ON_FOLDERS = ('evaluation', 'pipeline')
_FOLDER = Path(__file__).resolve().parent
_POSITIONS = (1024, 4096, 16384, 65536, 131072)
_SIZES = ((512, 512), (512, 1024), (769, 769), (1024, 2048))
_PIPELINE_BATCHES = 20


class Defaults(NamedTuple):
  """Of options that depend on the device."""

  train_sizes: Sequence[tuple[int, int, int]]
  dtypes: Sequence[str]
  repeats: int


_ON_CPU = Defaults([(256, 256, 2), (512, 512, 1)], ['float32'], repeats=3)
# The share that a GPU has of a published batch; what takes milliseconds is repeated more often.
_ON_GPU = Defaults([*_ON_CPU.train_sizes, (512, 512, 4)], ['float32', 'bfloat16'], repeats=20)


@dataclasses.dataclass(frozen=True)
class Child:
  """A measurement in a process of its own.

  Attributes:
    section: What it belongs to, of `SECTIONS`.
    label: Which one in the section, e.g. '512x1024'.
    measure: Name of the function in benchmark_measures.py or benchmark_peer.py.
    options: Its arguments.
    side: 'first' with an empty compilation cache, 'ours' with what that left, or 'theirs'.
    cached: Whether compiled programs are kept for the same section and label.
  """

  section: str
  label: str
  measure: str
  options: dict[str, Any]
  side: Literal['first', 'ours', 'theirs'] = 'ours'
  cached: bool = False


def main() -> None:
  """Runs what the arguments say."""
  arguments = parse_arguments()
  jax.config.update('jax_platforms', 'cpu')  # the devices are for the other processes
  if arguments.peer and not all(map(importlib.util.find_spec, ('torch', 'mmengine', 'mmseg'))):
    raise UserError('--peer needs MMSegmentation: pip install -r requirements-dev.txt.')
  if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
    raise UserError(f'There is no file {arguments.checkpoint}: give a .pth file.')
  if arguments.data is not None and arguments.num_classes is None:
    raise UserError('--data needs --num-classes, the number of classes in its label files.')
  with tempfile.TemporaryDirectory() as folder:
    machine = run_child(Child('machine', '', 'machine', {}), Path(folder))
    if 'error' in machine:
      raise UserError(f'JAX does not run here: {machine["error"]}')
    gpu = machine['backend'] == 'gpu'
    for name, value in (_ON_GPU if gpu else _ON_CPU)._asdict().items():
      if getattr(arguments, name) is None:
        setattr(arguments, name, value)
    children = planned(arguments, Path(folder), gpu=gpu)
    records = []
    with progress_bar(len(children), 'Measuring', unit='process') as bar:
      for child in children:
        bar.set_postfix_str(' '.join(filter(None, (child.section, child.label, child.side))))
        figures = run_child(child, Path(folder))
        shown = {'section': child.section, 'label': child.label, 'side': child.side}
        records.append({**shown, 'options': child.options, **figures})
        write_results(arguments.out, machine, settings_of(arguments), records)
        bar.update()
  print(f'Results are in {arguments.out}.')
  failed = [record for record in records if 'error' in record]
  if failed:
    raise UserError(
      f'{len(failed)} of {len(records)} measurements failed, see {arguments.out / "results.md"}.'
    )


def parse_arguments() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--out', type=Path, default=Path('benchmarks'), help='default: benchmarks')
  add(
    '--only',
    nargs='+',
    choices=SECTIONS,
    default=SECTIONS,
    metavar='NAME',
    help=f'of {", ".join(SECTIONS)}; default: all',
  )
  add('--peer', action='store_true', help='measure MMSegmentation, too, by turns')
  add('--rounds', type=at_least_one, default=3, help='turns with --peer; default: 3')
  add(
    '--repeats', type=at_least_one, help=f'of timed calls; default: 3, {_ON_GPU.repeats} on a GPU'
  )
  add('--width', type=at_least_one, default=64, help='base channels; default: 64')
  add('--depth', type=int, choices=STAGE_BLOCKS, default=50, help='default: 50')
  add(
    '--compile-depths', type=int, nargs='+', choices=STAGE_BLOCKS, default=(50, 101), help='50 101'
  )
  add('--classes', type=at_least_one, default=150, help='of random images; default: 150')
  add('--sizes', type=sides, nargs='+', default=_SIZES, metavar='HxW', help='of inference')
  add('--train-sizes', type=sides, nargs='+', metavar='HxWxBATCH', help='of training')
  add(
    '--dtypes',
    nargs='+',
    choices=('float32', 'bfloat16'),
    help='of activations in training; default: float32, both on a GPU',
  )
  add('--positions', type=at_least_one, nargs='+', default=_POSITIONS, help='of the block alone')
  add('--data', type=Path, help='folder with images/{train,val}, labels/{train,val}')
  add('--num-classes', type=at_least_one, help='of --data')
  add('--ignore-label', type=int, nargs='*', default=(), help='of --data, beside 255')
  add('--eval-scale', type=sides, default=(2048, 512), metavar='WxH', help='default: 2048x512')
  add('--limit', type=at_least_one, default=50, help='images of each split; default: 50')
  add('--checkpoint', type=Path, help='.pth file to evaluate; default: random weights')
  arguments = parser.parse_args()
  of_options = {
    '--sizes': (arguments.sizes, 2),
    '--train-sizes': (arguments.train_sizes or (), 3),
    '--eval-scale': ([arguments.eval_scale], 2),
  }
  for option, (values, count) in of_options.items():
    if any(len(value) != count for value in values):
      parser.error(f'{option} takes {count} numbers with x between them')
  return arguments


def sides(text: str) -> tuple[int, ...]:
  """Reads '512x1024' or '256x256x2'."""
  return tuple(map(at_least_one, text.split('x')))


def at_least_one(text: str) -> int:
  """Reads a positive number.

  Raises:
    ValueError: If it is none.
  """
  if int(text) < 1:
    raise ValueError(text)
  return int(text)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
  """The arguments as plain values."""
  return {
    name: str(value) if isinstance(value, Path) else value
    for name, value in vars(arguments).items()
  }


def planned(arguments: argparse.Namespace, folder: Path, *, gpu: bool) -> list[Child]:
  """What is to be measured, in order.

  Args:
    arguments: The command line.
    folder: Gets the images and weights to evaluate.
    gpu: Whether there is one: then speeds are shares of its own, which takes the network's
      operations.
  """
  images = {'width': arguments.width, 'depth': arguments.depth, 'classes': arguments.classes}
  wanted = set(arguments.only)
  if gpu and wanted & {'inference', 'training'}:
    wanted.add('network')
  device = 'cuda' if gpu else 'cpu'
  data = {}
  if wanted.intersection(_ON_FOLDERS):
    data = evaluated_folder(arguments, folder)
  children = []
  if 'network' in wanted:
    sizes = [*arguments.sizes, *(size[:2] for size in arguments.train_sizes)]
    children.append(Child('network', '', 'network', {**images, 'sizes': sizes}))
  for label, measure, options in timed_calls(arguments, images, data):
    if measure not in wanted:
      continue
    timed = Child(measure, label, measure, options, cached=True)
    children.append(dataclasses.replace(timed, side='first'))
    for _ in range(arguments.rounds if arguments.peer else 1):
      children.append(timed)
      if arguments.peer:
        of_peer = {'stage_blocks': STAGE_BLOCKS[arguments.depth], 'device': device}
        theirs = {**options, **of_peer}
        children.append(dataclasses.replace(timed, side='theirs', options=theirs, cached=False))
  if 'pipeline' in wanted:
    batches = {key: value for key, value in data.items() if key != 'checkpoint'}
    batches['batches'] = _PIPELINE_BATCHES
    children.append(Child('pipeline', '', 'pipeline', batches))
  if 'compile' in wanted:
    for depth in arguments.compile_depths:
      once = {**images, 'depth': depth, 'repeats': 1}
      *size, batch = arguments.train_sizes[0]
      training = {**once, 'size': size, 'batch': batch, 'dtype': arguments.dtypes[0]}
      children.append(Child('compile', f'training R-{depth}', 'training', training))
      inference = {**once, 'size': arguments.sizes[0]}
      children.append(Child('compile', f'inference R-{depth}', 'inference', inference))
  if 'non_local' in wanted:
    block = {'channels': 8 * arguments.width, 'positions': arguments.positions}
    children.append(Child('non_local', '', 'non_local', block))
  return children


def evaluated_folder(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
  """Makes the folder of images to evaluate and the weights; returns what the measures need."""
  source, num_classes = arguments.data, arguments.num_classes
  if source is None:
    source, num_classes = folder / 'synthetic', DEMO.num_classes
    write_demo_set(source, train=arguments.limit, val=arguments.limit)
  linked = folder / 'data'
  for split in ('train', 'val'):
    link_first(source, linked, split, arguments.limit)
  checkpoint = arguments.checkpoint
  if checkpoint is None:
    checkpoint = folder / 'random.pth'
    config = NonLocalNetConfig.from_depth(
      arguments.depth, width=arguments.width, num_classes=num_classes
    )
    arrays = to_state_dict(random_state(config), num_batches_tracked={})
    write_torch_checkpoint(checkpoint, arrays, meta={})
  return {
    'data': str(linked),
    'checkpoint': str(checkpoint.absolute()),
    'num_classes': num_classes,
    'ignore_labels': list(arguments.ignore_label),
  }


def link_first(source: Path, linked: Path, split: str, limit: int) -> None:
  """Makes a folder of links to the first images of a split and their labels.

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
  arguments: argparse.Namespace, images: dict[str, Any], data: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """Label, measure and options of what is timed on both sides."""
  repeated = {**images, 'repeats': arguments.repeats}
  for size in arguments.sizes:
    yield 'x'.join(map(str, size)), 'inference', {**repeated, 'size': size}
  for *size, batch in arguments.train_sizes:
    for dtype in arguments.dtypes:
      label = f'{size[0]}x{size[1]}, batch {batch}, {dtype}'
      yield label, 'training', {**repeated, 'size': size, 'batch': batch, 'dtype': dtype}
  if data:
    network = {'width': arguments.width, 'depth': arguments.depth}
    yield '', 'evaluation', {**data, **network, 'scale': arguments.eval_scale}


def run_child(child: Child, folder: Path) -> dict[str, Any]:
  """Runs a measurement; returns its figures, or an `error` if it fails.

  Args:
    child: What to measure.
    folder: Gets the compilation caches.
  """
  script = 'benchmark_peer.py' if child.side == 'theirs' else 'benchmark_measures.py'
  with subprocess.Popen(
    [sys.executable, str(_FOLDER / script), child.measure, json.dumps(started(child))],
    env=environment_of(child, folder),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      printed, said = process.communicate()
    except BaseException:
      process.terminate()
      raise
  if process.returncode < 0:
    return {'error': f'ended by {signal.Signals(-process.returncode).name}'}
  if process.returncode > 0:
    return {'error': last_line(said)}
  return json.loads(last_line(printed))


def environment_of(child: Child, folder: Path) -> dict[str, str]:
  """The environment of a measurement's process, see `run_child`."""
  environment = {**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  environment['JAX_TRACEBACK_FILTERING'] = 'off'  # so that an error's last line says what it is
  if child.measure == 'network':
    # Elsewhere JAX counts the operations of compiled programs only.
    environment['JAX_PLATFORMS'] = 'cpu'
  if child.cached:
    cache = folder / 'compiled' / f'{child.section} {child.label}'
    environment |= {
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
    }
  return environment


def started(child: Child) -> dict[str, Any]:
  """The arguments of a measurement that starts now."""
  if child.measure in ('inference', 'training') or child.side == 'theirs':
    return {**child.options, 'started': time.time()}
  return child.options


def last_line(text: str) -> str:
  """The last line that is not empty."""
  return next((line for line in reversed(text.splitlines()) if line.strip()), '')


if __name__ == '__main__':
  run_program(main)
