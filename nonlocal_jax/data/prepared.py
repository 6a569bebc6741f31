"""Opens the ArrayRecord datasets that `preparation.prepare` writes.

A prepared split holds the image and label files byte for byte (label files of Cityscapes' ids and
of SBD as PNG files of classes). TensorFlow is not needed.
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from nonlocal_jax.data.datasets import Dataset, Split
from nonlocal_jax.data.label_values import LabelValue, check_label_values, usual_mistakes
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.parallel import is_first_process

# Name of the TFDS builder, and so of the directories.
NAME = 'nonlocal_jax'
VERSION = '1.1.0'


class PreparedSplit(Sequence):
  """A sequence of `{'id': str, 'image': bytes, 'label': bytes}`, the files' contents.

  Cheap to pickle: each process that reads opens the record files for itself.

  Attributes:
    name: Name of dataset and split, for messages.
    directory: Where the record files are.
    source: The folder that they were made from.
    sizes: (height, width) of each sample.
    label_values: For each raw label value that occurs, its `LabelValue`.
    left_out: A sentence on each sample that was bad and left out.
    unused_labels: Number of label maps without an image.
  """

  def __init__(self, name: str, directory: str | os.PathLike[str]):
    """Opens a directory that `preparation.prepare` wrote.

    Args:
      name: Name of dataset and split, for messages.
      directory: The directory.

    Raises:
      UserError: If files of the directory are missing or broken.
    """
    self.name = name
    self.directory = Path(directory)
    try:
      info = tfds.builder_from_directory(directory).info
      self._size = info.splits.total_num_examples
      metadata = info.metadata
      self.source: str = metadata['source']
      self.sizes: list[tuple[int, int]] = list(map(tuple, metadata['sizes']))
      self.left_out: list[str] = metadata['left_out']
      self.unused_labels: int = metadata['unused_labels']
      self.label_values = {
        int(value): LabelValue(*found) for value, found in metadata['label_values'].items()
      }
    except Exception as error:  # TFDS raises many types
      raise _damaged(name, directory, error) from error
    if record_files(self.directory) != metadata['record_files']:
      raise _damaged(name, directory, 'record files are missing or of another size')

  def __len__(self) -> int:
    """Returns the number of samples."""
    return self._size

  # No slices: samples are read one by one.
  def __getitem__(self, index: int) -> dict[str, str | bytes]:  # pyrefly: ignore[bad-override]
    """Reads a sample; the order is that of `list_samples`."""
    record = self._records[range(self._size)[index]]
    return {**record, 'id': record['id'].decode()}

  def __getstate__(self) -> dict:
    """Pickles without the open files."""
    return {key: value for key, value in self.__dict__.items() if key != '_records'}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, bytes]]:
    as_they_are = {key: tfds.decode.SkipDecoding() for key in ('image', 'label')}
    builder = tfds.builder_from_directory(self.directory)
    source: Any = builder.as_data_source  # TFDS wraps it so that its type is lost
    return source('all', decoders=as_they_are)


def open_prepared(
  dataset: Dataset,
  *,
  splits: Sequence[Split] = ('train', 'val'),
  data_dir: str | os.PathLike[str] | None = None,
) -> dict[Split, PreparedSplit]:
  """Opens splits that were prepared before, without their source.

  Args:
    dataset: Which dataset.
    splits: Which splits.
    data_dir: Where prepared data is kept, see `prepare`.

  Returns:
    The newest copy of each split.

  Raises:
    UserError: If a split was not prepared, or from several sources.
  """
  return {split: _newest(f'{dataset.name}-{split}', data_dir) for split in splits}


def check_split(split: PreparedSplit, dataset: Dataset) -> list[str]:
  """Checks the contents of a prepared split against the dataset's description.

  Args:
    split: The prepared split.
    dataset: Its classes and published sizes.

  Returns:
    A sentence on each thing that is allowed but odd.

  Raises:
    UserError: If a label value is no class and not ignored.
  """
  check_label_values(split.label_values, dataset, split=split.name)
  published = dataset.published_sizes.get(split.name.rsplit('-', 1)[1], len(split))
  odd = []
  if len(split) != published:
    odd.append(f'{split.name} has {len(split):,} images; the published split has {published:,}.')
  if split.left_out:
    odd.append(f'{len(split.left_out):,} bad samples of {split.name} were left out.')
  if split.unused_labels:
    odd.append(f'{split.unused_labels:,} label maps of {split.name} have no image.')
  return odd + usual_mistakes(split.label_values, dataset, split=split.name)


def _newest(name: str, data_dir: str | os.PathLike[str] | None) -> PreparedSplit:
  root = Path(os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR))
  found = sorted(
    root.glob(f'{NAME}/{name}-*/{VERSION}/dataset_info.json'),
    key=lambda path: path.stat().st_mtime_ns,
  )
  copies = [PreparedSplit(name, path.parent) for path in found]
  sources = sorted({copy.source for copy in copies})
  if not sources:
    raise UserError(
      f'{name} was not prepared in {root}: give the folder of its images as source_dir.'
    )
  if len(sources) > 1:
    raise UserError(
      f'{name} was prepared in {root} from {" and from ".join(sources)}: give one of them '
      'as source_dir.'
    )
  return copies[-1]


def record_files(directory: Path) -> dict[str, int]:
  """The sizes in bytes of the record files in a directory, by name."""
  return {path.name: path.stat().st_size for path in directory.glob('*.array_record*')}


def _damaged(name: str, directory: str | os.PathLike[str], reason: object) -> UserError:
  return UserError(
    f'The prepared copy of {name} in {directory} is damaged ({reason}): delete that directory, and '
    'it will be prepared anew.'
  )


def report_split(split: PreparedSplit, dataset: Dataset) -> None:
  """Prints a summary of a prepared split and its warnings to stderr (first process only).

  Args:
    split: The split.
    dataset: The dataset whose classes its labels are checked against.

  Raises:
    UserError: If a label value is no class and not ignored.
  """
  odd = check_split(split, dataset)
  if not is_first_process():
    return
  print(
    f'{split.name}: {len(split):,} images, from {split.source}, prepared in {split.directory}',
    file=sys.stderr,
  )
  for sentence in odd:
    print(f'warning: {sentence}', file=sys.stderr)
