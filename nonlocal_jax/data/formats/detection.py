"""Finds out in which format a folder holds images and labels."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nonlocal_jax.data.datasets import DESCRIPTION, Split, read_description
from nonlocal_jax.data.formats import coco, cvat, label_studio, labelme, masks, supervisely
from nonlocal_jax.data.formats.description import merged
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.formats.splits import divided, has_lists, unused_lists
from nonlocal_jax.data.paths import as_path, listed_once
from nonlocal_jax.data.samples import Listing
from nonlocal_jax.errors import UserError, nearest

# By the names that "format" in dataset.json takes.
FORMATS: dict[str, Callable[[Path, Mapping[str, Any]], Candidate | None]] = {
  'masks': masks.find,
  'coco': coco.find,
  'labelme': labelme.find,
  'cvat': cvat.find,
  'label_studio': label_studio.find,
  'supervisely': supervisely.find,
}
_FORMAT = 'format'


class NothingFound(UserError):
  """Raised for a folder that is missing or holds no known format.

  Attributes:
    own: What its `dataset.json` says nevertheless.
  """

  def __init__(self, message: str, own: Mapping[str, Any]):
    super().__init__(message)
    self.own = dict(own)


def read_folder(source_dir: str | os.PathLike[str]) -> Found:
  """Finds out which format a folder holds, and what its `dataset.json` adds to it.

  Reads few label files: those that tell how all are to be read.

  Args:
    source_dir: A folder or bucket.

  Returns:
    What it holds. Its description is completed and overruled by `dataset.json`.

  Raises:
    NothingFound: If it holds no known format.
    UserError: If it holds several, or its files contradict each other.
  """
  source = as_path(source_dir)
  try:
    own = read_description(source)
    wanted = own.pop(_FORMAT, None)
    if wanted is not None and wanted not in FORMATS:
      meant = nearest(wanted, FORMATS)
      raise UserError(
        f'In {source / DESCRIPTION}, {_FORMAT!r} is {wanted!r}'
        f'{f" (did you mean {meant!r}?)" if meant else ""}; it must be one of {", ".join(FORMATS)}.'
      )
    if not source.is_dir():
      raise NothingFound(f'There is no folder {source}: give the folder of the images.', own)
    with listed_once():
      found = _read(source, own, wanted)
    unused = '' if isinstance(found.listing, Listing) else unused_lists(source)
  except (OSError, ImportError, ValueError) as error:
    raise UserError(f'Folder {source} cannot be read: {error}; see to it.') from error
  return dataclasses.replace(
    found,
    sentence='. '.join(filter(None, [found.sentence, unused])),
    description=merged(found, own, source / DESCRIPTION),
  )


def _read(source: Path, own: Mapping[str, Any], wanted: str | None) -> Found:
  candidates = {
    name: candidate
    for name, find in FORMATS.items()
    if wanted in (None, name) and (candidate := find(source, own))
  }
  if not candidates:
    raise NothingFound(_nothing(source, wanted), own)
  if len(candidates) > 1:
    listed = ' and '.join(f'{name} ({found.evidence})' for name, found in candidates.items())
    raise UserError(
      f'Folder {source} holds labels in more than one format, {listed}: move one of them away, '
      f'or choose with "{_FORMAT}": "{next(iter(candidates))}" in {DESCRIPTION}.'
    )
  (candidate,) = candidates.values()
  return candidate.read()


def _nothing(source: Path, wanted: str | None) -> str:
  if wanted is not None:
    return (
      f'Folder {source} holds nothing of the format {wanted!r}, which its {DESCRIPTION} names: '
      f'correct it, or take {_FORMAT!r} out.'
    )
  return (
    f'Folder {source} holds no images with labels in a format that is known: put images into '
    'images/train and images/val, and label maps of the same names into labels/train and '
    'labels/val; or put what COCO, CVAT, Label Studio, labelme or Supervisely export beside images.'
  )


def is_divided(source_dir: str | os.PathLike[str], found: Found) -> bool:
  """Whether folders, annotations or lists divide the images of a folder.

  Args:
    source_dir: A folder or bucket.
    found: What it was found to hold.

  Returns:
    False if `with_splits` would divide them itself.
  """
  return not isinstance(found.listing, Listing) or has_lists(as_path(source_dir))


def with_splits(source_dir: str | os.PathLike[str], found: Found) -> Found:
  """Divides the images of a folder that does not tell splits apart; see `splits.divided`.

  Args:
    source_dir: A folder or bucket.
    found: What it was found to hold.

  Returns:
    The same with splits, and with how they are divided in its sentence.

  Raises:
    UserError: See `splits.divided`.
  """
  if not isinstance(found.listing, Listing):
    return found
  division = divided(as_path(source_dir), found.listing)
  return dataclasses.replace(
    found,
    sentence=f'{found.sentence}. {division.sentence}',
    listing=division.listings.__getitem__,
    warning=division.warning,
    written=division.written,
  )


def list_folder(source_dir: str | os.PathLike[str], found: Found, split: Split) -> Listing:
  """Lists the samples of a split of a folder in any format.

  Args:
    source_dir: A folder or bucket.
    found: What it was found to hold.
    split: 'train' or 'val'. A folder that does not tell them apart is divided first.

  Returns:
    The samples and what is missing.

  Raises:
    UserError: If there are no such images; see also `splits.divided`.
  """
  listing = with_splits(source_dir, found).listing
  assert not isinstance(listing, Listing)
  return listing(split)._replace(reading=found.reading)
