"""Training: devices, resumption, what a run leaves behind."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose

import nonlocal_jax
from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.torch_format.writer import write_torch_checkpoint
from nonlocal_jax.training.log import summary_table
from nonlocal_jax.training.loop import has_stalled
from nonlocal_jax.training.run_files import write_run_files
from nonlocal_jax.weights.arrays import to_arrays
from nonlocal_jax.weights.checkpoints import read_description, save_weights
from nonlocal_jax.weights.loading import read_weights
from nonlocal_jax.weights.state_dict import to_state_dict
from tests.conftest import run_two_processes, train_and_evaluate


def read_log(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]


def test_a_run_leaves_all_that_is_promised(trained):
  workdir, evaluation = trained
  names = {path.name for path in workdir.iterdir()}
  (events,) = (name for name in names if name.startswith('events.out.tfevents'))
  assert names - {events} == {
    '.lock',
    'best',
    'checkpoints',
    'config.json',
    'curves.png',
    'eval.csv',
    'parameters.txt',
    'log.jsonl',
    'metrics.json',
    'metrics_per_image.csv',
    'model.json',
    'predictions.png',
    'report.html',
    'report_pictures.zip',
    'train.csv',
    'training_data.json',
  }
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'2', '4'}
  assert (workdir / events).stat().st_size > 500
  for picture in ('predictions.png', 'curves.png'):
    assert (workdir / picture).read_bytes().startswith(b'\x89PNG')

  metrics = json.loads((workdir / 'metrics.json').read_text())
  assert (metrics['step'], metrics['images'], metrics['config']) == (4, 5, 'custom')
  protocol = nonlocal_jax.EvalProtocol.from_dict(metrics['protocol'])
  assert protocol == nonlocal_jax.EvalProtocol(scale=(96, 96))
  assert {nonlocal_jax.load(path).protocol for path in (workdir, workdir / 'best')} == {protocol}
  assert metrics['mIoU'] == pytest.approx(100 * evaluation.scores.mean_iou, abs=1e-4)
  assert set(metrics['classes']['class 0']) == {'IoU', 'Acc'}
  assert evaluation.confusion.sum() == 5 * 192 * 192

  log = read_log(workdir)
  assert [entry['step'] for entry in log if 'loss' in entry] == [1, 2, 3, 4]
  assert [entry['step'] for entry in log if 'mIoU' in entry] == [2, 4]
  assert [entry['lr'] for entry in log if 'lr' in entry] == pytest.approx(
    [1e-4 + 9.9e-3 * (1 - step / 4) ** 0.9 for step in range(4)]
  )
  assert all(0 <= entry['waiting_for_data'] <= 1 for entry in log if 'loss' in entry)
  for entry in log:
    assert all(np.isfinite(value) for value in entry.values())


def test_a_run_keeps_how_it_was_tested(training_config, tmp_path):
  config = training_config.copy_and_resolve_references()
  config.eval.protocol, config.eval.multi_scale_flip = 'v1', True
  config.eval.window_crop = config.eval.window_stride = (64, 64)
  experiment = Experiment.from_config(config)
  write_run_files(tmp_path, experiment.values, experiment.description())
  for directory in (tmp_path, tmp_path / 'best'):
    protocol = read_description(directory).protocol
    assert protocol == experiment.protocol
    assert (protocol.version, protocol.pad_windows, protocol.flip) == ('v1', False, True)


def test_a_workdir_is_loaded_as_a_model(trained, demo_set):
  workdir, _ = trained
  model = nonlocal_jax.load(workdir)
  config = model.description.config
  assert config.predicts_like(NonLocalNetConfig.from_depth(14, width=4, num_classes=8))
  assert model.protocol.scale == (96, 96)
  assert model.predict(np.zeros((50, 70, 3), np.uint8)).shape == (50, 70)


def test_another_config_may_not_go_on_in_the_same_workdir(training_config, trained):
  workdir, _ = trained
  other = training_config.copy_and_resolve_references()
  other.model.non_local = False
  other.eval.every = 1  # this may change
  with pytest.raises(UserError, match=r'another config \(model.non_local was True, now False\);'):
    train_and_evaluate(other, workdir)


def test_a_batch_that_the_devices_cannot_share_is_an_error(training_config, tmp_path):
  other = training_config.copy_and_resolve_references()
  other.train.batch_size = 6
  with pytest.raises(UserError, match='batch_size is 6, which 4 devices cannot share'):
    train_and_evaluate(other, tmp_path / 'workdir')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(training_config, tmp_path):
  other = training_config.copy_and_resolve_references()
  other.optimizer.learning_rate = 3e38  # overflows float32 in the update
  with pytest.raises(
    UserError, match=r'and its update (inf|nan) at step 1, on the images (train|\d).*; the last'
  ):
    train_and_evaluate(other, tmp_path / 'workdir')
  assert not list((tmp_path / 'workdir/checkpoints').iterdir())


@pytest.mark.slow
def test_a_run_starts_from_a_given_backbone_and_then_needs_it_no_more(
  training_config, trained, tmp_path, capsys
):
  """With a learning rate of zero its parameters stay, and its statistics move by a tenth."""
  rng = np.random.default_rng(0)
  arrays = {}
  for name, array in to_state_dict(read_weights(trained[0])[1]).items():
    part, _, name_inside = name.partition('.')
    if part == 'backbone':
      fresh = rng.normal(size=array.shape).astype(np.float32)
      arrays[name_inside] = np.full_like(array, 1e6) if '.running_' in name else fresh
  backbone = tmp_path / 'resnet14_v1c.pth'
  write_torch_checkpoint(backbone, {**arrays, 'fc.weight': np.ones((3, 3), np.float32)}, {})
  other = training_config.copy_and_resolve_references()
  other.init_backbone = str(backbone)
  other.train.steps = other.checkpoint.every = 1
  other.optimizer.learning_rate = other.optimizer.min_learning_rate = 0.0
  train_and_evaluate(other, tmp_path / 'workdir')
  assert f'from the backbone in {backbone}\n4 devices' in capsys.readouterr().out
  found = to_state_dict(read_weights(tmp_path / 'workdir')[1])
  for name, array in arrays.items():
    if '.running_' in name:
      assert_allclose(found[f'backbone.{name}'], 0.9e6, rtol=1e-2, err_msg=name)
    else:
      np.testing.assert_array_equal(found[f'backbone.{name}'], array, err_msg=name)
  backbone.unlink()
  train_and_evaluate(other, tmp_path / 'workdir')
  with pytest.raises(UserError, match=r'There is no \S+resnet14_v1c\.pth: give'):
    train_and_evaluate(other, tmp_path / 'fresh')
  assert not (tmp_path / 'fresh').exists()


def test_a_trained_network_becomes_a_file_of_pytorch(trained, converter, tmp_path):
  workdir, _ = trained
  assert converter(workdir, '--to-pth', tmp_path / 'x.pth') == (None, '')
  saved = torch.load(tmp_path / 'x.pth', weights_only=True)
  expected = to_state_dict(read_weights(workdir)[1])
  counters = {
    f'{n.removesuffix("running_var")}num_batches_tracked' for n in expected if '_var' in n
  }
  assert saved['state_dict'].keys() == expected.keys() | counters
  assert {int(saved['state_dict'][name]) for name in counters} == {4}  # steps of the run
  for name, array in expected.items():
    np.testing.assert_array_equal(saved['state_dict'][name].numpy(), array)
  assert saved['meta']['CLASSES'][0] == 'class 0'
  again, here = nonlocal_jax.load(tmp_path / 'x.pth'), nonlocal_jax.load(workdir)
  assert again.protocol.scale == here.protocol.scale == (96, 96)


@pytest.mark.slow
def test_two_processes_train_as_one_and_only_the_first_speaks(
  trained, training_arguments, tmp_path
):
  """Two of two devices beside one of four: the same losses, scores and weights but for rounding."""
  said = run_two_processes(*training_arguments, workdirs=[tmp_path / 'workdir'] * 2)
  logs = [read_log(path) for path in (tmp_path / 'workdir', trained[0])]
  assert [line['step'] for line in logs[0]] == [line['step'] for line in logs[1]]
  for line, expected in zip(*logs, strict=True):
    for name in ('loss', 'loss_decode', 'loss_auxiliary', 'lr', 'mIoU', 'aAcc'):
      if name in expected:
        assert line[name] == pytest.approx(expected[name], rel=1e-4), (line, expected)
  found, arrays = (to_arrays(read_weights(p)[1]) for p in (tmp_path / 'workdir', trained[0]))
  for name, array in arrays.items():
    assert_allclose(found[name], array, atol=1e-4 * np.abs(array).max() + 1e-5, err_msg=name)
  assert "4 devices (cpu) of 2 processes, mesh {'data': 4}; batch 4, 1 on each" in said[0]
  assert not re.search('mIoU|step|images|Results', said[1])


@pytest.mark.slow
def test_training_stops_where_nothing_gets_better(training_config, tmp_path, capsys):
  """With frozen weights each evaluation gives the same score: the second is no better."""
  config = training_config.copy_and_resolve_references()
  config.optimizer.learning_rate = config.optimizer.min_learning_rate = 0.0
  config.train.batch_norm = 'frozen'
  config.train.steps = 40
  config.train.class_weights = ('balanced',)
  config.train.dice_weight, config.train.focal_gamma = 0.5, 2.0
  config.eval.every, config.eval.patience = 1, 2
  workdir = tmp_path / 'workdir'
  first = train_and_evaluate(config, workdir)
  assert [line['step'] for line in read_log(workdir) if 'mIoU' in line] == [1, 2, 3]
  assert json.loads((workdir / 'metrics.json').read_text())['step'] == 3
  said = capsys.readouterr().out
  assert 'Stopped after step 3 of 40: no better mIoU in 2 evaluations.\n' in said
  extras = 'class weights, focal loss with gamma 2.0, Dice loss x 0.5, until 2 evaluations bring no'
  assert extras in said
  again = train_and_evaluate(config, workdir)  # it is over, as one that took all its steps
  assert (again.confusion == first.confusion).all()
  assert [line['step'] for line in read_log(workdir) if 'loss' in line] == [1, 2, 3]


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_needs_and_keeps_nothing(training_config, tmp_path, capsys):
  config = training_config.copy_and_resolve_references()
  config.train.steps, config.eval.every = 100_000, 10_000
  Experiment.from_config(config).dry_run(tmp_path / 'workdir')
  said = capsys.readouterr().out
  assert re.search(r'parameters; a training step needs 0\.\d\d GiB on each device\n', said)
  found = re.search(
    r'A step took ([\d.e-]+) s, of which \d+% were spent waiting for images \(10 steps\); 100,000 '
    r'steps take about (\d+) (min|h)[ \d]*.* without 10 evaluations of 5 images\.\n',
    said,
  )
  hours = int(found[2]) / {'min': 60, 'h': 1}[found[3]]
  assert hours == pytest.approx(float(found[1]) * 100_000 / 3600, rel=0.02, abs=1)
  assert said.endswith('Nothing was trained, and no checkpoint was written.\n')
  assert not (tmp_path / 'workdir').exists()


@pytest.mark.parametrize(
  ('scores', 'patience', 'expected'),
  [
    ([1, 2, 2], 1, True),
    ([1, 2, 1], 2, False),
    ([3, 2, 1], 2, True),
    ([3, 1, 3.5], 2, False),
    ([1], 1, False),
    ([2, 1, 1], 0, False),
    ([math.nan, math.nan], 1, True),
    ([math.nan, 0.0], 1, False),
  ],
)
def test_what_no_better_evaluation_is(scores, patience, expected):
  assert has_stalled([{'mIoU': score} for score in scores], patience) == expected


@pytest.fixture(scope='module')
def averaged(training_config, tmp_path_factory):
  """A run with options: its config, its workdir and what it printed."""
  config = training_config.copy_and_resolve_references()
  config.train.batch_size = 8
  config.train.accumulate = 2
  config.train.ema_decay = 0.5
  config.train.dtype = 'bfloat16'
  config.eval.every = 4
  workdir = tmp_path_factory.mktemp('averaged') / 'workdir'
  with contextlib.redirect_stdout(io.StringIO()) as said:
    train_and_evaluate(config, workdir)
  return config, workdir, said.getvalue()


def test_the_first_lines_say_what_the_run_is(averaged):
  said = averaged[2]
  model = state_shapes(NonLocalNetConfig.from_depth(14, width=4, num_classes=8))
  size = sum(array.size for array in jax.tree.leaves(nnx.split_state(model, nnx.Param, ...)[0]))
  assert 'custom: from scratch\n' in said
  assert (
    "4 devices (cpu) of 1 process, mesh {'data': 4}; batch 8, 2 on each device, "
    'accumulated over 2 parts\n' in said
  )
  assert re.search(rf'{size:,} parameters; a training step needs 0\.\d\d GiB on each device', said)
  assert '4 steps of SGD: learning rate 0.01 to 0.0001, poly 0.9 (v0), heads x 1.0' in said
  assert 'global batch normalization; bfloat16; averaged weights with decay 0.5\n' in said
  table = {
    cells[1].strip(): cells[3].strip()
    for cells in (x.split('|') for x in said.splitlines())
    if len(cells) == 5
  }
  assert list(table) == [
    'Module',
    *(f'backbone/layer{i}' for i in range(1, 5)),
    'backbone/stem',
    'auxiliary_head',
    'decode_head',
    'total',
  ]
  assert table['total'] == f'{size:,}'
  assert sum(int(cell.replace(',', '')) for cell in list(table.values())[1:-1]) == size
  overview = (averaged[1] / 'parameters.txt').read_text()
  assert re.search(
    r'\| decode_head/nl_block/g/kernel +\| \(1, 1, 32, 16\) +\| float32 \| 512 ', overview
  )
  assert f'Total: {size:,} -- {4 * size:,} bytes' in overview


@pytest.mark.slow
def test_fine_tuning_with_other_classes_needs_a_word(training_config, trained, tmp_path, capsys):
  """With a learning rate of zero all parameters stay but those of the new classifiers."""
  config = training_config.copy_and_resolve_references()
  config.data.num_classes = 9
  config.train.steps = 1
  config.optimizer.learning_rate = config.optimizer.min_learning_rate = 0.0
  with pytest.raises(
    UserError, match=r'8 classes, but .* 9 classes; to fine-tune it on other classes, '
  ):
    train_and_evaluate(config, tmp_path / 'workdir', checkpoint=trained[0])
  assert not (tmp_path / 'workdir').exists()
  train_and_evaluate(config, tmp_path / 'workdir', checkpoint=trained[0], new_classifier=True)
  said = capsys.readouterr().out
  assert (
    f'from {trained[0]} but for new classifiers in both heads (8 classes there, 9 here)' in said
  )
  found, given = (
    to_arrays(nnx.split_state(read_weights(path)[1], nnx.Param, ...)[0])
    for path in (tmp_path / 'workdir', trained[0])
  )
  for name, array in given.items():
    if 'conv_seg' in name:
      assert found[name].shape[-1] == 9
    else:
      np.testing.assert_array_equal(found[name], array, err_msg=name)

  description, state = read_weights(trained[0])
  names = tuple(PUBLISHED['cityscapes'].classes[:8])
  save_weights(tmp_path / 'named', state, dataclasses.replace(description, classes=names))
  config.data.classes = ('crack', 'puddle', *names[:0:-1])
  options = {'checkpoint': tmp_path / 'named', 'match_classes': True}
  train_and_evaluate(config, tmp_path / 'matched', **options)
  found = to_arrays(nnx.split_state(read_weights(tmp_path / 'matched')[1], nnx.Param, ...)[0])
  for name, array in given.items():
    kept = found[name][..., 2:] if 'conv_seg' in name else found[name]
    np.testing.assert_array_equal(kept, array[..., :0:-1] if 'conv_seg' in name else array)
  capsys.readouterr()
  config.eval.every = 1
  train_and_evaluate(config, tmp_path / 'matched', **options)  # the run is over
  said = capsys.readouterr().out
  assert f'resumes at step 1 of {tmp_path}/matched; {tmp_path}/named is not read again' in said

  config.data.num_classes, config.data.classes = 8, ()
  train_and_evaluate(config, tmp_path / 'same', checkpoint=trained[0])
  found = to_arrays(nnx.split_state(read_weights(tmp_path / 'same')[1], nnx.Param, ...)[0])
  for name, array in given.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_the_averaged_weights_are_what_is_kept_and_goes_on(averaged, tmp_path):
  """Stopped after two steps of four, the end is that of a run that was not."""
  config, whole, _ = averaged
  shutil.copytree(whole, tmp_path / 'stopped')
  shutil.rmtree(tmp_path / 'stopped/checkpoints/4')
  train_and_evaluate(config, tmp_path / 'stopped')
  found, expected = (to_arrays(read_weights(path)[1]) for path in (tmp_path / 'stopped', whole))
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_best_weights_are_kept_beside_the_last(trained):
  log = [line for line in read_log(trained[0]) if 'mIoU' in line]
  best = max(log, key=lambda line: line['mIoU'])['step']
  assert [path.name for path in (trained[0] / 'best/checkpoints').iterdir()] == [str(best)]
  assert nonlocal_jax.load(trained[0] / 'best').protocol.scale == (96, 96)


def test_the_table_has_the_best_and_the_last():
  lines = [
    {'step': step, 'aAcc': 50.0 + step, 'mIoU': miou}
    for step, miou in ((1000, 1.25), (2000, 30.5), (3000, 30.5), (4000, 29.0))
  ]
  assert summary_table(lines).splitlines()[1:] == [
    'best      2,000 2050.00   30.50',
    'last      4,000 4050.00   29.00',
  ]
