"""Checks the images and label maps of a dataset and packs them into ArrayRecord files.

    nonlocal-jax prepare --dataset=ade20k --source=data/ade/ADEChallengeData2016
    nonlocal-jax prepare --dataset=ade20k --download

Lay out the folders as MMSegmentation documents it, or let --download do it. A custom dataset is
read as it is: the command finds out what the folder holds, and says so. Label maps are PNG files of
class indices, of colors or of black and white in the usual folders, such as images/{train,val} and
labels/{train,val}. Names and colors of classes are read from classes.txt (a line "name" or "name r
g b" for each), labelmap.txt, class_dict.csv or _classes.csv. COCO, labelme, CVAT, Label Studio,
Roboflow and Supervisely exports are read, too. Where there are no folders for train and val, the
lists train.txt and val.txt divide the images; without them a fifth is chosen for val, and the lists
are written. What dataset.json says goes before what was found:

  {"classes": ["road", "car"], "palette": [[128, 64, 128], [0, 0, 142]], "ignore_labels": [11]}

Add "reduce_zero_label": true if 0 has no class and label k means class k - 1. Add "label_map":
[0, 0, 1] to replace class k by class label_map[k]; 255 is ignored.
"""

import argparse
import functools
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nonlocal_jax.cli.pixel_options import format_to_read, pixel_options
from nonlocal_jax.cli.program import Parser, program_name
from nonlocal_jax.data.datasets import DESCRIPTION, PUBLISHED, Dataset, Split, custom_dataset
from nonlocal_jax.data.formats.detection import read_folder, with_splits
from nonlocal_jax.data.formats.splits import withdrawn_after_errors
from nonlocal_jax.data.label_values import class_shares
from nonlocal_jax.data.paths import as_path, is_remote
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError, explained_by
from nonlocal_jax.runtime.files import given_path
from nonlocal_jax.runtime.wording import counted

if TYPE_CHECKING:
  from nonlocal_jax.data.prepared import PreparedSplit

  Splits = dict[Split, PreparedSplit]

