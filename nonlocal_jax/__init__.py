"""Non-local segmentation networks in JAX and Flax."""

from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.pretrained import PretrainedModel, load
from nonlocal_jax.models import NonLocalBlock, NonLocalNet

__version__ = '0.1.0'

__all__ = ['NonLocalBlock', 'NonLocalNet', 'PretrainedModel', 'UserError', 'load']
