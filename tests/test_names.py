"""Weights by name: what names stand for, where files come from, and where they go."""

import dataclasses
import hashlib
import importlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import nonlocal_jax
from nonlocal_jax.cli import main, models
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNetConfig
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.recipes import published_config
from nonlocal_jax.training.initial_weights import read_initial_weights
from nonlocal_jax.weights import released
from nonlocal_jax.weights.loading import sha256_of
from nonlocal_jax.weights.names import find_backbone, find_weights, named_release, released_path
from nonlocal_jax.weights.state_dict import to_state_dict
from tests import peer
from tests.file_server import file_server
from tests.image_trees import write_tree

ROOT = Path(__file__).parents[1]
NAME = 'nonlocal_r50-d8_769x769_80k_cityscapes'
CONFIG_NAME = 'nonlocal_r50-d8_4xb2-80k_cityscapes-769x769'


def renamed(weights, data: bytes):
  """Released weights whose file has these contents."""
  digits = hashlib.sha256(data).hexdigest()[:8]
  return dataclasses.replace(weights, file=f'{weights.file[: -len("00000000.pth")]}{digits}.pth')


@pytest.fixture
def mirror(monkeypatch, tmp_path):
  """A server in the place of the authors', and an empty folder for what is downloaded."""
  monkeypatch.delenv('NONLOCAL_JAX_OFFLINE')
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  with file_server() as server:
    monkeypatch.setenv('NONLOCAL_JAX_MIRROR', server.address)
    yield server


@pytest.fixture
def model(mirror, peer_checkpoint, monkeypatch):
  """A tiny network, released in the place of a real one under its address."""
  data = peer_checkpoint.read_bytes()
  model = renamed(released.released_model(NAME), data)
  models = tuple(model if known.name == NAME else known for known in released.RELEASED)
  monkeypatch.setattr(released, 'RELEASED', models)
  mirror.serve(f'/mmsegmentation/v0.5/nonlocal_net/{NAME}/{model.file}', data)
  return model


def test_addresses_and_names_are_those_of_the_index():
  index = yaml.safe_load((peer.CONFIGS / 'metafile.yaml').read_text())['Models']
  expected = {entry['Name']: entry['Weights'] for entry in index}
  current = [model for model in released.RELEASED if not model.replaced]
  assert {model.config_name: model.address for model in current} == expected
  assert all((peer.CONFIGS / f'{model.config_name}.py').is_file() for model in current)
  for model in current:
    pretrained = peer.read_config(model.config_name).model.pretrained
    backbone = released.released_backbone(model.depth)
    assert pretrained == f'open-mmlab://{backbone.name}'
    assert published_config(model.dataset, model.depth, model.variant).init_backbone == (
      backbone.name
    )


def test_each_name_stands_for_one_file():
  names = {}
  for model in released.RELEASED:
    for name in (model.file, model.file.removesuffix('.pth')):
      names[name] = model
  for model in released.RELEASED:
    if not model.replaced:
      names |= dict.fromkeys((model.name, model.config_name, model.recipe), model)
  for name, model in names.items():
    assert named_release(name) is model
    assert named_release(Path(name)) is model
  assert named_release('ade20k_r50').miou == 42.03  # the better of the two
  assert named_release('cityscapes_r101').miou == 79.40
  for name in ('resnet50_v1c', 'open-mmlab://resnet50_v1c', 'resnet50_v1c-2cccc1ad.pth'):
    assert named_release(name) is named_release(Path(name)) is released.BACKBONES[0]
  assert named_release('ade20k') is None
  for known in (*released.RELEASED, *released.BACKBONES):
    assert named_release(known.address) is named_release(Path(known.address)) is known


@pytest.mark.parametrize('depth', [50, 101])
def test_sizes_are_about_those_of_the_files(depth, tmp_path):
  """Of the original network at its full width, and of torchvision's ResNet classifier."""
  model = next(m for m in released.RELEASED if (m.dataset, m.depth) == ('voc12aug', depth))
  with torch.device('meta'):
    network = peer.build_full(model.config_name)
  count = sum(array.numel() for array in network.state_dict().values())
  assert model.about_bytes == pytest.approx(4 * count, rel=1e-4)
  backbone = sum(array.numel() for array in network.backbone.state_dict().values())
  backbone += 2048 * 1000 + 1000
  assert released.released_backbone(depth).about_bytes == pytest.approx(4 * backbone, rel=2e-3)


@pytest.mark.parametrize('name', [NAME, CONFIG_NAME, 'cityscapes_r50', 'FILE'])
def test_a_name_is_downloaded_once(model, mirror, peer_checkpoint, name, monkeypatch, capfd):
  given = model.file if name == 'FILE' else name
  path = find_weights(given)
  assert path.read_bytes() == peer_checkpoint.read_bytes()
  assert path == released_path(model)
  assert f'to {path}' in capfd.readouterr().err
  monkeypatch.setenv('NONLOCAL_JAX_OFFLINE', '1')
  assert find_weights(given) == path
  assert len(mirror.requests) == 1


