"""What an evaluation writes: metrics.json as a whole or not at all, null for what is undefined."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np
import psutil
import pytest

import nonlocal_jax
from nonlocal_jax.data.datasets import PUBLISHED, custom_dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.evaluate import comparable_miou
from nonlocal_jax.evaluation.report import (
  ReportFacts,
  peak_memory_gib,
  published_line,
  write_report,
)
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.weights.released import released_model_of_file

DATASET = custom_dataset(classes=['sky', 'tree', 'lake', 'sand'], name='park')
CONFUSION = np.array([[5, 3, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
CONFIG = {'name': 'park_r50', 'train': {'crop': (64, 64), 'steps': 4}, 'published': None}
PROTOCOL = EvalProtocol(scale=(2048, 512), window_crop=(9, 8), window_stride=(5, 5))
FACTS = ReportFacts(images=7, protocol=PROTOCOL, config=CONFIG)
SECONDS = 12.34567


def written(workdir: Path, confusion=CONFUSION, dataset=DATASET, **facts) -> dict:
  """The report as read back; NaN and Infinity, which are not JSON, are refused."""
  facts = dataclasses.replace(FACTS, **facts)
  write_report(workdir, confusion, dataset, facts, seconds=SECONDS)
  assert [path.name for path in workdir.iterdir()] == ['metrics.json']

  def refuse(constant: str):
    raise AssertionError(constant)

  return json.loads((workdir / 'metrics.json').read_text(), parse_constant=refuse)


def test_scores_in_percent_and_null_where_undefined(tmp_path):
  metrics = written(tmp_path / 'new' / 'folder')
  assert metrics['aAcc'] == 63.6364
  assert metrics['mIoU'] == pytest.approx(100 * (5 / 9 + 2 / 5 + 0) / 3, abs=1e-4)
  assert metrics['mAcc'] == pytest.approx(100 * (5 / 9 + 1) / 2, abs=1e-4)
  assert 'mDice' not in metrics
  assert metrics['classes'] == {
    'sky': {'IoU': 55.5556, 'Acc': 55.5556},
    'tree': {'IoU': 40.0, 'Acc': 100.0},
    'lake': {'IoU': 0.0, 'Acc': None},
    'sand': {'IoU': None, 'Acc': None},
  }
  assert list(metrics['undefined']) == ['lake', 'sand']
  assert 'predicted in 1 pixels' in metrics['undefined']['lake']
  assert metrics['confusion'] == CONFUSION.tolist()


def test_more_scores(tmp_path):
  metrics = written(tmp_path, more_scores=True)
  assert metrics['mDice'] == pytest.approx(100 * (10 / 14 + 4 / 7 + 0) / 3, abs=1e-4)
  assert metrics['mFscore'] == pytest.approx(100 * (10 / 14 + 4 / 7) / 2, abs=1e-4)
  assert metrics['classes']['lake'] == {
    'IoU': 0.0,
    'Acc': None,
    'Dice': 0.0,
    'Fscore': None,
    'Precision': 0.0,
    'Recall': None,
  }
  assert 'mFscore' in metrics['undefined']['lake']


def test_nothing_labeled(tmp_path):
  metrics = written(tmp_path, np.zeros((4, 4), np.int64), published=40.75)
  assert [metrics[name] for name in ('aAcc', 'mIoU', 'mAcc')] == [None] * 3
  assert list(metrics['undefined']) == list(DATASET.classes)
  assert metrics['published']['difference'] is None


def test_where_the_numbers_come_from(tmp_path):
  before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
  metrics = written(tmp_path, checkpoint='weights/park.pth', sha256='ab' * 32)
  assert (metrics['config'], metrics['dataset'], metrics['images']) == ('park_r50', 'park', 7)
  assert (metrics['checkpoint'], metrics['sha256']) == ('weights/park.pth', 'ab' * 32)
  assert metrics['step'] is None
  assert metrics['published'] is None
  assert EvalProtocol.from_dict(metrics['protocol']) == PROTOCOL
  assert metrics['config_values'] == json.loads(json.dumps(CONFIG))
  assert metrics['seconds'] == 12.346
  date = datetime.datetime.fromisoformat(metrics['date'])
  assert date.utcoffset() == datetime.timedelta(0)
  assert before <= date <= datetime.datetime.now(datetime.UTC)
  assert metrics['versions']['python'] == platform.python_version()
  assert metrics['versions']['numpy'] == np.__version__
  assert metrics['versions']['nonlocal_jax'] == nonlocal_jax.__version__
  assert set(metrics['versions']) == {
    'nonlocal_jax',
    'python',
    'jax',
    'jaxlib',
    'flax',
    'numpy',
    'opencv-python-headless',
  }


def test_after_training_there_is_a_step_and_no_file(tmp_path):
  metrics = written(tmp_path, step=400)
  assert (metrics['step'], metrics['checkpoint'], metrics['sha256']) == (400, None, None)


def test_a_package_that_pip_did_not_install_is_null(tmp_path, monkeypatch):
  installed = importlib.metadata.version

  def version(name: str) -> str:
    if name == 'opencv-python-headless':
      raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

  monkeypatch.setattr(importlib.metadata, 'version', version)
  assert written(tmp_path)['versions']['opencv-python-headless'] is None


def test_classes_of_the_same_name_all_stay(tmp_path):
  dataset = custom_dataset(classes=['tree', 'sky', 'tree', 'sand'])
  metrics = written(tmp_path, dataset=dataset)
  assert list(metrics['classes']) == ['tree (0)', 'sky', 'tree (2)', 'sand']
  assert list(metrics['undefined']) == ['tree (2)', 'sand']


def test_counts_beyond_float64_and_int32_are_exact(tmp_path):
  confusion = np.zeros((4, 4), np.int64)
  confusion[0, 0] = 2**53 + 1
  assert written(tmp_path, confusion)['confusion'][0][0] == 2**53 + 1


def test_a_row_of_the_matrix_is_a_line(tmp_path):
  written(tmp_path)
  lines = (tmp_path / 'metrics.json').read_text().splitlines()
  assert '    [5, 3, 1, 0],' in lines
  assert '      "crop": [64, 64],' in lines


def test_text_that_looks_like_a_list_stays_as_it_is(tmp_path):
  config = {'name': 'x', 'note': '[\n 1,\n  2]  [ 3,  4 ]', 'rate': [1e-7, -2.5], 'none': []}
  assert written(tmp_path, config=config)['config_values'] == config


def test_infinite_and_undefined_values_of_the_config_are_null(tmp_path):
  config = {'name': 'x', 'train': {'limits': (float('inf'), float('nan'), np.float64('-inf'), 1.5)}}
  values = written(tmp_path, config=config)['config_values']
  assert values['train']['limits'] == [None, None, None, 1.5]


def test_what_cannot_be_serialised_leaves_the_old_report(tmp_path):
  old = written(tmp_path)
  facts = dataclasses.replace(FACTS, config={'name': 'x', 'y': object()})
  with pytest.raises(TypeError):
    write_report(tmp_path, CONFUSION, DATASET, facts, seconds=SECONDS)
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.json']
  assert json.loads((tmp_path / 'metrics.json').read_text()) == old


@pytest.mark.parametrize('method', ['write_bytes', 'replace'])
def test_a_write_that_fails_leaves_the_old_report(tmp_path, monkeypatch, method):
  old = written(tmp_path)
  whole = getattr(Path, method)

  def fail(path: Path, argument):
    if method == 'write_bytes':
      whole(path, argument[:100])
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(Path, method, fail)
  with pytest.raises(
    UserError, match=r'metrics\.json cannot be written: No space left on device\.'
  ):
    write_report(tmp_path, CONFUSION, DATASET, FACTS, seconds=SECONDS)
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.json']
  assert json.loads((tmp_path / 'metrics.json').read_text()) == old


def test_a_workdir_that_is_a_file_is_an_error(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'file/metrics\.json cannot be written'):
    write_report(tmp_path / 'file', CONFUSION, DATASET, FACTS, seconds=SECONDS)


@pytest.mark.parametrize(
  ('dataset_name', 'measured', 'published', 'line'),
  [
    ('ade20k', 40.73, 40.75, 'mIoU 40.73, published 40.75, difference -0.02 (within 0.02)'),
    ('ade20k', 40.7251, 40.75, 'mIoU 40.73, published 40.75, difference -0.02 (within 0.02)'),
    ('ade20k', 40.7249, 40.75, 'mIoU 40.72, published 40.75, difference -0.03 (more than 0.02)'),
    ('voc12aug', 78.27, 78.27, 'mIoU 78.27, published 78.27, difference +0.00 (within 0.02)'),
    ('voc12aug', 78.30, 78.27, 'mIoU 78.30, published 78.27, difference +0.03 (more than 0.02)'),
    ('cityscapes', 79.15, 79.05, 'mIoU 79.15, published 79.05, difference +0.10 (within 0.1)'),
    ('cityscapes', 78.90, 79.05, 'mIoU 78.90, published 79.05, difference -0.15 (more than 0.1)'),
    ('custom', 78.90, 79.05, 'mIoU 78.90, published 79.05, difference -0.15'),
  ],
)
def test_published_line(dataset_name, measured, published, line):
  assert published_line(measured, published, dataset_name) == line


@pytest.mark.parametrize(('published', 'agrees'), [(66.67, True), (66.66, True), (66.6, False)])
def test_the_report_has_the_same_comparison(tmp_path, published, agrees):
  dataset = PUBLISHED['voc12aug']
  confusion = np.zeros((21, 21), np.int64)
  confusion[0, 0] = confusion[1, 1] = confusion[2, 2] = confusion[3, 3] = 5
  confusion[4, 5] = 4  # both of IoU 0, four of 1, the others absent
  metrics = written(tmp_path, confusion, dataset, published=published)
  assert metrics['mIoU'] == 66.6667
  assert metrics['published'] == {
    'mIoU': published,
    'difference': pytest.approx(66.67 - published),
    'tolerance': 0.02,
    'agrees': agrees,
  }
  assert published_line(metrics['mIoU'], published, 'voc12aug').endswith(
    f'({"within" if agrees else "more than"} 0.02)'
  )


def test_every_published_dataset_has_a_tolerance():
  for name in PUBLISHED:
    assert 'within' in published_line(40, 40, name)


def test_peak_memory_is_that_of_this_process():
  before = peak_memory_gib()['host']
  block = np.ones(2**27)  # 1 GiB
  after = peak_memory_gib()['host']
  assert block.size
  resident = psutil.Process().memory_info().rss / 2**30
  assert after >= max(before, resident - 0.01)
  assert peak_memory_gib()['device'] is None  # which the CPU does not tell


@pytest.mark.parametrize(
  ('attention', 'images', 'reason'),
  [
    ('blocks', 2000, None),
    ('flash', 2000, None),
    ('cudnn', 2000, 'attention was not rounded to float16, as cudnn does'),
    ('cudnn', 7, '7 images were tested, not 2000; attention was not rounded to float16, as '),
  ],
)
def test_scores_that_compare_with_published_ones(attention, images, reason, capsys):
  model = released_model_of_file('nonlocal_r50-d8_512x512_80k_ade20k_20200615_015801-5ae0aa33.pth')
  dataset = PUBLISHED['ade20k']
  found = comparable_miou(model, dataset, model.protocol, images=images, attention=attention)
  said = capsys.readouterr().out
  if reason is None:
    assert (found, said) == (40.75, '')
  else:
    assert found is None
    assert f'was published with mIoU 40.75, which cannot be compared: {reason}' in said
