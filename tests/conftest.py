"""Four fake devices, full precision, and what several tests share."""

import os
import tempfile

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
import pytest
import torch

from nonlocal_jax.data.synthetic import write_demo_set
from tests import peer

jax.config.update('jax_default_matmul_precision', 'highest')
# Many tests compile the same program again.
_compilation_cache = tempfile.TemporaryDirectory()
jax.config.update('jax_compilation_cache_dir', _compilation_cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope='session')
def peer_model() -> torch.nn.Module:
  """R-50-D8 of an eighth of the width with 19 classes, half-pixel corners."""
  return peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024', width=8)


@pytest.fixture(scope='session')
def peer_checkpoint(peer_model, tmp_path_factory):
  """The same network as a file in the released layout."""
  path = tmp_path_factory.mktemp('peer') / 'model.pth'
  meta = {'mmseg_version': '0.5.0', 'CLASSES': tuple(f'c{i}' for i in range(19)), 'PALETTE': None}
  torch.save({'meta': meta, 'state_dict': peer_model.state_dict()}, path)
  return path


@pytest.fixture(scope='session')
def demo_set(tmp_path_factory):
  """A small demo set as a folder."""
  directory = tmp_path_factory.mktemp('data') / 'demo_set'
  write_demo_set(directory, train=24, val=5)
  return directory


@pytest.fixture
def rng() -> np.random.Generator:
  """A seeded generator."""
  return np.random.default_rng(0)
