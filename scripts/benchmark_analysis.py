"""What the compiler tells of the network, for benchmark.py: operations and memory; nothing runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_jax.models import NonLocalBlock
from nonlocal_jax.models.segmentor import OUTPUT_STRIDE
from nonlocal_jax.weights.torch_names import Architecture

Figures = dict[str, Any]


def measure_network(
  *, sizes: Sequence[Sequence[int]], classes: int, width: int, depth: int
) -> Figures:
  """Counts parameters, and the operations of a forward pass by XLA's cost analysis.

  Args:
    sizes: (height, width) of images.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of its backbone.

  Returns:
    `parameters`, and `flops` by size ('512x1024'), from a normalised image to logits at stride 8.
  """
  architecture = Architecture.of_depth(depth, width=width, num_classes=classes)
  params, _ = nnx.split_state(architecture.state_shapes(), nnx.Param, nnx.BatchStat)
  return {
    'parameters': sum(array.size for array in jax.tree.leaves(params)),
    'flops': {f'{h}x{w}': forward_flops(architecture, (h, w)) for h, w in sizes},
  }


def forward_flops(architecture: Architecture, size: tuple[int, int]) -> float:
  """Operations from a normalised image to logits at stride 8; a multiply-add is two.

  XLA counts a loop's body once and Winograd's products in place of those of the convolution, so the
  network is taken without both.
  """
  model = architecture.abstract(convolution='direct', loops=False)
  if model.decode_head.nl_block is not None:
    positions = [-(-side // OUTPUT_STRIDE) for side in size]
    model.decode_head.nl_block.query_block = positions[0] * positions[1]
  graphdef, state = nnx.split(model)

  def logits(state: nnx.State, image: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).encode_decode(image)

  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  return jax.jit(logits).lower(state, image).cost_analysis()['flops']


def measure_non_local(*, channels: int, positions: Sequence[int]) -> Figures:
  """Compiles the non-local block alone and asks for its temporary memory.

  Args:
    channels: Of its input.
    positions: Numbers of positions, powers of two.

  Returns:
    Bytes for each number, `forward` and `gradient` (forward and backward pass).
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
