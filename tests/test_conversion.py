"""Checkpoints of the original here, and networks from here in the original."""

import dataclasses
import json
import re
import resource
import shlex
import shutil
import time

import mmengine
import numpy as np
import pytest
import torch
from mmengine.runner import load_checkpoint

import nonlocal_jax
from nonlocal_jax.cli.convert import evaluation_command
from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.torch_format.reader import read_torch_file
from nonlocal_jax.torch_format.writer import write_torch_checkpoint
from nonlocal_jax.weights.arrays import to_arrays
from nonlocal_jax.weights.checkpoints import read_description, save_weights
from nonlocal_jax.weights.loading import read_backbone, read_torch_weights, read_weights
from nonlocal_jax.weights.released import RELEASED, released_model
from tests import peer

CONFIGS = sorted(path.stem for path in peer.CONFIGS.glob('nonlocal_*.py'))


def released_of(config: str):
  """The release of one of mmsegmentation's configs."""
  pattern = r'nonlocal_(r\d+)-d8_4xb\d-(\d+k)_(\w+)-(\d+x\d+)'
  depth, steps, dataset, crop = re.fullmatch(pattern, config).groups()
  return released_model(f'nonlocal_{depth}-d8_{crop}_{steps}_{dataset}')


@pytest.fixture(scope='module')
def models():
  """The original network of a config at a sixteenth of the width, with counters that differ."""
  built = {}

  def build(config: str) -> torch.nn.Module:
    model = released_of(config)
    key = model.depth, model.dataset
    if key not in built:
      built[key] = peer.build(config, width=4)
      for name, array in built[key].state_dict().items():
        if name.endswith('num_batches_tracked'):
          array.fill_(500_000 if name.startswith('backbone') else 80_000)
    return built[key]

  return build


@pytest.mark.parametrize('config', CONFIGS)
def test_there_and_back_without_the_loss_of_a_bit(config, models, converter, tmp_path):
  """Each published config, both formats of PyTorch, loaded strictly by the original at the end."""
  assert len(CONFIGS) == 16
  model, text = models(config), peer.read_config(config).pretty_text
  expected = peer.state_dict(model)
  for file_format in ('zip', 'legacy'):
    file, directory, back = (tmp_path / f'{file_format}{end}' for end in ('.pth', '', '_back.pth'))
    contents = {'meta': {'cfg': text}, 'state_dict': model.state_dict()}
    torch.save(contents, file, _use_new_zipfile_serialization=file_format == 'zip')
    assert converter(file, directory) == (None, '')
    assert converter(directory, '--to-pth', back) == (None, '')
    returned = torch.load(back, weights_only=True)['state_dict']
    assert {name: array.dtype for name, array in returned.items()} == {
      name: array.dtype for name, array in model.state_dict().items()
    }
    for name, array in expected.items():
      np.testing.assert_array_equal(returned[name].numpy(), array, err_msg=name)
  other = peer.randomise(peer.build(config, width=4), seed=1)
  load_checkpoint(other, str(back), strict=True)
  for name, array in other.state_dict().items():
    np.testing.assert_array_equal(array.numpy(), expected[name], err_msg=name)
  description, _ = read_weights(directory)
  published = released_of(config)
  # mmsegmentation 1.x, whose config it is, does not pad windows.
  later = {'version': 'v1', 'pad_windows': False}
  assert description.protocol == dataclasses.replace(published.protocol, **later)
  assert description.config.align_corners == published.align_corners
  assert read_torch_weights(back).description.num_batches_tracked == description.num_batches_tracked


@pytest.fixture
def convert(converter, capsys):
  """Runs the converter, which must succeed; returns what it prints."""

  def run(*arguments: object) -> str:
    assert converter(*arguments) == (None, '')
    return capsys.readouterr().out

  return run


