"""Measurements of the command `benchmark` on a folder of images."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nonlocal_jax.cli.program import child_environment
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.report import METRICS
from nonlocal_jax.recipes import custom_config

Figures = dict[str, Any]


def measure_evaluation(
  *,
  data: str,
  checkpoint: str,
  scale: Sequence[int],
  num_classes: int,
  ignore_labels: Sequence[int],
  width: int,
  depth: int,
  precision: str,
) -> Figures:
  """Times the command `eval` on a folder that was not prepared before.

  Args:
    data: The folder, with images/val and labels/val.
    checkpoint: The weights.
    scale: (width, height) of the box that images are resized into.
    num_classes: Number of classes.
    ignore_labels: Label values without a class, beside 255.
    width: Base channels of the network.
    depth: Layers of its backbone.
    precision: See nonlocal_jax/recipes.py. Attention is the fastest for it.

  Returns:
    `total_seconds`, the time of the whole process; `seconds`, that of the evaluation alone; the
    number of `images`; `mIoU` in percent; and the peak memory of the process.

  Raises:
    UserError: If the command fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    total, _ = run_command(
      'eval',
      '--config=custom',
      f'--checkpoint={checkpoint}',
      f'--workdir={folder}/workdir',
      f'--config.data.source_dir={data}',
      f'--config.data.data_dir={folder}/prepared',
      f'--config.data.num_classes={num_classes}',
      f'--config.data.ignore_labels={tuple(ignore_labels)}',
      f'--config.eval.scale={tuple(scale)}',
      f'--config.eval.precision={precision}',
      '--config.model.attention=auto',
      f'--config.model.width={width}',
      f'--config.model.depth={depth}',
    )
    report = json.loads((Path(folder) / 'workdir' / METRICS).read_text())
  return {
    **of_device_or_host(report['peak_memory_gib']),
    'seconds': report['seconds'],
    'total_seconds': total,
    'images': report['images'],
    'mIoU': report['mIoU'],
  }


def run_command(*arguments: str) -> tuple[float, str]:
  """Runs a command of `nonlocal-jax` in a process of its own.

  Returns:
    The seconds that it took, and what it printed.

  Raises:
    UserError: If the command fails.
  """
  begun = time.perf_counter()
  done = subprocess.run(
    [sys.executable, '-m', 'nonlocal_jax', *arguments],
    env=child_environment(),
    capture_output=True,
    text=True,
  )
  if done.returncode != 0:
    raise UserError(f'{arguments[0]} says: {done.stderr.strip().splitlines()[-1]}')
  return time.perf_counter() - begun, done.stdout


def measure_folder(*, data: str, checkpoint: str, precision: str) -> Figures:
  """Times the command `predict` on the val images of a folder, from files to label maps.

  Args:
    data: The folder, with images/val.
    checkpoint: The weights.
    precision: See `nonlocal_jax.load`. Attention is the fastest for it.

  Returns:
    `total_seconds`, the time of the whole process; `seconds`, that without the start and loading
    the weights; the number of `images`; and the peak memory of the process on the host.

  Raises:
    UserError: If the command fails.
  """
  images = Path(data, 'images', 'val')
  with tempfile.TemporaryDirectory() as folder:
    total, printed = run_command(
      'predict',
      f'--checkpoint={checkpoint}',
      f'--precision={precision}',
      '--attention=auto',
      '--no-overlays',
      str(images),
      f'--out={folder}',
    )
    written = len(list(Path(folder).glob('*.png')))
  seconds = float(printed.rpartition(' predicted in ')[-1].partition(' s,')[0])
  host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  return {'seconds': seconds, 'total_seconds': total, 'images': written, 'peak_host_gib': host}


def measure_pipeline(
  *, data: str, num_classes: int, ignore_labels: Sequence[int], batches: int
) -> Figures:
  """Times the data pipeline of the recipe in nonlocal_jax/recipes.py without a network.

  Args:
    data: The folder, with images/train and labels/train.
    num_classes: Number of classes.
    ignore_labels: Label values without a class, beside 255.
    batches: Number of timed batches.

  Returns:
    `seconds` per batch, the size of a `batch`, the size of a `crop`, and the number of `images` in
    the folder.
  """
  from nonlocal_jax.experiment import Experiment

  config = benchmark_config(classes=num_classes)
  config.data.source_dir, config.data.ignore_labels = data, tuple(ignore_labels)
  with tempfile.TemporaryDirectory() as folder:
    config.data.data_dir = folder
    experiment = Experiment.from_config(config)
    split = experiment.open_splits(Path(folder), ['train'])['train']
    stream = experiment.train_batches(split)
    next(stream)
    seconds = seconds_of(lambda: [next(stream) for _ in range(batches)]) / batches
    stream.close()
  return {
    'seconds': seconds,
    'batch': config.train.batch_size,
    'crop': list(config.train.crop),
    'images': len(split),
  }


def benchmark_config(*, classes: int, width: int = 64, depth: int = 50):
  """Returns the config `custom` for a network of the given size."""
  config = custom_config()
  config.name = 'benchmark'
  config.data.num_classes = classes
  config.model.width, config.model.depth = width, depth
  return config


def of_device_or_host(memory: Mapping[str, float | None]) -> Figures:
  """Returns the peak memory of the device if it is known, else of the host; and of the host."""
  peak = memory['host'] if memory['device'] is None else memory['device']
  return {'peak_gib': peak, 'peak_host_gib': memory['host']}


def seconds_of(action: Callable[[], object]) -> float:
  """Returns the wall-clock time of a call."""
  started = time.perf_counter()
  action()
  return time.perf_counter() - started