# How many values between black and white smoothed edges have at least, in how few of the pixels.
_SMOOTHED_VALUES, _SMOOTHED_SHARE = 8, 0.9


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax prepare`."""
  parser = Parser('nonlocal-jax prepare', __doc__)
  parser.add_argument(
    '--dataset', required=True, choices=[*PUBLISHED, 'custom'], help='whose layout and classes'
  )
  parser.add_argument('--source', help='folder of the dataset, or a bucket such as gs://...')
  parser.add_argument(
    '--download',
    action='store_true',
    help='download what is missing, into --source or into datasets in the cache directory',
  )
  parser.add_argument('--keep-archives', action='store_true', help='keep what was downloaded')
  parser.add_argument(
    '--username', default='', help='login for Cityscapes; the password: $CITYSCAPES_PASSWORD'
  )
  parser.add_argument('--data-dir', help='output; default: $TFDS_DATA_DIR, ~/tensorflow_datasets')
  parser.add_argument(
    '--splits', nargs='+', choices=['train', 'val'], default=['train', 'val'], help='default: both'
  )
  parser.add_argument('--skip-bad', action='store_true', help='leave out bad samples')
  options = parser.parse(arguments)
  _check(parser, options)

  from nonlocal_jax.data.preparation import prepare

  prepare_from = functools.partial(
    prepare, splits=options.splits, data_dir=options.data_dir, skip_bad=options.skip_bad
  )
  by_value = None
  with explained_by({'data_dir': '--data-dir=DIR', 'skip_bad': '--skip-bad'}):
    if options.dataset == 'custom':
      splits, dataset, by_value = _prepare_custom(options, prepare_from)
    else:
      dataset = PUBLISHED[options.dataset]
      splits = _prepare_published(options, dataset, prepare_from)
  for split in splits.values():
    print(f'\n{split.name}: {counted(len(split), "image")} in {split.directory}')
    print(shares_table(split, dataset))
  more = pixel_options(splits['train']) if 'train' in splits else []
  if by_value:
    print(f'\nDescribe the label values in {DESCRIPTION} in {options.source}, see --help.')
  print(f'\nTo train on it:\n  {training_command(options, by_value, more)}')


def _prepare_custom(
  options: argparse.Namespace, prepare_from: Callable[..., 'Splits']
) -> tuple['Splits', Dataset, Dataset | None]:
  """Prepares and checks a custom dataset; the last is the dataset if its classes were counted."""
  found = with_splits(options.source, read_folder(options.source))
  description: Mapping[str, Any] = found.description
  by_value = None
  with withdrawn_after_errors(found.written):
    is_described = bool({'num_classes', 'classes', 'label_map', 'palette'} & description.keys())
    enough: Mapping[str, Any] = description if is_described else {'num_classes': IGNORE}
    dataset = custom_dataset(**{**description, **enough})
    splits = prepare_from(dataset, options.source, found=found)
    if not is_described:
      dataset = one_class_per_value(splits.values(), dataset, description, options.source)
      by_value = dataset
    _report(splits, dataset)
  # Once the result is there, which a closed output must not cost.
  print(f'{options.source} holds {found.sentence}.')
  return splits, dataset, by_value


def _prepare_published(
  options: argparse.Namespace, dataset: Dataset, prepare_from: Callable[..., 'Splits']
) -> 'Splits':
  """Prepares and checks a published dataset, once it is downloaded if that is wanted."""
  from nonlocal_jax.data.prepared import check_data_dir, published_copies

  splits = {}
  if options.download:
    splits = published_copies(dataset, splits=options.splits, data_dir=options.data_dir)
  if splits:
    print('The dataset is prepared already: nothing is downloaded.', file=sys.stderr)
  else:
    if options.download:
      check_data_dir(options.data_dir)
    source = fetched(options) if options.download else options.source
    splits = prepare_from(dataset, source)
  _report(splits, dataset)
  return splits


def _report(splits: 'Splits', dataset: Dataset) -> None:
  from nonlocal_jax.data.split_checks import report_split

  pixels = format_to_read(next(iter(splits.values())))  # training's, if it is among them
  for split in splits.values():
    report_split(split, dataset, pixels=pixels)


def _check(parser: Parser, options: argparse.Namespace) -> None:
  """Checks that options fit together."""
  if options.download and options.dataset == 'custom':
    parser.error('--download is for the published datasets, not for custom')
  for option, path in {'--source': options.source, '--data-dir': options.data_dir}.items():
    if path == '':  # as of an unset variable
      parser.error(f'argument {option}: the path is empty')
  if not options.download and not options.source:
    parser.error('--source is required, or --download')
  if not options.download and (options.keep_archives or options.username):
    parser.error('--keep-archives and --username need --download')
  if options.username and options.dataset != 'cityscapes':
    parser.error(f'--username is a login for cityscapes, and not for {options.dataset}')
  if options.download and options.source and is_remote(as_path(options.source)):
    parser.error('--download needs a folder as --source, not a bucket')


def fetched(options: argparse.Namespace) -> Path:
  """Downloads what is missing of the dataset; returns its folder."""
  from nonlocal_jax.data.downloads import fetch_dataset

  folder = fetch_dataset(
    options.dataset,
    given_path(options.source) if options.source else None,
    splits=options.splits,
    username=options.username,
    keep_archives=options.keep_archives,
  )
  print(
    f'The images are in {folder}; once prepared, they are not needed any more.', file=sys.stderr
  )
  return folder


def one_class_per_value(
  splits: Collection['PreparedSplit'],
  dataset: Dataset,
  description: Mapping[str, Any],
  source: str,
) -> Dataset:
  """Counts the classes of an undescribed dataset; warns where label values leave gaps.

  Values that leave most classes without pixels are gray levels; black and white with many rare
  values between has smoothed edges.

  Args:
    splits: The prepared splits.
    dataset: How their label values are read.
    description: What is known of the dataset otherwise.
    source: Its folder, for messages.

  Returns:
    A dataset with one class for each up to the largest label value below 255.

  Raises:
    UserError: If label values are no class indices.
  """
  pixels, files = Counter[int](), dict[int, str]()
  for split in splits:
    for value, found in split.label_values.items():
      pixels[value] += found.pixels
      files.setdefault(value, found.first_file)
  of_class = {int(dataset.label_lookup[value]): value for value in sorted(pixels)}
  of_class.pop(IGNORE, None)
  count = max({1, *of_class}) + 1
  if _are_no_indices(pixels, len(of_class), count):
    raise UserError(_no_indices(pixels, files, source))
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


def _are_no_indices(pixels: Mapping[int, int], num_used: int, count: int) -> bool:
  """Whether label values are rather gray levels, or black and white with few others.

  Args:
    pixels: How often each value occurs.
    num_used: How many classes have pixels.
    count: How many there would be.
  """
  others = pixels.keys() - {0, IGNORE}
  black_and_white = pixels.get(0, 0) + pixels.get(IGNORE, 0)
  is_smoothed = (
    pixels.get(IGNORE, 0) > 0
    and len(others) >= _SMOOTHED_VALUES
    and black_and_white >= _SMOOTHED_SHARE * sum(pixels.values())
  )
  # 255 has no class, and more pixels than all but the first: black and white, and a stray value.
  is_mixed = pixels.get(IGNORE, 0) > sum(pixels[value] for value in others)
  return is_smoothed or is_mixed or 2 * num_used < count


def _no_indices(pixels: Mapping[int, int], files: Mapping[int, str], source: str) -> str:
  """A sentence on label values that are no class indices."""
  values = sorted(pixels, key=pixels.__getitem__, reverse=True)
  listed = [f'{value} ({counted(pixels[value], "pixel")})' for value in values]
  listed[3:] = [f'{len(values) - 3} more'] if len(values) > 4 else listed[3:]
  odd = next((value for value in values if value not in (0, IGNORE)), values[0])
  remedies = (
    'write black and white as 0 and 255 alone in all files, without smoothed edges; list gray '
    'levels in '
    'classes.txt, as in "road 128 128 128"'
  )
  return (
    f'The label maps in {source} have the values {", ".join(listed[:-1])} and {listed[-1]}, '
    f'value {odd} first in {files[odd]}, which are no class indices 0, 1, ...: {remedies}; or, if '
    f'they are indices, set num_classes in {DESCRIPTION}.'
  )


def shares_table(split: 'PreparedSplit', dataset: Dataset) -> str:
  """Formats the share of pixels of each class in a split."""
  return class_shares(split.label_values, dataset).table(dataset)


def training_command(
  options: argparse.Namespace, by_value: Dataset | None, more: Sequence[str]
) -> str:
  """Returns the command that trains on the prepared dataset.

  Args:
    options: Those of this command.
    by_value: The dataset whose classes were counted; None for a described one.
    more: Further options.
  """
  words = [*program_name().split(), 'train']
  if options.dataset == 'custom':
    words += ['--config=custom', f'--config.data.source_dir={options.source}']
  else:
    words += [f'--config={options.dataset}_r50']
  if by_value:
    words += [f'--config.data.num_classes={by_value.num_classes}']
  if options.data_dir:
    words += [f'--config.data.data_dir={options.data_dir}']
  return shlex.join([*words, *more])
