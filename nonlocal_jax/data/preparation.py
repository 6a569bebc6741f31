"""Converts image folders to TFDS datasets of ArrayRecord files, once.

The directory of a split is named after a fingerprint of the files that it was made from: changed
folders are prepared anew, old data is never read. TensorFlow is not needed.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import absl.logging
import filelock
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder

from nonlocal_jax.data.datasets import Dataset, Split
from nonlocal_jax.data.formats.detection import read_folder, with_splits
from nonlocal_jax.data.formats.found import Found
from nonlocal_jax.data.formats.splits import withdrawn_after_errors
from nonlocal_jax.data.layouts import list_samples
from nonlocal_jax.data.origins import absolute, record_origin
from nonlocal_jax.data.paths import is_remote, is_utf8, version_of
from nonlocal_jax.data.pixel_formats import format_name
from nonlocal_jax.data.prepared import NAME, VERSION, PreparedSplit, record_files
from nonlocal_jax.data.samples import Listing, Sample
from nonlocal_jax.data.validation import AuditedSample, read_sample
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import unfinished
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.runtime.wording import counted

_SHARD_BYTES = 128 << 20  # TFDS holds a shard in memory while writing it
# Changes the fingerprints of custom datasets, whose label files earlier versions read otherwise.
_FORMAT = 'samples as they are'
_INCOMPLETE = f'{tfds.core.constants.INCOMPLETE_PREFIX}*'  # folders that TFDS is writing
_READERS = 32  # threads that read from a bucket, where latency dominates


def prepare(
  dataset: Dataset,
  source_dir: str | os.PathLike[str],
  *,
  splits: Sequence[Split] = ('train', 'val'),
  data_dir: str | os.PathLike[str] | None = None,
  skip_bad: bool = False,
  found: Found | None = None,
) -> dict[Split, PreparedSplit]:
  """Prepares the splits that are not prepared yet, with a progress bar, and opens them all.

  The copy keeps the absolute path of its source, and of a custom dataset its description: what the
  folder was found to hold, with its `dataset.json`.

  Every file is read and decoded once, by all cores. An interrupted preparation leaves nothing that
  could be opened, and the next one clears away what it left. Of several processes one prepares and
  the others wait.

  Args:
    dataset: What the folder holds.
    source_dir: Folder or bucket of images and label maps, see `layouts.list_samples`.
    splits: Which splits; the files of the others need not exist.
    data_dir: Where prepared data is kept; None for `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    skip_bad: Whether to leave out bad samples. Later, the copy without them is opened as it is.
    found: What the folder of a custom dataset was found to hold, with splits, if that is known.

  Returns:
    The opened splits by name.

  Raises:
    UserError: If files are missing, broken or do not fit together and are not to be left out, or
      `data_dir` is not writable.
  """
  # Held until the end: both splits may come from the same files, which are then read once.
  written: Sequence[Path] = ()  # a caller that divided the images withdraws its lists itself
  if found is None and dataset.layout == 'custom':
    found = with_splits(source_dir, read_folder(source_dir))
    written = found.written
  if found and found.warning and is_first_process():
    print(f'warning: {found.warning}', file=sys.stderr)
  with withdrawn_after_errors(written):
    return {
      split: _prepare_split(dataset, source_dir, split, found, data_dir, skip_bad)
      for split in splits
    }


def _prepare_split(
  dataset: Dataset,
  source_dir: str | os.PathLike[str],
  split: Split,
  found: Found | None,
  data_dir: str | os.PathLike[str] | None,
  skip_bad: bool,
) -> PreparedSplit:
  name = f'{dataset.name}-{split}'
  listing = list_samples(dataset, source_dir, split, found)
  description = found.description if found else {}
  fingerprint = _fingerprint(listing, salt=f'{_FORMAT}{listing.reading}' if found else '')
  config = tfds.core.BuilderConfig(name=f'{name}-{fingerprint}')
  with _quiet():
    builder = _Builder(
      name,
      listing,
      split=split,
      source=absolute(source_dir),
      skip_bad=skip_bad,
      config=config,
      data_dir=os.path.expanduser(data_dir) if data_dir else None,
    )
    if not builder.is_prepared():
      if listing.incomplete and not skip_bad:
        raise _bad_samples(name, list(listing.incomplete.values()))
      if not is_utf8(builder.data_path):
        raise UserError(
          f'{name} cannot be prepared in {str(builder.data_path)!a}, whose name is not UTF-8; '
          'give another folder as data_dir.'
        )
      try:
        builder.prepare_alone()
      except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter on a full disk
        raise UserError(
          f'{name} cannot be prepared in {builder.data_path}: {error}; see to it, or give '
          'another folder as data_dir.'
        ) from error
  directory = Path(builder.data_path)
  if is_first_process():
    record_origin(directory, absolute(source_dir), description)
  return PreparedSplit(name, directory)


def _fingerprint(listing: Listing, *, salt: str) -> str:
  samples = listing.samples
  paths = [path for sample in samples for path in (sample.image, sample.label)]
  with ThreadPoolExecutor(_READERS) as pool:
    versions = pool.map(version_of, paths) if is_remote(paths[0]) else map(version_of, paths)
    digest = hashlib.sha256(salt.encode())
    for sample, image, label in zip(samples, versions, versions, strict=True):
      names = (sample.id, sample.image.name, *sample.label.parts[-2:])
      digest.update(repr((names, [image, label])).encode())
    for name in sorted(listing.incomplete):
      digest.update(repr(name).encode())
  return digest.hexdigest()[:16]


class _Info(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    """Does nothing: TFDS would look for the dataset online, and leave a temporary folder."""


class _Builder(ShardBasedBuilder, skip_registration=True):
  """Writes one split of a folder; reading it does not need this class."""

  name = NAME
  VERSION = tfds.core.Version(VERSION)
  url_infos = None  # nothing is downloaded, so there are no checksums

  def __init__(
    self,
    title: str,
    listing: Listing,
    *,
    split: Split,
    source: str,
    skip_bad: bool,
    **kwargs,
  ):
    self._title = title
    self._samples = listing.samples
    self._unused_labels = listing.unused_labels
    self._passed_over = listing.passed_over
    self._split = split
    self._source = source
    self._bad = list(listing.incomplete.values())
    self._skip_bad = skip_bad
    self._on_sample: Callable[[], object] = lambda: None
    super().__init__(file_format='array_record', **kwargs)

  def prepare_alone(self) -> None:
    """Prepares, or waits for another process that does; removes what a stopped one left."""
    parent = self.data_path.parent
    parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(parent / '.lock'):
      if self.is_prepared():
        return
      for leftover in parent.glob(_INCOMPLETE):
        # A process that was asked to stop may be removing it as well.
        shutil.rmtree(leftover, ignore_errors=True)
      with (
        unfinished(parent, _INCOMPLETE),
        progress_bar(len(self._samples), f'Preparing {self._title}', unit='img') as bar,
      ):
        self._on_sample = bar.update
        self.download_and_prepare()

  def _info(self) -> tfds.core.DatasetInfo:
    return _Info(
      builder=self,
      description='Images and label maps, as the files they came in.',
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.Image(shape=(None, None, 1)),
        }
      ),
      metadata=tfds.core.MetadataDict(
        source=self._source,
        unused_labels=self._unused_labels,
        passed_over=[len(self._passed_over), *self._passed_over[:1]],
        sizes=[],
        left_out=[],
        label_values={},
        pixel_formats={},
        moments={},
        record_files={},
      ),
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(self, dl_manager):
    shards = _in_shards(self._samples)
    return {self._split: [functools.partial(self._generate, shard) for shard in shards]}

  def _generate(self, shard: range) -> Iterator[tuple[int, dict]]:
    label_values = self.info.metadata['label_values']
    remote = is_remote(self._samples[0].image)
    pool = ThreadPoolExecutor(_READERS if remote else os.cpu_count())
    try:
      audits = pool.map(_read_or_complain, self._samples[shard.start : shard.stop])
      for index, audited in zip(shard, audits, strict=True):
        self._on_sample()
        if isinstance(audited, str):
          self._bad.append(audited)
          continue
        sample = self._samples[index]
        self.info.metadata['sizes'].append(audited.size)
        self._count_pixels(audited)
        for value in np.flatnonzero(audited.pixels).tolist():
          pixels, first_file = label_values.get(value, (0, absolute(sample.label)))
          label_values[value] = (pixels + int(audited.pixels[value]), first_file)
        yield (
          index,
          {
            'id': sample.id,
            'image': io.BytesIO(audited.image),
            'label': io.BytesIO(audited.label),
          },
        )
    finally:
      pool.shutdown(cancel_futures=True)

  def _count_pixels(self, audited: AuditedSample) -> None:
    """Counts images by their format, and sums the samples of their channels."""
    formats, moments = self.info.metadata['pixel_formats'], self.info.metadata['moments']
    name = format_name(audited.pixel_format)
    formats[name] = formats.get(name, 0) + 1
    if audited.moments is not None:
      new = [[audited.size[0] * audited.size[1]], *audited.moments]
      old = moments.get(name, [[0] * len(part) for part in new])
      moments[name] = [
        [a + b for a, b in zip(*parts, strict=True)] for parts in zip(old, new, strict=True)
      ]

  def _download_and_prepare(self, *arguments, **options) -> None:
    super()._download_and_prepare(*arguments, **options)
    if self._bad and not (self._skip_bad and self.info.splits.total_num_examples):
      # While the directory can still be removed.
      raise _bad_samples(self._title, self._bad, left_out=self._skip_bad)
    self.info.metadata['left_out'] = self._bad
    self.info.metadata['record_files'] = record_files(Path(self.data_dir))


def _in_shards(samples: Sequence[Sample]) -> list[range]:
  # A file that label maps are drawn from may have those of many samples.
  files = ([sample.image] if sample.read_label else sample[1:3] for sample in samples)
  sizes = [sum(version_of(path)[0] for path in paths) for paths in files]
  shard_of_sample = np.cumsum(sizes) // _SHARD_BYTES
  starts = [0, *(np.flatnonzero(np.diff(shard_of_sample)) + 1).tolist(), len(samples)]
  return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def _read_or_complain(sample: Sample) -> AuditedSample | str:
  try:
    return read_sample(sample)
  except UserError as error:
    return str(error)


def _bad_samples(name: str, complaints: Sequence[str], *, left_out: bool = False) -> UserError:
  """An error on bad samples; `left_out` if they were to be left out, and there are no others."""
  listed = '\n  '.join(complaints[:20])
  more = f'\n  and {len(complaints) - 20} more' if len(complaints) > 20 else ''
  if left_out:
    count = counted(len(complaints), 'bad sample')
    return UserError(f'{name} has {count} and no others; mend them:\n  {listed}{more}')
  if len(complaints) == 1:
    return UserError(f'{complaints[0]} Or leave it out with skip_bad.')
  return UserError(
    f'{name} has {len(complaints)} bad samples; mend them, or leave them out with '
    f'skip_bad:\n  {listed}{more}'
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TFDS's printing and logging; for the main thread, because others print as well."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)