def test_summary(convert, peer_checkpoint, tmp_path):
  printed = convert(peer_checkpoint, tmp_path / 'out')
  arrays = torch.load(peer_checkpoint)['state_dict']
  kept = {name: x for name, x in arrays.items() if not name.endswith('num_batches_tracked')}
  statistics = sum(x.numel() for name, x in kept.items() if '.running_' in name)
  parameters = sum(x.numel() for x in kept.values()) - statistics
  assert re.search(rf'^total +310 +{parameters:,} +{statistics:,}$', printed, re.MULTILINE)
  assert re.search(r"^skipped +60  PyTorch's counters of training batches$", printed, re.MULTILINE)
  assert re.search(r'^network +R-50, width 8, 19 classes$', printed, re.MULTILINE)
  assert re.search(
    r'^dataset +custom: 19 classes \(c0, c1, c2, c3, \.\.\.\)$', printed, re.MULTILINE
  )
  assert 'Note: It is not a released file' in printed
  assert 'It has no checksums' not in printed
  assert 'half-pixel corners (align_corners=False) are assumed.' in printed
  told = convert(peer_checkpoint, tmp_path / 'other', '--align-corners')
  assert 'assumed' not in told
  assert 'corner-aligned logits' in told
  description = read_weights(tmp_path / 'other')[0]
  assert description.config.align_corners
  assert description.protocol.align_corners


@pytest.mark.slow
def test_the_printed_command_evaluates(convert, program, peer_checkpoint, photos, tmp_path):
  printed = convert(peer_checkpoint, tmp_path / 'out')
  command = printed.splitlines()[-1].replace('DIR', str(photos))
  command = command.replace('(WIDTH,HEIGHT)', '(96,72)')
  python, module, package, mode, *arguments = shlex.split(command)
  assert (python, module, package, mode) == ('python', '-m', 'nonlocal_jax', 'eval')
  more = ['--config.data.ignore_labels=(20,)', f'--config.data.data_dir={tmp_path}/prepared']
  scores = []
  for index, checkpoint in enumerate((tmp_path / 'out', peer_checkpoint)):
    arguments[1] = f'--checkpoint={checkpoint}'
    assert program('--mode=eval', *arguments, *more, f'--workdir={tmp_path}/{index}') == (None, '')
    scores.append(json.loads((tmp_path / f'{index}/metrics.json').read_text())['mIoU'])
  assert scores[0] == scores[1] > 0


@pytest.mark.parametrize('model', [m for m in RELEASED if not m.replaced], ids=lambda m: m.name)
def test_the_command_of_a_release_is_its_config_alone(model, loaded_description, tmp_path):
  classes = {'cityscapes': 19, 'ade20k': 150, 'voc12aug': 21}[model.dataset]
  config = NonLocalNetConfig.from_depth(
    model.depth, num_classes=classes, align_corners=model.align_corners
  )
  description = loaded_description(
    dataset=model.dataset, protocol=model.protocol, config=config, assumed=()
  )
  command = evaluation_command(description, tmp_path / 'a b')
  match = re.fullmatch(
    rf'python -m nonlocal_jax eval --config={model.dataset}_r{model.depth}:(\w+) '
    rf"--checkpoint='{tmp_path}/a b' --config\.data\.source_dir=DIR",
    command,
  )
  # Schedules of different lengths are tested alike.
  assert match[1].split('_')[0] == '{}x{}'.format(*model.crop)


@pytest.fixture
def loaded_description(peer_checkpoint):
  """The description of the small network with other values."""
  return lambda **changes: dataclasses.replace(
    read_torch_weights(peer_checkpoint).description, **changes
  )


def test_a_folder_is_converted_as_far_as_possible(converter, peer_checkpoint, tmp_path, capsys):
  folder, out = tmp_path / 'folder', tmp_path / 'out'
  folder.mkdir()
  for name in ('a.pth', 'c.pth'):
    shutil.copy(peer_checkpoint, folder / name)
  (folder / 'b.pth').write_bytes(peer_checkpoint.read_bytes()[:100_000])
  (folder / 'notes.txt').write_text('not a checkpoint')
  status, said = converter(folder, out)
  assert status == 1
  first, failure = said.splitlines()
  assert first == 'error: 1 of 3 files were not converted:'
  assert re.match(rf'  {folder}/b\.pth .*cut off', failure)
  assert sorted(path.name for path in out.iterdir()) == ['a', 'c']
  assert '3/3' in capsys.readouterr().err

  (folder / 'b.pth').unlink()
  before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
  assert converter(folder, out) == (None, '')
  assert capsys.readouterr().out.count('is there already') == 2
  assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before

  shutil.rmtree(folder)
  folder.mkdir()
  assert converter(folder, out)[1] == (
    f'error: {folder} holds no .pth files and is no converted directory.'
  )


