"""Runs that are stopped, killed or damaged, and go on."""

import gc
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import main
from nonlocal_jax.data.loader import TrainIterator
from nonlocal_jax.errors import STOPPED_STATUS, RunStopped, UserError
from nonlocal_jax.evaluation.evaluator import Evaluator
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.runtime.compilation import use_compilation_cache
from nonlocal_jax.training import loop
from nonlocal_jax.weights.arrays import to_arrays
from nonlocal_jax.weights.loading import read_weights
from tests.conftest import train_and_evaluate
from tests.test_csv_files import check_csv

ROOT = Path(main.__file__).parent


def read_log(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]


def assert_same_run(workdir: Path, expected: Path):
  """Weights and best weights bit by bit, losses and scores of every step."""
  for part in ('', 'best'):
    arrays, wanted = (to_arrays(read_weights(path / part)[1]) for path in (workdir, expected))
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
      np.testing.assert_array_equal(arrays[name], array, err_msg=name)
  timing = ('images_per_second', 'waiting_for_data')
  logs = [
    [{key: value for key, value in line.items() if key not in timing} for line in read_log(path)]
    for path in (workdir, expected)
  ]
  assert logs[0] == logs[1]
  check_csv(workdir)


@pytest.fixture
def stopped_at_2(trained, tmp_path):
  """The run as it stands when killed after step 3, in the middle of a line of its log."""
  workdir = tmp_path / 'workdir'
  shutil.copytree(trained[0], workdir)
  shutil.rmtree(workdir / 'checkpoints/4')
  for file, text in (('log.jsonl', '{"step": 3, "los'), ('train.csv', '3,0.1')):
    with (workdir / file).open('a') as log:
      log.write(text)
  for folder in (workdir, workdir / 'best'):
    (folder / '.metrics.json.0a1b2c3d.partial').touch()
  return workdir


def test_a_continued_run_ends_bit_by_bit_as_one_that_never_stopped(
  training_config, trained, stopped_at_2, capsys
):
  continued = train_and_evaluate(training_config, stopped_at_2, checkpoint=Path('none.pth'))
  np.testing.assert_array_equal(continued.confusion, trained[1].confusion)
  assert_same_run(stopped_at_2, trained[0])
  assert not list(stopped_at_2.rglob('*.partial'))
  said = capsys.readouterr().out
  assert f'resumes at step 2 of {stopped_at_2}; none.pth is not read again' in said


