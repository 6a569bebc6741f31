"""Non-local segmentation networks in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when they are used: importing JAX takes seconds, in which a program is to handle signals.
_MODULES = {
  'EvalProtocol': 'protocol',
  'Execution': 'models',
  'NonLocalBlock': 'models',
  'NonLocalNet': 'models',
  'NonLocalNetConfig': 'models',
  'PretrainedModel': 'inference.pretrained',
  'UserError': 'errors',
  'load': 'inference.pretrained',
  'load_module': 'inference.pretrained',
  'normalize': 'ops.normalization',
  'resize': 'data.transforms',
}


def __getattr__(name: str) -> Any:
  """Imports a public name."""
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """Lists the public names, also those that are not imported yet."""
  return sorted({*globals(), *__all__})
