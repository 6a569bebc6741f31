"""The network: dilated ResNet, non-local and auxiliary heads; the non-local block on its own."""

from nonlocal_jax.models.config import Execution, NonLocalNetConfig
from nonlocal_jax.models.non_local import NonLocalBlock
from nonlocal_jax.models.nonlocal_net import NonLocalNet

__all__ = ['Execution', 'NonLocalBlock', 'NonLocalNet', 'NonLocalNetConfig']
