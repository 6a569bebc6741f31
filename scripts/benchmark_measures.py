"""The measurements of benchmark.py, each in a process of its own.

python scripts/benchmark_measures.py NAME JSON

NAME is a function below in MEASURES, JSON its arguments. The last line of stdout is a JSON object
of figures, among them the peak memory of the process.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.common import base_config
from nonlocal_jax.command_line import run_program
from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.report import METRICS, peak_memory_gib
from nonlocal_jax.experiment import architecture_of, dataset_of, open_splits, train_batches_of
from nonlocal_jax.parallel import data_mesh, replicated, shard_batch
from nonlocal_jax.pretrained import PretrainedModel
from nonlocal_jax.training.recipe import compile_step, optimizer_of
from nonlocal_jax.training.state import TrainState
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.torch_names import Architecture
from scripts.benchmark_analysis import measure_network, measure_non_local
from scripts.benchmark_inputs import random_state

Figures = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
  """Makes the measurement that the arguments name."""
  name, options = sys.argv[1:]
  print(json.dumps(measure(name, json.loads(options))))


def measure(name: str, options: Mapping[str, Any]) -> Figures:
  """Figures of one of `MEASURES`, and the peak memory of this process."""
  figures = MEASURES[name](**options)
  return {**of_device_or_host(peak_memory_gib()), **figures}


def of_device_or_host(memory: Mapping[str, float | None]) -> Figures:
  """The peak memory that counts, on the device if that tells, and the host's."""
  peak = memory['host'] if memory['device'] is None else memory['device']
  return {'peak_gib': peak, 'peak_host_gib': memory['host']}


def measure_machine() -> Figures:
  """What JAX runs on."""
  device = jax.local_devices()[0]
  return {
    'jax': jax.__version__,
    'backend': jax.default_backend(),
    'device': device.device_kind,
    'devices': jax.local_device_count(),
  }


def measure_inference(
  *,
  size: Sequence[int],
  classes: int,
  width: int,
  depth: int,
  repeats: int,
  started: float,
) -> Figures:
  """Predicts an image, again and again.

  Args:
    size: (height, width) of the image.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of its backbone.
    repeats: Predictions after the first.
    started: `time.time()` at the start of the process.

  Returns:
    `seconds` of a later prediction, the median; `first_call_seconds`, compilation included;
    `start_seconds` from the start of the process to the first result.
  """
  architecture = Architecture.of_depth(depth, width=width, num_classes=classes)
  dataset = custom_dataset(classes)
  description = ModelDescription(
    architecture,
    align_corners=False,
    dataset=dataset.name,
    classes=dataset.classes,
    palette=dataset.palette,
    test_scale=None,
    window_crop=None,
    window_stride=None,
    source='random weights',
    sha256=None,
    num_batches_tracked={},
  )
  model = PretrainedModel(description, random_state(architecture))
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
  first = seconds_of(lambda: model.predict(image))
  start = time.time() - started
  later = [seconds_of(lambda: model.predict(image)) for _ in range(repeats)]
  return {
    'seconds': statistics.median(later),
    'first_call_seconds': first,
    'start_seconds': start,
  }


def measure_training(
  *,
  size: Sequence[int],
  batch: int,
  classes: int,
  width: int,
  depth: int,
  repeats: int,
  started: float,
) -> Figures:
  """Takes training steps, as `training.loop` does, on the first device.

  Args:
    size: (height, width) of the crops.
    batch: Crops in a batch.
    classes: See `measure_inference`, as for all that follow.
    width: Base channels of the network.
    depth: Layers of its backbone.
    repeats: Steps after the first.
    started: `time.time()` at the start of the process.

  Returns:
    `seconds` of a later step, the median; `compile_seconds` of tracing, lowering and compiling it;
    `start_seconds` from the start of the process to the end of the first step.
  """
  config = custom_config(classes=classes, width=width, depth=depth)
  config.train.batch_size, config.train.crop = batch, tuple(size)
  mesh = data_mesh(jax.local_devices()[:1])
  _, tx = optimizer_of(config)

  def initial_state() -> TrainState:
    model = architecture_of(config).build(rngs=nnx.Rngs(config.seed))
    return TrainState.create(nnx.state(model), tx, seed=config.seed)

  state = jax.jit(initial_state, out_shardings=replicated(mesh))()
  compiling = time.perf_counter()
  train_step = compile_step(config, state, tx, mesh)
  compile_seconds = time.perf_counter() - compiling
  rng = np.random.default_rng(0)
  samples = {
    'image': rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8),
    'label': rng.integers(0, classes, (batch, *size), dtype=np.uint8),
    'size': np.tile(np.array(size, np.int32), (batch, 1)),
  }

  def step() -> None:
    nonlocal state
    stop = shard_batch({'flag': np.zeros(1, np.bool)}, mesh)['flag']
    state, metrics = train_step(state, shard_batch(samples, mesh), stop)
    jax.block_until_ready((state, metrics))

  step()
  start = time.time() - started
  later = [seconds_of(step) for _ in range(repeats)]
  return {
    'seconds': statistics.median(later),
    'compile_seconds': compile_seconds,
    'start_seconds': start,
  }