def test_load_by_name(model):
  loaded = nonlocal_jax.load(NAME)
  assert loaded.description.source == model.file
  assert loaded.description.dataset == 'cityscapes'  # of the release: the file does not say
  module = nonlocal_jax.load_module('cityscapes_r50:769x769_80k')
  assert module.config == loaded.description.config


def test_convert_by_name(model, converter, tmp_path, capsys):
  assert converter('cityscapes_r50', tmp_path / 'converted') == (None, '')
  assert f'released as  {NAME}' in capsys.readouterr().out
  assert nonlocal_jax.load(tmp_path / 'converted').description.source == model.file


@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors', 'weights'])
def test_weights_that_are_no_file_are_never_opened(name, tmp_path):
  """A pipe to which nobody writes would be waited for without end."""
  os.mkfifo(tmp_path / name)
  for path in (tmp_path / name, Path('/dev/zero')):
    for read in (nonlocal_jax.load, find_weights, find_backbone):
      with pytest.raises(UserError, match='is a pipe or device, no file'):
        read(path)
    assert sha256_of(path) == ''  # files of a folder, before they are read


@pytest.mark.parametrize('command', ['predict', 'eval', 'train', 'convert'])
def test_commands_take_names(script, tmp_path, command):
  options = {
    'predict': ['--checkpoint=ade20k_r5', ROOT / 'docs/demo.png', f'--out={tmp_path / "out"}'],
    'eval': ['--checkpoint=ade20k_r5', f'--workdir={tmp_path / "out"}'],
    'train': ['--checkpoint=ade20k_r5', f'--workdir={tmp_path / "out"}'],
    'convert': ['ade20k_r5', tmp_path / 'out'],
  }
  module = importlib.import_module(f'nonlocal_jax.cli.{main.COMMANDS[command][0]}')
  status, said = script(module, *options[command])
  assert status == 1
  assert "or a released model's name; the nearest is ade20k_r50, see nonlocal-jax models." in said
  assert not (tmp_path / 'out').exists()


def test_a_path_goes_before_a_name(model, mirror, peer_checkpoint, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  shutil.copy(peer_checkpoint, tmp_path / 'cityscapes_r50')
  assert find_weights('cityscapes_r50') == Path('cityscapes_r50')
  said = capsys.readouterr().err
  assert said == 'cityscapes_r50 is taken, not the released weights of that name.\n'
  shutil.copy(peer_checkpoint, tmp_path / model.file)
  assert find_weights(model.file) == Path(model.file)
  assert (capsys.readouterr().err, mirror.requests) == ('', [])


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    (
      'nonlocal_r50-d8_512x512_80k_ade20',
      "or a released model's name; the nearest is nonlocal_r50-d8_512x512_80k_ade20k, see "
      'nonlocal-jax models.',
    ),
    ('RESNET50_V1C', 'the nearest is resnet50_v1c, see nonlocal-jax models.'),
    ('open-mmlab://resnet50_v1d', 'the nearest is open-mmlab:'),
    ('a' * 5000, f'There is no {"a" * 5000}: give a .pth file'),
    ('', 'The path of the weights is empty: give one, or a released'),
    ('x.pth', "or a released model's name, see nonlocal-jax models."),
    ('folder/ade20k_r50', 'There is no folder/ade20k_r50: give a .pth file, a converted'),
    ('resnet50_v1c', 'resnet50_v1c is a backbone, and not a whole network: it is for config.init_'),
    ('ade20k_r50', 'baef45e3.pth (NONLOCAL_JAX_OFFLINE is set): put it at'),
  ],
)
def test_names_that_cannot_be_had(name, message):
  with pytest.raises(UserError, match=re.escape(message)):
    nonlocal_jax.load(name)


def test_what_is_written_is_checked_before_a_download(model, mirror, converter, tmp_path):
  (tmp_path / 'there').mkdir()
  for where in ([tmp_path / 'there'], ['--to-pth', tmp_path / 'there']):
    status, said = converter(NAME, *where)
    assert (status, 'there exists; remove it' in said) == (1, True)
  status, said = converter(NAME, '')
  assert (status, 'argument out: the path is empty' in said) == (2, True)
  assert mirror.requests == []


def test_a_wrong_file_is_refused(model, mirror, peer_checkpoint):
  mirror.files[next(iter(mirror.files))].data = b'an error page'
  with pytest.raises(
    UserError, match=r'what comes has the sha256 \w+\.\.\., not \w+\): see to NONLO'
  ):
    nonlocal_jax.load(NAME)
  assert not released_path(model).exists()


