"""The log of a training run: `log.jsonl`, CSV files, TensorBoard events, services, curves."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from nonlocal_jax.errors import RunStopped, UserError
from nonlocal_jax.runtime.files import CHECKSUM, parse_object, sealed, unsealed, write_whole
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.training.csv_files import EVALUATION, TRAINING, CsvFile
from nonlocal_jax.training.trackers import Outcome, Row, Service, Tracker

LOG = 'log.jsonl'
CURVES = 'curves.png'
_TIMING = ('images_per_second', 'waiting_for_data')
_POINTS = 200  # maximum number of points of a smoothed curve


class TrainingLog:
  """Writes metrics to `log.jsonl`, CSV files, TensorBoard and services; a context manager.

  Only the first process writes. All processes keep the scores.
  """

  def __init__(
    self, workdir: Path, *, batch_size: int, start: int, services: Sequence[Service] = ()
  ):
    """Opens the log of a run at step `start` and removes the lines of later steps.

    Args:
      workdir: Directory of the run.
      batch_size: Global batch size.
      start: Number of steps taken.
      services: Services that get the lines as well, those before `start` included.
    """
    self._batch_size = batch_size
    self._step, self._time, self._waited = start, time.perf_counter(), 0.0
    self._path = path = workdir / LOG
    logged, num_damaged = _read(path)
    lines = [line for line in logged if line['step'] <= start]
    self.evaluations = _of_evaluations(lines)
    self._writer = None
    self._tables: dict[str, CsvFile] = {}
    if is_first_process():
      if num_damaged:
        copy = path.with_name(f'{path.name}.damaged')
        path.replace(copy)
        print(
          f'warning: {path} has {counted(num_damaged, "damaged line")}; a copy is in {copy}.',
          file=sys.stderr,
        )
      write_whole(path, ''.join(map(_as_json, lines)))
      self._writer = SummaryWriter(str(workdir), purge_step=start + 1)
      self._tables = {
        'train': CsvFile(workdir / TRAINING, lambda: _of_steps(read_log(path))),
        'val': CsvFile(workdir / EVALUATION, lambda: _of_evaluations(read_log(path))),
      }
    is_sending = is_first_process()
    self._trackers = [
      Tracker(service, workdir, map(Row.from_line, lines)) for service in services if is_sending
    ]
    self._file = (path if is_first_process() else Path(os.devnull)).open('a')

  def __enter__(self) -> Self:
    """Returns the log."""
    return self

  def __exit__(self, error_type: type[BaseException] | None, *unused) -> None:
    """Closes the files, and sends what is left to the services."""
    outcome: Outcome = 'failed' if error_type is not None else 'finished'
    if error_type is not None and issubclass(error_type, RunStopped):
      outcome = 'stopped'
    for tracker in self._trackers:
      tracker.close(outcome)
    try:
      with self._one_error():
        self._file.close()
        if self._writer is not None:
          self._writer.close()
    except UserError:
      if error_type is None:  # do not hide an earlier error
        raise

  @contextmanager
  def _one_error(self):
    try:
      yield
    except OSError as error:
      raise UserError(f'{self._path} cannot be written: {error.strerror or error}.') from error

  @contextmanager
  def waiting(self):
    """Counts the time spent in this context as time waiting for data."""
    started = time.perf_counter()
    yield
    self._waited += time.perf_counter() - started

  def has(self, step: int) -> bool:
    """Returns whether the evaluation at `step` is logged."""
    return any(line['step'] == step for line in self.evaluations)

  def write(self, step: int, metrics: Mapping[str, float], *, lr: float) -> dict[str, str]:
    """Logs the metrics of a step; returns the values for the progress bar."""
    now = time.perf_counter()
    elapsed = max(now - self._time, 1e-9)
    rate = (step - self._step) * self._batch_size / elapsed
    waiting = self._waited / elapsed
    self._step, self._time, self._waited = step, now, 0.0
    speed = {'images_per_second': rate, 'waiting_for_data': waiting}
    self._write(step, {**metrics, 'lr': lr, **speed}, 'train')
    return {
      'loss': f'{metrics["loss"]:.4f}',
      'aux': f'{metrics["loss_auxiliary"]:.4f}',
      'acc': f'{metrics["accuracy"]:.3f}',
      'lr': f'{lr:.5f}',
      'images/s': f'{rate:.1f}',
      'waiting': f'{waiting:.0%}',
    }

  def write_evaluation(self, step: int, summary: Mapping[str, float], picture: np.ndarray) -> None:
    """Logs the scores of an evaluation and a picture of predictions.

    Args:
      step: Number of steps taken.
      summary: Scores in percent, with 'mIoU'.
      picture: (h, w, 3) uint8 RGB.
    """
    if self.has(step):  # a finished run that was started again
      return
    self.evaluations.append({'step': step, **summary})
    self._write(step, summary, 'val')
    if self._writer is not None:
      self._writer.add_image('val/predictions', picture, step, dataformats='HWC')
    self._time, self._waited = time.perf_counter(), 0.0

  def _write(self, step: int, values: Mapping[str, float], group: str) -> None:
    with self._one_error():
      self._file.write(_as_json({'step': step, **values}))
      self._file.flush()
      if group in self._tables:
        self._tables[group].append({'step': step, **values})
    for tracker in self._trackers:
      tracker.put(Row.from_line({'step': step, **values}))
    if self._writer is not None:
      for name, value in values.items():
        self._writer.add_scalar(f'{group}/{name}', value, step)


def read_log(path: Path) -> list[dict[str, Any]]:
  """Reads the complete lines of a `log.jsonl` that are not damaged.

  Returns:
    A step and numbers each, NaN where they were not finite; none if there is no file.
  """
  return _read(path)[0]


def _of_steps(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  return [line for line in lines if 'loss' in line]


def _of_evaluations(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  return [line for line in lines if 'mIoU' in line]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
  """Reads a log; returns its lines, and how many others are damaged."""
  if not path.exists():
    return [], 0
  data = path.read_bytes()
  text = data.decode(json.detect_encoding(data), errors='replace')
  complete = [line for line in text.split('\n')[:-1] if line.strip()]  # the last may be cut
  are_sealed = any(
    f'"{CHECKSUM}"' in line for line in complete
  )  # those of earlier versions are not
  lines = [_parsed(line, is_sealed=are_sealed) for line in complete]
  lines = [line for line in lines if line is not None]
  return lines, len(complete) - len(lines)


def _parsed(text: str, *, is_sealed: bool) -> dict[str, Any] | None:
  try:
    line = parse_object(text)
    if (CHECKSUM in line) != is_sealed:
      return None
    unsealed(_without_timing(line))
  except ValueError:
    return None
  line.pop(CHECKSUM, None)
  line = {name: math.nan if value is None else value for name, value in line.items()}
  are_numbers = all(
    type(value) is float or (type(value) is int and abs(value) < 2**63) for value in line.values()
  )
  return line if are_numbers and type(line.get('step')) is int else None


def _as_json(line: Mapping[str, Any]) -> str:
  """Formats a line of the log; JSON has no NaN and no infinity."""
  values = {name: value if math.isfinite(value) else None for name, value in line.items()}
  # Lines of a run that was stopped and of one that was not differ in their timing alone.
  checksum = sealed(_without_timing(values))[CHECKSUM]
  return json.dumps({**values, CHECKSUM: checksum}, allow_nan=False) + '\n'


def _without_timing(line: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in line.items() if name not in _TIMING}


def summary_table(evaluations: list[dict[str, Any]]) -> str:
  """Formats the best and the last evaluation as a table with one row each."""
  best = max(evaluations, key=lambda line: np.nan_to_num(line['mIoU'], nan=-np.inf))
  names = [name for name in best if name != 'step']
  lines = [f'{"":6}{"step":>9}' + ''.join(f'{name:>8}' for name in names)]
  for title, line in (('best', best), ('last', evaluations[-1])):
    scores = ''.join(f'{line.get(name, math.nan):8.2f}' for name in names)
    lines.append(f'{title:6}{line["step"]:9,}{scores}')
  return '\n'.join(lines)


def write_curves(log: Path, path: Path) -> None:
  """Plots losses, learning rate and scores over the steps.

  Args:
    log: The `log.jsonl` of a run.
    path: PNG file to write.
  """
  lines = read_log(log)
  steps, evaluations = _of_steps(lines), _of_evaluations(lines)
  figure = Figure(figsize=(9, 6.5), layout='constrained')
  canvas = FigureCanvasAgg(figure)
  loss, scores = figure.subplots(2, 1, sharex=True)
  at = np.array([line['step'] for line in steps])
  for key, name in (('loss', 'loss'), ('loss_auxiliary', 'auxiliary loss')):
    values = np.array([line.get(key, math.nan) for line in steps])
    (plain,) = loss.plot(at, values, alpha=0.25, linewidth=0.8)
    parts = np.array_split(np.arange(len(at)), min(_POINTS, max(len(at) // 10, 1)))
    means = [(at[part].mean(), values[part].mean()) for part in parts if len(part)]
    loss.plot(*zip(*means, strict=True), color=plain.get_color(), label=name)
  loss.set_ylabel('loss')
  loss.set_yscale('log')
  loss.legend(loc='upper right')
  rate = loss.twinx()
  rate.plot(
    at, [line.get('lr', math.nan) for line in steps], color='gray', linewidth=0.8, linestyle='--'
  )
  rate.set_ylabel('learning rate (dashed)')
  for key in ('mIoU', 'mAcc', 'aAcc'):
    values = [line.get(key, math.nan) for line in evaluations]
    scores.plot([line['step'] for line in evaluations], values, marker='.', label=key)
  scores.set_ylabel('percent on val')
  scores.set_xlabel('step')
  scores.legend(loc='lower right')
  encoded = io.BytesIO()
  canvas.print_figure(encoded, format='png', dpi=110)
  write_whole(path, encoded.getvalue())
