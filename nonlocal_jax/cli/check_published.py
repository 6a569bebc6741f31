"""Evaluates released checkpoints and compares their scores with the published ones.

    nonlocal-jax check-published --checkpoints=DIR --data=DIR --out=published

Finds the released checkpoints among the .pth files in --checkpoints, whatever their names, and
evaluates them on the folders in --data (cityscapes, ade, VOCdevkit, laid out as for
MMSegmentation): single scale, and multi-scale with flips if that was published. Writes
OUT/published.md and OUT/published.json after each evaluation; the same command resumes a run that
was stopped. The exit status is 0 if all scores that could be checked agree. Takes every
--config.FIELD=VALUE that `nonlocal-jax eval` takes, such as --config.eval.batch_size=8.
"""

import dataclasses
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nonlocal_jax.cli.program import Parser, child_environment
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.report import METRICS
from nonlocal_jax.recipes import base_config, fields_of
from nonlocal_jax.runtime.devices import SAID
from nonlocal_jax.runtime.files import given_path, parse_object, write_whole
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.weights.loading import sha256_of
from nonlocal_jax.weights.released import RELEASED, ReleasedModel, released_model_of_sha256

EVALUATE = (sys.executable, '-m', 'nonlocal_jax', 'eval')
COST = 'cost.json'


@dataclasses.dataclass(frozen=True)
class Check:
  """A published score to reproduce.

  Attributes:
    model: The released checkpoint.
    multi_scale_flip: Whether the score was measured with multi-scale and flips.
    published: The published mIoU in percent.
  """

  model: ReleasedModel
  multi_scale_flip: bool
  published: float

  @property
  def name(self) -> str:
    """The name of the results folder, e.g. 'nonlocal_r50-d8_..._ade20k-5ae0aa33_ms_flip'."""
    suffix = '_ms_flip' if self.multi_scale_flip else ''
    return f'{self.model.name}-{self.model.sha256_prefix}{suffix}'