def measure_evaluation(
  *,
  data: str,
  checkpoint: str,
  scale: Sequence[int],
  num_classes: int,
  ignore_labels: Sequence[int],
  width: int,
  depth: int,
) -> Figures:
  """Runs main.py --mode=eval on a folder that was never prepared.

  Args:
    data: The folder, see configs/custom.py.
    checkpoint: The weights.
    scale: (width, height) of the box that images are resized into.
    num_classes: Number of classes.
    ignore_labels: Label values without a class, beside 255.
    width: Base channels of the network.
    depth: Layers of its backbone.

  Returns:
    `total_seconds` of the whole process, `seconds` of the evaluation alone, the number of `images`,
    `mIoU` in percent and the process's peak memory.

  Raises:
    UserError: If main.py fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    command = [
      sys.executable,
      str(_ROOT / 'main.py'),
      f'--config={_ROOT / "configs/custom.py"}',
      '--mode=eval',
      f'--checkpoint={checkpoint}',
      f'--workdir={folder}/workdir',
      f'--config.data.source_dir={data}',
      f'--config.data.data_dir={folder}/prepared',
      f'--config.data.num_classes={num_classes}',
      f'--config.data.ignore_labels={tuple(ignore_labels)}',
      f'--config.eval.scale={tuple(scale)}',
      f'--config.model.width={width}',
      f'--config.model.depth={depth}',
    ]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    total = time.perf_counter() - begun
    if done.returncode != 0:
      raise UserError(f'main.py says: {done.stderr.strip().splitlines()[-1]}')
    report = json.loads((Path(folder) / 'workdir' / METRICS).read_text())
  return {
    **of_device_or_host(report['peak_memory_gib']),
    'seconds': report['seconds'],
    'total_seconds': total,
    'images': report['images'],
    'mIoU': report['mIoU'],
  }


def measure_pipeline(
  *, data: str, num_classes: int, ignore_labels: Sequence[int], batches: int
) -> Figures:
  """Makes training batches by the recipe of configs/common.py and throws them away.

  Args:
    data: See `measure_evaluation`, as for `num_classes` and `ignore_labels`.
    num_classes: Number of classes.
    ignore_labels: Label values without a class, beside 255.
    batches: Batches that are timed.

  Returns:
    `seconds` of a batch, `batch` its images, `crop` their size.
  """
  config = custom_config(classes=num_classes)
  config.data.source_dir, config.data.ignore_labels = data, tuple(ignore_labels)
  with tempfile.TemporaryDirectory() as folder:
    config.data.data_dir = folder
    dataset = dataset_of(config)
    split = open_splits(config, dataset, Path(folder), ['train'])['train']
    stream = train_batches_of(config, split, dataset)
    next(stream)
    seconds = seconds_of(lambda: [next(stream) for _ in range(batches)]) / batches
    stream.close()
  return {
    'seconds': seconds,
    'batch': config.train.batch_size,
    'crop': list(config.train.crop),
    'images': len(split),
  }


MEASURES: Mapping[str, Callable[..., Figures]] = {
  'machine': measure_machine,
  'inference': measure_inference,
  'training': measure_training,
  'evaluation': measure_evaluation,
  'pipeline': measure_pipeline,
  'network': measure_network,
  'non_local': measure_non_local,
}


def custom_config(*, classes: int, width: int = 64, depth: int = 50) -> ConfigDict:
  """The recipe that all configs share, for a custom set."""
  config = base_config()
  config.name = 'benchmark'
  config.data.num_classes = classes
  config.model.width, config.model.depth = width, depth
  return config


def seconds_of(action: Callable[[], object]) -> float:
  """How long an action takes."""
  started = time.perf_counter()
  action()
  return time.perf_counter() - started


if __name__ == '__main__':
  run_program(main)
