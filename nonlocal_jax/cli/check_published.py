"""Evaluates released checkpoints and compares their scores with the published ones.

    nonlocal-jax check-published --models=ade20k_r50 --download
    nonlocal-jax check-published --models=all --download --multi-scale-flip
    nonlocal-jax check-published --checkpoints=DIR --data=DIR --out=published

With --download, released weights and val images that are not here are downloaded. Without it,
weights come from the .pth files in --checkpoints, whatever their names, or from earlier downloads,
and images from the folders in --data (cityscapes, ade, VOCdevkit, laid out as for MMSegmentation)
or from the copies that were prepared before. First says what it needs. Writes OUT/published.md and
OUT/published.json after each evaluation, with all that a score depends on; the same command resumes
a run that was stopped. The exit status is 0 if all scores agree that --models names (with all: of
those that are here). Takes every --config.FIELD=VALUE
that `nonlocal-jax eval` takes, such as --config.eval.batch_size=8.
"""

import argparse
import io
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nonlocal_jax.cli.config import fields_set, read_config
from nonlocal_jax.cli.program import Parser, child_environment, path_option
from nonlocal_jax.cli.published_plan import Check, Places, say_plan
from nonlocal_jax.cli.published_report import Row, scored, table, write_tables
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.report import read_report
from nonlocal_jax.recipes import base_config, fields_of
from nonlocal_jax.runtime.devices import SAID
from nonlocal_jax.runtime.files import parse_object, sealed, unsealed, write_whole
from nonlocal_jax.runtime.locks import used_alone
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.weights import released
from nonlocal_jax.weights.loading import sha256_of
from nonlocal_jax.weights.names import find_release
from nonlocal_jax.weights.released import ReleasedModel, released_model_of_sha256

