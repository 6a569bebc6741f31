"""Measures this library on a GPU beside MMSegmentation, the most telling parts first.

    python benchmarks/gpu.py --budget-seconds=600
    python benchmarks/gpu.py --only step prediction --out=DIR
    python benchmarks/gpu.py --only curve pixels --data=DIR --num-classes=11 --ignore-label=11

After each measurement writes OUT/CARD.json and OUT/CARD.md. Results of earlier runs on the same
kind of card stay, unless measured again. A part that the budget does not allow is left out; with
--only it runs alone. The checks run side by side, measurements one after the other.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import jax
import numpy as np
from PIL import Image

from benchmarks.compare import PEER
from benchmarks.report import as_markdown
from nonlocal_jax.cli import benchmark
from nonlocal_jax.cli.benchmark import Record, as_line, at_least_one
from nonlocal_jax.cli.benchmark_plan import evaluated_folder
from nonlocal_jax.cli.benchmark_process import Child, last_line, run_child
from nonlocal_jax.cli.program import Parser, child_environment, run_program
from nonlocal_jax.data.synthetic import DEMO, write_demo_set
from nonlocal_jax.errors import STOPPED_STATUS, UserError
from nonlocal_jax.evaluation.report import METRICS
from nonlocal_jax.models.config import STAGE_BLOCKS
from nonlocal_jax.runtime.files import given_path, write_whole
from nonlocal_jax.training.log import LOG
from nonlocal_jax.weights.loading import read_weights

CHECKS = ('curve', 'pixels', 'deterministic')
_DEPTH, _WIDTH, _CLASSES, _REPEATS = 50, 64, 150, 20
_PRECISIONS = ('highest', 'high', 'default')
# (height, width) of photographs as people have them, and of ADE20K's.
_PHOTOGRAPHS = ((400, 500), (500, 375), (480, 640), (768, 1024), (1024, 768), (1024, 2048))
_ADE20K = ((256, 341), (512, 683), (683, 512), (600, 800), (480, 640), (768, 1024))
_FOLDER_IMAGES = 500
_NETWORK_SIZES = ((512, 512), (769, 769), (1024, 2048))
_SCALE = (2048, 512)  # of ADE20K, (width, height)
_SLOWEST_COMPILE_SECONDS = 120  # of torch.compile
_CHECK_SECONDS = 300  # after which a command of a check is stopped
# Checks share the GPU.
_MEMORY_OF_CHECK = '0.18'


@dataclasses.dataclass(frozen=True)
class Timed:
  """A measurement.

  Attributes:
    part: The part that it belongs to.
    seconds: What it takes, roughly.
    child: The process.
  """

  part: str
  seconds: float
  child: Child


@dataclasses.dataclass(frozen=True)
class Checks:
  """Checks of training and prediction on a GPU, by the commands.

  Attributes:
    data: Folder of images and labels in the layout of `custom`.
    fields: Arguments for the recipe: its classes, sizes and number of steps.
    folder: Where runs go.
    platform: The platform to check, as JAX calls it.
  """

  data: Path
  fields: Sequence[str]
  folder: Path
  platform: str = 'cuda'

  def curve(self, dtype: str) -> dict[str, Any]:
    """Trains by the recipe in a dtype; returns the seconds and the final mIoU in percent."""
    workdir = self.folder / f'curve_{dtype}'
    begun = time.perf_counter()
    self._succeeds(*self._train(workdir, f'--config.train.dtype={dtype}'))
    report = json.loads((workdir / METRICS).read_text())
    return {'seconds': time.perf_counter() - begun, 'mIoU': report['mIoU']}

  def pixels(self, precisions: Sequence[str]) -> dict[str, Any]:
    """Predicts the val images with the weights of `curve('float32')`.

    Args:
      precisions: Precisions of the predictions.

    Returns:
      The number of `pixels`, and for each precision the share that has the same class as on the
      CPU.
    """
    shares = {}
    cpu = self._labels('cpu', 'highest')
    for precision in precisions:
      labels = self._labels(self.platform, precision)
      equal = sum(int((labels[name] == label).sum()) for name, label in cpu.items())
      shares[precision] = equal / sum(label.size for label in cpu.values())
    return {'pixels': sum(label.size for label in cpu.values()), **shares}

  def deterministic(self, *more_fields: str) -> dict[str, Any]:
    """Trains twice, once stopped by SIGTERM and resumed.

    Args:
      *more_fields: Further arguments for the recipe.

    Returns:
      The step that it was `stopped_at`, and how many of the `arrays` of the final weights have the
      same bits.
    """
    fields = (
      '--config.train.deterministic=True',
      '--config.train.steps=12',
      '--config.train.log_every=1',
      *more_fields,
    )
    whole, stopped = self.folder / 'whole', self.folder / 'stopped'
    with concurrent.futures.ThreadPoolExecutor() as pool:
      uninterrupted = pool.submit(self._succeeds, *self._train(whole, *fields))
      self._stop_after(5, stopped, *fields)
      step = _last_step(stopped)
      self._succeeds(*self._train(stopped, *fields))
      uninterrupted.result()
    (_, one), (_, other) = read_weights(whole), read_weights(stopped)
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    same = sum(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    return {'stopped_at': step, 'arrays': len(pairs), 'arrays_with_the_same_bits': same}

  def _train(self, workdir: Path, *fields: str) -> list[str]:
    """The arguments of the command `train`."""
    return [
      *('train', '--config=custom', f'--workdir={workdir}'),
      f'--config.data.source_dir={self.data}',
      f'--config.data.data_dir={workdir}_data',
      '--config.model.attention=auto',
      *self.fields,
      *fields,
    ]

  def _labels(self, platform: str, precision: str) -> dict[str, np.ndarray]:
    """Predicts on a platform; returns the label maps by name."""
    out = self.folder / f'{platform}_{precision}'
    command = [
      *('predict', f'--checkpoint={self.folder}/curve_float32', f'--precision={precision}'),
      *('--attention=auto', '--no-overlays', str(self.data / 'images/val'), f'--out={out}'),
    ]
    self._succeeds(*command, platform=platform)
    return {path.name: np.asarray(Image.open(path)) for path in out.glob('*.png')}

  def _succeeds(self, *arguments: str, platform: str | None = None) -> None:
    """Runs a command of `nonlocal-jax`.

    Raises:
      UserError: If it fails.
    """
    process = self._start(*arguments, platform=platform or self.platform)
    try:
      _, errors = process.communicate(timeout=_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
      process.kill()
      raise UserError(f'{arguments[0]} takes longer than {_CHECK_SECONDS} s') from None
    if process.returncode != 0:
      raise UserError(f'{arguments[0]} says: {last_line(errors)}')

  def _start(self, *arguments: str, platform: str) -> subprocess.Popen:
    environment = child_environment() | {
      'JAX_ENABLE_COMPILATION_CACHE': 'false',  # so that a restart tries algorithms again
      'JAX_PLATFORMS': platform,
      'XLA_PYTHON_CLIENT_MEM_FRACTION': _MEMORY_OF_CHECK,
    }
    return subprocess.Popen(
      [sys.executable, '-m', 'nonlocal_jax', *arguments],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def _stop_after(self, step: int, workdir: Path, *fields: str) -> None:
    """Trains until a step is logged, and stops the run by SIGTERM.

    Raises:
      UserError: If it does not stop as it should.
    """
    process = self._start(*self._train(workdir, *fields), platform=self.platform)
    while process.poll() is None and _last_step(workdir) < step:
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    if process.returncode != STOPPED_STATUS:
      raise UserError(f'train was not stopped by SIGTERM: {last_line(errors)}')


def _last_step(workdir: Path) -> int:
  """Returns the last step in a run's log, 0 if there is none."""
  log = workdir / LOG
  steps = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
  return int(steps[-1]) if steps else 0


