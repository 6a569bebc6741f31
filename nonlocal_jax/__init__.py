"""Non-local segmentation networks in JAX and Flax."""

from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.pretrained import PretrainedModel, load
from nonlocal_jax.models import NonLocalBlock, NonLocalNet
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import EvalProtocol

__version__ = '0.1.0'

__all__ = [
  'EvalProtocol',
  'NonLocalBlock',
  'NonLocalNet',
  'PretrainedModel',
  'UserError',
  'load',
  'normalize',
]
