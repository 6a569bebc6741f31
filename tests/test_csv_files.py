"""The CSV files beside the log of a training run."""

import csv
import json
import math

import numpy as np
import pytest

from nonlocal_jax.training.log import TrainingLog


def from_csv(path):
  """The rows of a CSV file; numbers are what Python reads."""
  with path.open(newline='') as file:
    return [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]


def from_log(workdir, name):
  """The lines of the log that have a name; null is NaN."""
  lines = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
  return [
    {key: math.nan if value is None else float(value) for key, value in line.items()}
    for line in lines
    if name in line
  ]


def check_csv(workdir):
  """Checks that the CSV files have the same values as the log, bit by bit."""
  for file, name in (('train.csv', 'loss'), ('eval.csv', 'mIoU')):
    lines = from_log(workdir, name)
    for line in lines:
      del line['crc32']
    assert list(map(repr, from_csv(workdir / file))) == list(map(repr, lines))


def log_steps(workdir, start, end, **more):
  with TrainingLog(workdir, batch_size=2, start=start) as log:
    for step in range(start + 1, end + 1):
      values = {'loss': 1 / (3 * step), 'loss_auxiliary': math.inf, 'accuracy': 1e-30 * step}
      log.write(step, {**values, **more}, lr=0.1 / 3)
      if step % 2 == 0:
        picture = np.zeros((4, 4, 3), np.uint8)
        log.write_evaluation(step, {'aAcc': 100 / step, 'mIoU': math.nan}, picture)


def test_they_hold_the_values_of_the_log(tmp_path):
  log_steps(tmp_path, 0, 4)
  check_csv(tmp_path)
  header, *rows = (tmp_path / 'train.csv').read_text().splitlines()
  assert header == 'step,loss,loss_auxiliary,accuracy,lr,images_per_second,waiting_for_data'
  assert [row.split(',')[0] for row in rows] == ['1', '2', '3', '4']
  assert (tmp_path / 'eval.csv').read_text() == 'step,aAcc,mIoU\n2,50.0,nan\n4,25.0,nan\n'


def test_a_run_that_resumes_takes_up_their_rows(tmp_path):
  """After it was killed at step 7, within a line, and resumed at step 4."""
  log_steps(tmp_path, 0, 7)
  for file in ('log.jsonl', 'train.csv', 'eval.csv'):
    with (tmp_path / file).open('a') as opened:
      opened.write('{"st' if file == 'log.jsonl' else '8,0.0')
  log_steps(tmp_path, 4, 9)
  check_csv(tmp_path)
  steps = [row['step'] for row in from_csv(tmp_path / 'train.csv')]
  assert steps == list(range(1, 10))
  assert [row['step'] for row in from_csv(tmp_path / 'eval.csv')] == [2, 4, 6, 8]


def test_a_run_of_an_earlier_version_gets_them_when_it_resumes(tmp_path):
  log_steps(tmp_path, 0, 2)
  for file in ('train.csv', 'eval.csv'):
    (tmp_path / file).unlink()
  log_steps(tmp_path, 2, 3, update_norm=0.5)  # a value that is new in this version
  header, *rows = (tmp_path / 'train.csv').read_text().splitlines()
  assert header.endswith(',waiting_for_data,update_norm')
  assert [row.rpartition(',')[2] for row in rows] == ['', '', '0.5']
  assert len((tmp_path / 'eval.csv').read_text().splitlines()) == 2


def test_there_are_no_headers_without_rows(tmp_path):
  with TrainingLog(tmp_path, batch_size=1, start=0):
    pass
  assert (tmp_path / 'train.csv').read_bytes() == (tmp_path / 'eval.csv').read_bytes() == b''


@pytest.mark.parametrize('name', ['train.csv', 'eval.csv'])
def test_only_the_first_process_writes_them(name, tmp_path, monkeypatch):
  monkeypatch.setattr('nonlocal_jax.training.log.is_first_process', lambda: False)
  log_steps(tmp_path, 0, 2)
  assert not (tmp_path / name).exists()
