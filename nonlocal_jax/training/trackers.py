"""Sends the log of a training run to services that track runs, beside the training.

`log.jsonl` has every row. What reached a service is noted in the workdir: when a run resumes, rows
that the service has are not sent again, and those that it lacks are. A service that cannot be
reached ends no run, and delays its end a little.
"""

import json
import math
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from nonlocal_jax.runtime.files import parse_object, write_whole
from nonlocal_jax.runtime.wording import counted

Outcome = Literal['finished', 'stopped', 'failed']

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0  # seconds between attempts
_DELAY_AT_THE_END = 2.0
_SECONDS_AT_THE_END = 30.0  # to send what is left


class Row(NamedTuple):
  """A line of the log.

  Attributes:
    step: Number of steps taken.
    is_evaluation: Whether it has the scores of an evaluation rather than the loss of a step.
    values: Numbers by name.
    time: When it was logged, in milliseconds since 1970.
  """

  step: int
  is_evaluation: bool
  values: Mapping[str, float]
  time: int

  @classmethod
  def from_line(cls, line: Mapping[str, Any]) -> 'Row':
    """Makes a row of a line of `log.jsonl`, logged now."""
    values = {name: value for name, value in line.items() if name != 'step'}
    return cls(line['step'], 'mIoU' in line, values, int(1000 * time.time()))

  @property
  def place(self) -> tuple[int, bool]:
    """Its place among the rows of a run: the evaluation at a step follows the step."""
    return self.step, self.is_evaluation

  def named_values(self) -> dict[str, float]:
    """The values by the names that TensorBoard shows, such as 'train/loss' and 'val/mIoU'."""
    group = 'val' if self.is_evaluation else 'train'
    return {f'{group}/{name}': value for name, value in self.values.items()}


class Opened(NamedTuple):
  """A run that a service has opened.

  Attributes:
    run: What identifies it, to be noted.
    rows: How many rows of the log it has, from the first one on; None for those that were sent.
  """

  run: dict[str, Any]
  rows: int | None = None


class Service(Protocol):
  """A service that tracks runs. Its methods may block and raise any error.

  Attributes:
    name: Its name in messages.
    file: Name of the file in the workdir that notes what reached it.
  """

  name: str
  file: str

  def open(self, run: Mapping[str, Any], *, was_closed: bool) -> Opened:
    """Opens a run.

    Args:
      run: What identifies the run that was opened before; empty if there was none.
      was_closed: Whether that was closed; otherwise the program was killed, or it was not reached.

    Returns:
      The run that goes on, identified by an equal `run`, or a new one.
    """
    ...

  def send(self, row: Row) -> None:
    """Sends a row."""
    ...

  def close(self, outcome: Outcome) -> None:
    """Ends the run."""
    ...


class Tracker:
  """Sends rows to a service in a thread, in their order."""

  def __init__(self, service: Service, workdir: Path, rows: Iterable[Row]):
    """Starts the thread.

    Args:
      service: The service.
      workdir: Directory of the run.
      rows: The rows of the log so far; later ones follow by `put`.
    """
    self._service, self._path = service, workdir / service.file
    self._rows = deque(rows)
    self._run, self._sent, self._is_closed = self._read_note()
    self._to_skip = 0
    self._outcome: Outcome | None = None
    self._deadline = math.inf  # `time.monotonic()`
    self._has_warned = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._work, name=service.name, daemon=True)
    self._thread.start()

  def put(self, row: Row) -> None:
    """Adds a row to those that are to be sent."""
    with self._changed:
      self._rows.append(row)
      self._changed.notify()

  def close(self, outcome: Outcome) -> None:
    """Sends what is left, for a while, and ends the run."""
    with self._changed:
      self._outcome, self._deadline = outcome, time.monotonic() + _SECONDS_AT_THE_END
      self._changed.notify()
    self._thread.join(_SECONDS_AT_THE_END)
    if self._rows:
      print(
        f'warning: {counted(len(self._rows), "row")} of the log did not reach '
        f'{self._service.name}; the same command sends what is missing.',
        file=sys.stderr,
      )

  def _work(self) -> None:
    is_open, delay = False, _FIRST_DELAY
    while time.monotonic() < self._deadline:
      try:
        if not is_open:
          self._open()
          is_open = True
        while self._rows and time.monotonic() < self._deadline:
          self._send(self._rows[0])
          self._rows.popleft()
        delay = _FIRST_DELAY
        if self._outcome and not self._rows:
          self._service.close(self._outcome)
          self._is_closed = True
          self._write_note()
          return
        with self._changed:
          self._changed.wait_for(lambda: self._rows or self._outcome)
      except Exception as error:  # noqa: BLE001, a service may raise anything
        self._warn(error)
        if self._outcome:
          time.sleep(min(delay, _DELAY_AT_THE_END))
          continue
        with self._changed:
          self._changed.wait_for(lambda: self._outcome, timeout=delay)
        delay = min(2 * delay, _LONGEST_DELAY)

  def _open(self) -> None:
    run, num_rows = self._service.open(self._run, was_closed=self._is_closed)
    if run != self._run or num_rows is not None:
      self._run, self._sent, self._to_skip = run, None, num_rows or 0
    self._is_closed = False
    self._write_note()

  def _send(self, row: Row) -> None:
    if self._sent is not None and row.place <= self._sent:
      return
    if self._to_skip:
      self._to_skip -= 1
    else:
      self._service.send(row)
    self._sent = row.place
    self._write_note()

  def _read_note(self) -> tuple[dict[str, Any], tuple[int, bool] | None, bool]:
    """The run that was opened before, the last row that was sent, and whether it was closed."""
    try:
      note = parse_object(self._path.read_bytes())
      step, is_evaluation = note['sent'] or (-1, False)
      return dict(note['run']), (int(step), bool(is_evaluation)), note['is_closed'] is True
    except FileNotFoundError:
      return {}, None, True
    except (OSError, ValueError, TypeError, KeyError) as error:
      print(
        f'warning: {self._path} cannot be read ({error}): {self._service.name} gets a new run.',
        file=sys.stderr,
      )
      return {}, None, True

  def _write_note(self) -> None:
    note = {'run': self._run, 'sent': self._sent, 'is_closed': self._is_closed}
    write_whole(self._path, json.dumps(note) + '\n')

  def _warn(self, error: Exception) -> None:
    if not self._has_warned:
      self._has_warned = True
      reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
      reason = re.sub(r'://[^/@\s]+@', '://', reason)  # a password
      print(
        f'warning: {self._service.name} cannot be reached ({reason[:300].rstrip(".")}): training '
        'goes on, and the log is sent later.',
        file=sys.stderr,
      )
