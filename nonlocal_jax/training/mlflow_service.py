"""Runs in MLflow, at the address in `MLFLOW_TRACKING_URI`."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nonlocal_jax.errors import UserError, needs_packages
from nonlocal_jax.training.trackers import Opened, Outcome, Row

_STATUS = {'finished': 'FINISHED', 'stopped': 'KILLED', 'failed': 'FAILED'}
_LONGEST_VALUE = 6000  # characters of a parameter, of MLflow
_AT_ONCE = 100  # parameters in one request, of MLflow


class MlflowService:
  """A run in an experiment of MLflow."""

  name = 'MLflow'
  file = 'mlflow_run.json'

  def __init__(self, experiment: str, *, workdir: Path, config: Mapping[str, Any]):
    """Describes the run; nothing is sent yet.

    Args:
      experiment: Name of the experiment.
      workdir: Directory of the run, whose name is the run's there.
      config: The config, by section and name, which become the run's parameters.
    """
    self._experiment, self._workdir, self._config = experiment, workdir, config

  @staticmethod
  def check() -> None:
    """Checks, without a network, that there is a client for the address.

    Raises:
      UserError: If the package is missing, or the address is none.
    """
    os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')  # to its makers
    # Attempts are repeated here, and a request must not keep a run from its end.
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', '20')
    with needs_packages('runs in MLflow', extra='mlflow'):
      import mlflow

    try:
      mlflow.MlflowClient()
    except (mlflow.MlflowException, ImportError) as error:
      reason, *_ = re.split(r'\. |\n', str(error).strip())  # the first sentence
      raise UserError(
        f'config.log.mlflow needs MLflow, which cannot open {_address()} ({reason.rstrip(".")}): '
        'set MLFLOW_TRACKING_URI to the address of a server; or, for files, to file:FOLDER, and '
        'MLFLOW_ALLOW_FILE_STORE=true; or, for a database on this machine, pip install mlflow.'
      ) from error

  def open(self, run: Mapping[str, Any], *, was_closed: bool) -> Opened:
    """Opens the run, see `trackers.Service`. What was sent is there, closed or not."""
    import mlflow
    from mlflow.entities import Param

    self._client = client = mlflow.MlflowClient()
    if run.get('experiment') == self._experiment and 'run_id' in run:
      try:
        client.update_run(run['run_id'], status='RUNNING')
        self._run_id = run['run_id']
        self._say_opened()
        return Opened(dict(run))
      except mlflow.MlflowException as error:
        if error.error_code != 'RESOURCE_DOES_NOT_EXIST':  # else of another server, or removed
          raise
    experiment = client.get_experiment_by_name(self._experiment)
    place = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
    self._run_id = client.create_run(place, run_name=self._workdir.resolve().name).info.run_id
    params = [Param(name, value[:_LONGEST_VALUE]) for name, value in _leaves(self._config)]
    for first in range(0, len(params), _AT_ONCE):
      client.log_batch(self._run_id, params=params[first : first + _AT_ONCE])
    self._say_opened()
    return Opened({'experiment': self._experiment, 'run_id': self._run_id})

  def send(self, row: Row) -> None:
    """Sends a row, see `trackers.Service`."""
    from mlflow.entities import Metric

    metrics = [
      Metric(name, value, row.time, row.step) for name, value in row.named_values().items()
    ]
    self._client.log_batch(self._run_id, metrics=metrics)

  def close(self, outcome: Outcome) -> None:
    """Ends the run, see `trackers.Service`."""
    self._client.set_terminated(self._run_id, _STATUS[outcome])

  def _say_opened(self) -> None:
    print(f'The run {self._run_id} of MLflow is at {_address()}.', file=sys.stderr)


def _address() -> str:
  """The tracking address, without a password."""
  import mlflow

  scheme, separator, rest = mlflow.get_tracking_uri().partition('://')
  return f'{scheme}{separator}{rest.rpartition("@")[2]}'


def _leaves(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', str(value)
