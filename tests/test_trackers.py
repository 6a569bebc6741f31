"""The log of a training run in Weights & Biases and MLflow, without a network."""

import json
import math
import re
import struct
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from nonlocal_jax.errors import RunStopped, UserError
from nonlocal_jax.training import trackers
from nonlocal_jax.training.log import TrainingLog, read_log
from nonlocal_jax.training.mlflow_service import MlflowService
from nonlocal_jax.training.wandb_service import WandbService
from tests.conftest import free_port, train_and_evaluate

CONFIG = {'name': 'tiny', 'train': {'steps': 9, 'crop': (64, 64)}, 'init_backbone': ''}
TIMING = ('images_per_second', 'waiting_for_data')


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
  """Services write to files; their settings are not the user's."""
  for name, value in {
    'WANDB_MODE': 'offline',
    'WANDB_ERROR_REPORTING': 'false',
    'WANDB_CONFIG_DIR': str(tmp_path / 'wandb_config'),
    'WANDB_CACHE_DIR': str(tmp_path / 'wandb_cache'),
    'MLFLOW_DISABLE_TELEMETRY': 'true',
    'MLFLOW_ALLOW_FILE_STORE': 'true',
    'MLFLOW_TRACKING_URI': f'file://{tmp_path}/mlruns',
    'NETRC': str(tmp_path / 'netrc'),
  }.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv('WANDB_API_KEY', raising=False)


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / 'workdir').mkdir()
  return tmp_path / 'workdir'


def log_steps(workdir, start, end, services, *, error=None):
  """Logs each step, and an evaluation every two; raises `error` at the end."""
  with TrainingLog(workdir, batch_size=2, start=start, services=services) as log:
    for step in range(start + 1, end + 1):
      log.write(step, {'loss': 1 / step, 'loss_auxiliary': 2 / step, 'accuracy': 0.5}, lr=0.1)
      if step % 2 == 0:
        picture = np.zeros((4, 4, 3), np.uint8)
        log.write_evaluation(step, {'aAcc': 50.0 + step, 'mIoU': math.nan}, picture)
    if error is not None:
      raise error


def logged(workdir):
  """(step, name, value) of every number in the log, by the names that TensorBoard shows."""
  return sorted(
    (line['step'], f'{"val" if "mIoU" in line else "train"}/{name}', repr(float(value)))
    for line in read_log(workdir / 'log.jsonl')
    for name, value in line.items()
    if name not in ('step', *TIMING)
  )


class Recorder:
  """A service in memory, which fails as often as it is told."""

  name, file = 'the service', 'service_run.json'

  def __init__(self, number=1, failures=0, rows=None):
    self.number, self.failures, self.has = number, failures, rows
    self.rows, self.outcomes, self.failed = [], [], threading.Event()

  def _reach(self):
    if self.failures:
      self.failures -= 1
      self.failed.set()
      raise ConnectionError('no route to host.\n  in detail')

  def open(self, run, *, was_closed):
    self._reach()
    self.was_closed = was_closed
    return trackers.Opened({'number': self.number}, self.has)

  def send(self, row):
    self._reach()
    self.rows.append((*row.place, row.values['loss' if 'loss' in row.values else 'aAcc']))

  def close(self, outcome):
    self.outcomes.append(outcome)


STEPS_TO_4 = [
  *((1, False, 1.0), (2, False, 1 / 2), (2, True, 52.0)),
  *((3, False, 1 / 3), (4, False, 1 / 4), (4, True, 54.0)),
]


def test_rows_reach_a_service_once_and_in_order(workdir):
  first, second, third = Recorder(), Recorder(), Recorder()
  with pytest.raises(RunStopped):
    log_steps(workdir, 0, 4, [first], error=RunStopped('signal'))
  assert first.rows == STEPS_TO_4
  with pytest.raises(UserError):
    log_steps(workdir, 2, 5, [second], error=UserError('failed'))  # resumes before what was sent
  assert second.rows == [(5, False, 1 / 5)]
  log_steps(workdir, 5, 5, [third])
  assert third.rows == []
  assert [x.outcomes for x in (first, second, third)] == [['stopped'], ['failed'], ['finished']]


