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
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from nonlocal_jax.errors import explained_by

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
  described = bool({'num_classes', 'classes', 'label_map', 'palette'} & description.keys())
  if options.dataset != 'custom':
    dataset = PUBLISHED[options.dataset]
  else:
    dataset = custom_dataset(
      **(description if described else {**description, 'num_classes': IGNORE})
    )
  with explained_by({'data_dir': '--data-dir=DIR', 'skip_bad': '--skip-bad'}):
    splits = prepare(
      dataset,
      options.source,
      splits=options.splits,
      data_dir=options.data_dir,
      skip_bad=options.skip_bad,
    )
  counted = dataset.name == 'custom' and not described
  if counted:
    dataset = one_class_per_value(splits.values(), dataset, description)
  for split in splits.values():
    report_split(split, dataset)
    print(f'\n{split.name}: {len(split):,} images in {split.directory}')
    print(shares_table(split, dataset))
  if counted:
    print(f'\nDescribe the label values in {DESCRIPTION} in {options.source}, see --help.')
  print(f'\nTo train on it:\n  {training_command(options, dataset if counted else None)}')


def one_class_per_value(
  splits: Collection['PreparedSplit'], dataset: Dataset, description: Mapping[str, Any]
) -> Dataset:
  """Counts the classes of an undescribed dataset; warns where label values leave gaps.

  Args:
    splits: The prepared splits.
    dataset: How their label values are read.
    description: What is known of the dataset otherwise.

  Returns:
    A dataset with one class for each up to the largest label value below 255.
  """
  values = {value for split in splits for value in split.label_values}
  of_class = {int(dataset.label_lookup[value]): value for value in sorted(values)}
  of_class.pop(IGNORE, None)
  count = max({1, *of_class}) + 1
  if len(of_class) > 1 and len(of_class) < count:
    listed = ', '.join(str(value) for value in list(of_class.values())[:10])
    more = f' and {len(of_class) - 10} more' if len(of_class) > 10 else ''
    print(
      f'warning: The label values are {listed}{more}: classes are 0, 1, ... without a gap, so that '
      f'there would be {count}. Write the files anew, or lead values to classes by "label_map" in '
      f'{DESCRIPTION}.',
      file=sys.stderr,
    )
  first = int(dataset.reduce_zero_label)
  names = [f'value {index + first}' for index in range(count)]
  return custom_dataset(classes=names, **description)


def shares_table(split: 'PreparedSplit', dataset: Dataset) -> str:
  """Formats the share of pixels of each class in a split."""
  return class_shares(split.label_values, dataset).table(dataset)


def training_command(options: argparse.Namespace, counted: Dataset | None) -> str:
  """Returns the command that trains on the prepared dataset.

  Args:
    options: Those of this command.
    counted: The dataset whose classes were counted; None for a described one.
  """
  words = [*program_name().split(), 'train']
  if options.dataset == 'custom':
    words += ['--config=custom', f'--config.data.source_dir={options.source}']
  else:
    words += [f'--config={options.dataset}_r50']
  if counted:
    words += [f'--config.data.num_classes={counted.num_classes}']
  if options.data_dir:
    words += [f'--config.data.data_dir={options.data_dir}']
  return shlex.join(words)
