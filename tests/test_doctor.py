"""The command doctor: what it finds here, and what it says of a broken installation."""

import importlib.metadata
import importlib.util
import json
import os
import sys

import jax
import pytest

from nonlocal_jax.cli import doctor
from nonlocal_jax.cli.doctor import check_product, devices_of_subprocess, missing_packages
from nonlocal_jax.runtime.devices import NvidiaDriver
from tests.test_cli import WITHOUT_EXTRAS, run_elsewhere

DEVICES = [
  {'name': 'cpu:0', 'kind': 'cpu', 'platform': 'cpu', 'memory_gib': None, 'product': 'correct'}
]


def program(text: str) -> list[str]:
  """A command that runs a line of Python."""
  return [sys.executable, '-c', text]


@pytest.fixture
def here(monkeypatch, tmp_path):
  """Checks no devices again, and has no GPU; in an empty folder."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'data'))
  monkeypatch.setattr(doctor, 'devices_of_subprocess', lambda: (DEVICES, ''))
  monkeypatch.setattr(doctor, 'nvidia_driver', lambda: None)
  monkeypatch.setattr(doctor, 'cuda_plugins', list)


def test_this_installation_works(tmp_path):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data/file').write_bytes(bytes(2**20))
  before = {**os.environ}
  os.environ['TFDS_DATA_DIR'] = str(tmp_path / 'data')
  try:
    result = run_elsewhere(tmp_path, 'doctor', '--json')
  finally:
    os.environ.clear()
    os.environ.update(before)
  assert (result.returncode, result.stderr) == (0, '')
  found = json.loads(result.stdout)
  assert found['problems'] == []
  for package in ('jax', 'jaxlib', 'flax', 'orbax-checkpoint', 'numpy'):
    assert found['versions'][package] == importlib.metadata.version(package)
  assert [device['name'] for device in found['devices']] == [str(d) for d in jax.devices()]
  assert {device['product'] for device in found['devices']} == {'correct'}
  assert found['folders']['prepared data']['size_gib'] == pytest.approx(2**-10)
  assert found['folders']['runs']['size_gib'] is None
  assert found['folders']['cache']['path'] == os.environ['JAX_COMPILATION_CACHE_DIR']


def test_released_weights_are_listed(here, script, monkeypatch, tmp_path, capsys):
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  assert script(doctor) == (None, '')
  printed = capsys.readouterr().out
  assert f'released weights  {tmp_path}/home/weights: does not exist yet, ' in printed
  assert 'weights here      none\n' in printed
  folder = tmp_path / 'home/weights'
  folder.mkdir(parents=True)
  with open(folder / 'resnet50_v1c-2cccc1ad.pth', 'wb') as file:
    file.truncate(2**28)  # takes up no space
  (folder / 'resnet101_v1c-e67eebb6.pth.part').touch()
  assert script(doctor) == (None, '')
  printed = capsys.readouterr().out
  assert f'released weights  {folder}: holds 0.25 GiB, ' in printed
  assert 'weights here      resnet50_v1c-2cccc1ad.pth\n' in printed


def test_the_text_says_the_same(here, script, capsys):
  assert script(doctor) == (None, '')
  printed = capsys.readouterr().out
  assert f'jax               {jax.__version__}\n' in printed
  assert 'NVIDIA driver     none\n' in printed
  assert 'cpu:0             cpu (cpu); a product is correct\n' in printed
  assert 'data: does not exist yet, ' in printed
  assert printed.endswith('\nEverything works.\n')


@pytest.mark.parametrize(
  ('line', 'sentence'),
  [
    (
      "raise RuntimeError('cuInit(0) failed')",
      'JAX does not start with JAX_PLATFORMS=cpu (exit status 1): RuntimeError: cuInit(0) failed',
    ),
    (
      'import os; os.abort()',
      'JAX does not start with JAX_PLATFORMS=cpu (exit status -6): it says nothing',
    ),
  ],
)
def test_a_broken_jax_is_a_sentence(line, sentence, here, script, monkeypatch, capsys):
  found = devices_of_subprocess(program(line))
  assert found == ([], sentence)
  monkeypatch.setattr(doctor, 'devices_of_subprocess', lambda: found)
  assert script(doctor) == (1, 'error: 1 problem(s) found, see above.')
  printed = capsys.readouterr().out
  assert f'problems:\n- {sentence}' in printed
  assert 'Everything works' not in printed


def test_an_accelerator_that_hangs():
  found, sentence = devices_of_subprocess(program('import time; time.sleep(60)'), timeout=0.5)
  assert found == []
  assert sentence.startswith('JAX did not start within 0 s; another process may hold')


def test_a_wrong_product_is_a_problem(here, script, monkeypatch, capsys):
  device = jax.devices()[1]
  assert check_product(device) == 'correct'
  wrong = check_product(device, lambda a, b: (a @ b).at[3, 4:6].add(1))
  assert wrong == '2 of 16384 elements differ'
  found = [{**DEVICES[0], 'product': wrong}]
  monkeypatch.setattr(doctor, 'devices_of_subprocess', lambda: (found, ''))
  assert script(doctor)[0] == 1
  assert f'- The product of two matrices on cpu:0 is wrong: {wrong}.' in capsys.readouterr().out


def test_a_gpu_that_jax_does_not_use(here, script, monkeypatch, capsys):
  monkeypatch.setattr(doctor, 'nvidia_driver', lambda: NvidiaDriver('580.65.06'))
  monkeypatch.setattr(doctor, 'devices_of_subprocess', lambda: (DEVICES, 'cuInit(0) failed'))
  assert script(doctor) == (None, '')
  printed = capsys.readouterr().out
  assert 'NVIDIA driver     580.65.06\n' in printed
  assert "uses the CPU; run: pip install 'jax[cuda13]'" in printed

  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(doctor, 'cuda_plugins', lambda: ['jax-cuda13-plugin'])
  assert script(doctor) == (None, '')
  printed = capsys.readouterr().out
  assert '- JAX has jax-cuda13-plugin, but uses the CPU: cuInit(0) failed\n' in printed
  assert '- jax-cuda13-plugin is not' not in printed


def test_folders_that_cannot_be_used(here, script, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(doctor.os, 'access', lambda path, mode: path != tmp_path)
  monkeypatch.setattr(
    doctor.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 2**29})()
  )
  assert script(doctor) == (None, '')
  printed = capsys.readouterr().out
  assert f'- The prepared data folder {tmp_path / "data"} cannot be written.' in printed
  assert '- Only 0.5 GiB are free in ' in printed


def test_missing_extras(tmp_path):
  assert missing_packages() == {}
  result = run_elsewhere(tmp_path, 'doctor', program=WITHOUT_EXTRAS)
  assert (result.returncode, result.stderr) == (0, '')
  assert (
    '- The commands train, eval, prepare, browse and benchmark need array_record, clu, grain, '
    "pycocotools, tensorboardX, tensorflow_datasets; in a clone, run: pip install '.[train]'\n"
  ) in result.stdout
  assert '- Curves, legends and pictures of an evaluation need matplotlib; ' in result.stdout
  assert '- ONNX and safetensors files need onnx, onnxruntime, safetensors; ' in result.stdout
