"""Workdirs: one run at a time, and runs that were stopped before their first checkpoint."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from nonlocal_jax.data.label_values import LabelValue
from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.locks import used_alone
from nonlocal_jax.training.log import TrainingLog
from nonlocal_jax.training.run_files import (
  check_same_data,
  write_data_identity,
  write_run_files,
)
from nonlocal_jax.weights.description import ModelDescription
from tests.conftest import train_and_evaluate

HOLD = """
import sys, time
from pathlib import Path
from nonlocal_jax.runtime.locks import used_alone
with used_alone(Path(sys.argv[1]), 'in use'):
  print('held', flush=True)
  time.sleep(100)
"""


def test_a_second_run_in_a_workdir_is_refused(training_config, tmp_path):
  """Until the first has ended, by SIGKILL as well; nothing is written before."""
  workdir = tmp_path / 'workdir'
  command = [sys.executable, '-c', HOLD, workdir]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
    try:
      assert other.stdout.readline() == 'held\n'
      with pytest.raises(UserError, match=f'{workdir} is in use by another run; wait for its end'):
        train_and_evaluate(training_config, workdir)
      assert [path.name for path in workdir.iterdir()] == ['.lock']
    finally:
      other.send_signal(signal.SIGKILL)
  with used_alone(workdir, 'in use'):
    pass


def test_programs_that_a_run_starts_do_not_keep_its_lock(tmp_path):
  command = [sys.executable, '-c', 'print("up", flush=True); input()']
  with used_alone(tmp_path, 'in use'):
    child = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
    )
    assert child.stdout.readline() == b'up\n'
  with used_alone(tmp_path, 'in use'):
    assert child.poll() is None
  child.communicate(b'\n')


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
  with used_alone(tmp_path / 'runs/name', 'in use'):
    assert (tmp_path / 'runs/name/.lock').exists()
  assert list(tmp_path.iterdir()) == []
  with used_alone(tmp_path / 'name', 'in use'):
    (tmp_path / 'name/log.jsonl').touch()
  assert sorted(path.name for path in (tmp_path / 'name').iterdir()) == ['.lock', 'log.jsonl']


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
  def flock(*unused):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, 'flock', flock)
  with used_alone(tmp_path, 'in use'):
    pass
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert f'warning: {tmp_path} cannot be locked ([Errno 37] No locks available)' in said


@pytest.mark.slow
@dataclasses.dataclass
class Split:
  """What identifies a prepared split."""

  sizes: list[tuple[int, int]]
  label_values: dict[int, LabelValue]

  def __len__(self):
    return len(self.sizes)


TRAIN = Split([(4, 6), (4, 6)], {0: LabelValue(30, '/a/0.png'), 1: LabelValue(18, '/a/1.png')})


@pytest.mark.parametrize(
  ('classes', 'train', 'said'),
  [
    (['sky', 'sea'], TRAIN, None),
    (['sky', 'ocean'], TRAIN, None),  # another name
    (
      ['sky', 'sea'],  # moved
      dataclasses.replace(
        TRAIN,
        label_values={0: LabelValue(30, '/b/0.png'), 1: LabelValue(18, '/b/1.png')},
      ),
      None,
    ),
    (['sea', 'sky'], TRAIN, r"holds a run whose class 1 is 'sea', which is class 0 now: choose"),
    (['sky', 'land', 'sea'], TRAIN, r"holds a run whose class 1 is 'sea', which is class 2 now"),
    (
      ['sky', 'sea'],
      dataclasses.replace(
        TRAIN, label_values={0: LabelValue(31, '/a/0.png'), 1: LabelValue(17, '/a/1.png')}
      ),
      r'other training images or labels \(2 images, now 2\): choose another workdir; --checkpoint=',
    ),
    (['sky', 'sea'], dataclasses.replace(TRAIN, sizes=[(4, 6)]), r'or labels \(2 images, now 1\)'),
  ],
)
def test_a_run_resumes_on_its_own_data_only(classes, train, said, tmp_path):
  config = NonLocalNetConfig.from_depth(14, num_classes=2, width=4)
  description = ModelDescription(
    config,
    EvalProtocol(),
    dataset='custom',
    classes=('sky', 'sea'),
    palette=((0, 0, 0), (1, 1, 1)),
    source='here',
    sha256=None,
    num_batches_tracked={},
  )
  check_same_data(tmp_path, ['sea', 'sky'], TRAIN)  # no run is there
  write_run_files(tmp_path, {}, description)
  write_data_identity(tmp_path, TRAIN)
  (tmp_path / 'metrics.json').write_text('{}')
  if said is None:
    check_same_data(tmp_path, classes, train)
    return
  with pytest.raises(UserError, match=said):
    check_same_data(tmp_path, classes, train)


def test_a_damaged_identity_of_the_data_is_a_sentence(tmp_path):
  (tmp_path / 'metrics.json').write_text('{}')
  check_same_data(tmp_path, ['sky', 'sea'], TRAIN)  # of an earlier version
  (tmp_path / 'training_data.json').write_text('{')
  with pytest.raises(UserError, match=r'training_data\.json cannot be read .* choose anoth'):
    check_same_data(tmp_path, ['sky', 'sea'], TRAIN)


def test_a_run_without_a_checkpoint_makes_room_for_another_config(
  training_config, tmp_path, monkeypatch, capsys
):
  workdir, stopped = tmp_path / 'workdir', tmp_path / 'workdir/stopped_runs/1'
  write = TrainingLog.write

  def write_one_line(*arguments, **options):
    write(*arguments, **options)
    raise UserError('the run ends here')

  monkeypatch.setattr(TrainingLog, 'write', write_one_line)
  with pytest.raises(UserError, match='the run ends here'):
    train_and_evaluate(training_config, workdir)
  log = (workdir / 'log.jsonl').read_text()
  assert json.loads(log)['step'] == 1
  corrected = training_config.copy_and_resolve_references()
  corrected.train.ratio_range = (1.0, 1.5)
  capsys.readouterr()
  with pytest.raises(UserError, match='the run ends here'):
    train_and_evaluate(corrected, workdir)
  assert f'its config and log were moved to {stopped}.' in capsys.readouterr().err
  assert (stopped / 'log.jsonl').read_text() == log
  ranges = [
    json.loads((place / 'config.json').read_text())['train']['ratio_range']
    for place in (stopped, workdir)
  ]
  assert ranges == [[0.5, 2.0], [1.0, 1.5]]
  second = (workdir / 'log.jsonl').read_text()
  assert second != log
  assert json.loads(second)['step'] == 1  # one line
  for place in (stopped, workdir):
    assert len(list(place.glob('events.out.tfevents.*'))) == 1
    assert {'train.csv', 'eval.csv'} <= {path.name for path in place.iterdir()}
