"""Training steps that do not fit in the memory of a device."""

import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.errors import UserError
from nonlocal_jax.training import run
from nonlocal_jax.training.memory import (
  StepMemory,
  StepOptions,
  StepTooLargeError,
  check_memory,
  explained_out_of_memory,
  memory_limit,
)
from nonlocal_jax.training.run_files import check_same_run
from tests.conftest import train_and_evaluate

GIB = 2**30
STEP = StepMemory(held=2 * GIB, temporary=50 * GIB)
OPTIONS = StepOptions(
  batch_size=32,
  devices=2,
  device_kind='GPU',
  accumulate=1,
  rematerialize=False,
  has_batch_statistics=True,
)


def said(limit: float, less: StepMemory | None = None, **options) -> str:
  """The message with a limit in GiB, and `less` with rematerialization."""
  with pytest.raises(StepTooLargeError) as raised:
    check_memory(STEP, int(limit * GIB), OPTIONS._replace(**options), lambda: less)
  return str(raised.value)


def test_a_step_that_fits_is_not_compiled_again():
  for limit in (52 * GIB, None):
    check_memory(STEP, limit, OPTIONS, lambda: pytest.fail('compiled'))
  with pytest.raises(StepTooLargeError):
    check_memory(STEP, 52 * GIB - 1, OPTIONS, lambda: None)


def test_the_error_names_what_fits():
  assert said(48, StepMemory(2 * GIB, 30 * GIB)) == (
    'a training step that computes 16 images at once on each device needs 52.00 GiB, and GPU has '
    '48.00 GiB for it; set rematerialize=True (32.00 GiB; a third slower), or accumulate=2 (about '
    '30.40 GiB; batch normalization then uses the statistics of each part), or batch_size=26 '
    '(about 46.90 GiB).'
  )


def test_it_names_no_rematerialization_that_does_not_fit_or_was_not_compiled():
  alone = (
    'accumulate=4 (about 17.20 GiB; batch normalization then uses the statistics of each part)'
  )
  for less in (StepMemory(2 * GIB, 19 * GIB), None):
    assert f'; set {alone}, or batch_size=8 (about 17.20 GiB).' in said(20, less)


def test_with_rematerialization_fewer_images_fit_where_nothing_else_does():
  found = said(4, StepMemory(2 * GIB, 18 * GIB))
  assert found.endswith(
    'GPU has 4.00 GiB for it; one image alone does not fit: make the crops smaller.'
  )
  found = said(5, StepMemory(GIB, 33 * GIB))
  assert '; set rematerialize=True accumulate=16 (about 4.20 GiB; a third slower; batch' in found
  assert found.endswith('rematerialize=True batch_size=2 (about 4.20 GiB; a third slower).')


def test_parts_and_devices_multiply():
  found = said(48, None, batch_size=64, accumulate=2)
  assert 'accumulate=4 (' in found
  assert 'or batch_size=52 (' in found


def test_frozen_statistics_stay_as_they_are():
  assert 'accumulate=2 (about 30.40 GiB), or' in said(48, None, has_batch_statistics=False)


def test_a_step_that_rematerializes_is_not_compiled_again():
  options = OPTIONS._replace(rematerialize=True)
  with pytest.raises(StepTooLargeError, match='; set accumulate=2'):
    check_memory(STEP, 48 * GIB, options, lambda: pytest.fail('compiled'))


def test_results_in_place_of_arguments_count_once():
  compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros(1000)).compile()
  memory = StepMemory.of(compiled)
  assert memory.held == 4000
  assert memory.total == 4000 + memory.temporary


class Device:
  def __init__(self, stats):
    self.memory_stats = lambda: stats


class Devices:
  def __init__(self, *stats):
    self.local_devices = [Device(x) for x in stats]