def test_a_service_that_is_new_or_was_missed_gets_all_rows(workdir, capsys):
  log_steps(workdir, 0, 4, [])
  late, other, after = Recorder(), Recorder(number=2), Recorder(number=2)
  for service in (late, other):
    log_steps(workdir, 4, 4, [service])
    assert service.rows == STEPS_TO_4
  (workdir / 'service_run.json').write_text('{"run"')
  log_steps(workdir, 4, 4, [after])
  assert after.rows == STEPS_TO_4
  assert 'service_run.json cannot be read (' in capsys.readouterr().err


def test_a_service_that_lost_rows_gets_them_again(workdir):
  """It has three, and the run resumes at the second step."""
  again = Recorder(rows=3)
  log_steps(workdir, 0, 4, [Recorder()])
  note = json.loads((workdir / 'service_run.json').read_text())
  (workdir / 'service_run.json').write_text(json.dumps({**note, 'is_closed': False}))
  log_steps(workdir, 2, 4, [again])
  assert again.was_closed is False
  assert again.rows == STEPS_TO_4[3:]
  last = Recorder()
  log_steps(workdir, 4, 5, [last])
  assert last.was_closed is True
  assert last.rows == [(5, False, 1 / 5)]


def test_failures_delay_nothing_and_are_said_once(workdir, monkeypatch, capsys):
  monkeypatch.setattr(trackers, '_FIRST_DELAY', 0.01)
  service = Recorder(failures=4)
  log_steps(workdir, 0, 4, [service])
  assert service.rows == STEPS_TO_4
  said = capsys.readouterr().err
  said = ''.join(line for line in said.splitlines(True) if 'tensorboardX' not in line)
  assert said == (
    'warning: the service cannot be reached (no route to host): training goes on, and the log is '
    'sent later.\n'
  )


def test_a_service_that_never_answers_ends_no_run(workdir, monkeypatch, capsys):
  monkeypatch.setattr(trackers, '_SECONDS_AT_THE_END', 0.2)
  log_steps(workdir, 0, 4, [Recorder(failures=10**9)])
  assert (
    'warning: 6 rows of the log did not reach the service; the same command sends what is '
    'missing.' in capsys.readouterr().err
  )
  blocked = Recorder()
  release = threading.Event()
  blocked.send = lambda row: release.wait()
  log_steps(workdir, 4, 4, [blocked])
  assert '6 rows of the log did not reach the service' in capsys.readouterr().err
  release.set()


def test_other_processes_send_nothing(workdir, monkeypatch):
  monkeypatch.setattr('nonlocal_jax.training.log.is_first_process', lambda: False)
  service = Recorder()
  log_steps(workdir, 0, 4, [service])
  assert service.rows == []
  assert not (workdir / service.file).exists()


def records_of(path):
  """Records of a .wandb file: LevelDB's log format after a header of seven bytes."""
  data, block = path.read_bytes(), 2**15
  assert data.startswith(b':W&B')
  place, parts = 7, []
  while place < len(data):
    if block - place % block < 7:
      place += block - place % block
      continue
    _, size, kind = struct.unpack_from('<IHB', data, place)
    parts.append(data[place + 7 : place + 7 + size])
    place += 7 + size
    if kind in (1, 4):  # whole, or the last part
      yield b''.join(parts)
      parts = []


def wandb_history(workdir):
  """What the files of offline runs hold: run ids, configs, rows and exit codes."""
  from wandb.proto import wandb_internal_pb2

  found = types.SimpleNamespace(ids=[], configs=[], rows=[], exits=[])
  for path in sorted(workdir.glob('wandb/offline-run-*/*.wandb')):
    for data in records_of(path):
      record = wandb_internal_pb2.Record.FromString(data)
      kind = record.WhichOneof('record_type')
      if kind == 'run':
        found.ids.append(record.run.run_id)
        update = record.run.config.update
        found.configs.append({item.key: json.loads(item.value_json) for item in update})
      elif kind == 'history':
        items = {item.key or item.nested_key[0]: item for item in record.history.item}
        found.rows.append({key: json.loads(item.value_json) for key, item in items.items()})
      elif kind == 'exit':
        found.exits.append(record.exit.exit_code)
  return found