def main(arguments: Sequence[str]) -> None:
  """Runs the parts.

  Raises:
    UserError: If JAX finds no GPU, or a measurement fails.
  """
  options = _parse(arguments)
  deadline = time.monotonic() + options.budget_seconds
  jax.config.update('jax_platforms', 'cpu')  # leaves the GPU to the subprocesses
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    machine = run_child(Child('machine', '', 'machine', {}), folder)
    if machine.get('backend') != 'gpu':
      raise UserError('JAX finds no GPU: see what nonlocal-jax doctor says.')
    results = Results(options.out, machine)
    wanted = set(options.only)
    if wanted.intersection(CHECKS):
      for record in run_checks(options, folder):
        results.add(record)
    for timed in measurements(folder, wanted):
      left = deadline - time.monotonic()
      if left < timed.seconds:
        print(f'No time for {timed.child.section} {timed.child.label} {timed.child.side}')
        continue
      child = timed.child
      shown = {'section': child.section, 'label': child.label, 'side': child.side}
      figures = run_child(child, folder, timeout=min(left, 4 * timed.seconds))
      results.add({**shown, 'options': child.options, **figures})
  results.finish()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = Parser('python benchmarks/gpu.py', __doc__)
  add = parser.add_argument
  add(
    '--out', type=given_path, default=Path('benchmarks'), metavar='DIR', help='default: benchmarks'
  )
  add('--budget-seconds', type=at_least_one, default=3600, help='default: 3600')
  add('--only', nargs='+', choices=PARTS, default=PARTS, metavar='PART', help=', '.join(PARTS))
  add('--data', type=given_path, help='folder for the checks; default: the demo set')
  add('--num-classes', type=at_least_one, help='number of classes in --data')
  add('--ignore-label', type=int, nargs='*', default=(), help='in --data, besides 255')
  options = parser.parse(arguments)
  if options.data is not None and options.num_classes is None:
    raise UserError('--data needs --num-classes, the number of classes in its label files.')
  return options


