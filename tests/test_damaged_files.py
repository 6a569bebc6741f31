"""Damaged files of a run are left out with a warning, or refused in a sentence."""

import json
import math
import shutil
from pathlib import Path

import pytest

from nonlocal_jax.errors import UserError
from nonlocal_jax.training.log import TrainingLog, read_log, summary_table, write_curves
from nonlocal_jax.training.run_files import check_same_run
from nonlocal_jax.weights.checkpoints import read_description

RUN = Path(__file__).parent / 'data/workdir_of_2026_11'
NO_OBJECTS = (b'', b'[1, 2]\n', b'5\n', b'null\n', b'"text"\n', b'[' * 100_000, b'\xff\xe9{}\n')


@pytest.fixture
def workdir(tmp_path):
  for name in ('log.jsonl', 'config.json', 'model.json'):
    shutil.copy(RUN / name, tmp_path / name)
  (tmp_path / 'checkpoints/36').mkdir(parents=True)
  return tmp_path


def damaged(path: Path) -> list[bytes]:
  """Versions of a file that are no JSON: cut, with zeros inside, all zeros, and others."""
  data = path.read_bytes()
  third = len(data) // 3
  inside = data[:third] + bytes(3) + data[third + 3 :]
  return [data[: len(data) // 2], inside, bytes(len(data)), *NO_OBJECTS]


@pytest.mark.parametrize('name', ['config.json', 'model.json'])
def test_damaged_descriptions_are_refused(name, workdir):
  path = workdir / name
  whole = path.read_bytes()

  def read():
    if name == 'model.json':
      return read_description(workdir)
    return check_same_run(workdir, json.loads(whole), {})

  expected = read()
  for data in damaged(path):
    path.write_bytes(data)
    with pytest.raises(UserError, match=f'{path} (cannot be read|is no description)'):
      read()
  for encoding in ('utf-8-sig', 'utf-16'):  # as editors on Windows save them
    path.write_bytes(whole.decode().encode(encoding))
    assert read() == expected


def test_damaged_lines_of_a_log_are_left_out(workdir, capsys):
  path = workdir / 'log.jsonl'
  whole = path.read_bytes()
  lines = read_log(path)
  assert len(lines) == 38
  for encoding in ('utf-8-sig', 'utf-16'):
    path.write_bytes(whole.decode().encode(encoding))
    assert read_log(path) == lines
  odd = [b'{"step": "x"}', b'{"step": 1, "loss": "x"}', b'{"loss": 1}', b'\0\0\0', *NO_OBJECTS[1:]]
  path.write_bytes(whole + b''.join(line.rstrip(b'\n') + b'\n' for line in odd) + b'{"step": 3')
  before = path.read_bytes()
  with TrainingLog(workdir, batch_size=1, start=36) as log:
    assert len(log.evaluations) == 2
  assert (workdir / 'log.jsonl.damaged').read_bytes() == before
  assert f'warning: {path} has {len(odd)} damaged lines' in capsys.readouterr().err
  assert read_log(path) == lines


def test_undefined_numbers_are_null_in_the_log(tmp_path):
  values = {'loss': math.nan, 'loss_auxiliary': math.inf, 'accuracy': 0.5}
  (tmp_path / 'log.jsonl').write_text('{"step": 1, "mIoU": NaN}\n')  # of an earlier version
  with TrainingLog(tmp_path, batch_size=1, start=1) as log:
    log.write(2, values, lr=0.1)
    log.evaluations.append({'step': 2, 'mIoU': 30.0})
    assert summary_table(log.evaluations).splitlines()[1].split() == ['best', '2', '30.00']
  text = (tmp_path / 'log.jsonl').read_text()
  first, second = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
  assert (first['step'], first['mIoU']) == (1, None)
  assert (second['loss'], second['loss_auxiliary'], second['accuracy']) == (None, None, 0.5)
  write_curves(tmp_path / 'log.jsonl', tmp_path / 'curves.png')
