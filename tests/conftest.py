"""Four fake devices, full precision, and what several tests share."""

import contextlib
import functools
import io
import os
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path

# The programs of the tests are small, and there are many: compiling them quickly counts.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['NONLOCAL_JAX_OFFLINE'] = '1'  # but for servers that tests start themselves

import cv2
import jax
import numpy as np
import pytest
import torch

import main
from configs import custom
from nonlocal_jax.cli import convert
from nonlocal_jax.cli.program import run_program
from nonlocal_jax.data.synthetic import write_demo_set
from nonlocal_jax.experiment import Experiment
from tests import peer

jax.config.update('jax_default_matmul_precision', 'highest')
_home = tempfile.TemporaryDirectory()
os.environ['NONLOCAL_JAX_HOME'] = _home.name  # nothing is taken from the user's
# Many tests compile the same program again.
_compilation_cache = tempfile.TemporaryDirectory()
os.environ['JAX_COMPILATION_CACHE_DIR'] = _compilation_cache.name  # for programs that tests start
jax.config.update('jax_compilation_cache_dir', _compilation_cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture(scope='session')
def peer_model() -> torch.nn.Module:
  """R-50-D8 of an eighth of the width with 19 classes, half-pixel corners."""
  return peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024', width=8)


@pytest.fixture(scope='session')
def peer_checkpoint(peer_model, tmp_path_factory):
  """The same network as a file in the released layout."""
  path = tmp_path_factory.mktemp('peer') / 'model.pth'
  meta = {'mmseg_version': '0.5.0', 'CLASSES': tuple(f'c{i}' for i in range(19)), 'PALETTE': None}
  torch.save({'meta': meta, 'state_dict': peer_model.state_dict()}, path)
  return path


@pytest.fixture(scope='session')
def demo_set(tmp_path_factory):
  """A small demo set as a folder."""
  directory = tmp_path_factory.mktemp('data') / 'demo_set'
  write_demo_set(directory, train=24, val=5)
  return directory


@pytest.fixture(scope='session')
def training_config(demo_set, tmp_path_factory):
  """The custom config, shrunk: four steps of a tiny network on the demo set as a user's folder."""
  config = custom.get_config()
  config.data.source_dir = str(demo_set)
  config.data.data_dir = str(tmp_path_factory.mktemp('prepared'))
  config.data.num_classes = 8
  config.model.depth = 14
  config.model.width = 4
  config.train.steps = 4
  config.train.batch_size = 4
  config.train.scale = config.eval.scale = (96, 96)
  config.train.crop = (64, 64)
  config.train.log_every = 1
  config.eval.every = config.checkpoint.every = 2
  return config


@pytest.fixture(scope='session')
def training_arguments(training_config):
  """Arguments of main.py for the same config."""
  keys = (
    *('data.source_dir', 'data.data_dir', 'data.num_classes', 'model.depth', 'model.width'),
    *('train.steps', 'train.batch_size', 'train.scale', 'train.crop', 'train.log_every'),
    *('eval.scale', 'eval.every', 'checkpoint.every'),
  )
  values = (
    (section, name, training_config[section][name])
    for section, name in (key.split('.') for key in keys)
  )
  settings = [f'--config.{section}.{name}={value}' for section, name, value in values]
  return [f'--config={custom.__file__}', *settings]


def train_and_evaluate(config, workdir: Path, **options):
  """Trains as a config says; see `Experiment.train`."""
  return Experiment.from_config(config).train(workdir, **options)


@pytest.fixture(scope='session')
def trained(training_config, tmp_path_factory):
  """A finished run: its workdir and last evaluation."""
  workdir = tmp_path_factory.mktemp('run') / 'workdir'
  return workdir, train_and_evaluate(training_config, workdir)


@pytest.fixture
def program(monkeypatch, tmp_path):
  """Runs main.py in this process; returns exit status and what it says on exit."""
  monkeypatch.chdir(tmp_path)

  def run(*arguments: str) -> tuple[object, str]:
    monkeypatch.setattr(sys, 'argv', ['main.py', *arguments])
    return run_in_process(main.run)

  return run


@pytest.fixture
def script():
  """Runs a module of nonlocal_jax.cli in this process; returns as `program`."""

  def run(module: types.ModuleType, *arguments: object) -> tuple[object, str]:
    program = functools.partial(module.main, [str(argument) for argument in arguments])
    return run_in_process(functools.partial(run_program, program))

  return run


@pytest.fixture
def converter(script):
  """Runs the command convert in this process; returns as `program`."""
  return functools.partial(script, convert)


def run_in_process(run: Callable[[], None]) -> tuple[object, str]:
  """Exit status (None: came to its end), and what a program that fails says on exit."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      run()
  except SystemExit as exit_:
    if isinstance(exit_.code, str):
      return 1, exit_.code
    return exit_.code, said.getvalue().rstrip().rpartition('\n')[2] if exit_.code == 2 else ''
  finally:
    sys.stderr.write(said.getvalue())
  return None, ''


def start_two_processes(
  *arguments: object, own: Sequence[Sequence[object]], port: int | None = None
) -> list[subprocess.Popen[str]]:
  """Starts main.py on two processes of two devices each.

  Args:
    *arguments: Their arguments.
    own: Further arguments of each.
    port: The coordinator's port; None for a free one.
  """
  port = port or free_port()
  together = ['--distributed', f'--coordinator=localhost:{port}', '--processes=2']
  flags = os.environ['XLA_FLAGS'].replace('device_count=4', 'device_count=2')
  return [
    subprocess.Popen(
      [sys.executable, main.__file__, *arguments, *together, f'--process={index}', *own[index]],
      env={**os.environ, 'XLA_FLAGS': flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]


def free_port() -> int:
  """A port that nobody listens at."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def ends_of(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
  """Waits for processes; returns the exit status of each and what it said."""
  try:
    said = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return [process.returncode for process in processes], said


def run_two_processes(*arguments: object, workdirs: Sequence[Path]) -> list[str]:
  """Runs main.py on two processes of two devices each; returns what each says."""
  own = [[f'--workdir={workdir}'] for workdir in workdirs]
  statuses, said = ends_of(start_two_processes(*arguments, own=own))
  assert statuses == [0, 0], said
  return said


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
  """A folder with a val split of three images of different sizes and labels 0..18, 20 and 255."""
  rng = np.random.default_rng(3)
  root = tmp_path_factory.mktemp('photos')
  for kind in ('images', 'labels'):
    (root / kind / 'val').mkdir(parents=True)
  for index, size in enumerate([(60, 80), (72, 64), (80, 60)]):
    coarse = rng.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(root / f'images/val/{index}.png'), image)
    label = rng.choice([*range(19), 20, 255], size=size).astype(np.uint8)
    cv2.imwrite(str(root / f'labels/val/{index}.png'), label)
  return root


@pytest.fixture
def rng() -> np.random.Generator:
  """A seeded generator."""
  return np.random.default_rng(0)
