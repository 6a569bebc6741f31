"""Turns image folders into TFDS datasets of ArrayRecord files, once, and opens them.

A prepared split holds the image and label files byte for byte. It lies in a directory named after
a fingerprint of the files it was made from: changed folders are prepared anew, old data is never
read. TensorFlow is not needed.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import absl.logging
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder

from nonlocal_jax.data import transforms
from nonlocal_jax.data.datasets import Dataset, Sample, Split, list_samples
from nonlocal_jax.errors import UserError
from nonlocal_jax.progress import progress_bar

_SHARD_BYTES = 128 << 20  # a shard is in memory while TFDS writes it


class LabelValue(NamedTuple):
  """How often a raw value occurs in the label files of a split, and the first file that has it."""

  pixels: int
  first_file: Path


class PreparedSplit(Sequence):
  """A sequence of `{'id': str, 'image': bytes, 'label': bytes}`, the files' contents.

  Cheap to pickle: each process that reads opens the record files for itself.

  Attributes:
    name: Name of dataset and split, for messages.
    directory: Where the record files are.
    label_values: For each raw label value that occurs, its `LabelValue`.
  """

  def __init__(self, name: str, directory: os.PathLike, samples: Sequence[Sample]):
    """Opens a directory that `prepare` wrote from `samples`."""
    self.name = name
    self.directory = directory
    self.label_values = {
      int(value): LabelValue(pixels, samples[first].label)
      for value, (pixels, first) in _open(directory).info.metadata['label_values'].items()
    }
    self._indices = range(len(samples))

  def __len__(self) -> int:
    """Returns the number of samples."""
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, str | bytes]:
    """Reads a sample; the order is that of `list_samples`."""
    record = self._records[self._indices[index]]
    return {**record, 'id': record['id'].decode()}

  def __getstate__(self) -> dict:
    """Leaves out the open files."""
    return {key: value for key, value in self.__dict__.items() if key != '_records'}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, bytes]]:
    as_they_are = {key: tfds.decode.SkipDecoding() for key in ('image', 'label')}
    return _open(self.directory).as_data_source('all', decoders=as_they_are)


def prepare(
  dataset: Dataset,
  source_dir: str | Path,
  *,
  splits: Sequence[Split] = ('train', 'val'),
  data_dir: str | Path | None = None,
) -> dict[Split, PreparedSplit]:
  """Prepares the splits that are not prepared yet, with a progress bar, and opens them all.

  Every file is read and decoded once. An interrupted preparation leaves nothing that could be
  opened; several processes may prepare the same split, the first to finish wins.

  Args:
    dataset: What the folder holds.
    source_dir: Folder of images and label maps, see `list_samples`.
    splits: Which splits; the files of the others need not exist.
    data_dir: Where prepared data is kept; None for `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

  Returns:
    The opened splits by name.

  Raises:
    UserError: If files are missing, broken or do not fit together, or `data_dir` is not writable.
  """
  return {split: _prepare_split(dataset, source_dir, split, data_dir) for split in splits}


def check_label_values(
  split: PreparedSplit,
  *,
  num_classes: int,
  reduce_zero_label: bool = False,
  ignore_labels: Sequence[int] = (),
) -> None:
  """Checks that every value in the label files of a split is a class or is ignored.

  Args:
    split: The prepared split.
    num_classes: Number of classes.
    reduce_zero_label: See `transforms.label_lookup`.
    ignore_labels: See `transforms.label_lookup`.

  Raises:
    UserError: If a value is neither; the message names it and a file that has it.
  """
  lookup = transforms.label_lookup(reduce_zero_label=reduce_zero_label, ignore_labels=ignore_labels)
  first_class = int(reduce_zero_label)
  for value, (pixels, first_file) in sorted(split.label_values.items()):
    if num_classes <= lookup[value] < transforms.IGNORE:
      raise UserError(
        f'Label value {value} ({pixels} pixels of {split.name}, first in {first_file}) is none of '
        f'the {num_classes} classes {first_class}..{first_class + num_classes - 1}: add it to '
        '--config.data.ignore_labels, correct --config.data.num_classes, or, where 0 means '
        'unlabelled and classes start at 1, set --config.data.reduce_zero_label=True.'
      )


def _prepare_split(
  dataset: Dataset, source_dir: str | Path, split: Split, data_dir: str | Path | None
) -> PreparedSplit:
  samples = list_samples(dataset, source_dir, split)
  name = f'{dataset.name}-{split}'
  config = tfds.core.BuilderConfig(name=f'{name}-{_fingerprint(samples)}')
  data_dir = os.path.expanduser(data_dir) if data_dir else None
  with _quiet():
    builder = _Builder(samples, split=split, config=config, data_dir=data_dir)
    if not builder.is_prepared():
      with progress_bar(len(samples), f'Preparing {name}', unit='img') as bar:
        builder.on_sample = bar.update
        try:
          builder.download_and_prepare()
        except OSError as error:
          if not builder.is_prepared():  # by another process, meanwhile
            raise UserError(
              f'{name} cannot be prepared in {builder.data_path}: {error}; see to it, or give '
              'another folder as --config.data.data_dir.'
            ) from error
  return PreparedSplit(name, builder.data_path, samples)


def _fingerprint(samples: Sequence[Sample]) -> str:
  digest = hashlib.sha256()
  for sample in samples:
    names = (sample.id, sample.image.name, *sample.label.parts[-2:])
    stats = [path.stat() for path in (sample.image, sample.label)]
    digest.update(repr((names, [(stat.st_size, stat.st_mtime_ns) for stat in stats])).encode())
  return digest.hexdigest()[:16]


class _Builder(ShardBasedBuilder, skip_registration=True):
  """Writes one split of a folder; reading it back needs no builder of this class."""

  name = 'nonlocal_jax'
  VERSION = tfds.core.Version('1.0.0')
  url_infos = None  # nothing is downloaded, so there are no checksums to look for

  def __init__(self, samples: Sequence[Sample], *, split: Split, **kwargs):
    self._samples = samples
    self._split = split
    self.on_sample = lambda: None
    super().__init__(file_format='array_record', **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Images and label maps, as the files they came in.',
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.Image(shape=(None, None, 1)),
        }
      ),
      metadata=tfds.core.MetadataDict(label_values={}),
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(self, dl_manager):
    shards = _in_shards(self._samples)
    return {self._split: [functools.partial(self._generate, shard) for shard in shards]}

  def _generate(self, shard: range) -> Iterator[tuple[int, dict]]:
    label_values = self.info.metadata['label_values']
    pool = ThreadPoolExecutor()
    try:
      audits = pool.map(_read_and_audit, self._samples[shard.start : shard.stop])
      for index, (example, counts) in zip(shard, audits, strict=True):
        for value in np.flatnonzero(counts).tolist():
          pixels, first = label_values.get(value, (0, index))
          label_values[value] = (pixels + int(counts[value]), first)
        self.on_sample()
        yield index, example
    finally:
      pool.shutdown(cancel_futures=True)


def _in_shards(samples: Sequence[Sample]) -> list[range]:
  sizes = [sample.image.stat().st_size + sample.label.stat().st_size for sample in samples]
  shard_of_sample = np.cumsum(sizes) // _SHARD_BYTES
  starts = [0, *(np.flatnonzero(np.diff(shard_of_sample)) + 1).tolist(), len(samples)]
  return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def _read_and_audit(sample: Sample) -> tuple[dict, np.ndarray]:
  """Reads both files and checks that they fit: (example, how often each label value occurs)."""
  image_bytes, image = _read(sample.image, transforms.decode_image)
  label_bytes, label = _read(sample.label, transforms.decode_label)
  if image.shape[:2] != label.shape:
    (image_h, image_w), (label_h, label_w) = image.shape[:2], label.shape
    raise UserError(
      f'Label map {sample.label} is {label_w}x{label_h} pixels but its image {sample.image} is '
      f'{image_w}x{image_h}: replace one of them.'
    )
  example = {
    'id': sample.id,
    'image': io.BytesIO(image_bytes),
    'label': io.BytesIO(label_bytes),
  }
  return example, np.bincount(label.ravel(), minlength=256)


def _read(path: Path, decode: Callable[[bytes], np.ndarray]) -> tuple[bytes, np.ndarray]:
  data = path.read_bytes()
  try:
    return data, decode(data)
  except ValueError as error:
    raise UserError(f'File {path} is {error}: replace it.') from error


def _open(directory: os.PathLike) -> tfds.core.DatasetBuilder:
  with _quiet():
    return tfds.builder_from_directory(directory)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS from printing and logging."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)