class Results:
  """The results on a kind of card, in two files."""

  def __init__(self, out: Path, machine: Record):
    """Reads what earlier runs wrote.

    Args:
      out: The output folder.
      machine: Device and version of JAX.
    """
    self._path = out / re.sub(r'\W+', '_', machine['device']).lower()
    file = self._path.with_suffix('.json')
    self._records: list[Record] = json.loads(file.read_text()) if file.exists() else []
    self._machine = {**machine, 'processor': benchmark.processor(), 'cores': os.cpu_count()}
    self._run = datetime.datetime.now(datetime.UTC).isoformat()
    self._failed = 0

  def add(self, record: Record) -> None:
    """Adds a measurement and writes the files. It replaces those of before this run.

    Args:
      record: `section`, `label`, `side`, `options` and figures, or an `error`.
    """
    print(as_line(record), flush=True)
    if 'error' in record:
      self._failed += 1
      return
    names = ('section', 'label', 'side')
    self._records = [
      each
      for each in self._records
      if any(each[name] != record[name] for name in names) or each['run'] == self._run
    ]
    self._records.append({**record, 'run': self._run, 'jax': self._machine['jax']})
    write_whole(self._path.with_suffix('.json'), json.dumps(self._records, indent=1) + '\n')
    write_whole(self._path.with_suffix('.md'), self._as_markdown())

  def _as_markdown(self) -> str:
    settings = {'depth': _DEPTH, 'width': _WIDTH, 'classes': _CLASSES}
    machine = {**self._machine, 'date': self._run[:10]}
    checks = [f'- {as_line(each)}' for each in self._records if each['section'] == 'check']
    more = '\n'.join(['\n## Checks\n', *checks, '']) if checks else ''
    return as_markdown(machine, settings, self._records) + more

  def finish(self) -> None:
    """Says where the results are.

    Raises:
      UserError: If a measurement failed.
    """
    print(f'Results are in {self._path}.md.')
    if self._failed:
      raise UserError(f'{self._failed} measurements failed, see above.')


