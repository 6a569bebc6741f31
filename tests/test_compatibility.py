"""Weights and runs written by earlier versions, in tests/data, still load and resume.

`expected.json` beside them holds what the version that wrote them computed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nonlocal_jax

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'tests/data'
EXPECTED = json.loads((DATA / 'expected.json').read_text())


@pytest.mark.parametrize('path', EXPECTED['weights'])
def test_weights_give_the_same_logits_and_labels(path):
  expected = EXPECTED['weights'][path]
  model = nonlocal_jax.load(DATA / path)
  assert len(model.classes) == len(model.palette) == expected['classes']
  assert model.classes[-1] == expected['last_class']
  assert list(model.palette[-1]) == expected['last_colour']

  images = np.random.default_rng(0).standard_normal((1, 33, 49, 3), np.float32)
  logits = np.asarray(model.logits(images))[0, ::16, ::16].reshape(-1, expected['classes'])
  np.testing.assert_allclose(logits, expected['logits'], rtol=1e-5, atol=1e-5)

  # Resized as tested, and for the converted model in windows.
  image = np.random.default_rng(1).integers(0, 256, (12, 20, 3), np.uint8)
  labels = model.predict(image.repeat(4, 0).repeat(4, 1))
  assert labels.shape == (48, 80)
  same = labels[::8, ::8] == np.array(expected['labels'])
  assert same.mean() > 0.95  # near ties may flip with another version of XLA


def test_the_protocols_of_before_are_read():
  """From fields that lay beside each other; what was not saved was that of the published scores."""
  converted = nonlocal_jax.EvalProtocol(
    scale=(161, 97), window_crop=(65, 65), window_stride=(43, 43), align_corners=True
  )
  assert nonlocal_jax.load(DATA / 'converted_of_2026_11').protocol == converted
  for workdir in ('workdir_of_2026_11', 'workdir_of_2026_11/best'):
    assert nonlocal_jax.load(DATA / workdir).protocol == nonlocal_jax.EvalProtocol(scale=(192, 192))


@pytest.mark.slow
def test_a_stopped_run_resumes(tmp_path):
  expected, workdir = EXPECTED['resumed'], tmp_path / 'workdir'
  shutil.copytree(DATA / 'workdir_of_2026_11', workdir)
  result = subprocess.run(
    [
      *(sys.executable, 'main.py', *expected['command']),
      *(f'--config.data.data_dir={tmp_path}/prepared', f'--workdir={workdir}'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  log = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
  losses = {str(line['step']): line['loss'] for line in log if 'loss' in line}
  assert list(losses) == [str(step) for step in range(1, 41)]
  for step, loss in expected['losses'].items():
    assert losses[step] == pytest.approx(loss, rel=1e-4), step
  scores = {str(line['step']): line for line in log if 'mIoU' in line}
  assert list(scores) == ['16', '32', '40']
  for name, score in expected['scores']['40'].items():
    assert scores['40'][name] == pytest.approx(score, abs=0.02), name
  # The best weights are those of the last step, in place of the ones in the copied workdir.
  assert [path.name for path in (workdir / 'best/checkpoints').iterdir()] == ['40']
