"""Non-local segmentation networks in JAX and Flax."""

from nonlocal_jax.data.transforms import resize
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.pretrained import PretrainedModel, load, load_module
from nonlocal_jax.models import Execution, NonLocalBlock, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import EvalProtocol

__version__ = '0.1.0'

__all__ = [
  'EvalProtocol',
  'Execution',
  'NonLocalBlock',
  'NonLocalNet',
  'NonLocalNetConfig',
  'PretrainedModel',
  'UserError',
  'load',
  'load_module',
  'normalize',
  'resize',
]