def run_checks(options: argparse.Namespace, folder: Path) -> Iterator[Record]:
  """Runs the wanted checks at the same time; yields results as they come."""
  data, num_classes, ignored = options.data, options.num_classes, tuple(options.ignore_label)
  steps, edge = 1500, 160
  if data is None:
    data, num_classes = folder / 'demo', DEMO.num_classes
    write_demo_set(data, train=64, val=16)
  fields = (
    f'--config.data.num_classes={num_classes}',
    f'--config.data.ignore_labels={ignored}',
    '--config.model.width=16',
    '--config.train.batch_size=8',
    f'--config.train.steps={steps}',
    f'--config.train.crop=({edge}, {edge})',
    '--config.train.scale=(240, 180)',
    '--config.eval.scale=(240, 180)',
    f'--config.eval.every={steps}',
    '--config.optimizer.schedule=v1',
  )
  checks = Checks(data.absolute(), fields, folder)

  def curve_and_pixels() -> Iterator[Record]:
    yield _checked('curve float32', lambda: checks.curve('float32'))
    if 'pixels' in options.only:
      yield _checked('share of pixels as on the CPU', lambda: checks.pixels(_PRECISIONS))

  def curve() -> Iterator[Record]:
    yield _checked('curve bfloat16', lambda: checks.curve('bfloat16'))

  def deterministic() -> Iterator[Record]:
    yield _checked('stopped and resumed', lambda: checks.deterministic('--config.model.width=64'))

  wanted = set(options.only)
  chains = [curve_and_pixels] if wanted & {'curve', 'pixels'} else []
  chains += [curve] if 'curve' in wanted else []
  chains += [deterministic] if 'deterministic' in wanted else []
  with concurrent.futures.ThreadPoolExecutor(len(chains)) as pool:
    running = [pool.submit(lambda chain=chain: list(chain())) for chain in chains]
    for done in concurrent.futures.as_completed(running):
      yield from done.result()


def _checked(label: str, check: Callable[[], dict[str, Any]]) -> Record:
  record = {'section': 'check', 'label': label, 'side': '', 'options': {}}
  try:
    return {**record, **check()}
  except UserError as error:
    return {**record, 'error': str(error)}


def measurements(folder: Path, wanted: set[str]) -> Iterator[Timed]:
  """Yields the measurements of the wanted parts, the most telling first."""
  for part, planned in _TIMED.items():
    if part in wanted:
      for seconds, child in planned(folder):
        yield Timed(part, seconds, child)


def _step(*sizes: tuple[int, int, int, str]) -> Callable[[Path], Iterator[tuple[float, Child]]]:
  def planned(folder: Path) -> Iterator[tuple[float, Child]]:
    del folder
    for *size, batch, dtype in sizes:
      label = f'{size[0]}x{size[1]}, batch {batch}, {dtype}'
      yield from _both('training', label, {'size': size, 'batch': batch, 'dtype': dtype}, 75)

  return planned


def _prediction(*sizes: tuple[int, int, str]) -> Callable[[Path], Iterator[tuple[float, Child]]]:
  def planned(folder: Path) -> Iterator[tuple[float, Child]]:
    del folder
    for *size, precision in sizes:
      label = f'{size[0]}x{size[1]}, {precision}'
      yield from _both('inference', label, {'size': size, 'precision': precision}, 30)

  return planned


def _both(
  measure: str, label: str, given: dict[str, Any], seconds: float
) -> Iterator[tuple[float, Child]]:
  network = {'width': _WIDTH, 'depth': _DEPTH, 'classes': _CLASSES, 'repeats': _REPEATS}
  ours = Child(measure, label, measure, {**network, **given}, side='first', cached=True)
  yield seconds, ours
  yield seconds / 2, _of_peer(ours)


def _of_peer(ours: Child, **given: Any) -> Child:
  options = {**ours.options, 'stage_blocks': STAGE_BLOCKS[_DEPTH], 'device': 'cuda', **given}
  return dataclasses.replace(
    ours, side='theirs', options=options, cached=False, program=(str(PEER),)
  )


def _folder(folder: Path) -> Iterator[tuple[float, Child]]:
  """A folder of photographs, from files to label maps."""
  given = _tree(folder / 'photographs', _PHOTOGRAPHS)
  options = {name: given[name] for name in ('data', 'checkpoint')} | {'precision': 'default'}
  ours = Child('folder', 'default', 'folder', options, cached=True)
  yield 90, dataclasses.replace(ours, side='first')
  yield 40, ours
  more = {'num_classes': given['num_classes'], 'width': _WIDTH, 'depth': _DEPTH}
  yield 60, _of_peer(ours, **more)


