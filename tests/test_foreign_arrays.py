"""State dicts as other training code leaves them: prefixes, averages, one channel, a head less."""

import contextlib
import dataclasses
import io
import logging

import cv2
import numpy as np
import pytest
import torch
from flax import nnx
from mmengine.runner import load_checkpoint

import nonlocal_jax
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNet
from nonlocal_jax.torch_format.reader import read_torch_file
from nonlocal_jax.training.initial_weights import read_initial_weights
from nonlocal_jax.weights.loading import read_torch_weights
from nonlocal_jax.weights.state_dict import to_state_dict
from tests import peer

PUBLISHED = 'nonlocal_r50-d8_4xb4-20k_voc12aug-512x512'


@pytest.fixture(scope='module')
def model():
  return peer.build(PUBLISHED, width=4, num_classes=3, shallow=True)


@pytest.fixture
def saved(tmp_path):
  """Saves a state dict and what else a file holds; returns its path."""

  def save(arrays, name='x.pth', **more):
    torch.save({'state_dict': arrays, **more}, tmp_path / name)
    return tmp_path / name

  return save


def assert_arrays(weights, expected):
  """The arrays are those of a state dict, but for its counters."""
  actual = to_state_dict(weights.state)
  assert actual.keys() == {n for n in expected if not n.endswith('num_batches_tracked')}
  for name, array in actual.items():
    np.testing.assert_array_equal(array, expected[name].numpy(), err_msg=name)


@pytest.mark.parametrize(
  ('prefix', 'note'),
  [
    ('module.', 'Of its names the prefix module. was left out.'),
    ('model.', 'Of its names the prefix model. was left out.'),
    ('_orig_mod.', 'Of its names the prefix _orig_mod. was left out.'),
    ('module._orig_mod.', 'Of its names the prefix module. and _orig_mod. was left out.'),
    ('_orig_mod.model.module.', '_orig_mod. and model. and module. was left out.'),
  ],
)
def test_prefixes_are_left_out_with_a_note(prefix, note, model, saved):
  arrays = model.state_dict()
  weights = read_torch_weights(saved({f'{prefix}{name}': x for name, x in arrays.items()}))
  assert_arrays(weights, arrays)
  assert [told.endswith(note) for told in weights.notes].count(True) == 1


def test_parts_that_were_compiled_or_wrapped_on_their_own(saved):
  """Names as PyTorch gives them."""
  model = peer.build(PUBLISHED, width=4, num_classes=3, shallow=True)
  arrays = model.state_dict()
  model.backbone = torch.compile(model.backbone, backend='eager')
  model.decode_head = torch.nn.DataParallel(model.decode_head)
  names = list(model.state_dict())
  assert 'backbone._orig_mod.stem.0.weight' in names
  assert 'decode_head.module.conv_seg.weight' in names
  assert_arrays(read_torch_weights(saved(model.state_dict())), arrays)


def test_the_same_weights_with_and_without_a_prefix(model, saved):
  arrays = model.state_dict()
  path = saved({**arrays, 'module.decode_head.conv_seg.bias': torch.zeros(3)})
  with pytest.raises(UserError, match=r'holds decode_head\.conv_seg\.bias twice, with and without'):
    read_torch_weights(path)


def averages(model):
  """Buffers as mmcv's EMAHook adds them to a model: one of each parameter."""
  return {
    f'ema_{name.replace(".", "_")}': parameter.detach() * 0.5
    for name, parameter in model.named_parameters()
  }


