"""Compares what an exported program computes with the network that it was made of."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.export.interface import Interface
from nonlocal_jax.models import Execution, NonLocalNet
from nonlocal_jax.ops.normalization import normalize

LIMIT = 1e-4  # of the standard deviation of the logits

_TEXTURE = 24  # pixels of a side of the patches in the images of the check
_IMAGES = 2  # where any number is taken


@dataclasses.dataclass(frozen=True)
class Reference:
  """What the network computes for a few images.

  Attributes:
    images: (n, height, width, channels) uint8.
    logits: (n, height, width, classes) float32.
  """

  images: np.ndarray
  logits: np.ndarray


def reference(state: nnx.State, interface: Interface) -> Reference:
  """Computes the logits of images of random patches and noise, by `NonLocalNet` in float32."""
  config, protocol = interface.config, interface.protocol
  height, width = interface.size
  rng = np.random.default_rng(0)
  patches = (-(-height // _TEXTURE), -(-width // _TEXTURE))
  shape = (interface.batch or _IMAGES, *patches, config.in_channels)
  coarse = rng.integers(0, 216, shape, np.uint8).repeat(_TEXTURE, 1).repeat(_TEXTURE, 2)
  coarse = coarse[:, :height, :width]
  images = coarse + rng.integers(0, 40, coarse.shape, np.uint8)
  # The most exact of the convolutions: Winograd's errors are several times as large.
  execution = dataclasses.replace(Execution.for_platform(), convolution='products')
  graphdef = nnx.graphdef(NonLocalNet.abstract(config, execution))

  @jax.jit
  @jax.default_matmul_precision('highest')
  def logits_of(state: nnx.State, images: jax.Array) -> jax.Array:
    ordered = images[..., ::-1] if protocol.channel_order == 'bgr' else images
    after = [padded - side for padded, side in zip(interface.network, interface.size, strict=True)]
    normalized = normalize(ordered, mean=protocol.mean, std=protocol.std)
    padded = jnp.pad(normalized, ((0, 0), (0, after[0]), (0, after[1]), (0, 0)))
    return nnx.merge(graphdef, state)(padded)[:, :height, :width]

  # One after the other: an export for large images needs the memory of one.
  logits = [np.asarray(logits_of(state, image[None]))[0] for image in images]
  return Reference(images, np.stack(logits))


def difference(reference: Reference, outputs: Mapping[str, np.ndarray]) -> float:
  """Returns the largest difference of logits as a share of their standard deviation.

  Args:
    reference: See `reference`.
    outputs: 'logits' (n, height, width, classes) of the program for the same images.
  """
  largest = float(np.abs(outputs['logits'] - reference.logits).max())
  deviation = float(reference.logits.std())
  return largest / deviation if deviation else float(largest > 0)


def check_outputs(
  reference: Reference, outputs: Mapping[str, np.ndarray], found: float, *, what: str
) -> None:
  """Checks the outputs of an exported file against the network.

  Args:
    reference: See `reference`.
    outputs: What the file returns: 'classes' and perhaps 'confidence'.
    found: The largest difference of its logits, see `difference`.
    what: The file.

  Raises:
    UserError: If the difference is above `LIMIT`, a class differs where the two largest logits are
      further apart than it, or a confidence differs by more than such logits can make it.
  """
  logits = reference.logits
  if not found <= LIMIT:
    raise UserError(
      f'{what} was not written: its logits differ from those of the network by {found:.1e} of '
      f'their standard deviation, more than {LIMIT:.0e}; please report this with the weights.'
    )
  given = np.take_along_axis(logits, outputs['classes'][..., None].astype(np.int64), axis=-1)
  behind = float((logits.max(axis=-1, keepdims=True) - given).max())
  if behind > 2 * LIMIT * float(logits.std()):
    raise UserError(
      f'{what} was not written: some of its classes are not those of the network; please report '
      'this with the weights.'
    )
  if 'confidence' in outputs:
    expected = scipy.special.softmax(logits, axis=-1).max(axis=-1)
    off = float(np.abs(outputs['confidence'] - expected).max())
    if not off <= LIMIT * max(float(logits.std()), 1):
      raise UserError(
        f'{what} was not written: its confidence differs from that of the network by {off:.1e}; '
        'please report this with the weights.'
      )