def test_arguments(converter, peer_checkpoint, tmp_path):
  assert converter(peer_checkpoint)[0] == 2
  assert converter(peer_checkpoint, tmp_path / 'a', '--to-pth', tmp_path / 'a.pth')[0] == 2
  assert converter(peer_checkpoint, tmp_path / 'a') == (None, '')
  assert 'needs no conversion; --to-pth writes' in converter(tmp_path / 'a', tmp_path / 'b')[1]
  assert 'a exists; remove it' in converter(peer_checkpoint, tmp_path / 'a')[1]
  (tmp_path / 'x.pth').touch()
  assert 'x.pth exists; remove it' in converter(peer_checkpoint, '--to-pth', tmp_path / 'x.pth')[1]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'x.pth']


@pytest.mark.parametrize('align_corners', [True, False])
def test_the_other_corner_convention_can_be_written(
  align_corners, converter, peer_checkpoint, tmp_path
):
  """The file's config, which MMSegmentation parses, has what was asked for."""
  flag = '--align-corners' if align_corners else '--no-align-corners'
  assert converter(peer_checkpoint, '--to-pth', tmp_path / 'x.pth', flag) == (None, '')
  text = torch.load(tmp_path / 'x.pth', weights_only=True)['meta']['cfg']
  config = mmengine.Config.fromstring(text, '.py')
  for head in (config.model.decode_head, config.model.auxiliary_head):
    assert head.align_corners is align_corners
  assert converter(tmp_path / 'x.pth', tmp_path / 'back') == (None, '')
  assert read_description(tmp_path / 'back').protocol.align_corners is align_corners


