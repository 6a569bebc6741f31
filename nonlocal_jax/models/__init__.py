"""The network and its parts: dilated ResNet, non-local block, decode and auxiliary heads."""

from nonlocal_jax.models.config import Execution, NonLocalNetConfig
from nonlocal_jax.models.non_local import NonLocalBlock
from nonlocal_jax.models.nonlocal_net import NonLocalNet

__all__ = ['Execution', 'NonLocalBlock', 'NonLocalNet', 'NonLocalNetConfig']
