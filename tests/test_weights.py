"""Loading networks from files and directories, and the errors of what cannot be loaded."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import nonlocal_jax
from nonlocal_jax.data.transforms import resize
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.training.run_files import config_differences
from nonlocal_jax.weights import released
from nonlocal_jax.weights.arrays import checksum, to_arrays
from nonlocal_jax.weights.checkpoints import load_weights, save_weights
from nonlocal_jax.weights.loading import read_torch_weights
from nonlocal_jax.weights.state_dict import from_state_dict, infer_config, to_state_dict
from tests import peer


@pytest.fixture(scope='module')
def loaded(peer_checkpoint):
  return nonlocal_jax.load(peer_checkpoint)


def test_names_and_shapes_are_the_original_s(peer_model):
  arrays = peer.state_dict(peer_model)
  config = infer_config(arrays, source='peer')
  assert config == NonLocalNetConfig(stage_blocks=(3, 4, 6, 3), width=8, num_classes=19)
  assert str(config) == 'R-50, width 8, 19 classes'
  state = from_state_dict(arrays, config, source='peer')
  returned = to_state_dict(state)
  trained = {name for name in arrays if not name.endswith('num_batches_tracked')}
  assert set(returned) == trained
  for name in trained:
    np.testing.assert_array_equal(returned[name], arrays[name], err_msg=name)


def test_load_tells_what_the_file_holds(loaded, peer_checkpoint):
  assert loaded.description.config.depth == 50
  assert loaded.classes == tuple(f'c{i}' for i in range(19))
  assert len(set(loaded.palette)) == 19
  assert not loaded.description.config.align_corners
  assert loaded.protocol == EvalProtocol()
  aligned = nonlocal_jax.load(peer_checkpoint, align_corners=True)
  assert aligned.description.config.align_corners
  assert aligned.protocol.align_corners


def test_a_released_file_is_known_by_its_sha256_whatever_its_name(
  peer_checkpoint, tmp_path, monkeypatch
):
  prefix = hashlib.sha256(peer_checkpoint.read_bytes()).hexdigest()[:8]
  model = released.released_model('nonlocal_r50-d8_769x769_80k_cityscapes')
  model = dataclasses.replace(model, file=f'{model.name}_20200607_193506-{prefix}.pth')
  monkeypatch.setattr(released, 'RELEASED', (model,))
  for name in (model.file, 'best (1).pth'):
    shutil.copy(peer_checkpoint, tmp_path / name)
    weights = read_torch_weights(tmp_path / name)
    assert (weights.released, weights.notes) == (model, ())
    description = weights.description
    assert description.config.align_corners
    assert description.protocol == EvalProtocol(
      scale=(2049, 1025),
      window_crop=(769, 769),
      window_stride=(513, 513),
      align_corners=True,
    )
    assert (description.dataset, description.classes[0]) == ('cityscapes', 'road')
    assert description.palette[0] == (128, 64, 128)
    assert (description.source, description.sha256[:8]) == (name, prefix)
  replaced = dataclasses.replace(model, replaced=True)
  monkeypatch.setattr(released, 'RELEASED', (replaced,))
  (note,) = read_torch_weights(tmp_path / model.file).notes
  assert note == 'It was replaced later by another file of the same model.'


def test_a_released_name_on_other_contents_is_an_error(peer_checkpoint, tmp_path):
  for model in released.RELEASED:
    path = tmp_path / model.file
    shutil.copy(peer_checkpoint, path)
    with pytest.raises(UserError, match=rf'has the name .* not {model.sha256_prefix}: download it'):
      nonlocal_jax.load(path)
    path.unlink()


def test_a_replaced_release_is_told_from_the_current_one():
  old, new = (
    released.released_model_of_sha256(f'{prefix}{56 * "0"}') for prefix in ('affd0f8d', '7881aa1a')
  )
  assert old.name == new.name == 'nonlocal_r101-d8_512x512_160k_ade20k'
  assert ((old.miou, old.replaced), (new.miou, new.replaced)) == ((43.36, True), (44.63, False))
  assert released.released_model_of_sha256(64 * '0') is None


def test_logits_equal_the_original(rng, loaded, peer_model):
  images = rng.normal(size=(1, 65, 72, 3)).astype(np.float32)
  expected = peer.logits(peer_model, images)
  actual = np.asarray(loaded.logits(images))
  assert np.abs(actual - expected).max() <= 1e-3 * expected.std()


def test_predict_equals_the_original_at_the_image_s_own_size(rng, loaded, peer_model):
  image = rng.integers(0, 256, size=(60, 71, 3), dtype=np.uint8)
  normalized = np.asarray(normalize(image[None]))[0]
  expected = peer.final_logits(peer_model, normalized, (60, 71)).argmax(-1)
  predicted = loaded.predict(image)
  assert predicted.shape == (60, 71)
  assert np.mean(predicted == expected) >= 0.9999


def test_predict_resizes_to_the_test_scale(rng, loaded, peer_model, tmp_path):
  loaded.save(tmp_path / 'converted')
  description = json.loads((tmp_path / 'converted/model.json').read_text())
  description['protocol']['scale'] = [96, 80]
  (tmp_path / 'converted/model.json').write_text(json.dumps(description))
  with pytest.raises(UserError, match=r"its checksum differs; if you edited it, take out 'crc32'"):
    nonlocal_jax.load(tmp_path / 'converted')
  del description['crc32']
  (tmp_path / 'converted/model.json').write_text(json.dumps(description))
  image = rng.integers(0, 256, size=(60, 71, 3), dtype=np.uint8)
  normalized = np.asarray(normalize(resize(image, (96, 80))[None]))[0]
  assert normalized.shape == (80, 95, 3)
  expected = peer.final_logits(peer_model, normalized, (60, 71)).argmax(-1)
  predicted = nonlocal_jax.load(tmp_path / 'converted').predict(image)
  assert np.mean(predicted == expected) >= 0.9999


def test_saved_weights_come_back_bit_by_bit(loaded, tmp_path):
  loaded.save(tmp_path / 'converted')
  again = nonlocal_jax.load(tmp_path / 'converted')
  assert again.description == loaded.description
  images = jnp.ones((1, 65, 72, 3))
  np.testing.assert_array_equal(again.logits(images), loaded.logits(images))
  assert [path.name for path in tmp_path.iterdir()] == ['converted']
  with pytest.raises(UserError, match='converted exists; remove it'):
    loaded.save(tmp_path / 'converted')


def test_load_module_is_the_network_of_the_predictor(rng, loaded, peer_checkpoint):
  module = nonlocal_jax.load_module(peer_checkpoint)
  assert module.config == loaded.description.config
  images = jnp.asarray(rng.normal(size=(1, 65, 72, 3)), jnp.float32)
  # Operations by themselves and in one program round differently.
  np.testing.assert_allclose(module(images), loaded.logits(images), rtol=0, atol=1e-3)
  again = nonlocal_jax.PretrainedModel.from_module(module, classes=loaded.classes)
  assert again.protocol == loaded.protocol
  image = rng.integers(0, 256, size=(60, 71, 3), dtype=np.uint8)
  np.testing.assert_array_equal(again.predict(image), loaded.predict(image))
  module.decode_head.conv_seg.bias[...] += 1e6 * jax.nn.one_hot(3, 19)  # of the module alone
  assert set(np.asarray(module(images)).argmax(-1).ravel().tolist()) == {3}
  np.testing.assert_array_equal(again.predict(image), loaded.predict(image))


def test_predict_refuses_what_is_no_image(loaded):
  with pytest.raises(ValueError, match=r'image is \(4, 4\) uint8, expected \(h, w, 3\) uint8 RGB'):
    loaded.predict(np.zeros((4, 4), np.uint8))


def test_missing_unknown_and_misshapen_arrays_are_named_together(peer_model):
  arrays = peer.state_dict(peer_model)
  config = infer_config(arrays, source='x.pth')
  arrays['backbone.stem.0.conv.weight'] = arrays.pop('backbone.stem.0.weight')
  arrays['backbone.stem.1.bias'] = arrays['backbone.stem.1.bias'].astype(np.int32)
  arrays['auxiliary_head.convs.0.bn.running_var'][1] = np.inf
  arrays['decode_head.conv_seg.bias'] = np.zeros(3, np.float32)
  arrays['neck.weight'] = np.zeros(3, np.float32)
  with pytest.raises(UserError) as caught:
    from_state_dict(arrays, config, source='x.pth')
  assert str(caught.value) == (
    'x.pth does not fit NonLocalNet (R-50, width 8, 19 classes): '
    'backbone.stem.0.weight is missing (nearest: backbone.stem.0.conv.weight); '
    'auxiliary_head.convs.0.bn.running_var has values that are not finite; '
    'backbone.stem.1.bias gives int32, expected floating-point numbers; '
    'decode_head.conv_seg.bias gives (3,), expected (19,); '
    'backbone.stem.0.conv.weight is unknown; neck.weight is unknown.'
  )


def test_a_backbone_alone_is_no_segmentation_model(tmp_path):
  path = tmp_path / 'resnet50.pth'
  torch.save({'stem.0.weight': torch.zeros(3)}, path)
  with pytest.raises(UserError, match=r'resnet50.pth holds no NonLocalNet: .* not among its 1 arr'):
    nonlocal_jax.load(path)


def test_directories_without_weights(tmp_path, loaded):
  with pytest.raises(UserError, match=r'has no model\.json: give a \.pth file'):
    nonlocal_jax.load(tmp_path)
  (tmp_path / 'model.json').write_text('{}')
  with pytest.raises(UserError, match=r'model\.json is no description of a model'):
    nonlocal_jax.load(tmp_path)
  (tmp_path / 'model.json').write_text(loaded.description.to_json())
  with pytest.raises(UserError, match='holds no checkpoint yet'):
    nonlocal_jax.load(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['model.json']


@pytest.mark.parametrize('damage', ['missing', 'cut'])
def test_damaged_weights(tmp_path, loaded, damage):
  loaded.save(tmp_path / 'broken')
  data = tmp_path / 'broken/weights/d'
  if damage == 'missing':
    shutil.rmtree(data)
  else:
    largest = max(data.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, 1000)
  with pytest.raises(UserError, match=r'the weights in .*broken cannot be read: [^\n]*$'):
    nonlocal_jax.load(tmp_path / 'broken')


@pytest.mark.slow
def test_no_flipped_bit_gives_other_weights(loaded, tmp_path):
  config = NonLocalNetConfig.from_depth(14, width=2, num_classes=2)
  state = nnx.state(NonLocalNet(config, rngs=nnx.Rngs(0)), (nnx.Param, nnx.BatchStat))
  description = dataclasses.replace(loaded.description, config=config)
  save_weights(tmp_path / 'intact', state, description)
  expected = checksum(to_arrays(state))
  files = sorted(path for path in (tmp_path / 'intact').rglob('*') if path.is_file())
  rng, refused = np.random.default_rng(0), 0
  for index in range(20):
    path = files[index % len(files)]
    intact = path.read_bytes()
    data = bytearray(intact)
    if data:
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    try:
      read, weights = load_weights(tmp_path / 'intact')
      assert read == description
      assert checksum(to_arrays(weights)) == expected
    except UserError:
      refused += 1
    path.write_bytes(intact)
  assert refused > 1


def test_config_differences():
  """A field that the saved config does not have yet is at its default there."""
  saved, current = {'a': {'b': 1, 'c': [2]}}, {'a': {'b': 3, 'c': (2,)}, 'd': 4}
  assert config_differences(saved, current, {'a': {'b': 0}, 'd': 4}) == ['a.b was 1, now 3']
  assert config_differences(saved, current, {'d': 5})[1:] == ['d was 5, now 4']


def test_the_package_needs_neither_torch_nor_tensorflow():
  """In a process of its own, in which PyTorch cannot be imported; TensorFlow is not installed."""
  code = (
    'import sys; sys.modules |= dict.fromkeys(("torch", "mmseg")); '
    'import nonlocal_jax.training.loop; assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[1])


def test_initial_values_are_the_original_s():
  """Deviations of the kernels, zeros where a block starts closed (mmseg `init_weights`)."""
  config = NonLocalNetConfig.from_depth(14, width=16, num_classes=19)
  build = jax.jit(lambda: nnx.state(NonLocalNet(config, rngs=nnx.Rngs(0))))
  arrays = to_state_dict(build())
  for name, array in arrays.items():
    if array.ndim == 4:
      small = '.conv_seg.' in name or ('.nl_block.' in name and '.conv_out.' not in name)
      fan_out = array.shape[0] * array.shape[2] * array.shape[3]
      expected = 0.01 if small else np.sqrt(2 / fan_out)
      assert abs(array.std() / expected - 1) < 6 / np.sqrt(2 * array.size), name
      assert abs(array.mean()) < 6 * expected / np.sqrt(array.size), name
    elif name.endswith(('.running_mean', '.bias')):
      assert not array.any(), name
    else:
      closed = name.endswith('bn3.weight') or name == 'decode_head.nl_block.conv_out.bn.weight'
      assert np.all(array == (0 if closed else 1)), name
