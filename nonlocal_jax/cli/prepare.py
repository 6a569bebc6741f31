"""Checks the images and label maps of a dataset and packs them into ArrayRecord files.

    nonlocal-jax prepare --dataset=ade20k --source=data/ade/ADEChallengeData2016

Lay out the folders as MMSegmentation documents it. A custom dataset has images/{train,val} and
labels/{train,val}, and optionally dataset.json:

  {"classes": ["road", "car"], "palette": [[128, 64, 128], [0, 0, 142]], "ignore_labels": [11]}

Add "reduce_zero_label": true if 0 has no class and label k means class k - 1. Add "label_map":
[0, 0, 1] to replace class k by class label_map[k]; 255 is ignored.
"""

import argparse
import shlex
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from nonlocal_jax.cli.program import Parser, program_name
from nonlocal_jax.data.datasets import (
  DESCRIPTION,
  PUBLISHED,
  Dataset,
  custom_dataset,
  read_description,
)
from nonlocal_jax.data.label_values import class_shares
from nonlocal_jax.data.transforms import IGNORE

if TYPE_CHECKING:
  from nonlocal_jax.data.prepared import PreparedSplit


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax prepare`."""
  parser = Parser('nonlocal-jax prepare', __doc__)
  parser.add_argument('--dataset', required=True, choices=[*PUBLISHED, 'custom'])
  parser.add_argument(
    '--source', required=True, help='folder of the dataset, or a bucket such as gs://...'
  )
  parser.add_argument('--data-dir', help='output; default: $TFDS_DATA_DIR, ~/tensorflow_datasets')
  parser.add_argument(
    '--splits', nargs='+', choices=['train', 'val'], default=['train', 'val'], help='default: both'
  )
  parser.add_argument('--skip-bad', action='store_true', help='leave out bad samples')
  options = parser.parse(arguments)

  from nonlocal_jax.data.preparation import prepare
  from nonlocal_jax.data.prepared import report_split

  description = read_description(options.source) if options.dataset == 'custom' else {}
  named = bool({'num_classes', 'classes', 'label_map'} & description.keys())
  if options.dataset != 'custom':
    dataset = PUBLISHED[options.dataset]
  elif named:
    dataset = custom_dataset(**description)
  else:
    dataset = custom_dataset(255)
  splits = prepare(
    dataset,
    options.source,
    splits=options.splits,
    data_dir=options.data_dir,
    skip_bad=options.skip_bad,
  )
  if dataset.name == 'custom' and not named:
    dataset = one_class_per_value(splits.values())
  for split in splits.values():
    if named or dataset.name != 'custom':
      report_split(split, dataset)
    print(f'\n{split.name}: {len(split):,} images in {split.directory}')
    print(shares_table(split, dataset))
  if dataset.name == 'custom' and not named:
    print(f'\nDescribe the label values in {DESCRIPTION} in {options.source}, see --help.')
  print(f'\nTo train on it:\n  {training_command(options, dataset)}')


def one_class_per_value(splits: Collection['PreparedSplit']) -> Dataset:
  """Returns a dataset with one class for each label value up to the largest below 255."""
  values = {value for split in splits for value in split.label_values} - {IGNORE}
  return custom_dataset(classes=[f'value {value}' for value in range(max({1, *values}) + 1)])


def shares_table(split: 'PreparedSplit', dataset: Dataset) -> str:
  """Formats the share of pixels of each class in a split."""
  return class_shares(split.label_values, dataset).table(dataset)


def training_command(options: argparse.Namespace, dataset: Dataset) -> str:
  """Returns the command that trains on the prepared dataset."""
  words = [*program_name().split(), 'train']
  if dataset.name == 'custom':
    words += ['--config=custom', f'--config.data.source_dir={options.source}']
  else:
    words += [f'--config={dataset.name}_r50']
  if options.data_dir:
    words += [f'--config.data.data_dir={options.data_dir}']
  return shlex.join(words)