def test_wandb_has_every_number_once_after_a_stop(workdir, capsys):
  WandbService.check()
  with pytest.raises(UserError):  # at step 5, after the checkpoint of step 2
    log_steps(workdir, 0, 5, [wandb(workdir)], error=UserError('failed'))
  time.sleep(1.1)  # its folders are named after the second
  log_steps(workdir, 2, 6, [wandb(workdir)])
  found = wandb_history(workdir)
  assert len(found.ids) >= 2
  assert len(set(found.ids)) == 1
  assert set(found.exits) == {0, 1}
  assert found.configs[0]['train'] == {'steps': 9, 'crop': [64, 64]}
  numbers = sorted(
    (row['step'], name, repr(float(value)))
    for row in found.rows
    for name, value in row.items()
    if name.startswith(('train/', 'val/')) and name.partition('/')[2] not in TIMING
  )
  assert numbers == logged(workdir)
  assert f'The run {found.ids[0]} of Weights & Biases is in {workdir}' in capsys.readouterr().err


def test_wandb_gets_all_numbers_in_a_new_run_after_a_kill_without_a_server(workdir, capsys):
  """It keeps rows in memory, so that nobody knows which of them are lost."""
  first = wandb(workdir)
  with TrainingLog(workdir, batch_size=2, start=0, services=[first]) as log:
    log.write(1, {'loss': 1.0, 'loss_auxiliary': 2.0, 'accuracy': 0.5}, lr=0.1)
  note = json.loads((workdir / 'wandb_run.json').read_text())
  assert note['is_closed']
  (workdir / 'wandb_run.json').write_text(json.dumps({**note, 'is_closed': False}))
  log_steps(workdir, 1, 2, [wandb(workdir)])
  found = wandb_history(workdir)
  before = note['run']['id']
  after = json.loads((workdir / 'wandb_run.json').read_text())['run']['id']
  assert before != after
  assert set(found.ids) == {before, after}
  assert sorted(row['step'] for row in found.rows) == [1, 1, 2, 2]
  said = f'It has the rows of {before}, too, which was cut off and may lack some.'
  assert said in capsys.readouterr().err


def test_wandb_goes_on_from_what_its_server_has_after_a_kill(workdir, monkeypatch):
  """There is no server here: what the package returns for one is made up."""
  opened, rows = [], []

  def init(**options):
    opened.append((options['project'], options['id'], options['resume']))
    return types.SimpleNamespace(
      url='https://server/run',
      starting_step=4,
      define_metric=lambda *_, **__: None,
      log=lambda values: rows.append((values['step'], 'val/mIoU' in values)),
      finish=lambda exit_code: None,
    )

  package = types.SimpleNamespace(
    init=init,
    Settings=dict,
    setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode='online')),
  )
  monkeypatch.setitem(sys.modules, 'wandb', package)
  log_steps(workdir, 0, 4, [wandb(workdir)])
  assert rows == [row[:2] for row in STEPS_TO_4]
  note = json.loads((workdir / 'wandb_run.json').read_text())
  rows.clear()
  log_steps(workdir, 4, 4, [wandb(workdir)])
  assert rows == []  # it was closed: all are there
  (workdir / 'wandb_run.json').write_text(json.dumps({**note, 'is_closed': False}))
  log_steps(workdir, 2, 5, [wandb(workdir)])
  assert rows == [*(row[:2] for row in STEPS_TO_4[4:]), (5, False)]
  assert set(opened) == {('project', note['run']['id'], 'allow')}


def wandb(workdir):
  return WandbService('project', workdir=workdir, config=CONFIG)


def mlflow(workdir, experiment='experiment'):
  return MlflowService(experiment, workdir=workdir, config=CONFIG)


def mlflow_runs(experiment='experiment'):
  """Runs of an experiment and the numbers of each, as MLflow's client reads them."""
  from mlflow import MlflowClient

  client = MlflowClient()
  place = client.get_experiment_by_name(experiment).experiment_id
  runs = client.search_runs([place])
  return runs, [
    sorted(
      (metric.step, name, repr(float(metric.value)))
      for name in run.data.metrics
      if name.partition('/')[2] not in TIMING
      for metric in client.get_metric_history(run.info.run_id, name)
    )
    for run in runs
  ]


