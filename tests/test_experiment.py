"""A config resolved into typed parts, and the programs that it lowers."""

import ctypes
import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.recipes import base_config, published_config
from nonlocal_jax.runtime.compilation import trim_memory_after_compiling
from tests.scenes import make_scenes, write


def tiny_config() -> ConfigDict:
  config = base_config()
  config.data.num_classes, config.model.depth, config.model.width = 5, 14, 4
  config.train.batch_size, config.train.crop = 8, (40, 48)
  config.train.batch_norm, config.train.ohem = 'per_device', True
  return config


def parts_of(value):
  """The value and, of dataclasses and containers, all that is in it."""
  yield value
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield from parts_of(getattr(value, field.name))
  elif isinstance(value, dict):
    for item in value.values():
      yield from parts_of(item)
  elif isinstance(value, tuple | list):
    for item in value:
      yield from parts_of(item)


def test_an_experiment_is_frozen_and_holds_no_config():
  config = tiny_config()
  experiment = Experiment.from_config(config)
  assert not any(isinstance(part, ConfigDict) for part in parts_of(experiment))
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(experiment, 'name', 'other')  # noqa: B010
  config.train.batch_size = 16
  assert experiment.schedule.batch_size == experiment.values['train']['batch_size'] == 8


@pytest.mark.parametrize('deterministic', [False, True])
def test_a_deterministic_run_is_so_in_evaluation_as_well(deterministic):
  config = tiny_config()
  config.train.deterministic = deterministic
  experiment = Experiment.from_config(config)
  assert experiment.execution.deterministic == deterministic
  assert experiment.eval_execution.deterministic == deterministic


def test_images_that_nothing_divides_are_not_divided_before_weights_are_there(tmp_path):
  for scene in make_scenes(2):
    write(tmp_path / f'images/{scene.name}.jpg', scene.image)
    write(tmp_path / f'labels/{scene.name}.png', scene.label)
  config = tiny_config()
  config.data.source_dir = str(tmp_path)
  experiment = Experiment.from_config(config)
  experiment.check_data(['train', 'val'])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 'labels']
  for path in (tmp_path / 'labels').iterdir():
    path.rename(path.with_suffix('.tif'))
  with pytest.raises(UserError, match=r'scene_0\.jpg has no label map: expected .*PNG files only'):
    experiment.check_data(['train', 'val'])


def test_the_step_is_lowered_for_the_devices_given():
  experiment = Experiment.from_config(tiny_config(), devices=jax.devices()[:2])
  assert experiment.execution.batch_norm_groups == experiment.mesh.size == 2
  lowered = experiment.lower_train_step()
  state, batch, stop = lowered.in_avals[0]
  assert batch['image'].shape == (8, 40, 48, 3)
  assert stop.shape == (2,)
  assert 'mhlo.num_partitions = 2' in lowered.as_text()
  next_state, metrics = lowered.out_info
  assert jax.tree.map(lambda x: (x.shape, x.dtype), next_state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert set(metrics) >= {'loss', 'accuracy', 'stop'}


def test_the_network_is_lowered_folded():
  experiment = Experiment.from_config(tiny_config(), devices=jax.devices()[:1])
  lowered = experiment.lower_network(2, (64, 72), 'highest')
  assert lowered.out_info.shape == (2, 8, 9, 5)
  assert 'rsqrt' not in lowered.as_text()  # nothing is left of the variances
  images = jnp.zeros((2, 64, 72, 3))
  weights = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_shapes(experiment.network))
  assert lowered.compile()(weights, images).shape == (2, 8, 9, 5)


def test_evaluation_on_devices_that_cannot_share_a_training_batch():
  config = tiny_config()
  config.train.batch_size = 7
  experiment = Experiment.from_config(config, devices=jax.devices()[:2])
  with pytest.raises(UserError, match='batch_size is 7, which 2 devices cannot share'):
    experiment.lower_train_step()


def test_auto_attention_is_in_blocks_on_cpus():
  config = published_config('ade20k', 50, '')
  config.model.attention = 'auto'
  experiment = Experiment.from_config(config)
  assert experiment.execution.attention == experiment.eval_execution.attention == 'blocks'


def test_memory_is_trimmed_after_long_compilations(monkeypatch):
  trimmed = []
  library = types.SimpleNamespace(malloc_trim=trimmed.append)
  monkeypatch.setattr(ctypes, 'CDLL', lambda _: library)
  monkeypatch.setattr('sys.platform', 'linux')
  trim_memory_after_compiling()
  jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(7))
  assert not trimmed  # a short one
  monkeypatch.setattr('nonlocal_jax.runtime.compilation._LONG_SECS', 0.0)
  run = jax.jit(lambda x: x * 3.5 + 1)
  run(jnp.ones(7))
  count = len(trimmed)
  assert count > 0
  run(jnp.ones(7))
  assert len(trimmed) == count