CHECKS = tuple(
  Check(model, several, miou)
  for model in RELEASED
  for several, miou in ((False, model.miou), (True, model.miou_ms_flip))
  if miou is not None
)


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax check-published`."""
  parser = Parser('nonlocal-jax check-published', __doc__)
  parser.add_argument('--checkpoints', required=True, type=given_path, help='folder of .pth files')
  parser.add_argument('--data', required=True, type=given_path, help='folder of the datasets')
  parser.add_argument(
    '--out', type=given_path, default=Path('published'), help='default: published'
  )
  options, settings = parser.parse_with_config(arguments, fields_of(base_config()))
  files = find_released(options.checkpoints)
  started = itertools.count()

  def run(arguments: list[str]) -> dict[str, Any]:
    return run_and_time(arguments, says_devices=next(started) == 0)

  rows = check_all(CHECKS, files, options.data, options.out, settings, run=run)
  print(as_markdown(rows))
  checked = [row for row in rows if row['measured'] is not None]
  wrong = [row for row in rows if row['verdict'] not in ('agrees', 'missing')]
  print(f'{len(checked)} of {len(rows)} checked; the table is in {options.out / "published.md"}.')
  if wrong or not checked:
    raise UserError(
      f'{len(wrong)} of {len(rows)} published numbers were not reproduced.'
      if wrong
      else f'{options.checkpoints} holds no released checkpoint that could be checked.'
    )


def find_released(folder: Path) -> dict[str, Path]:
  """Finds the released checkpoints in a folder, by the first digits of their sha256.

  Raises:
    UserError: If there is no such folder.
  """
  if not folder.is_dir():
    raise UserError(f'There is no folder {folder}: give the one with the released .pth files.')
  files = {}
  for path in sorted(folder.rglob('*.pth')):
    released = released_model_of_sha256(sha256_of(path))
    if released is not None:
      files[released.sha256_prefix] = path
  return files


def check_all(
  checks: Sequence[Check],
  files: dict[str, Path],
  data: Path,
  out: Path,
  settings: Sequence[str],
  *,
  run: Callable[[list[str]], dict[str, Any]],
) -> list[dict[str, Any]]:
  """Runs the checks that have no result yet, and writes the table after each.

  Args:
    checks: The checks.
    files: The checkpoints, by the first digits of their sha256.
    data: The folder of the datasets.
    out: The output folder, for the table and one folder with `metrics.json` per check.
    settings: Additional arguments of the command `eval`.
    run: Runs the command `eval` with the given arguments and returns `status`, `error` and
      `seconds`, see `run_and_time`.

  Returns:
    A row for each check: model, mode, published, measured, difference, seconds, peak_gib, verdict.
  """
  rows = []
  with progress_bar(len(checks), 'Checking', unit='number') as bar:
    for check in checks:
      file = files.get(check.model.sha256_prefix)
      workdir = out / check.name
      if file is not None and not _is_done(workdir, settings):
        cost = run(_arguments(check, file, data, workdir, settings))
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / COST, json.dumps({**cost, 'settings': list(settings)}) + '\n')
      rows.append(_row(check, workdir if file is not None else None))
      write_whole(out / 'published.json', json.dumps(rows, indent=2) + '\n')
      write_whole(out / 'published.md', as_markdown(rows) + '\n')
      bar.update()
  return rows


def _is_done(workdir: Path, settings: Sequence[str]) -> bool:
  try:
    cost = parse_object((workdir / COST).read_bytes())
    parse_object((workdir / METRICS).read_bytes())
    return cost['status'] == 0 and cost['settings'] == list(settings)
  except (OSError, ValueError, KeyError):  # missing or damaged
    return False


def _arguments(
  check: Check, file: Path, data: Path, workdir: Path, settings: Sequence[str]
) -> list[str]:
  model = check.model
  return [
    f'--config={model.recipe}',
    f'--checkpoint={file}',
    f'--workdir={workdir}',
    f'--config.data.source_dir={data}',
    f'--config.eval.multi_scale_flip={check.multi_scale_flip}',
    *settings,
  ]


def _row(check: Check, workdir: Path | None) -> dict[str, Any]:
  row = {
    'model': check.model.name,
    'file': check.model.file,
    'mode': 'ms+flip' if check.multi_scale_flip else 'single scale',
    'published': check.published,
    'measured': None,
    'difference': None,
    'seconds': None,
    'peak_gib': None,
    'verdict': 'missing',
  }
  if workdir is None:
    return row
  cost = json.loads((workdir / COST).read_text())
  if cost['status'] != 0:
    return {**row, 'verdict': f'failed: {cost["error"]}'}
  report = json.loads((workdir / METRICS).read_text())
  compared = report['published']
  row |= {'measured': round(report['mIoU'], 2), 'verdict': 'not comparable'}
  memory = report['peak_memory_gib']
  row |= {'seconds': cost['seconds'], 'peak_gib': memory['device'] or memory['host']}
  if compared:
    verdict = 'agrees' if compared['agrees'] else 'differs'
    row |= {'difference': compared['difference'], 'verdict': verdict}
  return row


def run_and_time(arguments: list[str], *, says_devices: bool = True) -> dict[str, Any]:
  """Runs the command `eval` in a subprocess and forwards its stderr.

  Args:
    arguments: The arguments of the command.
    says_devices: Whether it says on what it runs.

  Returns:
    Its exit `status`, its last line on stderr as `error`, and its `seconds`.
  """
  started, tail = time.perf_counter(), b''
  environment = child_environment()
  if not says_devices:
    environment[SAID] = '1'
  with subprocess.Popen(
    [*EVALUATE, *arguments],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  ) as process:
    try:
      assert isinstance(process.stderr, io.BufferedReader)
      while part := process.stderr.read1():
        sys.stderr.buffer.write(part)
        sys.stderr.flush()
        tail = (tail + part)[-4096:]
      process.wait()
    except BaseException:
      process.terminate()
      raise
  lines = tail.decode(errors='replace').replace('\r', '\n').split('\n')
  return {
    'status': process.returncode,
    'error': next((line for line in reversed(lines) if line.strip()), ''),
    'seconds': time.perf_counter() - started,
  }


def as_markdown(rows: Iterable[dict[str, Any]]) -> str:
  """Formats the rows as a Markdown table."""
  lines = [
    '| model | mode | published | measured | difference | seconds | peak GiB | |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    cells = [row['model'], row['mode'], f'{row["published"]:.2f}']
    cells += [_number(row['measured'], '.2f'), _number(row['difference'], '+.2f')]
    cells += [_number(row['seconds'], '.0f'), _number(row['peak_gib'], '.1f'), row['verdict']]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _number(value: float | None, form: str) -> str:
  return '' if value is None else format(value, form)
