"""A network with its weights as one serialized JAX program, which runs without this library."""

from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.export.interface import BLUE_FIRST, Interface
from nonlocal_jax.models import Execution, NonLocalNet
from nonlocal_jax.ops.blocks import map_blocks
from nonlocal_jax.ops.normalization import normalize

PLATFORMS = ('cpu', 'cuda', 'tpu')

Program = Callable[[jax.Array], dict[str, jax.Array]]


def jax_program(state: nnx.State, interface: Interface, *, with_logits: bool = False) -> Program:
  """Returns the function to export, from images to 'classes' and perhaps 'confidence'.

  Args:
    state: The network's weights, which become constants.
    interface: What the function takes and returns.
    with_logits: Whether logits at the size of the image, (n, height, width, classes) float32, are
      another output, 'logits', to check the program.
  """
  config, protocol = interface.config, interface.protocol
  # What every platform computes well, whatever this process runs on.
  execution = Execution(
    convolution='products', query_block=interface.queries_at_once, scan_blocks=True
  )
  graphdef = nnx.graphdef(NonLocalNet.abstract(config, execution))
  rows, columns = interface.upsampling

  def pixels(some_rows: jax.Array, wide: jax.Array) -> dict[str, jax.Array]:
    """(1, some, rows) and (n, rows, width, classes) -> (n, some, width, ...)."""
    scores = jnp.einsum('or,nrwc->nowc', some_rows[0], wide)
    classes = jnp.argmax(scores, axis=-1).astype(jnp.uint8)
    outputs = {'classes': classes}
    if interface.confidence:
      outputs['confidence'] = jax.nn.softmax(scores).max(axis=-1)
    if with_logits:
      outputs['logits'] = scores
    return outputs

  @jax.default_matmul_precision('highest')
  def program(images: jax.Array) -> dict[str, jax.Array]:
    x = images[..., BLUE_FIRST] if protocol.channel_order == 'bgr' else images
    x = normalize(x, mean=protocol.mean, std=protocol.std)
    after = [padded - side for padded, side in zip(interface.network, interface.size, strict=True)]
    x = jnp.pad(x, ((0, 0), (0, after[0]), (0, after[1]), (0, 0)))
    logits = nnx.merge(graphdef, state).encode_decode(x)
    wide = jnp.einsum('pw,nrwc->nrpc', columns, logits)
    return map_blocks(lambda some: pixels(some, wide), rows[None], interface.rows_at_once)

  return program


def export_program(program: Program, interface: Interface) -> bytearray:
  """Serializes a program for CPUs, NVIDIA GPUs and TPUs; `jax.export.deserialize` reads it.

  Args:
    program: See `jax_program`.
    interface: Says which images it takes.
  """
  batch = interface.batch
  if batch is None:
    (batch,) = jax.export.symbolic_shape('n')
  images = jax.ShapeDtypeStruct((batch, *interface.size, interface.config.in_channels), np.uint8)
  return jax.export.export(jax.jit(program), platforms=PLATFORMS)(images).serialize()
