"""Exported files against mmsegmentation's network, and without this library."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import scipy.special
import torch
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import nonlocal_jax
from nonlocal_jax import EvalProtocol, NonLocalNet, NonLocalNetConfig, PretrainedModel, UserError
from nonlocal_jax.cli import convert
from nonlocal_jax.cli import export as command
from nonlocal_jax.export import files, interface
from nonlocal_jax.export.checking import Reference, check_outputs, difference
from nonlocal_jax.export.interface import Interface
from nonlocal_jax.export.onnx_network import onnx_model
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.safetensors_file import write_safetensors
from nonlocal_jax.weights.state_dict import from_state_dict, infer_config, to_state_dict
from tests import peer
from tests.test_docs import ROOT, code_blocks

SIZE = (61, 90)
CLASSES = 7


def described(config: NonLocalNetConfig, protocol: EvalProtocol) -> ModelDescription:
  count = config.num_classes
  return ModelDescription(
    config=config,
    protocol=protocol,
    dataset='custom',
    classes=tuple(f'class {i}' for i in range(count)),
    palette=((1, 2, 3),) * count,
    source='the peer',
    sha256=None,
    num_batches_tracked={},
  )


def peer_network(mode: str = 'embedded_gaussian', **head) -> tuple[torch.nn.Module, dict]:
  """A small network of mmsegmentation with another pairwise function, and its arrays."""
  name = 'nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024'
  config = peer.small_config(name, width=8, num_classes=CLASSES, shallow=True)
  config.model.decode_head.update(mode=mode, **head)
  network = peer.randomise(peer.build_model(config))
  return network, peer.state_dict(network)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).integers(0, 256, (3, *SIZE, 3), np.uint8)


@pytest.fixture(scope='module')
def network():
  """A network of mmsegmentation, and ours with its weights."""
  theirs, arrays = peer_network()
  config = infer_config(arrays, source='the peer')
  state = from_state_dict(arrays, config, source='the peer')
  return theirs, PretrainedModel(described(config, EvalProtocol()), state)


@pytest.fixture(scope='module')
def exported(network, tmp_path_factory):
  """Files of the network, of both kinds of programs and of its weights."""
  folder = tmp_path_factory.mktemp('exported')
  model = network[1]
  written = {
    format: model.export(folder / f'network.{format}', format=format, size=SIZE, confidence=True)
    for format in ('onnx', 'jax')
  }
  return {
    **written,
    'safetensors': model.export(folder / 'weights.safetensors', format='safetensors'),
  }


def normalized(images: np.ndarray, protocol: EvalProtocol) -> np.ndarray:
  return ((images - np.array(protocol.mean)) / np.array(protocol.std)).astype(np.float32)


def run_onnx(model: Path | bytes, images: np.ndarray) -> dict[str, np.ndarray]:
  model = str(model) if isinstance(model, Path) else model
  session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
  names = [output.name for output in session.get_outputs()]
  return dict(zip(names, session.run(names, {'images': images}), strict=True))


@pytest.mark.filterwarnings('ignore:When align_corners=True:UserWarning')
@pytest.mark.parametrize('in_blocks', [False, True], ids=['whole', 'blocks'])
@pytest.mark.parametrize(
  ('mode', 'options'),
  [
    ('embedded_gaussian', {}),
    ('embedded_gaussian', {'use_scale': False, 'align_corners': True, 'reduction': 4}),
    ('gaussian', {'align_corners': True}),
    ('dot_product', {}),
    ('concatenation', {}),
  ],
  ids=['embedded_gaussian', 'no_scale', 'gaussian', 'dot_product', 'concatenation'],
)
def test_onnx_equals_mmsegmentation(images, mode, options, in_blocks, monkeypatch):
  if in_blocks:
    monkeypatch.setattr(interface, 'PAIRWISE_WEIGHTS_AT_ONCE', 40 * 96)
    monkeypatch.setattr(interface, 'SCORES_AT_ONCE', 20 * 90 * CLASSES)
  theirs, arrays = peer_network(mode, **options)
  config = dataclasses.replace(infer_config(arrays, source='the peer'), mode=mode)
  named = {name: options[name] for name in ('use_scale', 'align_corners') if name in options}
  config = dataclasses.replace(config, **named)
  protocol = EvalProtocol(align_corners=config.align_corners)
  description = described(config, protocol)
  shapes = Interface.of(description, size=SIZE, batch=None, confidence=True)
  model = onnx_model(description, arrays, shapes, with_logits=True)
  onnx.checker.check_model(model, full_check=True)
  splits = sum(node.op_type == 'Split' for node in model.graph.node)
  assert splits == (in_blocks and mode != 'dot_product')
  found = run_onnx(model.SerializeToString(), images)
  expected = peer.logits(theirs, normalized(images, protocol))
  tolerance = 1e-4 * expected.std()
  assert_allclose(found['logits'].transpose(0, 2, 3, 1), expected, atol=tolerance, rtol=0)
  assert_array_equal(found['classes'], expected.argmax(axis=-1))
  probabilities = scipy.special.softmax(expected, axis=-1).max(axis=-1)
  assert_allclose(found['confidence'], probabilities, atol=max(tolerance, 1e-5))


def test_preprocessing_and_padding_are_inside(images):
  """As mmsegmentation's preprocessor does: channels, mean, deviation, then zeros to a multiple."""
  theirs, arrays = peer_network()
  protocol = EvalProtocol(
    channel_order='bgr',
    mean=(103.5, 116.3, 123.7),
    std=(1, 2, 3),
    pad_multiple=32,
    pad_size=(90, 8),
  )
  description = described(infer_config(arrays, source='the peer'), protocol)
  shapes = Interface.of(description, size=SIZE, batch=3, confidence=False)
  assert shapes.network == (96, 96)
  model = onnx_model(description, arrays, shapes, with_logits=True)
  found = run_onnx(model.SerializeToString(), images)
  padded = np.zeros((3, 96, 96, 3), np.float32)
  padded[:, :61, :90] = normalized(images[..., ::-1], protocol)
  expected = peer.logits(theirs, padded)[:, :61, :90]
  tolerance = 1e-4 * expected.std()
  assert_allclose(found['logits'].transpose(0, 2, 3, 1), expected, atol=tolerance, rtol=0)
  assert 'padding to 96,96' in shapes.inside()
  assert 'BGR' in shapes.inside()


