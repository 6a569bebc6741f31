"""What stands in a workdir beside the checkpoints: which run it is."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import network_of, protocol_of
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.weights.checkpoints import DESCRIPTION
from nonlocal_jax.weights.description import ModelDescription

CONFIG = 'config.json'
BEST = 'best'  # directory of the weights with the best mIoU
# What may change between a run and its continuation: nothing that the next step depends on.
_FREE = (
  'eval.',
  'checkpoint.',
  'data.source_dir',
  'data.data_dir',
  'data.workers',
  'data.classes',
  'data.palette',
  'train.log_every',
)


def check_same_run(config: ConfigDict, workdir: Path, dataset: Dataset) -> None:
  """Checks that what stands in `workdir`, if anything, was made with this config.

  Raises:
    UserError: If it was not; the message says what differs.
  """
  path = workdir / CONFIG
  if not path.exists():
    return
  differences = [
    difference
    for difference in config_differences(path.read_text(), _as_json(config, dataset))
    if not difference.startswith(_FREE)
  ]
  if differences:
    raise UserError(
      f'{workdir} holds a run of another config ({"; ".join(differences)}); '
      'choose another --workdir.'
    )


def write_run_files(config: ConfigDict, workdir: Path, dataset: Dataset) -> None:
  """Writes config, network and test protocol of a run, also beside its best weights."""
  description = ModelDescription(
    config=network_of(config),
    protocol=protocol_of(config),
    dataset=dataset.name,
    classes=dataset.classes,
    palette=dataset.palette,
    source=f'trained with config {config.name}',
    sha256=None,
    num_batches_tracked=dict.fromkeys(('backbone', 'decode_head', 'auxiliary_head'), 0),
  )
  for directory in (workdir, workdir / BEST):
    write_whole(directory / DESCRIPTION, description.to_json())
  write_whole(workdir / CONFIG, _as_json(config, dataset))


def config_differences(saved: str, current: str) -> list[str]:
  """Keys whose values differ between two configs in JSON, e.g. 'model.width: 16, now 64'."""
  saved_values, current_values = (dict(_leaves(json.loads(text))) for text in (saved, current))
  return [
    f'{key} was {saved_values.get(key)}, now {current_values.get(key)}'
    for key in sorted(saved_values.keys() | current_values.keys())
    if saved_values.get(key) != current_values.get(key)
  ]


def _leaves(tree: Any, prefix: str = ''):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _as_json(config: ConfigDict, dataset: Dataset) -> str:
  """The config as JSON, with what the description beside a custom dataset adds."""
  values = config.to_dict()
  if dataset.layout == 'custom':
    values['data'].update(
      num_classes=dataset.num_classes,
      classes=dataset.classes,
      palette=dataset.palette,
      reduce_zero_label=dataset.reduce_zero_label,
      ignore_labels=dataset.ignore_labels,
      label_map=dataset.label_map,
    )
  return json.dumps(values, indent=2) + '\n'