EVALUATE = (sys.executable, '-m', 'nonlocal_jax', 'eval')
COST = 'cost.json'
# Fields of the config that each evaluation gets, and the options that say which.
_OPTIONS = {'data.source_dir': '--data', 'eval.multi_scale_flip': '--multi-scale-flip'}


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax check-published`."""
  parser = Parser('nonlocal-jax check-published', __doc__)
  parser.add_argument(
    '--models',
    default='all',
    metavar='NAMES',
    help='names as in nonlocal-jax models, with commas between them; default: all',
  )
  parser.add_argument(
    '--multi-scale-flip',
    action='store_true',
    help='also check the scores with six scales and flips, which takes some 17 times as long',
  )
  parser.add_argument(
    '--download', action='store_true', help='download weights and val images that are not here'
  )
  parser.add_argument('--checkpoints', type=path_option, help='folder of .pth files')
  parser.add_argument('--data', type=path_option, help='folder of the datasets')
  parser.add_argument(
    '--username', default='', help='login for Cityscapes; the password: $CITYSCAPES_PASSWORD'
  )
  parser.add_argument(
    '--out', type=path_option, default=Path('published'), help='default: published'
  )
  options, settings = parser.parse_with_config(arguments, fields_of(base_config()))

  from nonlocal_jax.experiment.config_values import check_values

  _check_options(parser, options, settings)
  found = find_released(options.checkpoints) if options.checkpoints else {}
  checks = checks_of(options.models, found, multi_scale_flip=options.multi_scale_flip)
  if options.username and all(check.model.dataset != 'cityscapes' for check in checks):
    parser.error('--username is a login for Cityscapes, which no model of --models needs')
  config = read_config([f'--config={checks[0].model.recipe}', *settings])
  check_values(config)  # of all models, before anything is downloaded
  places = Places(
    found=found,
    data=options.data,
    data_dir=config.data.data_dir or None,
    may_download=options.download,
    username=options.username,
  )
  started = itertools.count()

  def run(arguments: list[str]) -> dict[str, Any]:
    return run_and_time(arguments, says_devices=next(started) == 0)

  command = shlex.join(['nonlocal-jax', 'check-published', *arguments])
  busy = f'{options.out} is in use by another run; wait for its end, or give another --out.'
  with used_alone(options.out, busy):
    done = {check for check in checks if _is_done(options.out / check.name, settings)}
    remaining = [check for check in checks if check not in done and places.has(check.model)]
    if remaining:
      say_plan(remaining, places, precision=config.eval.precision)
    rows = check_all(checks, places, options.out, settings, run=run, command=command)
  print(table(rows))
  checked = [row for row in rows if row['measured'] is not None]
  missing = [row for row in rows if row['verdict'] == 'missing']
  wrong = [row for row in rows if row['verdict'] not in ('agrees', 'missing')]
  print(f'{len(checked)} of {len(rows)} checked; the table is in {options.out / "published.md"}.')
  if wrong:
    raise UserError(f'{len(wrong)} of {len(rows)} published numbers were not reproduced.')
  if missing and (options.models != 'all' or not checked):
    raise UserError(
      f'The weights of {len(missing)} of {len(rows)} published numbers are not here: give their '
      'folder as --checkpoints, or --download.'
    )


def _check_options(parser: Parser, options: argparse.Namespace, settings: Sequence[str]) -> None:
  """Checks that options fit together and that what they name is there."""
  if options.username and not options.download:
    parser.error('--username needs --download')
  for field, option in _OPTIONS.items():
    if field in fields_set(settings):
      parser.error(f'--config.{field} is set by {option}: give that')
  if options.data and not options.download and not options.data.is_dir():
    raise UserError(
      f'There is no folder {options.data}: give the one with cityscapes, ade or VOCdevkit.'
    )


def checks_of(
  names: str, found: dict[str, Path], *, multi_scale_flip: bool = False
) -> tuple[Check, ...]:
  """Returns the published scores of some models.

  Args:
    names: 'all' or names with commas between them. All are the current releases, and of replaced
      ones those that are here.
    found: The checkpoints that are here, by the first digits of their sha256.
    multi_scale_flip: Whether to add the scores with multi-scale and flips.

  Raises:
    UserError: If there is no model of a name.
  """
  if 'all' in names.split(','):
    models = [m for m in released.RELEASED if not m.replaced or m.sha256_prefix in found]
  else:
    given = [find_release(name.strip()) for name in names.split(',')]
    models = [model for model in dict.fromkeys(given) if isinstance(model, ReleasedModel)]
    if len(models) < len(set(given)):
      raise UserError(f'{names} names a backbone, which has no published score on a val set.')
  return tuple(
    Check(model, several, miou)
    for model in models
    for several, miou in ((False, model.miou), (True, model.miou_ms_flip))
    if miou is not None and (multi_scale_flip or not several)
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
  places: Places,
  out: Path,
  settings: Sequence[str],
  *,
  run: Callable[[list[str]], dict[str, Any]],
  command: str,
) -> list[Row]:
  """Runs the checks that have no result yet, and writes the tables after each.

  Args:
    checks: The checks.
    places: Where weights and data are.
    out: The output folder, for the tables and one folder with `metrics.json` per check.
    settings: Additional arguments of the command `eval`.
    run: Runs the command `eval` with the given arguments and returns `status`, `error` and
      `seconds`, see `run_and_time`.
    command: The command line, for the tables.

  Returns:
    A row for each check, see `published_report.scored`.
  """
  rows = []
  with progress_bar(len(checks), 'Checking', unit='number') as bar:
    for check in checks:
      rows.append(_check(check, places, out / check.name, settings, run, before=tuple(rows)))
      write_tables(out, rows, command)
      bar.update()
  return rows


def _check(
  check: Check,
  places: Places,
  workdir: Path,
  settings: Sequence[str],
  run: Callable[[list[str]], dict[str, Any]],
  *,
  before: Sequence[Row],
) -> Row:
  row = {
    'model': check.model.name,
    'file': check.model.file,
    'address': check.model.address,
    'mode': 'ms+flip' if check.multi_scale_flip else 'single scale',
    'published': check.published,
    'measured': None,
    'difference': None,
    'protocol': '',
    'seconds': None,
    'images_per_second': None,
    'peak_gib': None,
    'verdict': 'missing',
  }
  if not _is_done(workdir, settings):
    if not places.has(check.model):
      return row
    try:
      # Images first: without them, as without a login for Cityscapes, weights are of no use.
      source = places.source_of(check.model.dataset)
      file = places.weights(check.model)
    except UserError as error:  # the others go on
      verdict = f'failed: {error}'
      if all(verdict != other['verdict'] for other in before):  # said once
        print(f'error: {error}', file=sys.stderr)
      return {**row, 'verdict': verdict}
    arguments = _arguments(check, file, source, workdir, settings)
    cost = sealed({**run(arguments), 'arguments': arguments, 'settings': list(settings)})
    write_whole(workdir / COST, json.dumps(cost) + '\n')
  return scored(row, workdir, json.loads((workdir / COST).read_bytes()))


def _is_done(workdir: Path, settings: Sequence[str]) -> bool:
  try:
    cost = unsealed(parse_object((workdir / COST).read_bytes()))
    read_report(workdir)
    return cost['status'] == 0 and cost['settings'] == list(settings) and 'arguments' in cost
  except (UserError, OSError, ValueError, KeyError):  # missing or damaged
    return False


def _arguments(
  check: Check, file: Path, source: Path | None, workdir: Path, settings: Sequence[str]
) -> list[str]:
  return [
    f'--config={check.model.recipe}',
    f'--checkpoint={file}',
    f'--workdir={workdir}',
    *([] if source is None else [f'--config.data.source_dir={source}']),
    f'--config.eval.multi_scale_flip={check.multi_scale_flip}',
    *settings,
  ]


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
