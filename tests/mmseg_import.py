"""Imports mmsegmentation, the reference, on machines without mmcv's compiled operators."""

import importlib
import sys
import types
import warnings
from unittest.mock import MagicMock


def mmseg_module(name: str) -> types.ModuleType:
  """Imports a module of mmsegmentation or mmcv, past the warnings of their imports.

  Args:
    name: Such as 'mmseg.datasets.transforms'.

  Returns:
    The module.
  """
  sys.modules.setdefault('mmcv.ops', _NoCompiledOps('mmcv.ops'))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return importlib.import_module(name)


class _NoCompiledOps(types.ModuleType):
  """What mmcv-lite lacks; NonLocalNet needs none of it, only its import has to succeed."""

  __path__ = ()

  def __getattr__(self, name: str):
    if name.startswith('__'):
      raise AttributeError(name)
    return MagicMock()