def test_a_disk_without_room_leaves_nothing(converter, peer_checkpoint, tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    said = [
      converter(peer_checkpoint, tmp_path / 'out')[1],
      converter(peer_checkpoint, '--to-pth', tmp_path / 'out.pth')[1],
    ]
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert re.fullmatch(r'error: .*/out cannot be written: File too large\.', said[0])
  assert re.fullmatch(r'error: .*/out\.pth cannot be written: File too large\.', said[1])
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').touch()
  message = converter(peer_checkpoint, tmp_path / 'file/out')[1]
  assert re.fullmatch(r'error: .*/file/out cannot be written: .*Not a directory.*', message)


def test_written_files_are_those_of_torch(rng, tmp_path):
  arrays = {
    'kernel': rng.normal(size=(3, 4, 2, 5)).astype(np.float32).transpose(3, 2, 0, 1),
    'name with ä': rng.normal(size=7).astype(np.float32),
    'empty': np.zeros((0, 3), np.float32),
    'counter': np.array(2**40, np.int64),
    'big_endian': np.arange(3, dtype='>i8'),
  }
  meta = {'classes': ['a', 'b'], 'palette': [[0, 1, 2]], 'pair': (1.5, None, True)}
  path = tmp_path / 'sub/x.pth'
  write_torch_checkpoint(path, arrays, meta)
  for options in ({'weights_only': True}, {'weights_only': False}, {'mmap': True}):
    loaded = torch.load(path, **options)
    assert loaded['meta'] == meta
    assert list(loaded['state_dict']) == list(arrays)
    for name, array in arrays.items():
      tensor = loaded['state_dict'][name]
      assert tensor.is_contiguous()
      np.testing.assert_array_equal(tensor.numpy(), array)
      assert tensor.numpy().dtype == array.dtype.newbyteorder('=')
  own = read_torch_file(path)
  assert own['meta'] == meta
  for name, array in arrays.items():
    np.testing.assert_array_equal(own['state_dict'][name], array)
  assert [p.name for p in path.parent.iterdir()] == ['x.pth']


@pytest.mark.parametrize('later', [False, True])
def test_class_names_tell_the_dataset(models, tmp_path, later):
  model = models('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512')
  known = peer.mmseg_module('mmseg.utils')
  classes, palette = known.get_classes('voc'), known.get_palette('voc')
  meta = {'CLASSES': tuple(classes), 'PALETTE': palette}
  if later:
    meta = {'dataset_meta': {'classes': tuple(classes), 'palette': palette}}
  torch.save({'meta': meta, 'state_dict': model.state_dict()}, tmp_path / 'x.pth')
  description = read_torch_weights(tmp_path / 'x.pth').description
  assert description.dataset == 'voc12aug'
  assert description.classes == tuple(classes)
  assert description.palette == tuple(map(tuple, palette))


RECURSIVE: list = []
RECURSIVE += [RECURSIVE, RECURSIVE]


@pytest.mark.parametrize(
  'meta',
  [
    {'CLASSES': 7, 'PALETTE': 'red'},
    {'CLASSES': ['c'] * 18, 'PALETTE': [[0, 0, 0]] * 18},
    {'CLASSES': [b'c'] * 19, 'PALETTE': [[0, 0, 256]] * 19},
    {'CLASSES': ['\x1b[2J'] * 19, 'PALETTE': [[0, 0]] * 19},
    {'CLASSES': np.zeros(19), 'PALETTE': np.full((19, 3), 0.5)},
    {'dataset_meta': 3},
    {'dataset_meta': {'classes': None, 'palette': [RECURSIVE] * 19}},
  ],
)
def test_meta_of_any_kind_does_no_harm(peer_model, tmp_path, meta):
  torch.save({'meta': meta, 'state_dict': peer_model.state_dict()}, tmp_path / 'x.pth')
  description = read_torch_weights(tmp_path / 'x.pth').description
  assert (description.dataset, description.classes[0]) == ('custom', 'class 0')
  assert len(set(description.palette)) == 19


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.'])
def test_a_backbone_alone(peer_model, tmp_path, prefix):
  arrays = {f'{prefix}{name}': x for name, x in peer_model.backbone.state_dict().items()}
  arrays |= {'fc.weight': torch.zeros(5, 3), 'fc.bias': torch.zeros(5)} if not prefix else {}
  torch.save(arrays, tmp_path / 'resnet50_v1c-2cccc1ad.pth')
  config = NonLocalNetConfig.from_depth(50, width=8, num_classes=3)
  state, _ = read_backbone(tmp_path / 'resnet50_v1c-2cccc1ad.pth', config)
  read = to_arrays(state)
  _, whole = read_torch_weights_of(peer_model, tmp_path)
  expected = {name: x for name, x in to_arrays(whole).items() if name.startswith('backbone.')}
  assert read.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(read[name], array)


def read_torch_weights_of(model, folder):
  path = folder / 'whole.pth'
  torch.save(model.state_dict(), path)
  return read_weights(path)


def test_a_backbone_of_another_kind(peer_model, tmp_path):
  arrays = peer_model.backbone.state_dict()
  arrays['conv1.weight'] = arrays.pop('stem.0.weight')
  torch.save(arrays, tmp_path / 'x.pth')
  config = NonLocalNetConfig.from_depth(50, width=8, num_classes=3)
  with pytest.raises(UserError, match=r'backbone\.stem\.0\.weight is missing'):
    read_backbone(tmp_path / 'x.pth', config)
  wide = NonLocalNetConfig.from_depth(50, width=16, num_classes=3)
  with pytest.raises(UserError, match=r'gives \(8,\), expected \(16,\)'):
    read_backbone(tmp_path / 'x.pth', wide)


def test_half_precision_is_exact_and_double_precision_is_noted(models, tmp_path):
  model = models('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512')
  weights = {}
  for dtype in (torch.float16, torch.bfloat16, torch.float64):
    arrays = {n: x.to(dtype) if x.is_floating_point() else x for n, x in model.state_dict().items()}
    torch.save(arrays, tmp_path / 'x.pth')
    weights[dtype] = read_torch_weights(tmp_path / 'x.pth')
    name = 'backbone.layer2.0.conv2'
    expected = arrays[f'{name}.weight'].float().numpy().transpose(2, 3, 1, 0)
    actual = to_arrays(weights[dtype].state)[f'{name}.kernel']
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)
  note = '310 float64 arrays were rounded to float32.'
  assert [note in weights[dtype].notes for dtype in weights] == [False, False, True]


