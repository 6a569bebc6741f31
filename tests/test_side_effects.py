"""After an error everything that belongs to the whole process is as before."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import absl.logging
import cv2
import jax
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

import nonlocal_jax
from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.data.preparation import prepare
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.weights.orbax_errors import one_error


def state_of_process() -> dict[str, object]:
  """Hooks, filters, levels, handlers, variables and settings of libraries."""
  loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
  return {
    'hooks': (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
    'streams': (sys.stdin, sys.stdout, sys.stderr),
    'warnings': (list(warnings.filters), warnings.showwarning),
    **{logger.name: (logger.level, tuple(logger.handlers)) for logger in loggers},
    'absl': absl.logging.get_verbosity(),
    'signals': {number: signal.getsignal(number) for number in signal.valid_signals()},
    'environment': dict(os.environ),
    'folder': Path.cwd(),
    'jax': dict(jax.config.values),
    'numpy': (np.geterr(), np.get_printoptions()),
    'images': (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
    'threads of OpenCV': cv2.getNumThreads(),
    'recursion': sys.getrecursionlimit(),
  }


def changed_since(before: dict[str, object]) -> dict[str, object]:
  """What differs; loggers of libraries that were imported since do not count."""
  after = state_of_process()
  return {key: after[key] for key, value in before.items() if after[key] != value}


@pytest.fixture(scope='module')
def converted(peer_checkpoint, tmp_path_factory):
  """A converted directory with its model; all libraries are imported by then."""
  directory = tmp_path_factory.mktemp('converted') / 'model'
  model = nonlocal_jax.load(peer_checkpoint)
  model.save(directory)
  nonlocal_jax.load(directory)
  return directory, model


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damaged_directory(converted, tmp_path):
  """Every file of arrays is cut, so that many reads fail at once."""
  converted[1].save(tmp_path / 'damaged')
  for path in (tmp_path / 'damaged/weights').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      cut(path)
  nonlocal_jax.load(tmp_path / 'damaged')


def _damaged_pth(converted, tmp_path):
  (tmp_path / 'x.pth').write_bytes(b'PK\3\4' + bytes(1000))
  nonlocal_jax.load_module(tmp_path / 'x.pth')


def _damaged_image(converted, tmp_path):
  (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
  converted[1].predict(tmp_path / 'x.png')


def _damaged_image_of_many(converted, tmp_path):
  (tmp_path / 'x.jpg').write_bytes(b'\xff\xd8\xff' + bytes(100))
  list(converted[1].predict_many([tmp_path / 'x.jpg']))


def _bad_dataset(converted, tmp_path):
  for kind in ('images', 'labels'):
    (tmp_path / kind / 'val').mkdir(parents=True)
    (tmp_path / kind / 'val/0.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
  prepare(custom_dataset(2), tmp_path, splits=['val'], data_dir=tmp_path / 'prepared')


ERRORS = {
  'no file': lambda converted, tmp_path: nonlocal_jax.load(tmp_path / 'none.pth'),
  'a folder that exists': lambda converted, tmp_path: converted[1].save(converted[0]),
  'a damaged directory': _damaged_directory,
  'a damaged .pth': _damaged_pth,
  'a damaged image': _damaged_image,
  'a damaged image of many': _damaged_image_of_many,
  'a bad dataset': _bad_dataset,
}


@pytest.mark.parametrize('name', ERRORS)
def test_an_error_leaves_the_process_as_it_was(name, converted, tmp_path):
  before = state_of_process()
  with pytest.raises(UserError):
    ERRORS[name](converted, tmp_path)
  assert changed_since(before) == {}


def test_training_that_fails_leaves_the_process_as_it_was(training_config, tmp_path, monkeypatch):
  """After the checkpoints were opened, and before anything is compiled for long."""
  from nonlocal_jax.training import run

  def fail(*unused, **options):
    raise UserError('no such step')

  monkeypatch.setattr(run, 'lower_train_step', fail)
  experiment = Experiment.from_config(training_config)
  before = state_of_process()
  with pytest.raises(UserError, match='no such step'):
    experiment.train(tmp_path / 'workdir')
  assert changed_since(before) == {}


def test_what_was_abandoned_speaks_before_the_error_is_raised(monkeypatch):
  """Reads that end after their loop was closed, in a thread; afterwards the hook is the old one."""
  heard = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: heard.append(unraisable.exc_value))

  def complain(times: int):
    for _ in range(times):
      time.sleep(0.05)
      error = RuntimeError('Event loop is closed')
      sys.unraisablehook(types.SimpleNamespace(exc_value=error))

  abandoned = threading.Thread(target=complain, args=(12,))

  @one_error('weights cannot be read')
  def read():
    abandoned.start()
    raise ValueError('first\nsecond')

  with pytest.raises(UserError, match=r'weights cannot be read: first\.'):
    read()
  abandoned.join(1)
  assert heard == []
  complain(1)
  assert len(heard) == 1


def test_reads_that_nobody_waits_for_are_quiet(caplog):
  """Of many reads that fail asyncio raises the first, and logs each other one as an error."""

  async def fail(array: str):
    raise ValueError(f'DATA_LOSS: {array} [tensorstore_spec={{"driver": "zarr"}}]')

  async def read_all():
    reads = [asyncio.ensure_future(fail(array)) for array in 'abc']
    await asyncio.sleep(0)
    await reads[0]

  caplog.set_level(logging.ERROR, logger='asyncio')  # commands that ran in this process silence it
  with (
    pytest.raises(UserError, match=r'^weights cannot be read: DATA_LOSS: a\.$'),
    one_error('weights cannot be read'),
  ):
    asyncio.run(read_all())
  assert not caplog.records
  with contextlib.suppress(ValueError):
    asyncio.run(read_all())
  gc.collect()
  assert 'exception was never retrieved' in caplog.text


@pytest.mark.parametrize(
  'added',
  [
    ' [os_error_code=\'EFBIG\'] [tensorstore_spec=\'{"driver": "zarr"}\']',
    ' [tensorstore_spec=\'{"driver": "zarr"}\'] [os_error_code=\'EFBIG\']',
    ' [tensorstore_spec=1]',
    '',
  ],
)
def test_what_tensorstore_adds_to_an_error_is_left_out_in_any_order(added):
  with (
    pytest.raises(UserError, match=r'^x cannot be written: File too large\.$'),
    one_error('x cannot be written'),
  ):
    raise ValueError(f'RESOURCE_EXHAUSTED: Error writing "/a/b": write: File too large{added}')
