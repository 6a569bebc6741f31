"""Results are written before they are printed, by each command that prints any."""

import io
import json
import sys

import cv2
import numpy as np
import pytest

from nonlocal_jax.cli import benchmark, main
from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.weights.loading import read_weights
from tests.test_benchmark import MACHINE


class Closed(BaseException):
  """Raised at the first byte of output."""


class _ClosedOutput(io.TextIOBase):
  def write(self, text: str) -> int:
    if text:
      raise Closed
    return 0


@pytest.fixture
def cut_off(monkeypatch):
  """Runs a command that ends as soon as it prints anything."""

  def run(*arguments: object) -> None:
    with monkeypatch.context() as patch:
      patch.setattr(sys, 'stdout', _ClosedOutput())
      with pytest.raises(Closed):
        main.run([str(argument) for argument in arguments])

  return run


def test_evaluation(cut_off, trained, training_arguments, tmp_path):
  workdir, evaluation = trained
  options = (f'--workdir={tmp_path}', f'--checkpoint={workdir}')
  cut_off('eval', *training_arguments, *options)
  found = json.loads((tmp_path / 'metrics.json').read_text())
  assert found['mIoU'] == pytest.approx(100 * evaluation.scores.mean_iou, abs=0.01)
  assert cv2.imread(str(tmp_path / 'predictions.png')) is not None


def test_prediction(cut_off, trained, demo_set, tmp_path):
  workdir, _ = trained
  (image, *_) = sorted((demo_set / 'images/val').iterdir())
  cut_off('predict', image, f'--checkpoint={workdir}', f'--out={tmp_path}', '--scale', 96, 96)
  label = cv2.imread(str(tmp_path / f'{image.stem}.png'), cv2.IMREAD_UNCHANGED)
  assert label.shape[:2] == cv2.imread(str(image)).shape[:2]
  assert cv2.imread(str(tmp_path / f'{image.stem}_overlay.jpg')) is not None


def test_prepared_copy(cut_off, demo_set, tmp_path):
  cut_off('prepare', '--dataset=custom', f'--source={demo_set}', f'--data-dir={tmp_path}')
  copies = [info.parent for info in tmp_path.rglob('dataset_info.json')]
  assert sorted(len(PreparedSplit('x', copy)) for copy in copies) == [5, 24]


def test_pictures_and_shares(cut_off, training_arguments, tmp_path):
  cut_off('browse', *training_arguments, f'--out={tmp_path}', '--count=2')
  assert {path.name for path in tmp_path.iterdir()} == {'labels.json', '000.png'}
  assert len(json.loads((tmp_path / 'labels.json').read_text())['classes']) == 8


def test_conversion(cut_off, peer_checkpoint, tmp_path):
  cut_off('convert', peer_checkpoint, tmp_path / 'out')
  description, state = read_weights(tmp_path / 'out')
  assert description.config.num_classes == 19
  kernels = state['decode_head']['conv_seg']['kernel']
  assert np.isfinite(np.asarray(kernels.get_value())).all()


def test_table_of_published_scores(cut_off, tmp_path):
  out = tmp_path / 'out'
  (tmp_path / 'weights').mkdir()
  cut_off(
    'check-published', f'--checkpoints={tmp_path}/weights', f'--data={tmp_path}', f'--out={out}'
  )
  assert len(json.loads((out / 'published.json').read_text())['rows']) == 16
  assert 'missing' in (out / 'published.md').read_text()


def test_measurements(cut_off, tmp_path, monkeypatch):
  found = {'machine': MACHINE, 'network': {'flops': {}}}
  monkeypatch.setattr(benchmark, 'run_child', lambda child, _: found[child.measure])
  cut_off('benchmark', f'--out={tmp_path}', '--only', 'network')
  (record,) = json.loads((tmp_path / 'results.json').read_text())['measurements']
  assert record['section'] == 'network'