@pytest.mark.slow
def test_an_evaluation_that_was_cut_off_is_made_up_for(training_config, trained, stopped_at_2):
  lines = [line for line in read_log(trained[0]) if line['step'] <= 2 and 'mIoU' not in line]
  (stopped_at_2 / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  shutil.rmtree(stopped_at_2 / 'best/checkpoints')
  train_and_evaluate(training_config, stopped_at_2)
  assert_same_run(stopped_at_2, trained[0])


def test_a_finished_run_is_evaluated_again_and_stays_as_it_is(training_config, trained, tmp_path):
  workdir = tmp_path / 'workdir'
  shutil.copytree(trained[0], workdir)
  again = train_and_evaluate(training_config, workdir)
  np.testing.assert_array_equal(again.confusion, trained[1].confusion)
  assert_same_run(workdir, trained[0])


@pytest.mark.slow
def test_a_run_that_began_before_backbones_had_names_resumes(training_config, trained, tmp_path):
  workdir = tmp_path / 'workdir'
  shutil.copytree(trained[0], workdir)
  config = training_config.copy_and_resolve_references()
  config.init_backbone = 'resnet50_v1c'
  again = train_and_evaluate(config, workdir)  # offline
  np.testing.assert_array_equal(again.confusion, trained[1].confusion)
  for file in ('config.json', 'metrics.json'):
    saved = json.loads((workdir / file).read_text())
    assert saved.get('config_values', saved)['init_backbone'] == ''  # what it really began with
  config.init_backbone = 'other.pth'
  with pytest.raises(UserError, match=r'init_backbone was , now other\.pth'):
    train_and_evaluate(config, workdir)


@pytest.fixture
def heeded_interrupts():
  """SIGINT is not ignored, as it is in background jobs."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('heeded_interrupts')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(training_config, trained, tmp_path, monkeypatch, number):
  """Noted before step 2, seen with its results or, as step 3 is already under way, after that."""
  workdir, before = tmp_path / 'workdir', signal.getsignal(number)
  give_batch = TrainIterator.__next__

  def give_batch_and_signal(self):
    batch = give_batch(self)
    if self.get_state() == {'next_batch': 2}:
      signal.raise_signal(number)
    return batch

  config = training_config.copy_and_resolve_references()
  config.train.log_every = config.checkpoint.every = config.eval.every = 4
  monkeypatch.setattr(TrainIterator, '__next__', give_batch_and_signal)
  with pytest.raises(RunStopped, match=f'stopped by {signal.Signals(number).name} after step 3,'):
    train_and_evaluate(config, workdir)
  assert signal.getsignal(number) is before
  assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['3']
  monkeypatch.undo()
  train_and_evaluate(config, workdir)
  expected, found = (to_arrays(read_weights(path)[1]) for path in (trained[0], workdir))
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_that_is_made_up_for(
  training_config, trained, tmp_path, monkeypatch
):
  workdir, evaluate = tmp_path / 'workdir', Evaluator.__call__

  def evaluate_and_signal(self, weights, *, after_batch):
    signal.raise_signal(signal.SIGTERM)
    return evaluate(self, weights, after_batch=after_batch)

  monkeypatch.setattr(Evaluator, '__call__', evaluate_and_signal)
  with pytest.raises(RunStopped, match='stopped by SIGTERM after step 2, which is saved'):
    train_and_evaluate(training_config, workdir)
  monkeypatch.undo()
  assert not any('mIoU' in line for line in read_log(workdir))
  train_and_evaluate(training_config, workdir)
  assert_same_run(workdir, trained[0])


@pytest.mark.slow
def test_a_killed_worker_loses_no_step(training_config, trained, tmp_path, monkeypatch):
  config = training_config.copy_and_resolve_references()
  config.checkpoint.every = config.eval.every = 4
  give_batch, workdir = TrainIterator.__next__, tmp_path / 'workdir'

  def give_batch_or_die(self):
    if self.get_state() == {'next_batch': 3}:
      raise UserError('One of the 2 worker processes was ended: use a smaller num_workers.')
    return give_batch(self)

  monkeypatch.setattr(TrainIterator, '__next__', give_batch_or_die)
  with pytest.raises(UserError, match=r'As a flag: --config\.data\.workers=NUMBER'):
    train_and_evaluate(config, workdir)
  assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['3']
  monkeypatch.undo()
  train_and_evaluate(config, workdir)
  expected, found = (to_arrays(read_weights(path)[1]) for path in (trained[0], workdir))
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_signal_gives_an_exit_status_of_its_own(program, monkeypatch, capsys):
  def stop(*unused, **options):
    raise RunStopped('stopped by SIGTERM after step 3')

  monkeypatch.setattr(Experiment, 'train', stop)
  assert program(f'--config={ROOT}/configs/demo.py') == (STOPPED_STATUS, '')
  assert STOPPED_STATUS not in (0, 1, 130, 143)
  assert capsys.readouterr().err == 'stopped by SIGTERM after step 3\n'


def damage(checkpoint: Path):
  """Flips a bit in the middle of the largest file."""
  path = max((p for p in checkpoint.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_set_aside(training_config, trained, tmp_path, capsys):
  workdir = tmp_path / 'workdir'
  shutil.copytree(trained[0], workdir)
  damage(workdir / 'checkpoints/4')
  train_and_evaluate(training_config, workdir)
  assert_same_run(workdir, trained[0])
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'2', '4'}
  assert [path.name for path in (workdir / 'unreadable_checkpoints').iterdir()] == ['4']
  said = capsys.readouterr()
  assert re.search(r'warning: the checkpoint of step 4 in .* cannot be read: .*moved to', said.err)
  assert f'resumes at step 2 of {workdir}' in said.out


def test_where_all_are_damaged_nothing_is_touched(training_config, trained, tmp_path):
  workdir = tmp_path / 'workdir'
  shutil.copytree(trained[0], workdir)
  for step in (2, 4):
    damage(workdir / f'checkpoints/{step}')
  before = {p: p.read_bytes() for p in (workdir / 'checkpoints').rglob('*') if p.is_file()}
  with pytest.raises(UserError, match=r'no checkpoint in .* can be read: .*step 4.*; .*step 2'):
    train_and_evaluate(training_config, workdir)
  after = {p: p.read_bytes() for p in (workdir / 'checkpoints').rglob('*') if p.is_file()}
  assert before == after


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
  training_config, trained, tmp_path, monkeypatch
):
  """Files may not grow beyond 4 KiB from the second save on."""
  workdir, save = tmp_path / 'workdir', loop.save
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)

  def save_on_a_full_disk(checkpoints, state, batches):
    if int(state.step) == 4:
      checkpoints.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    save(checkpoints, state, batches)
    checkpoints.wait()

  monkeypatch.setattr(loop, 'save', save_on_a_full_disk)
  try:
    with pytest.raises(UserError, match=r'the checkpoints in .* cannot be written: .*'):
      train_and_evaluate(training_config, workdir)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  gc.collect()  # what Orbax abandoned is to be silent here, not in a later test
  monkeypatch.undo()
  train_and_evaluate(training_config, workdir)
  assert_same_run(workdir, trained[0])
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'2', '4'}


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
  trained, training_arguments, tmp_path
):
  """SIGKILL as soon as the log has reached a step; the compiled step is found in the cache."""
  workdir = tmp_path / 'killed'
  command = [sys.executable, ROOT / 'main.py', *training_arguments, f'--workdir={workdir}']
  compiled = []
  for reached in (1, 3):
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
      deadline = time.monotonic() + 120
      while run.poll() is None and time.monotonic() < deadline:
        log = workdir / 'log.jsonl'
        if log.exists() and f'{{"step": {reached},' in log.read_text():
          break
        time.sleep(0.01)
      run.kill()
      said = run.stdout.read().decode()
    assert run.returncode == -signal.SIGKILL, said
    compiled.append(compiled_programs())
  finished = subprocess.run(command, capture_output=True, text=True)
  assert finished.returncode == 0, finished.stderr
  assert 'resumes at step 2 of' in finished.stdout
  assert_same_run(workdir, trained[0])
  assert compiled[0] == compiled[1] == compiled_programs()


def compiled_programs() -> set[str]:
  """Training steps in the cache of the tests."""
  cache = Path(jax.config.jax_compilation_cache_dir)
  return {path.name for path in cache.iterdir() if path.name.startswith('jit_train_step')}


def test_the_compilation_cache_is_in_the_users_cache_directory(monkeypatch, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == before  # what was chosen stays
  monkeypatch.delenv('NONLOCAL_JAX_HOME')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    use_compilation_cache()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == tmp_path / 'nonlocal_jax'
    folder.mkdir(parents=True)
    for name in ('whole-cache', 'whole-atime', 'cut-cache'):  # JAX writes -atime after -cache
      (folder / name).touch()
    jax.config.update('jax_compilation_cache_dir', None)
    use_compilation_cache()
    left = {path.name for path in folder.iterdir()} - {'.lockfile'}
    assert left == {'whole-cache', 'whole-atime'}
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
    jax.config.update('jax_compilation_cache_max_size', -1)
