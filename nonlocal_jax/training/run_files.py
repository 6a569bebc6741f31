"""What stands in a workdir beside the checkpoints: which run it is."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.weights.checkpoints import DESCRIPTION
from nonlocal_jax.weights.description import ModelDescription

CONFIG = 'config.json'
BEST = 'best'  # directory of the weights with the best mIoU
# What may change between a run and its continuation: nothing that the next step depends on, but for
# the rounding of another way to compute the same.
_FREE = (
  'eval.',
  'checkpoint.',
  'data.source_dir',
  'data.data_dir',
  'data.workers',
  'data.classes',
  'data.palette',
  'train.log_every',
  'train.rematerialize',
  'model.attention',
  'model.convolution',
)


def check_same_run(workdir: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
  """Checks that what stands in `workdir`, if anything, was made with this config.

  Args:
    workdir: Where the run lies.
    config: The values of this config, by section and name.
    defaults: What fields are that the config of the run in `workdir` did not have yet.

  Raises:
    UserError: If it was not; the message says what differs.
  """
  path = workdir / CONFIG
  if not path.exists():
    return
  differences = [
    difference
    for difference in config_differences(json.loads(path.read_text()), config, defaults)
    if not difference.startswith(_FREE)
  ]
  if differences:
    raise UserError(
      f'{workdir} holds a run of another config ({"; ".join(differences)}); choose another workdir.'
    )


def write_run_files(
  workdir: Path, config: Mapping[str, Any], description: ModelDescription
) -> None:
  """Writes config and description of a run, also beside the weights that will be its best."""
  for directory in (workdir, workdir / BEST):
    write_whole(directory / DESCRIPTION, description.to_json())
  write_whole(workdir / CONFIG, json.dumps(config, indent=2) + '\n')


def config_differences(
  saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
  """Keys whose values differ between two configs, e.g. 'model.width was 16, now 64'.

  Args:
    saved: Values by section and name, as JSON gives them back.
    current: Values by section and name.
    defaults: What `saved` means where it has no value.
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