def test_moving_averages_are_taken_if_chosen(model, saved, converter, tmp_path, capsys):
  arrays, beside = model.state_dict(), averages(model)
  path = saved({**arrays, **beside})
  count = len(beside)
  weights = read_torch_weights(path)
  assert_arrays(weights, arrays)
  assert any(f'of {count} arrays, which ema=True (--ema) takes' in note for note in weights.notes)
  halved = {
    name: x * 0.5 if f'ema_{name.replace(".", "_")}' in beside else x for name, x in arrays.items()
  }
  assert sum('running' in name for name in arrays) > 0  # statistics have no averages
  averaged = read_torch_weights(path, ema=True)
  assert_arrays(averaged, halved)
  assert f'The exponential moving averages of {count} arrays were taken.' in averaged.notes
  assert converter(path, tmp_path / 'out', '--ema') == (None, '')
  assert 'Note: The exponential moving averages' in capsys.readouterr().out
  module = nonlocal_jax.load_module(path, ema=True)
  np.testing.assert_array_equal(
    module.decode_head.conv_seg.bias, halved['decode_head.conv_seg.bias'].numpy()
  )
  with pytest.raises(UserError, match='out is a directory, which holds one set of weights'):
    nonlocal_jax.load(tmp_path / 'out', ema=True)
  with pytest.raises(UserError, match='holds no exponential moving average: load it without'):
    nonlocal_jax.load(saved(arrays, 'plain.pth'), ema=True)


@pytest.mark.parametrize('ema', [False, True])
def test_averages_that_were_swapped_are_the_weights_already(ema, model, saved):
  """MMEngine saves them so, mmcv at the end of an epoch."""
  arrays, beside = model.state_dict(), averages(model)
  text = "custom_hooks = [dict(type='EMAHook')]\nrunner = dict(type='EpochBasedRunner')\n"
  for path in (
    saved(arrays, 'later.pth', ema_state_dict={f'module.{n}': x + 1 for n, x in arrays.items()}),
    saved({**arrays, **beside}, 'first.pth', meta={'config': text}),
  ):
    weights = read_torch_weights(path, ema=ema)
    assert_arrays(weights, arrays)
    assert any('weights are an exponential moving average' in note for note in weights.notes)


def test_a_message_names_ten_arrays_at_most(model, saved):
  names = list(model.state_dict())
  arrays = {f'{name}_': torch.zeros(1) for name in names}
  kept = ('backbone.layer1.0.conv1.weight', 'decode_head.conv_seg.weight')
  arrays |= {name: model.state_dict()[name] for name in kept}
  arrays |= {f'backbone.layer{stage}.0.x': torch.zeros(1) for stage in range(1, 5)}
  arrays |= {f'backbone.layer3.{block}.x': torch.zeros(1) for block in (1, 2)}
  with pytest.raises(UserError) as caught:
    read_torch_weights(saved(arrays))
  message = str(caught.value)
  assert message.count(' is missing') + message.count(' is unknown') == 10
  assert message.count('(nearest: ') == 10
  missing = sum(not name.endswith('num_batches_tracked') for name in names) - len(kept)
  assert message.endswith(f'; and {missing + len(names) + 6 - 10} more.')


@pytest.fixture(scope='module')
def image(tmp_path_factory):
  path = tmp_path_factory.mktemp('image') / 'x.png'
  coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
  cv2.imwrite(str(path), cv2.resize(coarse, (96, 64), interpolation=cv2.INTER_CUBIC))
  return path


def test_one_output_channel_predicts_as_the_original(image, saved):
  config = peer.small_config(PUBLISHED, width=4, num_classes=2, shallow=True)
  config.test_pipeline[1].scale = (96, 64)
  config.model.decode_head.update(out_channels=1, threshold=0.4)
  model = peer.randomise(peer.build_model(config))
  with torch.no_grad():
    model.decode_head.conv_seg.bias[...] = 0.2  # so that both classes appear
  path = saved(model.state_dict(), meta={'cfg': config.pretty_text})
  weights = read_torch_weights(path)
  assert any('at the threshold 0.4' in note for note in weights.notes)
  predictor = nonlocal_jax.load(path)
  expected = peer.predict_file(config, model, image)
  shares = np.bincount(expected.astype(int).ravel(), minlength=2) / expected.size
  assert shares.min() > 0.02
  # Other thresholds give other predictions, so the test would notice.
  model.decode_head.threshold = 0.5
  assert np.mean(peer.predict_file(config, model, image) == expected) < 0.999
  labels = predictor.predict(image)
  assert np.mean(labels == expected) > 0.9999
  with pytest.raises(UserError, match=r'threshold 0\.4, whose averages .* are not supported'):
    predictor.predict(image, multi_scale_flip=True)


