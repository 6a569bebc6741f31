"""What a program runs on, and the advice where JAX does not see an NVIDIA GPU."""

import functools
from pathlib import Path

import jax
import pytest

from nonlocal_jax.cli import evaluate, predict, train
from nonlocal_jax.runtime import devices
from nonlocal_jax.runtime.devices import (
  NvidiaDriver,
  advice_on_cuda,
  cpu_is_chosen,
  nvidia_driver,
  say_devices,
)
from nonlocal_jax.runtime.parallel import data_mesh

# As NVIDIA's closed and open kernel modules write it.
CLOSED = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


def machine(root: Path, version: str | None, device: str = 'nvidia0') -> Path:
  """Makes a folder with the files of a driver."""
  (root / 'dev').mkdir(parents=True)
  (root / 'dev' / device).touch()
  if version is not None:
    (root / 'proc/driver/nvidia').mkdir(parents=True)
    (root / 'proc/driver/nvidia/version').write_text(version)
  return root


def nvidia_smi(folder: Path, body: str) -> str:
  """Makes a program nvidia-smi; returns its folder."""
  folder.mkdir()
  (folder / 'nvidia-smi').write_text(f'#!/bin/sh\n{body}\n')
  (folder / 'nvidia-smi').chmod(0o755)
  return str(folder)


@pytest.mark.parametrize(
  ('text', 'version', 'extra'),
  [(CLOSED, '535.183.01', 'cuda12'), (OPEN, '580.65.06', 'cuda13'), ('?', '', 'cuda12')],
)
def test_driver_of_the_device_files(tmp_path, text, version, extra):
  root = machine(tmp_path / 'root', text, device='nvidia3')
  driver = nvidia_driver(root, search_path=str(tmp_path))
  assert driver == NvidiaDriver(version)
  assert driver.extra == extra


def test_driver_of_nvidia_smi(tmp_path):
  program = nvidia_smi(tmp_path / 'bin', '[ "$1" = --query-gpu=driver_version ] && echo 570.133.07')
  assert nvidia_driver(tmp_path, search_path=program) == NvidiaDriver('570.133.07')
  without_version = machine(tmp_path / 'root', None)
  assert nvidia_driver(without_version, search_path=program) == NvidiaDriver('570.133.07')
  fails = nvidia_smi(tmp_path / 'broken', 'echo 570.133.07; exit 9')
  assert nvidia_driver(tmp_path, search_path=fails) is None


def test_no_gpu(tmp_path):
  assert nvidia_driver(tmp_path, search_path=str(tmp_path)) is None
  # A container that was given no GPU has the driver's text and the controlling device.
  root = machine(tmp_path / 'root', OPEN, device='nvidiactl')
  assert nvidia_driver(root, search_path=str(tmp_path)) is None
  assert advice_on_cuda(None, []) is None


@pytest.mark.parametrize(
  ('version', 'remedy'),
  [
    ('580.65.06', "run: pip install 'jax[cuda13]'"),
    ('590.1', "run: pip install 'jax[cuda13]'"),
    ('579.99', "run: pip install 'jax[cuda12]'"),
    ('525.60.13', "run: pip install 'jax[cuda12]'"),
    ('524.9', 'its driver is too old for JAX: install 525 or later.'),
  ],
)
def test_advice_by_driver(version, remedy):
  advice = advice_on_cuda(NvidiaDriver(version), [])
  assert advice.startswith(f'This machine has an NVIDIA GPU (driver {version}), but ')
  assert advice.endswith(remedy)
  assert advice_on_cuda(NvidiaDriver(version), ['jax-cuda12-plugin']) is None


def test_who_chose_the_cpu():
  assert not cpu_is_chosen({})
  assert not cpu_is_chosen({'JAX_PLATFORMS': '', 'CUDA_VISIBLE_DEVICES': '0,1'})
  assert cpu_is_chosen({'JAX_PLATFORMS': 'cpu'})
  assert cpu_is_chosen({'CUDA_VISIBLE_DEVICES': ''})
  assert cpu_is_chosen({'CUDA_VISIBLE_DEVICES': '-1'})


@pytest.fixture
def gpu_without_cuda(tmp_path, monkeypatch):
  """A machine whose GPU JAX does not see."""
  root = machine(tmp_path / 'root', OPEN)
  monkeypatch.setattr(devices, 'nvidia_driver', functools.partial(nvidia_driver, root))
  monkeypatch.setattr(devices, 'cuda_plugins', list)
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)


ADVICE = (
  'This machine has an NVIDIA GPU (driver 580.65.06), but JAX is installed without CUDA and uses '
  "the CPU; run: pip install 'jax[cuda13]'"
)


def test_what_is_said(gpu_without_cuda, capsys, monkeypatch):
  say_devices(data_mesh(jax.devices()[:3]))
  assert capsys.readouterr() == ('', f'Runs on 3 devices (cpu) of 1 process\n{ADVICE}\n')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  say_devices(data_mesh())
  assert capsys.readouterr().err == 'Runs on 4 devices (cpu) of 1 process\n'
  monkeypatch.setenv(devices.SAID, '1')
  say_devices(data_mesh())
  assert capsys.readouterr().err == ''


@pytest.mark.slow
def test_commands_say_it_once(
  gpu_without_cuda, script, training_arguments, demo_set, tmp_path, capsys
):
  workdir = f'--workdir={tmp_path}/run'
  assert script(train, *training_arguments, workdir) == (None, '')
  printed, said = capsys.readouterr()
  assert said.count(ADVICE) == 1
  assert (printed + said).count(' devices (') == 1

  checkpoint = f'--checkpoint={tmp_path}/run'
  assert script(evaluate, *training_arguments, workdir, checkpoint) == (None, '')
  said = capsys.readouterr().err
  assert said.count('Runs on 4 devices (cpu) of 1 process\n') == said.count(ADVICE) == 1

  image = next((demo_set / 'images/val').iterdir())
  assert script(predict, checkpoint, image, f'--out={tmp_path}/out') == (None, '')
  said = capsys.readouterr().err
  assert said.count('Runs on 1 device (cpu) of 1 process\n') == said.count(ADVICE) == 1
