"""Opens the ArrayRecord datasets that `preparation.prepare` writes.

A prepared split holds the image and label files byte for byte (label files of Cityscapes' ids and
of SBD as PNG files of classes). TensorFlow is not needed.
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from nonlocal_jax.data.datasets import Dataset, Split
from nonlocal_jax.data.label_values import LabelValue
from nonlocal_jax.data.origins import DAMAGED, ORIGINS, Origin, read_origins
from nonlocal_jax.data.pixel_formats import format_of_name
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import check_writable

# Name of the TFDS builder, and so of the directories.
NAME = 'nonlocal_jax'
VERSION = '1.1.0'


class PreparedSplit(Sequence):
  """A sequence of `{'id': str, 'image': bytes, 'label': bytes}`, the files' contents.

  Cheap to pickle: each process that reads opens the record files for itself.

  Attributes:
    name: Name of dataset and split, for messages.
    directory: Where the record files are.
    source: The folder that they were made from, the last one if it was moved.
    description: The `dataset.json` of that folder; None if an earlier version prepared the copy.
    sizes: (height, width) of each sample.
    label_values: For each raw label value that occurs, its `LabelValue`.
    pixel_formats: Number of images of each format; empty for copies of earlier versions.
    left_out: A sentence on each sample that was bad and left out.
    unused_labels: Number of label maps without an image.
    passed_over: Number of files beside the images that are none by their names, and the first.
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
      origin = read_origins(self.directory)[-1]
      self.source: str = origin.source
      self.description = origin.description
      self.sizes: list[tuple[int, int]] = list(map(tuple, metadata['sizes']))
      self.left_out: list[str] = metadata['left_out']
      self.unused_labels: int = metadata['unused_labels']
      self.passed_over: list = metadata.get('passed_over', [0])  # not in copies of earlier versions
      self.pixel_formats = {
        format_of_name(name): count for name, count in metadata.get('pixel_formats', {}).items()
      }
      self._moments: dict = metadata.get('moments', {})
      self.label_values = {
        int(value): LabelValue(pixels, _moved(file, metadata['source'], self.source))
        for value, (pixels, file) in metadata['label_values'].items()
      }
    except Exception as error:  # TFDS raises many types
      raise _damaged(name, directory, error) from error
    if record_files(self.directory) != metadata['record_files']:
      raise _damaged(name, directory, 'record files are missing or of another size')

  def __len__(self) -> int:
    """Returns the number of samples."""
    return self._size

  def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel, over all pixels.

    Returns:
      Both; None unless all images are of one format other than RGB of 8 bits.
    """
    if len(self.pixel_formats) != 1 or len(self._moments) != 1:
      return None
    ((pixels,), sums, squares), *_ = self._moments.values()
    means = tuple(total / pixels for total in sums)
    # In integers: the squares of large means would swallow small variances.
    variances = [
      (pixels * square - total**2) / pixels**2 for total, square in zip(sums, squares, strict=True)
    ]
    return means, tuple(math.sqrt(variance) for variance in variances)

  # No slices: samples are read one by one.
  def __getitem__(self, index: int) -> dict[str, str | bytes]:  # pyrefly: ignore[bad-override]
    """Reads a sample; the order is that of `list_samples`.

    Raises:
      UserError: If its record is damaged.
    """
    place = range(self._size)[index]
    try:
      record = self._records[place]
    except Exception as error:  # ArrayRecord and TFDS raise many types; records have checksums
      raise _damaged(self.name, self.directory, error) from error
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
    The copy of each split that was prepared last.

  Raises:
    UserError: If a split was not prepared, the copies are damaged, come from several sources, or do
      not keep one description of a custom dataset.
  """
  own = dataset.layout == 'custom'
  copies = _last_copies(dataset.name, ('train', 'val') if own else splits, data_dir, described=own)
  for split in splits:
    if split not in copies:
      raise UserError(
        f'{dataset.name}-{split} was not prepared in {_root(data_dir)}: give the folder of its '
        'images as source_dir.'
      )
  return {split: PreparedSplit(f'{dataset.name}-{split}', copies[split][0]) for split in splits}


def published_copies(
  dataset: Dataset,
  *,
  splits: Sequence[Split] = ('train', 'val'),
  data_dir: str | os.PathLike[str] | None = None,
) -> dict[Split, PreparedSplit]:
  """Opens splits of a published dataset that were prepared before, if all of their images were.

  Args:
    dataset: Which dataset.
    splits: Which splits.
    data_dir: Where prepared data is kept, see `prepare`.

  Returns:
    The copy of each split that was used last; none if one has not the published number of images.

  Raises:
    UserError: If the copies are damaged.
  """
  found: dict[Split, PreparedSplit] = {}
  for split in splits:
    name = f'{dataset.name}-{split}'
    for directory, _ in _copies(_root(data_dir), name)[-1:]:
      found[split] = PreparedSplit(name, directory)
  whole = all(
    split in found and len(found[split]) == dataset.published_sizes[split] for split in splits
  )
  return found if whole else {}


