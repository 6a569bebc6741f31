"""Non-local segmentation networks in JAX and Flax."""

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalBlock, NonLocalNet
from nonlocal_jax.pretrained import PretrainedModel, load

__version__ = '0.1.0'

__all__ = ['NonLocalBlock', 'NonLocalNet', 'PretrainedModel', 'UserError', 'load']