@pytest.mark.parametrize(
  ('stats', 'limit'),
  [
    ([None], None),
    ([{'bytes_in_use': 3}], None),
    ([{'bytes_limit': 7}, {'bytes_limit': 5}], 5),
  ],
)
def test_the_limit_is_that_of_the_smallest_device(stats, limit):
  assert memory_limit(Devices(*stats)) == limit


def run_out(options: StepOptions, message: str):
  with explained_out_of_memory(options):
    raise jax.errors.JaxRuntimeError(message)


def test_running_out_of_memory_is_explained():
  with pytest.raises(StepTooLargeError) as raised:
    run_out(OPTIONS, 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate')
  assert str(raised.value) == (
    'a training step that computes 16 images at once on each device runs out of memory on GPU; try '
    'rematerialize=True (a third slower), or accumulate=2 (batch normalization then uses the '
    'statistics of each part), or batch_size=16.'
  )
  with pytest.raises(StepTooLargeError, match='one image alone does not fit'):
    run_out(OPTIONS._replace(batch_size=2, rematerialize=True), 'RESOURCE_EXHAUSTED: Out of memory')
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    run_out(OPTIONS, 'INTERNAL: something else')


@pytest.fixture
def config(training_config):
  config = training_config.copy_and_resolve_references()
  config.train.batch_size = 16
  config.train.steps = 1
  return config


@pytest.mark.slow
def test_a_run_that_does_not_fit_names_flags_with_which_it_does(config, tmp_path, monkeypatch):
  """In the same workdir: the estimate is not below what the program then needs."""
  limits = []

  def check_with_limit(memory, limit, *arguments):
    assert limit is None  # of a CPU
    limits.append(int(0.7 * memory.total))
    check_memory(memory, limits[0], *arguments)

  monkeypatch.setattr(run, 'check_memory', check_with_limit)
  with pytest.raises(UserError, match='computes 4 images at once on each device') as raised:
    train_and_evaluate(config, tmp_path)
  assert not isinstance(raised.value, StepTooLargeError)
  accumulate = re.search(r'--config\.train\.accumulate=(\d) \(about', str(raised.value))
  assert accumulate is not None
  config.train.accumulate = int(accumulate[1])
  assert train_and_evaluate(config, tmp_path).confusion.sum() > 0


class Program:
  """A compiled step without memory to run."""

  def __init__(self, compiled):
    self.memory_analysis = compiled.memory_analysis

  def __call__(self, *arguments):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')


@pytest.mark.parametrize('where', ['compilation', 'step'])
def test_xla_runs_out_of_memory(config, tmp_path, monkeypatch, where):
  program = Program(jax.jit(lambda x: x).lower(np.zeros(1)).compile())
  lowered = types.SimpleNamespace(compile=lambda: program if where == 'step' else program())
  monkeypatch.setattr(run, 'lower_train_step', lambda *_, **__: lowered)
  message = (
    r'runs out of memory on cpu; try --config\.train\.rematerialize=True \(a third slower\), or'
  )
  with pytest.raises(UserError, match=message) as raised:
    train_and_evaluate(config, tmp_path)
  assert 'resumes' not in str(raised.value)
  check_same_run(tmp_path, {'train': {'accumulate': 2}}, {})  # a corrected config may follow


def test_a_run_that_resumes_is_told_what_it_can_change(
  training_config, trained, tmp_path, monkeypatch
):
  shutil.copytree(trained[0], tmp_path / 'workdir')
  shutil.rmtree(tmp_path / 'workdir/checkpoints/4')
  program = Program(jax.jit(lambda x: x).lower(np.zeros(1)).compile())
  lowered = types.SimpleNamespace(compile=program)
  monkeypatch.setattr(run, 'lower_train_step', lambda *_, **__: lowered)
  with pytest.raises(UserError, match='; of these, a run that resumes can change only remat'):
    train_and_evaluate(training_config.copy_and_resolve_references(), tmp_path / 'workdir')
  assert (tmp_path / 'workdir/config.json').exists()
