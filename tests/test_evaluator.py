"""Evaluation on several devices and processes, and what an interrupted one leaves."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import custom
from nonlocal_jax.data.transforms import decode_label
from nonlocal_jax.evaluation import evaluator
from nonlocal_jax.experiment import Experiment
from tests.conftest import run_two_processes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arguments(photos, peer_checkpoint, tmp_path):
  """Arguments of main.py that evaluate the tiny network on three images of different sizes."""
  values = {
    'data.source_dir': photos,
    'data.data_dir': tmp_path / 'prepared',
    'data.num_classes': 19,
    'data.ignore_labels': '(20,)',
    'model.width': 8,
    'eval.scale': '(96,72)',
    'eval.shapes': 1,
  }
  settings = [f'--config.{key}={value}' for key, value in values.items()]
  config = f'--config={ROOT}/configs/custom.py'
  return [config, *settings, '--mode=eval', f'--checkpoint={peer_checkpoint}']


def confusion_in(workdir):
  return np.array(json.loads((workdir / 'metrics.json').read_text())['confusion'])


@pytest.mark.slow
def test_two_processes_of_two_devices_count_each_image_once(
  arguments, program, photos, peer_checkpoint, tmp_path
):
  assert program(*arguments, '--workdir=alone') == (None, '')  # on four devices
  said = run_two_processes(*arguments, workdirs=[tmp_path / 'process0', tmp_path / 'process1'])
  found = confusion_in(tmp_path / 'process0')
  np.testing.assert_array_equal(found, confusion_in(tmp_path / 'alone'))
  labels = [decode_label(path.read_bytes()) for path in (photos / 'labels/val').iterdir()]
  assert found.sum() == sum((label < 19).sum() for label in labels)
  assert 'mIoU' in said[0]
  assert [line for line in said[1].splitlines() if not line.startswith('[Gloo]')] == []
  assert not (tmp_path / 'process1').exists()


@pytest.mark.slow
def test_images_go_through_together_where_that_is_fast(
  photos, peer_checkpoint, tmp_path, monkeypatch
):
  """As many as the device takes, or as the config says; each counts once."""
  config = custom.get_config()
  config.data.source_dir, config.data.data_dir = str(photos), str(tmp_path / 'prepared')
  config.data.num_classes, config.data.ignore_labels = 19, (20,)
  config.model.width, config.eval.scale, config.eval.shapes = 8, (96, 72), 1
  monkeypatch.setattr(evaluator, 'images_at_once', lambda *_: 3)
  sizes, confusions = [], []
  for given in (None, 2, 1):
    config.eval.batch_size = given
    experiment = Experiment.from_config(config, devices=jax.devices()[:1])
    split = experiment.open_splits(tmp_path, ['val'])['val']
    sizes.append([len(batch.indices) for batch in experiment.evaluator(split)._batches])
    confusions.append(experiment.evaluate(peer_checkpoint, tmp_path / 'out').confusion)
  assert sizes == [[3], [2, 1], [1, 1, 1]]
  alone = confusions[-1]
  assert alone.sum() > 10_000
  for found in confusions:
    np.testing.assert_array_equal(found.sum(axis=1), alone.sum(axis=1))
    assert np.abs(found - alone).sum() <= 2 * alone.sum() // 1000  # up to ties at rounding


def test_an_interrupted_evaluation_leaves_no_result(arguments, program, tmp_path, monkeypatch):
  scores, calls = evaluator.scores, []

  def interrupt(confusion):
    calls.append(confusion)
    if len(calls) == 1:
      raise KeyboardInterrupt
    return scores(confusion)

  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/metrics.json').write_text('of before')
  monkeypatch.setattr(evaluator, 'scores', interrupt)
  assert program(*arguments, '--workdir=out') == (130, '')
  assert (tmp_path / 'out/metrics.json').read_text() == 'of before'
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['metrics.json']


@pytest.mark.parametrize(
  ('extra', 'sentence'),
  [
    (['--config.eval.protocol=v2'], 'config.eval.protocol is v2; it must be v0 or v1'),
    (
      ['--config.eval.batch_size=0'],
      'config.eval.batch_size is 0; it must be a number of at least',
    ),
    (['--config.eval.shapes=0'], 'config.eval.shapes is 0; it must be a number of at least 1'),
  ],
)
def test_wrong_arguments_are_a_sentence(extra, sentence, arguments, program):
  status, said = program(*arguments, *extra)
  assert status == 1
  assert sentence in said