def _evaluation(folder: Path) -> Iterator[tuple[float, Child]]:
  """The evaluation of a tree like ADE20K's."""
  given = _tree(folder / 'ade20k', _ADE20K) | {'width': _WIDTH, 'depth': _DEPTH}
  for precision in ('default', 'highest'):
    options = {**given, 'scale': _SCALE, 'precision': precision}
    ours = Child('evaluation', precision, 'evaluation', options, cached=True)
    yield 90, dataclasses.replace(ours, side='first')
    yield 40, ours
    yield 60, _of_peer(ours)


def _tree(folder: Path, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
  """Writes images and labels and random weights; returns what `evaluated_folder` does."""
  write_photographs(folder / 'source', sizes, count=_FOLDER_IMAGES)
  options = argparse.Namespace(
    data=folder / 'source',
    num_classes=_CLASSES,
    limit=_FOLDER_IMAGES,
    checkpoint=None,
    depth=_DEPTH,
    width=_WIDTH,
    ignore_label=(),
  )
  return evaluated_folder(options, folder)


def write_photographs(folder: Path, sizes: Sequence[tuple[int, int]], *, count: int) -> None:
  """Writes images with detail at all scales and labels of regions, `images/val`, `labels/val`.

  Args:
    folder: The output folder.
    sizes: (height, width) of the images, in turns.
    count: The number of images; the first of each size is in `train`, too.
  """
  for kind in ('images', 'labels'):
    for split in ('train', 'val'):
      (folder / kind / split).mkdir(parents=True)

  def write(number: int) -> None:
    rng = np.random.default_rng(number)
    height, width = sizes[number % len(sizes)]
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
      noise = rng.normal(0, 160 / octave**1.5, (2**octave, 2**octave, 3)).astype(np.float32)
      image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + 128, 0, 255).astype(np.uint8)
    regions = rng.integers(0, _CLASSES, (8, 8), dtype=np.uint8)
    label = cv2.resize(regions, (width, height), interpolation=cv2.INTER_NEAREST)
    for split in ('train', 'val') if number < len(sizes) else ('val',):
      Image.fromarray(image).save(folder / 'images' / split / f'{number:04}.jpg', quality=90)
      Image.fromarray(label).save(folder / 'labels' / split / f'{number:04}.png')

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(write, range(count)))


def _ceiling(folder: Path) -> Iterator[tuple[float, Child]]:
  del folder
  yield 20, Child('ceiling', '', 'ceiling', {'side': 8192, 'gib': 2.0})


def _network(folder: Path) -> Iterator[tuple[float, Child]]:
  """The operations of the network, for the shares of the peak."""
  del folder
  network = {'width': _WIDTH, 'depth': _DEPTH, 'classes': _CLASSES}
  yield 40, Child('network', '', 'network', {**network, 'sizes': _NETWORK_SIZES})


def _compiled(folder: Path) -> Iterator[tuple[float, Child]]:
  """MMSegmentation through `torch.compile`, where that takes two minutes at most."""
  del folder
  for measure, label, given in (
    ('training', '512x512, batch 4, float32', {'size': [512, 512], 'batch': 4, 'dtype': 'float32'}),
    ('inference', '1024x2048, default', {'size': [1024, 2048], 'precision': 'default'}),
  ):
    *_, (_, theirs) = _both(measure, label, given, 0)
    child = dataclasses.replace(
      theirs, label=f'{label}, torch.compile', options={**theirs.options, 'compiled': True}
    )
    yield _SLOWEST_COMPILE_SECONDS / 4, child


_TIMED: dict[str, Callable[[Path], Iterator[tuple[float, Child]]]] = {
  'step': _step((512, 512, 4, 'float32'), (512, 512, 4, 'bfloat16')),
  'prediction': _prediction(
    (1024, 2048, 'default'), (512, 512, 'default'), (1024, 2048, 'highest'), (1024, 2048, 'high')
  ),
  'step_769': _step((769, 769, 2, 'bfloat16')),
  'folder': _folder,
  'evaluation': _evaluation,
  'ceiling': _ceiling,
  'network': _network,
  'compiled': _compiled,
}
PARTS = (*CHECKS, *_TIMED)


if __name__ == '__main__':
  run_program(lambda: main(sys.argv[1:]))