@pytest.mark.parametrize('count', [1, 3])
def test_onnx_file(network, exported, images, count):
  theirs, model = network
  assert exported['onnx'].difference < 1e-4
  found = run_onnx(exported['onnx'].path, images[:count])
  assert found['classes'].dtype == np.uint8
  expected = peer.logits(theirs, normalized(images[:count], EvalProtocol()))
  assert_array_equal(found['classes'], expected.argmax(axis=-1))
  assert_array_equal(found['classes'][0], model.predict(images[0]))
  written = onnx.load(exported['onnx'].path)
  onnx.checker.check_model(written, full_check=True)
  metadata = {entry.key: entry.value for entry in written.metadata_props}
  assert json.loads(metadata['classes']) == list(model.classes)
  assert metadata['inside'].startswith('normalization, the network')
  described_there = ModelDescription.from_json(metadata['description'], source='the file')
  assert described_there == model.description


def test_fixed_batch(network, tmp_path, images):
  exported = network[1].export(tmp_path / 'one.onnx', format='onnx', size=SIZE, batch=1)
  assert run_onnx(exported.path, images[:1]).keys() == {'classes'}
  with pytest.raises(Exception, match='Got invalid dimensions for input: images'):
    run_onnx(exported.path, images)


# What a machine with JAX alone has: an import of the others fails there.
_ALONE = """
import sys
sys.modules.update(dict.fromkeys(['nonlocal_jax', 'flax', 'optax', 'orbax', 'onnx', 'cv2']))
"""


