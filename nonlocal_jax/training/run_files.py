"""Files in a workdir that identify the run: its config and model description."""

import contextlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.report import METRICS
from nonlocal_jax.runtime.files import make_folder, parse_object, remove_partial_files, write_whole
from nonlocal_jax.training.csv_files import EVALUATION, TRAINING
from nonlocal_jax.training.log import LOG
from nonlocal_jax.training.mlflow_service import MlflowService
from nonlocal_jax.training.wandb_service import WandbService
from nonlocal_jax.weights.checkpoints import DESCRIPTION, read_description
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.released import BACKBONES
from nonlocal_jax.weights.run_checkpoints import BEST, has_checkpoint

CONFIG = 'config.json'
DATA = 'training_data.json'
STOPPED = 'stopped_runs'  # subfolder of a workdir for runs that ended before their first checkpoint
# Fields that may change when a run resumes: they do not affect training except for rounding.
_FREE = (
  'eval.',
  'checkpoint.',
  'log.',
  'data.source_dir',
  'data.data_dir',
  'data.workers',
  'data.classes',
  'data.palette',
  'train.log_every',
  'train.rematerialize',
  'train.deterministic',
  'model.attention',
  'model.convolution',
)
_BACKBONE = 'init_backbone'
_BY_NAME = frozenset(backbone.name for backbone in BACKBONES)


def check_same_run(
  workdir: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Checks that a run in `workdir`, if there is one that can resume, has the same config.

  A run that was stopped before its first checkpoint can not, see `set_aside_stopped_run`.

  Args:
    workdir: Directory of the run.
    config: Values of the current config, by section and name.
    defaults: Values of fields that the saved config does not have yet.

  Returns:
    The config to record: the current one, with the backbone that the run really started from.

  Raises:
    UserError: If the configs differ, in which case the message lists the differences, or the saved
      one cannot be read.
  """
  path = workdir / CONFIG
  if not path.exists() or not _has_results(workdir):
    return config
  saved = _read(path, 'config')
  if has_checkpoint(workdir) and not saved.get(_BACKBONE) and config[_BACKBONE] in _BY_NAME:
    # It began when the published recipes did not name their backbone.
    config = {**config, _BACKBONE: ''}
  differences = [
    difference
    for difference in config_differences(saved, config, defaults)
    if not difference.startswith(_FREE)
  ]
  if differences:
    raise UserError(
      f'{workdir} holds a run of another config ({"; ".join(differences)}); choose another workdir.'
    )
  return config


def check_same_data(workdir: Path, classes: Sequence[str], train: PreparedSplit) -> None:
  """Checks that a run in `workdir`, if there is one that can resume, has the same training data.

  The folder may have moved, and a class may have another name.

  Args:
    workdir: Directory of the run.
    classes: Names of the classes.
    train: The training images.

  Raises:
    UserError: If a class has another index than it had, or the images or their labels differ.
  """
  if not _has_results(workdir):
    return
  before: Sequence[str] = ()
  with contextlib.suppress(UserError):  # it is written again
    before = read_description(workdir).classes
  moved = next((name for name in classes if name in before and _moved(name, before, classes)), None)
  if moved is not None:
    raise UserError(
      f'{workdir} holds a run whose class {before.index(moved)} is {moved!r}, which is class '
      f'{list(classes).index(moved)} now: choose another workdir; --checkpoint={workdir} '
      '--match_classes starts from its weights.'
    )
  path = workdir / DATA
  if not path.exists():  # of an earlier version
    return
  saved = _read(path, 'data')
  if saved != (now := _identity(train)):
    raise UserError(
      f'{workdir} holds a run on other training images or labels ({saved.get("images")} images, '
      f'now {now["images"]}): choose another workdir; --checkpoint={workdir} starts from its '
      'weights.'
    )


def _read(path: Path, what: str) -> dict[str, Any]:
  """Reads a file that tells what a run has.

  Raises:
    UserError: If it cannot be read.
  """
  try:
    return parse_object(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read ({error}); choose another workdir, or remove the file if the run in '
      f'{path.parent} has the {what} of this command.'
    ) from error


def _moved(name: str, before: Sequence[str], now: Sequence[str]) -> bool:
  return list(before).index(name) != list(now).index(name)


def _identity(split: PreparedSplit) -> dict[str, int]:
  """What tells training images and their labels from others, wherever they are."""
  pixels = {str(value): found.pixels for value, found in sorted(split.label_values.items())}
  text = json.dumps([[list(size) for size in split.sizes], pixels])
  return {'images': len(split), 'crc32': zlib.crc32(text.encode())}


def write_data_identity(workdir: Path, train: PreparedSplit) -> None:
  """Writes what identifies the training images of a run, see `check_same_data`."""
  write_whole(workdir / DATA, json.dumps(_identity(train)) + '\n')


def write_run_files(
  workdir: Path, config: Mapping[str, Any], description: ModelDescription
) -> None:
  """Writes config and model description of a run; the latter also to the `best` subdirectory."""
  for directory in (workdir, workdir / BEST):
    remove_partial_files(directory)
    write_whole(directory / DESCRIPTION, description.to_json())
  write_whole(workdir / CONFIG, json.dumps(config, indent=2) + '\n')


def set_aside_stopped_run(workdir: Path) -> None:
  """Moves config and log of a run that ended before its first checkpoint out of the way.

  The next run in `workdir` starts anew, perhaps with another config: the two are not mixed.
  """
  log = workdir / LOG
  if _has_results(workdir) or not log.exists() or not log.stat().st_size:
    return
  number = 1
  while (place := workdir / STOPPED / str(number)).exists():
    number += 1
  make_folder(place)
  names = (CONFIG, DATA, LOG, TRAINING, EVALUATION, WandbService.file, MlflowService.file)
  for path in (*(workdir / name for name in names), *workdir.glob('events.out.tfevents.*')):
    if path.exists():
      path.rename(place / path.name)
  print(
    f'A run in {workdir} was stopped before its first checkpoint; its config and log were moved to '
    f'{place}.',
    file=sys.stderr,
  )


def _has_results(workdir: Path) -> bool:
  has_weights = has_checkpoint(workdir) or has_checkpoint(workdir / BEST)
  return has_weights or (workdir / METRICS).exists()


def config_differences(
  saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
  """Lists the differences between two configs, e.g. 'model.width was 16, now 64'.

  Args:
    saved: Values by section and name, as read from JSON.
    current: Values by section and name.
    defaults: Values of fields that `saved` does not have.
  """
  before, now = ({**dict(_leaves(defaults)), **dict(_leaves(saved))}, dict(_leaves(current)))
  return [
    f'{key} was {before.get(key)}, now {now.get(key)}'
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]


def _leaves(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in json.loads(json.dumps(tree)).items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value