def prepared_description(name: str, data_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
  """Returns the `dataset.json` that was kept with the copies that `open_prepared` opens.

  Args:
    name: The dataset's name.
    data_dir: Where prepared data is kept, see `prepare`.

  Returns:
    See `datasets.read_description`; {} if nothing was prepared.

  Raises:
    UserError: See `open_prepared`.
  """
  copies = _last_copies(name, ('train', 'val'), data_dir, described=True)
  return next((dict(origin.description or {}) for _, origin in copies.values()), {})


def check_data_dir(data_dir: str | os.PathLike[str] | None) -> None:
  """Checks that data can be prepared there, without writing.

  Args:
    data_dir: Where prepared data is kept, see `prepare`.

  Raises:
    UserError: If it cannot.
  """
  check_writable(_root(data_dir))


def _root(data_dir: str | os.PathLike[str] | None) -> Path:
  return Path(os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR))


def _last_copies(
  name: str,
  splits: Sequence[Split],
  data_dir: str | os.PathLike[str] | None,
  *,
  described: bool,
) -> dict[Split, tuple[Path, Origin]]:
  """Finds the copy of each split that was prepared last; they must have one source.

  Args:
    name: The dataset's name.
    splits: Which splits; those that were not prepared are left out.
    data_dir: See `prepare`.
    described: Whether the copies must keep the description of their dataset, the same one.
  """
  root = _root(data_dir)
  found = {split: _copies(root, f'{name}-{split}') for split in splits}
  if described:
    known = [
      copy for copies in found.values() for copy in copies if copy[1].description is not None
    ]
    if not known and any(found.values()):
      directory = next(copies[-1][0] for copies in found.values() if copies)
      raise UserError(
        f'{name} was prepared in {directory} by an earlier version, which did not keep its '
        'dataset.json: give the folder of its images as source_dir.'
      )
    found = {split: [copy for copy in copies if copy in known] for split, copies in found.items()}
  where = {origin.source: directory for copies in found.values() for directory, origin in copies}
  if len(where) > 1:
    listed = ''.join(f'\n  {source} (in {where[source]})' for source in sorted(where))
    raise UserError(
      f'{name} was prepared in {root} from several folders: give one of them as source_dir, or '
      f'delete the directories of the others:{listed}'
    )
  last = {split: copies[-1] for split, copies in found.items() if copies}
  descriptions = [origin.description for _, origin in last.values()]
  if described and any(description != descriptions[0] for description in descriptions):
    directories = ' and '.join(str(directory) for directory, _ in last.values())
    raise UserError(
      f'The splits in {directories} were prepared with different dataset.json: give the folder of '
      'their images as source_dir.'
    )
  return last


def _copies(root: Path, name: str) -> list[tuple[Path, Origin]]:
  """Lists the copies of a split with their origins, last used last, without damaged older ones.

  Of several origins of one copy with the same description, the last used stands for all.
  """
  found: list[tuple[Path, Origin]] = []
  damaged: list[tuple[int, Path, Exception]] = []
  for info in root.glob(f'{NAME}/{name}-*/{VERSION}/dataset_info.json'):
    directory = info.parent
    try:
      origins = {json.dumps(origin.description): origin for origin in read_origins(directory)}
    except (OSError, *DAMAGED) as error:
      path = directory / ORIGINS
      changed = (path if path.exists() else info).stat().st_mtime_ns
      damaged.append((changed, directory, error))
    else:
      found += [(directory, origin) for origin in origins.values()]
  found.sort(key=lambda copy: copy[1].used)
  if damaged:
    changed, directory, error = max(damaged, key=lambda copy: copy[:2])
    if not found or changed > found[-1][1].used:
      raise _damaged(name, directory, error) from error
  return found


def _moved(file: str, old: str, new: str) -> str:
  """The path of a file of a folder that was moved; unchanged if it is of another."""
  below = file.removeprefix(f'{old}/')
  return f'{new}/{below}' if below != file else file


def record_files(directory: Path) -> dict[str, int]:
  """The sizes in bytes of the record files in a directory, by name."""
  return {path.name: path.stat().st_size for path in directory.glob('*.array_record*')}


def _damaged(name: str, directory: str | os.PathLike[str], reason: object) -> UserError:
  return UserError(
    f'The prepared copy of {name} in {directory} is damaged ({reason}): delete that directory, and '
    'it will be prepared anew.'
  )
