"""From nothing to the published number, in one command, against a server on loopback."""

import dataclasses
import hashlib
import json
import time

import pytest
import torch

from nonlocal_jax.cli import check_published, evaluate
from nonlocal_jax.weights import released
from tests import peer
from tests.conftest import run_in_process
from tests.dataset_archives import make_set, publish, serve
from tests.file_server import file_server

NAME = 'nonlocal_r50-d8_512x512_40k_voc12aug'


def evaluate_here(arguments, **unused):
  """Runs the command eval in this process, which has the stand-ins for what was released."""
  started = time.perf_counter()
  status, error = run_in_process(lambda: evaluate.main(arguments))
  return {'status': status or 0, 'error': error, 'seconds': time.perf_counter() - started}


@pytest.fixture
def released_here(tmp_path, monkeypatch):
  """A narrow network and a small VOC2012 under the real addresses, with the score of the original.

  The score is that of MMSegmentation's network on the same images.
  """
  monkeypatch.delenv('NONLOCAL_JAX_OFFLINE')
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(check_published, 'run_and_time', evaluate_here)
  small = make_set('voc12aug', tmp_path / 'set')
  publish('voc12aug', small, monkeypatch)
  network = peer.build('nonlocal_r50-d8_4xb4-40k_voc12aug-512x512', width=8)
  torch.save({'meta': {}, 'state_dict': network.state_dict()}, tmp_path / 'model.pth')
  data = (tmp_path / 'model.pth').read_bytes()
  scores = peer.scores_of_files(
    network, small.samples['val'], box=(2048, 512), num_classes=21, label_of=lambda label: label
  )
  known = released.released_model(NAME)
  digits = hashlib.sha256(data).hexdigest()[:8]
  model = dataclasses.replace(
    known, file=f'{NAME}_20200614_000028-{digits}.pth', miou=round(scores['mIoU'], 2)
  )
  monkeypatch.setattr(
    released, 'RELEASED', tuple(model if m.name == NAME else m for m in released.RELEASED)
  )
  with file_server() as server:
    monkeypatch.setenv('NONLOCAL_JAX_MIRROR', server.address)
    server.serve(f'/mmsegmentation/v0.5/nonlocal_net/{NAME}/{model.file}', data)
    serve(small, server)
    yield model, server, scores


@pytest.mark.slow
def test_one_command_from_nothing(released_here, script, tmp_path, capfd):
  model, server, expected = released_here
  data_dir = tmp_path / 'prepared'
  command = ['--models=voc12aug_r50:512x512_40k', '--download', f'--out={tmp_path / "out"}']
  command += [f'--config.data.data_dir={data_dir}', '--config.model.width=8']
  found = script(check_published, *command)
  said = capfd.readouterr()
  assert found == (None, ''), said.err
  assert said.err.startswith('1 score of 1 model to measure.\nTo download, in ')
  assert 'it takes about' in said.err
  assert 'Whoever downloads it accepts them.' in said.err
  assert f'{model.miou:.2f} | ' in said.out
  assert said.out.rstrip().splitlines()[-2].endswith('| agrees |')

  saved = json.loads((tmp_path / 'out/published.json').read_text())
  (row,) = saved['rows']
  assert saved['command'].startswith(
    'nonlocal-jax check-published --models=voc12aug_r50:512x512_40k --download'
  )
  assert abs(row['difference']) <= 0.02
  (metrics,) = (tmp_path / 'out').glob('*/metrics.json')
  report = json.loads(metrics.read_text())
  assert {key: report[key] for key in expected} == pytest.approx(expected, abs=0.01)
  assert expected['mIoU'] > 0.1
  evidence = row['evidence']
  assert evidence['sha256'][:8] == model.sha256_prefix
  assert evidence['images'] == 2
  assert evidence['decoder'].startswith('OpenCV ')
  assert sum(evidence['label_pixels']) == sum(evidence['predicted_pixels']) > 0
  assert f'-{model.sha256_prefix}' in (tmp_path / 'out/published.md').read_text()

  # The same command reads what it found, and downloads and evaluates nothing.
  server.requests.clear()
  server.files.clear()
  assert script(check_published, *command) == (None, '')
  assert server.requests == []
  assert 'to measure' not in capfd.readouterr().err