def test_shapes_of_any_kind_are_no_network(models, tmp_path):
  for name, shape in (
    ('backbone.layer1.0.conv1.weight', ()),
    ('backbone.layer1.0.conv1.weight', (0, 4, 1, 1)),
    ('decode_head.conv_seg.weight', (0, 32, 1, 1)),
    ('backbone.layer3.100000.conv1.weight', (1,)),
  ):
    arrays = models('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512').state_dict()
    arrays |= {f'backbone.layer3.{i}.x': torch.zeros(1) for i in range(200) if '100000' in name}
    arrays[name] = torch.zeros(shape)
    torch.save(arrays, tmp_path / 'x.pth')
    with pytest.raises(UserError, match=r'holds no NonLocalNet: '):
      read_torch_weights(tmp_path / 'x.pth')


def test_saved_weights_are_read_without_a_copy(peer_checkpoint):
  """The reader's arrays are those that are written: no second copy in memory."""
  _, state = read_weights(peer_checkpoint)
  assert all(array.base is not None for array in to_arrays(state).values())


def test_a_failed_write_is_an_error_of_the_user(tmp_path, peer_checkpoint):
  description, state = read_weights(peer_checkpoint)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot be written'):
    save_weights(tmp_path / 'file/out', state, description)


def test_loading_tells_as_much_as_converting(peer_checkpoint, converter, tmp_path):
  assert converter(peer_checkpoint, tmp_path / 'out') == (None, '')
  assert (
    nonlocal_jax.load(tmp_path / 'out').description
    == nonlocal_jax.load(peer_checkpoint).description
  )


def test_mutated_files_become_networks_or_errors(models, tmp_path):
  """Whole files with flipped bits, names among them: a network, or the project's own error."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'x.pth'
  arrays = models('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512').state_dict()
  meta = {'CLASSES': [f'class {i}' for i in range(21)], 'config': 'align_corners=True'}
  torch.save({'meta': meta, 'state_dict': arrays}, path, _use_new_zipfile_serialization=False)
  assert 'It has no checksums: damaged weights would not be noticed.' in (
    read_torch_weights(path).notes
  )
  contents = path.read_bytes()
  pickled = contents.index(b'_rebuild_tensor_v2'), contents.rindex(b'num_batches_tracked')
  outcomes = set()
  for _ in range(60):
    mutated = bytearray(contents)
    for position in rng.integers(*pickled, size=rng.integers(1, 4)):
      mutated[position] ^= 1 << rng.integers(8)
    path.write_bytes(mutated)
    try:
      read_torch_weights(path)
      outcomes.add('read')
    except UserError as error:
      assert str(path) in str(error)
      assert str(error).isprintable()
      outcomes.add('fit' if 'does not fit' in str(error) else 'refused')
  assert {'fit', 'refused'} <= outcomes


def test_messages_about_names_by_the_thousand_come_soon(models, tmp_path):
  arrays = models('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512').state_dict()
  kept = ('backbone.layer1.0.conv1.weight', 'decode_head.conv_seg.weight')
  arrays = {name if name in kept else f'net.{name}': x for name, x in arrays.items()}
  arrays |= {f'backbone.layer{stage}.0.x': torch.zeros(1) for stage in (2, 3, 4)}
  arrays |= {f'other.{"weight" * 30}.{i}\n': torch.zeros(1) for i in range(5000)}
  torch.save(arrays, tmp_path / 'x.pth')
  start = time.process_time()
  with pytest.raises(UserError) as caught:
    read_torch_weights(tmp_path / 'x.pth')
  assert time.process_time() - start < 5
  message = str(caught.value)
  assert message.isprintable()
  name = 'backbone.layer1.0.bn1.bias'
  assert f'{name} is missing (nearest: net.{name})' in message
  assert re.search(r'; and 5\d\d\d more\.$', message)
