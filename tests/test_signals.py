"""SIGTERM and SIGINT, whatever a program does when they come."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import main
from nonlocal_jax.errors import STOPPED_STATUS
from nonlocal_jax.runtime import signals
from nonlocal_jax.weights.run_checkpoints import has_checkpoint
from tests.conftest import ends_of, start_two_processes
from tests.processes import members, runs, unused_shared_memory

ROOT = Path(main.__file__).parent

# The main thread is in C, where no handler runs, as when XLA compiles. Other threads write.
PROGRAM = """
import hashlib, itertools, os, pathlib, subprocess, sys, threading
from nonlocal_jax.cli.program import run_program
from nonlocal_jax.runtime.files import unfinished, whole_file
from nonlocal_jax.runtime.signals import StopRequest

folder, requests = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def write_files():
  for number in itertools.count():
    (folder / 'new [set].tmp').mkdir(exist_ok=True)
    (folder / 'new [set].tmp' / str(number)).write_text('x')

def program():
  with unfinished(folder, 'new [[]set].tmp*'), whole_file(folder / 'results.json') as partial:
    partial.write_text('half')
    threading.Thread(target=write_files, daemon=True).start()
    child = subprocess.Popen(['sleep', '100'])
    (folder / 'kept').write_text('whole')
    print(child.pid, flush=True)
    print(' and buffered', end='')
    os.write(1, b'written')
    if requests:
      with StopRequest():
        hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)

run_program(program)
"""


@pytest.mark.parametrize(
  ('sent', 'requests', 'status', 'said'),
  [
    (signal.SIGTERM, 0, 143, 'stopped by SIGTERM'),
    (signal.SIGINT, 1, 130, 'interrupted'),
  ],
)
def test_a_program_leaves_at_once_and_leaves_nothing_unfinished(
  sent, requests, status, said, tmp_path
):
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
  process = subprocess.Popen(
    [sys.executable, '-c', PROGRAM, tmp_path, str(requests)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  signal.signal(signal.SIGINT, before)
  with process:
    child = int(process.stdout.readline())
    assert process.stdout.read(7) == 'written'
    for _ in range(requests):  # the first is a request, which cannot be met
      process.send_signal(sent)
      time.sleep(0.2)
      process.send_signal(sent)  # the same one, as Slurm and a parent both send it
      time.sleep(1)
      assert process.poll() is None
    started = time.monotonic()
    process.send_signal(sent)
    out, errors = process.communicate(timeout=30)
  assert time.monotonic() - started < 5
  assert (process.returncode, out) == (status, ' and buffered')
  assert errors.strip() == said
  assert [path.name for path in tmp_path.iterdir()] == ['kept']
  assert not runs(child)


ENDING = """
import atexit, time
from nonlocal_jax.runtime.signals import LeaveOnSignals

atexit.register(lambda: (print('ending', flush=True), time.sleep(60)))
with LeaveOnSignals(until_exit=True):
  pass
"""


def test_a_signal_while_the_interpreter_ends_has_the_same_status():
  command = [sys.executable, '-c', ENDING]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
    assert process.stdout.readline() == 'ending\n'
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


def test_an_ignored_signal_stays_ignored_and_all_is_restored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
  wakeup = signal.set_wakeup_fd(-1)
  signal.set_wakeup_fd(wakeup)
  try:
    with signals.LeaveOnSignals(), signals.StopRequest() as stop:
      signal.raise_signal(signal.SIGINT)
      assert stop.received == ''
      signal.raise_signal(signal.SIGTERM)
      assert stop.received == 'SIGTERM'
      _wait(lambda: stop.seen, seconds=30)  # a thread sees it as well
      assert stop.seen
      signal.raise_signal(signal.SIGTERM)  # within a second: the same one
      time.sleep(0.5)  # until the thread has seen it, too
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is before[1]
    assert signal.set_wakeup_fd(wakeup) == wakeup
  finally:
    signal.signal(signal.SIGINT, before[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('sent', 'status', 'when'),
  [
    (signal.SIGTERM, 143, 'Compiling the training step'),
    (signal.SIGKILL, -signal.SIGKILL, 'loss='),
  ],
)
def test_nothing_stays_of_a_training_program(sent, status, when, training_arguments, tmp_path):
  """Two workers load batches; SIGTERM comes while the step is compiled, without a cache."""
  before = unused_shared_memory()
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache')}
  workdir, output = tmp_path / 'workdir', tmp_path / 'output.txt'
  arguments = [*training_arguments, '--config.data.workers=2', f'--workdir={workdir}']
  with (
    output.open('w') as file,
    subprocess.Popen(
      [sys.executable, ROOT / 'main.py', *arguments],
      stdout=file,
      stderr=file,
      env=environment,
      start_new_session=True,
    ) as process,
  ):
    _wait(lambda: when in output.read_text() or process.poll() is not None, seconds=120)
    time.sleep(0.2)
    process.send_signal(sent)
    started = time.monotonic()
    process.wait(timeout=60)
  assert process.returncode == status, output.read_text()
  assert time.monotonic() - started < 5
  assert 'Traceback' not in output.read_text()
  if sent == signal.SIGTERM:
    assert not [path for path in workdir.rglob('*') if path.name.endswith(('.partial', '-tmp'))]
    assert not list((workdir / 'checkpoints').iterdir())
  _wait(lambda: not members(process.pid), seconds=20)
  assert not members(process.pid)
  _wait(lambda: unused_shared_memory() <= before, seconds=20)
  assert unused_shared_memory() <= before


@pytest.mark.slow
def test_of_two_processes_one_is_asked_and_both_stop(training_arguments, tmp_path):
  """JAX's distributed runtime has a handler of its own, which is not to take the signal."""
  workdir = tmp_path / 'workdir'
  arguments = [*training_arguments, '--config.train.steps=2000', '--config.eval.every=2000']
  processes = start_two_processes(*arguments, own=[[f'--workdir={workdir}']] * 2)
  log = workdir / 'log.jsonl'
  _wait(lambda: log.exists() and '"step": 1,' in log.read_text(), seconds=200)
  processes[1].send_signal(signal.SIGTERM)
  statuses, said = ends_of(processes)
  assert statuses == [STOPPED_STATUS] * 2, said
  assert all('after step' in text for text in said)
  assert 'Traceback' not in ''.join(said)
  assert has_checkpoint(workdir)


def _wait(condition: Callable[[], bool], *, seconds: float) -> None:
  """Returns once a condition holds, at the latest after some time."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline and not condition():
    time.sleep(0.05)
