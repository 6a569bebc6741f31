"""Runs one measurement of the command `benchmark`.

    python -m nonlocal_jax.cli.measurements NAME JSON

NAME is a key of MEASURES below, and JSON holds the keyword arguments of its function. The last line
of stdout is a JSON object of the results, with the peak memory of the process.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.cli.folder_measurements import (
  benchmark_config,
  measure_evaluation,
  measure_folder,
  measure_pipeline,
  of_device_or_host,
  seconds_of,
)
from nonlocal_jax.cli.program import needs_extra, run_program
from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.evaluation.report import peak_memory_gib
from nonlocal_jax.inference.pretrained import Precision, PretrainedModel
from nonlocal_jax.models import Execution, NonLocalBlock, NonLocalNet
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.ops.attention import fastest_attention
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.parallel import platform_of, shard_batch
from nonlocal_jax.weights.description import ModelDescription

Figures = dict[str, Any]


def main() -> None:
  """Runs the measurement that the command line names."""
  name, options = sys.argv[1:]
  with needs_extra('benchmark'):
    print(json.dumps(measure(name, json.loads(options))))


def measure(name: str, options: Mapping[str, Any]) -> Figures:
  """Runs one of `MEASURES`, and adds the peak memory of this process if the result has none."""
  figures = MEASURES[name](**options)
  if 'peak_gib' in figures or 'peak_host_gib' in figures:
    return figures
  return {**of_device_or_host(peak_memory_gib()), **figures}


def measure_machine() -> Figures:
  """Returns the version of JAX and the devices that it runs on."""
  device = jax.local_devices()[0]
  return {
    'jax': jax.__version__,
    'backend': platform_of(),
    'device': device.device_kind,
    'devices': jax.local_device_count(),
  }


def measure_inference(
  *,
  size: Sequence[int],
  classes: int,
  width: int,
  depth: int,
  precision: Precision,
  repeats: int,
  started: float,
) -> Figures:
  """Times predictions of images of one size, one image at a time.

  Args:
    size: (height, width) of the images.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of the backbone.
    precision: See `nonlocal_jax.load`. Attention is the fastest for it.
    repeats: Number of timed predictions, after a first one.
    started: `time.time()` at the start of the process.

  Returns:
    `seconds`, the median time of a prediction; `first_call_seconds`, the time of the first one with
    compilation; `start_seconds`, from the start of the process to the first result.
  """
  config = NonLocalNetConfig.from_depth(depth, width=width, num_classes=classes)
  dataset = custom_dataset(classes)
  description = ModelDescription(
    config,
    EvalProtocol(),
    dataset=dataset.name,
    classes=dataset.classes,
    palette=dataset.palette,
    source='random weights',
    sha256=None,
    num_batches_tracked={},
  )
  attention = fastest_attention(
    config.inner_channels, jax.local_devices()[:1], precision=precision, train=False
  )
  execution = Execution.for_platform(attention=attention)
  model = PretrainedModel(
    description, random_state(config), execution=execution, precision=precision
  )
  rng = np.random.default_rng(0)

  def predict() -> float:
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return seconds_of(lambda: model.predict(image))

  first = predict()
  start = time.time() - started
  later = [predict() for _ in range(repeats)]
  return {
    'seconds': statistics.median(later),
    'first_call_seconds': first,
    'start_seconds': start,
  }


def measure_training(
  *,
  size: Sequence[int],
  batch: int,
  dtype: str,
  classes: int,
  width: int,
  depth: int,
  repeats: int,
  started: float,
) -> Figures:
  """Times training steps, as `training.loop` takes them, on the first device.

  Args:
    size: (height, width) of the crops.
    batch: Crops in a batch.
    dtype: The dtype of activations, see nonlocal_jax/recipes.py. Attention is the fastest for it.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of the backbone.
    repeats: Number of timed steps, after a first one.
    started: `time.time()` at the start of the process.

  Returns:
    `seconds`, the median time of a step that is waited for; `queued_seconds`, the time of a step
    where only the last of all is waited for, as between two lines of a training log;
    `compile_seconds`, for tracing, lowering and compiling the step; `start_seconds`, from the start
    of the process to the end of the first step; `step_gib`, the memory of the compiled step.
  """
  from nonlocal_jax.experiment import Experiment
  from nonlocal_jax.training.memory import StepMemory
  from nonlocal_jax.training.train_step import initial_state

  config = benchmark_config(classes=classes, width=width, depth=depth)
  config.train.batch_size, config.train.crop, config.train.dtype = batch, tuple(size), dtype
  config.model.attention = 'auto'
  experiment = Experiment.from_config(config, jax.local_devices()[:1])
  mesh, (_, tx) = experiment.mesh, experiment.optimizer.make(experiment.schedule.steps)
  state = initial_state(experiment.network, tx, seed=0, keep_ema=False, mesh=mesh)
  compiling = time.perf_counter()
  train_step = experiment.lower_train_step().compile()
  compile_seconds = time.perf_counter() - compiling
  rng = np.random.default_rng(0)
  stop = shard_batch({'flag': np.zeros(1, np.bool)}, mesh)['flag']

  def samples() -> dict[str, np.ndarray]:
    return {
      'image': rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8),
      'label': rng.integers(0, classes, (batch, *size), dtype=np.uint8),
      'size': np.tile(np.array(size, np.int32), (batch, 1)),
    }

  def take(batches: Sequence[dict[str, np.ndarray]]) -> None:
    nonlocal state
    metrics = None
    for each in batches:
      state, metrics = train_step(state, shard_batch(each, mesh), stop)
    jax.block_until_ready((state, metrics))

  def step() -> float:
    given = [samples()]
    return seconds_of(lambda: take(given))

  step()
  start = time.time() - started
  later = [step() for _ in range(repeats)]
  several = [samples() for _ in range(repeats)]
  return {
    'seconds': statistics.median(later),
    'queued_seconds': seconds_of(lambda: take(several)) / repeats,
    'compile_seconds': compile_seconds,
    'start_seconds': start,
    'step_gib': StepMemory.of(train_step).total / 2**30,
  }


def measure_ceiling(*, side: int, gib: float) -> Figures:
  """Times a large matrix product and a large copy on the first device.

  Args:
    side: Of the square matrices.
    gib: Size of the array that is copied.

  Returns:
    TFLOP/s of products in float32 ('highest'), in the default precision ('default', TF32 on recent
    GPUs) and in bfloat16, and `copy_tb`, the TB/s that a copy reads and writes.
  """

  def teraflops(dtype: Any, precision: str) -> float:
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    return 2 * side**3 / _seconds_in_a_row(lambda: product(a, a)) / 1e12

  array = jnp.ones(int(gib * 2**28), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  return {
    'highest': teraflops(jnp.float32, 'highest'),
    'default': teraflops(jnp.float32, 'default'),
    'bfloat16': teraflops(jnp.bfloat16, 'default'),
    'copy_tb': 2 * array.nbytes / _seconds_in_a_row(lambda: copy(array)) / 1e12,
  }


def _seconds_in_a_row(call: Callable[[], jax.Array], *, calls: int = 10, rounds: int = 3) -> float:
  """Returns the median over rounds of the time of a call, the last of each round waited for."""
  jax.block_until_ready(call())

  def several() -> None:
    for _ in range(calls - 1):
      call()
    jax.block_until_ready(call())

  return statistics.median(seconds_of(several) for _ in range(rounds)) / calls


def measure_network(
  *, sizes: Sequence[Sequence[int]], classes: int, width: int, depth: int
) -> Figures:
  """Counts the parameters and the FLOPs of a forward pass, by XLA's cost analysis.

  Args:
    sizes: (height, width) of the images.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of its backbone.

  Returns:
    `parameters`, and `flops` by size ('512x1024'), from a normalized image to logits at stride 8.
  """
  config = NonLocalNetConfig.from_depth(depth, width=width, num_classes=classes)
  params, _ = nnx.split_state(state_shapes(config), nnx.Param, nnx.BatchStat)
  return {
    'parameters': sum(array.size for array in jax.tree.leaves(params)),
    'flops': {f'{h}x{w}': forward_flops(config, (h, w)) for h, w in sizes},
  }


def forward_flops(config: NonLocalNetConfig, size: tuple[int, int]) -> float:
  """Returns the FLOPs from a normalized image to logits at stride 8; a multiply-add is two.

  XLA counts the body of a loop once and the products of Winograd's algorithm instead of those of
  the convolution, so this network has neither loops nor Winograd convolutions.
  """
  positions = math.prod(-(-side // config.output_stride) for side in size)
  execution = Execution(query_block=positions)
  graphdef, state = nnx.split(NonLocalNet.abstract(config, execution))

  def logits(state: nnx.State, image: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).encode_decode(image)

  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  cost: Any = jax.jit(logits).lower(state, image).cost_analysis()
  return cost['flops']


def measure_non_local(*, channels: int, positions: Sequence[int]) -> Figures:
  """Compiles the non-local block and reads its temporary memory from XLA's memory analysis.

  Args:
    channels: Channels of the input.
    positions: Numbers of positions, powers of two.

  Returns:
    Bytes for each number of positions, `forward` and `gradient` (forward and backward pass).
  """
  graphdef, state = nnx.split(nnx.eval_shape(lambda: NonLocalBlock(channels, rngs=nnx.Rngs(0))))

  def forward(state: nnx.State, x: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(x)

  def loss(state: nnx.State, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(forward(state, x)))

  def temporary_bytes(function: Callable, count: int) -> int:
    height = 2 ** (count.bit_length() // 2)
    x = jax.ShapeDtypeStruct((1, height, count // height, channels), jnp.float32)
    memory: Any = jax.jit(function).lower(state, x).compile().memory_analysis()
    return memory.temp_size_in_bytes

  return {
    'positions': list(positions),
    'forward': [temporary_bytes(forward, count) for count in positions],
    'gradient': [temporary_bytes(jax.grad(loss, argnums=(0, 1)), count) for count in positions],
  }


MEASURES: Mapping[str, Callable[..., Figures]] = {
  'machine': measure_machine,
  'inference': measure_inference,
  'training': measure_training,
  'evaluation': measure_evaluation,
  'folder': measure_folder,
  'pipeline': measure_pipeline,
  'network': measure_network,
  'non_local': measure_non_local,
  'ceiling': measure_ceiling,
}


def random_state(config: NonLocalNetConfig) -> nnx.State:
  """Returns random nonzero parameters and statistics that keep the scale of activations."""
  rng = np.random.default_rng(0)
  arrays = {}
  for path, variable in nnx.to_flat_state(state_shapes(config)):
    if len(variable.shape) > 1:
      fan_in = np.prod(variable.shape[:-1])
      values = rng.standard_normal(variable.shape, np.float32) * np.sqrt(2 / fan_in)
    else:
      low = {'var': 0.5, 'scale': 0.2}.get(str(path[-1]), -0.3)
      values = rng.uniform(low, low + 0.6, variable.shape)
    arrays[path] = variable.replace(values.astype(np.float32))
  return nnx.from_flat_state(arrays)


if __name__ == '__main__':
  run_program(main)
