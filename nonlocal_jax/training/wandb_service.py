"""Runs in Weights & Biases; its own environment variables say where, and as whom.

`WANDB_MODE=offline` keeps the run in the workdir, from where `wandb sync` sends it.
"""

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nonlocal_jax.errors import UserError, needs_packages
from nonlocal_jax.training.trackers import Opened, Outcome, Row


class WandbService:
  """A run in a project of Weights & Biases."""

  name = 'Weights & Biases'
  file = 'wandb_run.json'

  def __init__(self, project: str, *, workdir: Path, config: Mapping[str, Any]):
    """Describes the run; nothing is sent yet.

    Args:
      project: Name of the project.
      workdir: Directory of the run, whose name is the run's there.
      config: The config, by section and name.
    """
    self._project, self._workdir, self._config = project, workdir, config
    self._new_id = secrets.token_hex(4)

  @staticmethod
  def check() -> None:
    """Checks, without a network, that a run can be opened.

    Raises:
      UserError: If the package is missing, or there is no account.
    """
    os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')  # to its makers
    with needs_packages('runs in Weights & Biases', extra='wandb'):
      import wandb

    is_online = wandb.setup().settings.mode == 'online'
    if is_online and not wandb.login(prompt=False, verify=False):
      raise UserError(
        'config.log.wandb needs an account at Weights & Biases: run `wandb login`, set '
        'WANDB_API_KEY, or set WANDB_MODE=offline to keep the run in the workdir.'
      )

  def open(self, run: Mapping[str, Any], *, was_closed: bool) -> Opened:
    """Opens the run, see `trackers.Service`.

    The package gathers rows in memory: after a program was killed some are lost. Its server tells
    how many it has. Without one nobody knows, and a new run gets them all.
    """
    import wandb

    is_offline = wandb.setup().settings.mode == 'offline'
    identity = {'project': self._project, 'is_offline': is_offline}
    is_known = identity.items() <= run.items() and 'id' in run
    goes_on = is_known and (was_closed or not is_offline)
    identity['id'] = run['id'] if goes_on else self._new_id
    self._run = wandb.init(
      project=self._project,
      id=identity['id'],
      resume='allow',
      name=self._workdir.resolve().name,
      dir=str(self._workdir),
      config=dict(self._config),
      settings=wandb.Settings(silent=True, console='off', disable_git=True, init_timeout=60),
    )
    # Its own count of rows cannot go back, and drops a second row of a step.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')
    where = f'at {self._run.url}'
    if is_offline:
      where = f'in {Path(self._run.dir).parent}, for `wandb sync`'
    print(f'The run {identity["id"]} of Weights & Biases is {where}.', file=sys.stderr)
    if is_known and not goes_on:
      print(
        f'It has the rows of {run["id"]}, too, which was cut off and may lack some.',
        file=sys.stderr,
      )
    return Opened(identity, self._run.starting_step if goes_on and not was_closed else None)

  def send(self, row: Row) -> None:
    """Sends a row, see `trackers.Service`."""
    self._run.log({'step': row.step, **row.named_values()})

  def close(self, outcome: Outcome) -> None:
    """Ends the run, see `trackers.Service`."""
    self._run.finish(exit_code=0 if outcome == 'finished' else 1)
