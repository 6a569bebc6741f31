"""Times exported files beside this library and MMSegmentation, on the CPU.

    python benchmarks/exported.py
    python benchmarks/exported.py --size=512,512 --rounds=5

Exports a network with random weights, and prints the difference, size and time of each export. Then
each side predicts single images in processes of its own, in turns, and a table of the medians is
printed. Needs the packages in requirements-dev.txt; on a machine that does other work as well, read
ratios, not times.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.export
import numpy as np

from nonlocal_jax import EvalProtocol, NonLocalNetConfig, PretrainedModel
from nonlocal_jax.cli.benchmark import at_least_one
from nonlocal_jax.cli.benchmark_process import Child, run_child
from nonlocal_jax.cli.export import parse_size
from nonlocal_jax.cli.measurements import random_state
from nonlocal_jax.cli.program import Parser, run_program
from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.export.files import Exported
from nonlocal_jax.models.config import STAGE_BLOCKS
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.weights.description import ModelDescription

HERE = Path(__file__).resolve()


def main(arguments: Sequence[str]) -> None:
  """Runs the comparison.

  Raises:
    UserError: If a side cannot be measured.
  """
  parser = Parser('python benchmarks/exported.py', __doc__)
  parser.add_argument('--size', type=parse_size, default=(512, 512), help='default: 512,512')
  parser.add_argument('--depth', type=int, choices=sorted(STAGE_BLOCKS), default=50)
  parser.add_argument('--width', type=int, default=64, help='base channels; default: 64')
  parser.add_argument('--classes', type=int, default=19, help='default: 19')
  parser.add_argument('--rounds', type=at_least_one, default=3, help='of all sides; default: 3')
  parser.add_argument('--repeats', type=at_least_one, default=3, help='in a round; default: 3')
  options = parser.parse(arguments)
  network = {'classes': options.classes, 'width': options.width, 'depth': options.depth}
  predictions = {'size': options.size, 'repeats': options.repeats}
  common = {**network, **predictions, 'precision': 'highest'}
  of_peer = {**common, 'stage_blocks': STAGE_BLOCKS[options.depth], 'device': 'cpu'}
  with tempfile.TemporaryDirectory() as folder:
    model = random_model(**network)
    files = {}
    for format in ('onnx', 'jax'):
      start = time.monotonic()
      exported = model.export(
        Path(folder) / f'network.{format}', format=format, size=options.size, batch=1
      )
      print(describe(format, exported, time.monotonic() - start), flush=True)
      files[format] = {**predictions, 'path': str(exported.path)}
    del model

    def exported_child(format: str) -> Child:
      return Child(
        'exported', format, format, files[format], cached=format == 'jax', program=(str(HERE),)
      )

    peer = str(HERE.parent / 'peer.py')
    sides = {
      'this library': Child('exported', 'ours', 'inference', common, cached=True),
      'ONNX Runtime': exported_child('onnx'),
      'JAX program': exported_child('jax'),
      'MMSegmentation': Child(
        'exported', 'theirs', 'inference', of_peer, side='theirs', program=(peer,)
      ),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    with progress_bar(options.rounds * len(sides), 'Measuring', unit='process') as bar:
      for _ in range(options.rounds):
        for name, child in sides.items():
          figures = run_child(child, Path(folder))
          if 'error' in figures:
            raise UserError(f'{name} could not be measured: {figures["error"]}.')
          found[name].append(figures['seconds'])
          bar.update()
  print(table(found))


def random_model(*, classes: int, width: int, depth: int) -> PretrainedModel:
  """Returns a network with random weights."""
  config = NonLocalNetConfig.from_depth(
    depth, width=width, num_classes=classes, auxiliary_head=False
  )
  dataset = custom_dataset(classes)
  description = ModelDescription(
    config=config,
    protocol=EvalProtocol(),
    dataset=dataset.name,
    classes=dataset.classes,
    palette=dataset.palette,
    source='random weights',
    sha256=None,
    num_batches_tracked={},
  )
  return PretrainedModel(description, random_state(config))


def describe(format: str, exported: Exported, seconds: float) -> str:
  """Formats an export and how long it took."""
  return (
    f'{format}: {exported.length / 1e6:.1f} MB, written and compared in {seconds:.0f} s, largest '
    f"difference {exported.difference:.1e} of the logits' standard deviation"
  )


def table(found: dict[str, list[float]]) -> str:
  """Formats the median seconds over all rounds as Markdown."""

  def median(name: str) -> float:
    return statistics.median(found[name])

  theirs = median('MMSegmentation')
  lines = ['| | prediction | relative |', '|---|---|---|']
  lines += [f'| {name} | {median(name):.2f} s | {median(name) / theirs:.2f} |' for name in found]
  return '\n'.join(lines)


def measure_file(kind: str, *, path: str, size: Sequence[int], repeats: int) -> dict[str, float]:
  """Times predictions of an exported file; returns the median `seconds`."""
  run = _onnx(path) if kind == 'onnx' else _jax(path)
  rng = np.random.default_rng(0)

  def predict() -> float:
    images = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start

  predict()
  return {'seconds': statistics.median(predict() for _ in range(repeats))}


def _onnx(path: str) -> Callable[[np.ndarray], Any]:
  import onnxruntime

  session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  return lambda images: session.run(['classes'], {'images': images})


def _jax(path: str) -> Callable[[np.ndarray], Any]:
  program = jax.jit(jax.export.deserialize(bytearray(Path(path).read_bytes())).call)
  return lambda images: jax.device_get(program(images))


if __name__ == '__main__':
  if sys.argv[1:2] in (['onnx'], ['jax']):
    print(json.dumps(measure_file(sys.argv[1], **json.loads(sys.argv[2]))))
  else:
    run_program(lambda: main(sys.argv[1:]))
