"""Downloads the published datasets and lays out the folders that `layouts.list_samples` reads."""

import sys
from collections.abc import Sequence
from pathlib import Path

from nonlocal_jax.data.archives import missing_files, unpack
from nonlocal_jax.data.cityscapes import download_packages
from nonlocal_jax.data.datasets import PUBLISHED, Split
from nonlocal_jax.data.distributions import DISTRIBUTIONS, Archive
from nonlocal_jax.data.layouts import list_samples
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.download import check_free_space, download, lock_of, remove_downloaded
from nonlocal_jax.runtime.files import cache_folder, make_folder


def datasets_folder() -> Path:
  """Returns the folder of the datasets where none is given: `datasets` in the cache folder."""
  return cache_folder() / 'datasets'


def fetch_dataset(
  name: str,
  folder: Path | None = None,
  *,
  splits: Sequence[Split] = ('train', 'val'),
  username: str = '',
  keep_archives: bool = False,
) -> Path:
  """Downloads and unpacks what is missing of a published dataset; prints its terms of use first.

  An archive that is in the folder already is used, and stays. Downloaded ones are deleted once they
  are unpacked. Folders appear when they are whole, with the published number of files. The same
  call goes on after an interruption. Of several processes one downloads and the others wait.

  Args:
    name: 'ade20k', 'voc12aug' or 'cityscapes'.
    folder: Where it goes, in ADEChallengeData2016, VOCdevkit or cityscapes; None for
      `datasets_folder()`.
    splits: For which splits; 'val' of voc12aug does not need SBD.
    username: Of a login at cityscapes-dataset.com, used if cityscapesscripts is installed. The
      password is asked for, or read from the environment variable CITYSCAPES_PASSWORD.
    keep_archives: Whether downloaded archives stay.

  Returns:
    The folder, the `source_dir` of the dataset.

  Raises:
    UserError: If something cannot be downloaded, is not what was published or does not fit on the
      disk, or a folder is there but not whole.
  """
  folder = folder or datasets_folder()
  if _is_whole(name, folder, splits):
    return folder
  make_folder(folder)
  with lock_of(folder / name):
    try:
      _fetch(name, folder, splits, username, keep_archives)
    except OSError as error:
      raise UserError(f'{folder} cannot be written: {error.strerror or error}.') from error
  for split in splits:
    count, published = len(list_samples(PUBLISHED[name], folder, split).samples), _size(name, split)
    if count != published:
      raise UserError(
        f'{name}-{split} in {folder} has {count:,} images with label maps, the published split '
        f'{published:,}: move the folder away to download it anew.'
      )
  return folder


def _is_whole(name: str, folder: Path, splits: Sequence[Split]) -> bool:
  try:
    listings = {split: list_samples(PUBLISHED[name], folder, split) for split in splits}
  except UserError:
    return False
  return all(len(listing.samples) == _size(name, split) for split, listing in listings.items())


def _size(name: str, split: Split) -> int:
  return PUBLISHED[name].published_sizes[split]


def _fetch(
  name: str, folder: Path, splits: Sequence[Split], username: str, keep_archives: bool
) -> None:
  """Downloads and unpacks the archives whose folders are missing; the lock is held."""
  distribution = DISTRIBUTIONS[name]
  missing = [archive for archive in distribution.archives if set(splits) & set(archive.splits)]
  for archive in list(missing):
    target = folder / archive.folder
    if target.exists():
      if differences := missing_files(target, archive.contents):
        raise UserError(
          f'{target} is there, but holds {", ".join(differences)}: complete it, or move it away to '
          'download it.'
        )
      missing.remove(archive)
  absent = [archive for archive in missing if not (folder / archive.file).exists()]
  if absent:
    print(f'{distribution.terms}\nWhoever downloads it accepts them.', file=sys.stderr)
    need = sum(archive.size for archive in (*absent, *missing))
    what = f'Downloading and unpacking {name}'
    check_free_space(folder, need, what=what, remedy='give a folder on another disk')
  if behind_login := [archive.file for archive in absent if not archive.addresses]:
    for file in download_packages(behind_login, folder, username):
      _mark_of(folder / file).touch()
  for archive in missing:
    path = folder / archive.file
    if archive.addresses:
      _download(archive, folder)
    if archive in absent:
      _mark_of(path).touch()
    unpack(path, folder / archive.folder, archive.contents)
    is_ours = _mark_of(path).exists()
    _mark_of(path).unlink(missing_ok=True)
    if is_ours and not keep_archives:
      remove_downloaded(path)
    else:
      print(f'{path} stays; it is not needed any more.', file=sys.stderr)


def _mark_of(archive: Path) -> Path:
  """The file that tells, after an interruption, that an archive was not put there by a user."""
  return archive.with_name(f'.{archive.name}.downloaded')


def _download(archive: Archive, folder: Path) -> None:
  """Downloads an archive, or compares the checksum of the one that is there."""
  for address in archive.addresses:
    try:
      download(address, folder=folder, name=archive.file, sha256=archive.sha256, md5=archive.md5)
      return
    except UserError as error:
      if address == archive.addresses[-1] or (folder / archive.file).exists():
        raise
      print(f'{error} Trying another address.', file=sys.stderr)