@pytest.mark.slow
def test_training_starts_from_a_backbone_by_name(mirror, monkeypatch, tmp_path, rng):
  """At its full size, with one number in each array."""
  network = NonLocalNetConfig.from_depth(50, num_classes=21)
  with torch.device('meta'):
    shapes = peer.build_full('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512').backbone.state_dict()
  values = dict(zip(shapes, rng.normal(size=len(shapes)), strict=True))
  arrays = {
    name: torch.tensor(values[name], dtype=torch.float32).expand(array.shape).clone()
    for name, array in shapes.items()
    if not name.endswith('num_batches_tracked')
  }
  torch.save(arrays, tmp_path / 'backbone.pth')
  data = (tmp_path / 'backbone.pth').read_bytes()
  backbone = renamed(released.BACKBONES[0], data)
  monkeypatch.setattr(released, 'BACKBONES', (backbone,))
  mirror.serve(f'/pretrain/third_party/{backbone.file}', data)
  for name in ('resnet50_v1c', 'open-mmlab://resnet50_v1c'):
    weights = read_initial_weights(network, EvalProtocol(), backbone=Path(name))
    assert weights.source == f'the backbone in {released_path(backbone)}'
  assert len(mirror.requests) == 1
  assert weights.state is not None
  found = to_state_dict(weights.state, {})
  assert {f'backbone.{name}' for name in arrays} <= found.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[f'backbone.{name}'], array.numpy())


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      [],
      r'resnet50_v1c-2cccc1ad\.pth cannot be downloaded from https://download\.openmmlab\.com/'
      r'pretrain/third_party/resnet50_v1c-2cccc1ad\.pth \(NONLOCAL_JAX_OFFLINE is set\): put it at '
      r'.*; its sha256 begins with 2cccc1ad; with --config\.init_backbone=none it ',
    ),
    (
      ['--config.model.width=8'],
      r'resnet50_v1c is the backbone of R-50 at width 64, but the config describes R-50, width 8, '
      r'150 classes: with --config\.init_backbone=none it starts from random weights\.',
    ),
    (['--config.init_backbone=none', '--config.data.source_dir='], 'train was not prepared in'),
    (['--config.init_backbone=', '--config.data.source_dir='], 'train was not prepared in'),
  ],
)
def test_published_recipes_start_from_their_backbone(program, settings, message, tmp_path):
  write_tree('ade20k', tmp_path / 'ade')
  data = [f'--config.data.source_dir={tmp_path / "ade"}', '--config.data.data_dir=nowhere']
  status, said = program('--config=ade20k_r50', *data, *settings)
  assert status == 1
  assert re.search(message, said), said


@pytest.mark.parametrize(
  'settings', [[], ['--checkpoint=ade20k_r50'], ['--mode=eval', '--checkpoint=ade20k_r50']]
)
def test_missing_data_is_told_before_weights_are_downloaded(settings, mirror, program):
  command = ['--config=ade20k_r50', '--config.data.data_dir=nowhere', *settings]
  status, said = program(*command)
  assert (status, 'was not prepared in nowhere' in said) == (1, True), said
  status, said = program(*command, '--config.data.source_dir=nothing')
  assert (status, 'There is no folder nothing: give the folder' in said) == (1, True), said
  assert mirror.requests == []


def test_the_list_of_models(script, capsys):
  assert script(models) == (None, '')
  lines = capsys.readouterr().out.splitlines()
  rows = [re.split(r' {2,}', line) for line in lines[1:-2]]
  assert len(rows) == len(released.RELEASED) + len(released.BACKBONES)
  assert [NAME, 'cityscapes', '769x769', '80k', '79.05', '80.68', '~200 MB'] in rows
  assert ['resnet101_v1c', 'ImageNet', '~179 MB'] in rows
  assert lines[-1].startswith('Downloaded files are kept in /')


def test_models_are_downloaded(model, mirror, peer_checkpoint, script, capsys):
  assert script(models, '--download', 'cityscapes_r50') == (None, '')
  path = released_path(model)
  assert capsys.readouterr().out == f'{path}\n'
  assert script(models) == (None, '')
  line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(NAME))
  megabytes = peer_checkpoint.stat().st_size / 10**6
  assert line.endswith(f'{megabytes:.1f} MB   yes')
  assert script(models, NAME) == (None, '')
  told = capsys.readouterr().out
  assert f'here      {path}\n' in told
  assert f'address   https://download.openmmlab.com/mmsegmentation/v0.5/nonlocal_net/{NAME}' in told
  path.write_bytes(b'damaged')
  found = script(models, '--download', NAME)
  assert found[0] == 1
  assert 'delete it, and it is downloaded anew' in found[1]


@pytest.mark.parametrize(
  ('arguments', 'status', 'message'),
  [
    (['--download'], 2, 'name what to download, or all'),
    (['ade20k_r5'], 1, "No released model is called 'ade20k_r5'; the nearest is ade20k_r50, see"),
    (['ADE20K_R50'], 1, 'the nearest is ade20k_r50, see'),
    (['xyz'], 1, "No released model is called 'xyz'; see nonlocal-jax models"),
  ],
)
def test_wrong_arguments_of_models(script, arguments, status, message):
  found = script(models, *arguments)
  assert found[0] == status
  assert message in found[1]