def test_mlflow_has_every_number_once_after_a_stop(workdir, capsys):
  MlflowService.check()
  with pytest.raises(RunStopped):  # at step 5, after the checkpoint of step 2
    log_steps(workdir, 0, 5, [mlflow(workdir)], error=RunStopped('signal'))
  (run,), _ = mlflow_runs()
  assert run.info.status == 'KILLED'
  log_steps(workdir, 2, 6, [mlflow(workdir)])
  (run,), (numbers,) = mlflow_runs()
  assert numbers == logged(workdir)
  assert (run.info.status, run.info.run_name) == ('FINISHED', 'workdir')
  assert run.data.params == {
    'name': 'tiny',
    'train.steps': '9',
    'train.crop': '(64, 64)',
    'init_backbone': '',
  }
  assert f'The run {run.info.run_id} of MLflow is at file://' in capsys.readouterr().err
  log_steps(workdir, 6, 7, [mlflow(workdir, 'other')])  # the experiment was changed
  _, (numbers,) = mlflow_runs('other')
  assert numbers == logged(workdir)


def test_mlflow_gets_later_what_a_network_failure_kept(workdir, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trackers, '_SECONDS_AT_THE_END', 4.0)
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'http://user:secret@127.0.0.1:{free_port()}')
  MlflowService.check()
  log_steps(workdir, 0, 2, [mlflow(workdir)])
  said = capsys.readouterr().err
  assert 'warning: MLflow cannot be reached (' in said
  assert '3 rows of the log did not reach MLflow; the same command sends what is missing.' in said
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file://{tmp_path}/mlruns')
  log_steps(workdir, 2, 2, [mlflow(workdir)])
  _, (numbers,) = mlflow_runs()
  assert numbers == logged(workdir)
  assert 'secret' not in said + Path(workdir / 'mlflow_run.json').read_text()
  # A run that was removed there, or is on another server, is made anew.
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file://{tmp_path}/other')
  log_steps(workdir, 2, 3, [mlflow(workdir)])
  _, (numbers,) = mlflow_runs()
  assert numbers == logged(workdir)


@pytest.mark.parametrize(
  ('service', 'package'), [(WandbService, 'wandb'), (MlflowService, 'mlflow')]
)
def test_missing_packages_are_a_sentence(service, package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(UserError) as caught:
    service.check()
  assert str(caught.value) == (
    f'runs in {service.name} need the package {package}, which the core installation leaves out; '
    f"in a clone, run: pip install '.[{package}]'."
  )


def test_wandb_without_an_account_is_a_sentence(monkeypatch):
  import wandb

  monkeypatch.setenv('WANDB_MODE', 'online')
  wandb.teardown()  # it has read the environment
  with pytest.raises(UserError, match='needs an account at Weights & Biases: run `wandb login`'):
    WandbService.check()
  wandb.teardown()


def test_an_address_that_is_none_is_a_sentence(monkeypatch):
  monkeypatch.delenv('MLFLOW_ALLOW_FILE_STORE')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', 'file:///tmp/runs')
  with pytest.raises(UserError) as caught:
    MlflowService.check()
  assert re.fullmatch(
    r'config.log.mlflow needs MLflow, which cannot open file:///tmp/runs \(.{,130}\): set '
    r'MLFLOW_TRACKING_URI to the address of a server; or, for files, .*FILE_STORE=true; or, .*',
    str(caught.value),
  )
  monkeypatch.setenv('MLFLOW_TRACKING_URI', 'nowhere://place')
  with pytest.raises(UserError, match=r'which cannot open nowhere://place \(.*MLFLOW_TRACK'):
    MlflowService.check()


@pytest.mark.slow
def test_a_training_run_sends_its_log(training_config, workdir):
  config = training_config.copy_and_resolve_references()
  config.log.mlflow, config.log.wandb = 'experiment', 'project'
  config.train.steps = 2
  train_and_evaluate(config, workdir)
  (run,), (numbers,) = mlflow_runs()
  assert numbers == logged(workdir)
  assert run.data.params['train.steps'] == '2'
  found = wandb_history(workdir)
  assert [row['step'] for row in found.rows] == [1, 2, 2]
  config.log.mlflow = config.log.wandb = ''  # may change when a run resumes
  train_and_evaluate(config, workdir)
  assert len(mlflow_runs()[0]) == 1
