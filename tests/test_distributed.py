"""Two processes of which one is lost or fails: all end with one true line, and can start again."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

import main
from tests.conftest import ends_of, free_port, start_two_processes

pytestmark = pytest.mark.slow
HOST = socket.gethostname()


@pytest.fixture
def evaluation(photos, peer_checkpoint, tmp_path):
  """Arguments that evaluate a tiny network on three images."""
  return [
    f'--config={Path(main.__file__).parent}/configs/custom.py',
    f'--config.data.data_dir={tmp_path}/prepared',
    '--config.data.num_classes=19',
    '--config.data.ignore_labels=(20,)',
    '--config.model.width=8',
    '--config.eval.scale=(96,72)',
    '--mode=eval',
    f'--checkpoint={peer_checkpoint}',
    f'--workdir={tmp_path}/out',
    '--partner-timeout=60',
  ]


def child_of(process) -> int:
  """The process that computes."""
  children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
  deadline = time.monotonic() + 120
  while not (found := children.read_text().split()) and time.monotonic() < deadline:
    time.sleep(0.05)
  return int(found[0])


def read_until(process, pattern: str) -> str:
  """Reads what a process says up to a line that holds a pattern."""
  said = ''
  for line in process.stdout:
    said += line
    if re.search(pattern, line):
      return said
  raise AssertionError(said)


def errors(said: str) -> list[str]:
  """What is said after the lines that each evaluation starts with."""
  start = r'\[Gloo\]|Note on |Preparing|custom-val: |Runs on |Evaluating|This machine|warning: '
  return [line for line in re.split(r'[\n\r]+', said) if line and not re.match(start, line)]


def test_a_lost_process_is_named_and_the_same_command_starts_again(evaluation, photos, tmp_path):
  """SIGKILL for one that computes; for another with its parent; the third start goes through."""
  port, own = free_port(), [[f'--config.data.source_dir={photos}']] * 2
  for lost, line in (
    (
      1,
      f'error: process 1 ({HOST}) was ended by SIGKILL, as the system does where memory is short.',
    ),
    (0, 'error: process 0 (localhost) is gone: it was killed, or its machine was.'),
  ):
    processes = start_two_processes(*evaluation, own=own, port=port)
    read_until(processes[0], r'Runs on 4 devices \(cpu\) of 2 processes')
    number = signal.SIGKILL
    os.kill(child_of(processes[1]) if lost else processes[0].pid, number)
    started = time.monotonic()
    statuses, said = ends_of(processes)
    assert time.monotonic() - started < 30
    assert statuses == ([1, 1] if lost else [-number, 1])
    assert errors(said[1]) == [line]
    assert errors(said[0]) == ([line] if lost else [])
  statuses, said = ends_of(start_two_processes(*evaluation, own=own, port=port))
  assert statuses == [0, 0], said
  assert json.loads((tmp_path / 'out/metrics.json').read_text())['mIoU'] >= 0


def test_why_one_process_fails_is_said_by_all(evaluation, photos, tmp_path):
  own = [[f'--config.data.source_dir={place}'] for place in (photos, tmp_path / 'missing')]
  statuses, said = ends_of(start_two_processes(*evaluation, own=own))
  assert statuses == [1, 1]
  (first,), (second,) = map(errors, said)
  assert re.match(r'error: .*missing', second)
  assert first == second.replace('error: ', f'error: process 1 ({HOST}) failed: ')


@pytest.mark.parametrize('receivers', [(1,), (0, 1)])
def test_sigterm_saves_the_step_on_all_processes(
  receivers, training_config, training_arguments, tmp_path
):
  workdir = tmp_path / 'workdir'
  arguments = [*training_arguments, '--config.train.steps=500', '--config.eval.every=500']
  processes = start_two_processes(
    *arguments, '--partner-timeout=60', own=[[f'--workdir={workdir}']] * 2
  )
  deadline = time.monotonic() + 200
  log = workdir / 'log.jsonl'
  while not (log.exists() and '"step": 1,' in log.read_text()) and time.monotonic() < deadline:
    time.sleep(0.1)
  for index in receivers:
    processes[index].send_signal(signal.SIGTERM)
  statuses, said = ends_of(processes)
  assert statuses == [75, 75], said
  steps = [int(path.name) for path in (workdir / 'checkpoints').iterdir()]
  for text in said:
    assert f'after step {max(steps):,}, which is saved' in text