def test_one_channel_without_a_config_has_the_default_threshold(model, saved):
  arrays = dict(model.state_dict())
  for head in ('decode_head', 'auxiliary_head'):
    for part in ('weight', 'bias'):
      arrays[f'{head}.conv_seg.{part}'] = arrays[f'{head}.conv_seg.{part}'][:1].clone()
  weights = read_torch_weights(saved(arrays))
  assert (weights.description.config.num_classes, len(weights.description.classes)) == (2, 2)
  assert any('at the threshold 0.3' in note for note in weights.notes)
  state = to_state_dict(weights.state)
  bias = state['decode_head.conv_seg.bias']
  assert 1 / (1 + np.exp(-bias[0])) == pytest.approx(0.3)
  assert bias[1] == arrays['decode_head.conv_seg.bias'].item()
  text = 'model = dict(decode_head=dict(num_classes=2, out_channels=1))'
  with pytest.raises(UserError, match='one output channel, but its arrays have 3'):
    read_torch_weights(saved(model.state_dict(), meta={'cfg': text}))


def test_a_network_without_an_auxiliary_head(model, saved, converter, tmp_path, capsys):
  arrays = {n: x for n, x in model.state_dict().items() if not n.startswith('auxiliary_head.')}
  path = saved(arrays)
  weights = read_torch_weights(path)
  assert_arrays(weights, arrays)
  assert 'It has no auxiliary head, which only training needs.' in weights.notes
  # Back again: the config has none either, and the original builds and loads it.
  assert converter(path, tmp_path / 'out') == (None, '')
  assert converter(tmp_path / 'out', '--to-pth', tmp_path / 'back.pth') == (None, '')
  assert 'There is no auxiliary head' in capsys.readouterr().out
  config = peer.parse_config(read_torch_file(tmp_path / 'back.pth')['meta']['cfg'])
  assert 'auxiliary_head' not in config.model
  config.merge_from_dict({
    f'model.{part}.norm_cfg.type': 'BN' for part in ('backbone', 'decode_head')
  })  # fmt: skip
  other = peer.build_model(config)
  load_checkpoint(other, str(tmp_path / 'back.pth'), strict=True)
  for name, array in other.state_dict().items():
    np.testing.assert_array_equal(array.numpy(), arrays[name].numpy(), err_msg=name)
  # Training starts a new one, and says so.
  description = weights.description
  whole = dataclasses.replace(description.config, auxiliary_head=True)
  initial = read_initial_weights(whole, description.protocol, checkpoint=path)
  assert initial.source == f'{path} but for a new auxiliary head'
  module = nonlocal_jax.load_module(path)
  assert isinstance(module, NonLocalNet)
  with pytest.raises(ValueError, match='the network has no auxiliary head'):
    module.training_logits(np.zeros((1, 32, 32, 3), np.float32), rngs=nnx.Rngs(0))


def test_loading_says_what_converting_says(model, saved, converter, tmp_path, caplog):
  path = saved(model.state_dict())
  notes = read_torch_weights(path).notes
  assert len(notes) == 2
  logger = logging.getLogger('nonlocal_jax.notes')
  handlers, logger.handlers, logger.propagate = logger.handlers, [], True
  try:
    nonlocal_jax.load_module(path)
  finally:
    logger.handlers = handlers
  assert [record.getMessage() for record in caplog.records] == [f'{path}: {n}' for n in notes]
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    assert converter(path, '--to-pth', tmp_path / 'again.pth') == (None, '')
  for note in notes:
    assert said.getvalue().count(f'Note on {path}: {note}\n') == 1
