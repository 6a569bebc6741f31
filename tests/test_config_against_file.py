"""A config that tests images in another way than is recorded beside the weights."""

import dataclasses
import json

import pytest

from configs import custom
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.experiment.recorded import protocol_of_evaluation
from nonlocal_jax.models import NonLocalNetConfig
from nonlocal_jax.protocol import RATIOS, EvalProtocol
from nonlocal_jax.training.initial_weights import read_initial_weights
from nonlocal_jax.training.run_files import write_run_files
from nonlocal_jax.weights.checkpoints import read_description, save_weights
from nonlocal_jax.weights.loading import read_weights

CONFIGURED = EvalProtocol(scale=(96, 72))


@pytest.fixture
def described(peer_checkpoint):
  """The description of weights that were tested by a protocol."""

  def make(protocol, assumed=()):
    description, _ = read_weights(peer_checkpoint)
    return dataclasses.replace(description, protocol=protocol, assumed=assumed)

  return make


@pytest.mark.parametrize(
  ('recorded', 'key', 'there', 'here'),
  [
    ({'scale': (64, 48)}, 'eval.scale', '(64, 48)', '(96, 72)'),
    ({'scale': None}, 'eval.scale', '()', '(96, 72)'),
    ({'keep_ratio': False}, 'eval.keep_ratio', 'False', 'True'),
    ({'align_corners': True}, 'model.align_corners', 'True', 'False'),
    ({'ratios': RATIOS, 'flip': True}, 'eval.multi_scale_flip', 'True', 'False'),
  ],
)
def test_a_difference_is_an_error_that_names_both(described, recorded, key, there, here):
  protocol = dataclasses.replace(CONFIGURED, **recorded)
  description = described(protocol)
  with pytest.raises(UserError) as caught:
    protocol_of_evaluation(CONFIGURED, description, overrides=(), source='x.pth')
  assert f'{key} is {there} there and {here} in the config' in str(caught.value)
  assert f'add --config.{key}=' in str(caught.value)
  chosen = protocol_of_evaluation(CONFIGURED, description, overrides={key}, source='x.pth')
  assert chosen == CONFIGURED
  same = protocol_of_evaluation(protocol, description, overrides=(), source='x.pth')
  assert same == protocol


def test_windows_differ(described):
  windows = {'window_crop': (65, 65), 'window_stride': (43, 43)}
  recorded = dataclasses.replace(CONFIGURED, **windows, pad_windows=False, version='v1')
  with pytest.raises(UserError) as caught:
    protocol_of_evaluation(CONFIGURED, described(recorded), overrides=(), source='x.pth')
  for name in ('window_crop is (65, 65)', 'window_stride is (43, 43)', 'pad_windows is False'):
    assert f'eval.{name} there' in str(caught.value)
  assert 'eval.protocol' not in str(caught.value)  # of no influence at a single scale
  configured = dataclasses.replace(CONFIGURED, **windows, pad_windows=False)
  found = protocol_of_evaluation(configured, described(recorded), overrides=(), source='x.pth')
  assert found == recorded
  several = configured.with_multi_scale_flip()
  with pytest.raises(UserError, match=r'eval\.protocol is v1 there and v0 in the config'):
    protocol_of_evaluation(
      several, described(recorded), overrides={'eval.multi_scale_flip'}, source='x.pth'
    )


def test_what_only_the_file_can_say_comes_from_there(described):
  inputs = {'channel_order': 'bgr', 'mean': (1.0, 2.0, 3.0), 'pad_multiple': 32}
  recorded = dataclasses.replace(CONFIGURED, **inputs, ratios=(0.5, 1.0))
  found = protocol_of_evaluation(CONFIGURED, described(recorded), overrides=(), source='x.pth')
  assert found == recorded
  factor = EvalProtocol(scale_factor=(0.5, 0.5))
  found = protocol_of_evaluation(
    CONFIGURED, described(factor), overrides={'eval.scale'}, source='x.pth'
  )
  assert found == CONFIGURED


def test_where_nothing_is_recorded_the_config_counts(described):
  assumed = tuple(field.name for field in dataclasses.fields(EvalProtocol))
  configured = dataclasses.replace(
    CONFIGURED, align_corners=True, window_crop=(9, 9), window_stride=(9, 9), keep_ratio=False
  ).with_multi_scale_flip()
  description = described(EvalProtocol(), assumed)
  assert protocol_of_evaluation(configured, description, overrides=(), source='x') == configured


@pytest.mark.slow
def test_the_command(program, photos, peer_checkpoint, tmp_path):
  description, state = read_weights(peer_checkpoint)
  recorded = EvalProtocol(scale=(64, 48), channel_order='bgr')
  description = dataclasses.replace(description, protocol=recorded, assumed=())
  save_weights(tmp_path / 'model', state, description)
  arguments = [
    f'--config={custom.__file__}',
    '--mode=eval',
    '--checkpoint=model',
    '--workdir=out',
    '--config.model.width=8',
    '--config.data.num_classes=19',
    '--config.data.ignore_labels=(20,)',
    f'--config.data.source_dir={photos}',
    f'--config.data.data_dir={tmp_path / "prepared"}',
  ]
  status, said = program(*arguments)
  assert status == 1
  assert said == (
    'error: model was tested in another way than the config says: eval.scale is (64, 48) there and '
    "(2048, 512) in the config; for the same test add --config.eval.scale='(64,48)', or set these "
    'fields to other values on the command line.'
  )
  assert program(*arguments, '--config.eval.scale=(48,48)') == (None, '')
  used = json.loads((tmp_path / 'out/metrics.json').read_text())['protocol']
  assert EvalProtocol.from_dict(used) == dataclasses.replace(recorded, scale=(48, 48))


def test_a_run_saves_how_it_was_tested(training_config, tmp_path):
  config = training_config.copy_and_resolve_references()
  config.eval.protocol, config.eval.pad_windows = 'v1', True
  config.eval.window_crop = config.eval.window_stride = (64, 64)
  config.eval.keep_ratio, config.eval.multi_scale_flip = False, True
  experiment = Experiment.from_config(config)
  write_run_files(tmp_path, experiment.values, experiment.description())
  expected = EvalProtocol(
    scale=(96, 96),
    keep_ratio=False,
    window_crop=(64, 64),
    window_stride=(64, 64),
    pad_windows=True,
    version='v1',
  ).with_multi_scale_flip()
  for directory in (tmp_path, tmp_path / 'best'):
    assert read_description(directory).protocol == expected
    assert not read_description(directory).assumed


def test_training_starts_from_weights_of_the_same_function(peer_checkpoint, tmp_path):
  description, state = read_weights(peer_checkpoint)
  network = NonLocalNetConfig.from_depth(50, width=8, num_classes=19)
  other = dataclasses.replace(description, config=dataclasses.replace(network, mode='dot_product'))
  save_weights(tmp_path / 'other', state, other)
  with pytest.raises(UserError, match=r'\(mode dot_product, not embedded_gaussian\)'):
    read_initial_weights(network, EvalProtocol(), checkpoint=tmp_path / 'other')
  inputs = dataclasses.replace(description, protocol=EvalProtocol(channel_order='bgr'))
  save_weights(tmp_path / 'inputs', state, inputs)
  with pytest.raises(UserError, match=r'takes images normalized by .*bgr.* but training'):
    read_initial_weights(network, EvalProtocol(), checkpoint=tmp_path / 'inputs')