def test_jax_file_runs_with_jax_alone(network, exported, images, tmp_path):
  (example,) = (
    block for block in code_blocks(ROOT / 'docs/python_api.md') if 'deserialize' in block
  )
  assert 'nonlocal_jax' not in example
  assert exported['jax'].difference < 1e-4
  (tmp_path / 'network.jax').write_bytes(exported['jax'].path.read_bytes())
  np.save(tmp_path / 'images.npy', images)
  given, save = (
    'import numpy as np\nimages = np.load("images.npy")\n',
    'np.savez("o.npz", **outputs)',
  )
  result = subprocess.run(
    [sys.executable, '-c', f'{_ALONE}{given}{example}{save}'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  found = np.load(tmp_path / 'o.npz')
  expected = peer.logits(network[0], normalized(images, EvalProtocol()))
  assert_array_equal(found['classes'], expected.argmax(axis=-1))
  assert found['classes'].dtype == np.uint8
  probabilities = scipy.special.softmax(expected, axis=-1).max(axis=-1)
  assert_allclose(found['confidence'], probabilities, atol=1e-4)


def test_safetensors(network, exported, images):
  theirs, model = network
  path = exported['safetensors'].path
  assert exported['safetensors'].difference == 0
  expected = {
    name: array
    for name, array in peer.state_dict(theirs).items()
    if not name.endswith('num_batches_tracked')
  }
  found = safetensors.numpy.load_file(path)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert_array_equal(found[name], array, err_msg=name)
  loaded = nonlocal_jax.load(path)
  assert loaded.description == model.description
  assert_array_equal(loaded.predict(images[0]), model.predict(images[0]))


def test_safetensors_of_other_origin_or_damaged_are_refused(network, exported, tmp_path):
  whole = exported['safetensors'].path.read_bytes()
  other, damaged, cut = (tmp_path / f'{name}.safetensors' for name in ('other', 'damaged', 'cut'))
  safetensors.numpy.save_file({'x': np.zeros(3)}, other)
  damaged.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
  cut.write_bytes(whole[:-1])
  loaded = nonlocal_jax.load_module(exported['safetensors'].path)
  config = dataclasses.replace(loaded.config, stage_blocks=(10**9,) * 4)
  description = dataclasses.replace(network[1].description, config=config)
  huge = tmp_path / 'huge.safetensors'
  write_safetensors(huge, nnx.state(loaded), description)
  for path, message in [
    (huge, r'describes a network with stage_blocks=\(1000000000,'),
    (other, 'other.safetensors does not say which network it is'),
    (damaged, 'damaged.safetensors is damaged'),
    (cut, 'cut.safetensors is no safetensors file that can be read'),
  ]:
    with pytest.raises(UserError, match=message):
      nonlocal_jax.load(path)
  with pytest.raises(UserError, match='is a safetensors file, which holds one set of weights'):
    nonlocal_jax.load(exported['safetensors'].path, ema=True)


def test_safetensors_are_converted(exported, script, tmp_path, images):
  out = tmp_path / 'converted'
  assert script(convert, exported['safetensors'].path, out) == (None, '')
  given = nonlocal_jax.load(exported['safetensors'].path)
  assert nonlocal_jax.load(out).description == given.description


def test_a_file_that_differs_is_not_left(network, tmp_path, monkeypatch):
  def slightly_wrong(state):
    arrays = to_state_dict(state)
    name = 'decode_head.conv_seg.weight'
    return {**arrays, name: arrays[name] * np.float32(1.001)}

  monkeypatch.setattr(files, 'to_state_dict', slightly_wrong)
  with pytest.raises(UserError, match='its logits differ from those of the network by'):
    network[1].export(tmp_path / 'network.onnx', format='onnx', size=SIZE)
  assert list(tmp_path.iterdir()) == []


def test_what_is_compared():
  logits = np.random.default_rng(0).normal(size=(1, 4, 5, 3)).astype(np.float32)
  expected = Reference(np.zeros((1, 4, 5, 3), np.uint8), logits)
  classes = logits.argmax(axis=-1)
  confidence = scipy.special.softmax(logits, axis=-1).max(axis=-1)
  right = {'classes': classes, 'confidence': confidence}
  check_outputs(expected, right, 0.0, what='a file')
  off = logits.copy()
  off[0, 1, 2, 0] += 0.5
  assert difference(expected, {'logits': off}) == pytest.approx(0.5 / logits.std(), rel=1e-5)
  wrong = classes.copy()
  wrong[0, 1, 2] = (wrong[0, 1, 2] + 1) % 3
  with pytest.raises(UserError, match='some of its classes are not those of the network'):
    check_outputs(expected, {**right, 'classes': wrong}, 0.0, what='a file')
  with pytest.raises(UserError, match='its confidence differs'):
    check_outputs(expected, {**right, 'confidence': confidence + 0.01}, 0.0, what='a file')
  for found in (1.1e-4, float('nan')):
    with pytest.raises(UserError, match='a file was not written: its logits differ'):
      check_outputs(expected, right, found, what='a file')


@pytest.mark.slow
def test_other_channels_and_no_block(tmp_path):
  config = NonLocalNetConfig.from_depth(
    14, num_classes=4, width=2, in_channels=4, non_local=False, auxiliary_head=False
  )
  module = NonLocalNet(config, rngs=nnx.Rngs(0))
  protocol = EvalProtocol(mean=(1, 2, 3, 4), std=(5, 6, 7, 8))
  model = PretrainedModel.from_module(module, protocol=protocol)
  exported = model.export(tmp_path / 'network.onnx', format='onnx', size=(17, 24))
  image = np.random.default_rng(0).integers(0, 256, (1, 17, 24, 4), np.uint8)
  found = run_onnx(exported.path, image)['classes']
  expected = model.logits(nonlocal_jax.normalize(image, mean=protocol.mean, std=protocol.std))
  assert_array_equal(found, np.asarray(expected).argmax(axis=-1))


def test_command(script, exported, tmp_path, capsys):
  weights, out = exported['safetensors'].path, tmp_path / 'new/network.onnx'
  arguments = [f'--checkpoint={weights}', '--format=onnx', f'--out={out}']
  assert script(command, *arguments, '--size=61,90', '--batch=2') == (None, '')
  printed = capsys.readouterr().out
  assert f'{out}, ' in printed
  assert 'images (2, 61, 90, 3) uint8 RGB -> classes (2, 61, 90) uint8\n' in printed
  assert re.search(r"difference +\d\.\de-0\d of the logits' standard deviation", printed)
  assert script(command, *arguments, '--size=61,90') == (
    1,
    f'error: {out} exists; remove it or choose another name.',
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--format=tflite', '--size=8,8'], "invalid choice: 'tflite'"),
    (['--format=onnx'], 'size is missing, which onnx needs'),
    (['--format=jax', '--size=8'], "--size is '8'; give height and width in pixels"),
    (['--format=jax', '--size=0,8'], 'size is 0,8; give height and width in pixels, at least 1'),
    (['--format=onnx', '--size=5000,5000'], 'give one of at most 16,777,216 pixels'),
    (['--format=onnx', '--size=8,8', '--batch=0'], 'batch is 0; give a number of images'),
    (['--format=onnx', '--size=8,8', '--batch=x'], "--batch is 'x'; give a number of images"),
    (['--format=safetensors', '--size=8,8'], 'safetensors holds weights alone'),
    (['--format=safetensors', '--confidence'], 'safetensors holds weights alone'),
  ],
)
def test_bad_options(script, exported, tmp_path, options, message):
  weights, out = exported['safetensors'].path, tmp_path / 'out'
  status, said = script(command, f'--checkpoint={weights}', f'--out={out}', *options)
  assert status in (1, 2)
  assert message in said
  assert not out.exists()


def test_thresholds_have_no_confidence(network):
  config = dataclasses.replace(network[1].description.config, threshold=0.3)
  description = dataclasses.replace(network[1].description, config=config)
  with pytest.raises(UserError, match='export it without confidence'):
    Interface.of(description, size=SIZE, batch=None, confidence=True)


@pytest.mark.parametrize(
  ('format', 'package'), [('onnx', 'onnxruntime'), ('safetensors', 'safetensors')]
)
def test_without_the_extra(network, tmp_path, monkeypatch, format, package):
  for name in [name for name in sys.modules if name.partition('.')[0] == package]:
    monkeypatch.setitem(sys.modules, name, None)
  size = SIZE if format == 'onnx' else None
  with pytest.raises(UserError, match=rf"need the package {package}, .*'\.\[export\]'"):
    network[1].export(tmp_path / 'network', format=format, size=size)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_benchmark_of_exported_files_runs():
  tiny = ['--size=32,40', '--width=4', '--depth=14', '--rounds=1', '--repeats=1']
  result = subprocess.run(
    [sys.executable, 'benchmarks/exported.py', *tiny], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  for format in ('onnx', 'jax'):
    assert re.search(rf"{format}: \d\.\d MB, .* of the logits' standard deviation", result.stdout)
  for side in ('this library', 'ONNX Runtime', 'JAX program', 'MMSegmentation'):
    assert re.search(rf'\| {side} \| \d+\.\d\d s \| \d+\.\d\d \|', result.stdout)
