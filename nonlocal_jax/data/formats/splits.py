"""Divides images into those for training and those for validation by lists, or writes lists."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from nonlocal_jax.data.datasets import Split
from nonlocal_jax.data.formats.automatic_split import choose_val, present_classes
from nonlocal_jax.data.formats.split_lists import Names, find_lists, listed_names, numbered_lines
from nonlocal_jax.data.paths import (
  IMAGE_SUFFIXES,
  in_one_form,
  is_remote,
  is_utf8,
  read_text,
  without_suffix,
)
from nonlocal_jax.data.samples import Listing
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.runtime.wording import counted


class Division(NamedTuple):
  """Images by split.

  Attributes:
    listings: The images of each split.
    sentence: How they were divided.
    warning: A sentence on labeled images in no split; empty if there are none.
    written: Lists that were written, because there were none.
  """

  listings: Mapping[Split, Listing]
  sentence: str
  warning: str = ''
  written: Sequence[Path] = ()


def divided(source: Path, listing: Listing) -> Division:
  """Divides the images of a folder into splits.

  The lists train.txt and val.txt in the folder, in ImageSets/Segmentation or in ImageSets have an
  image in each line: its path or the end of it, with or without suffix. With one of the lists, the
  other split has all other images: those of trainval.txt, if that is there, and none of test.txt.
  Without lists, these images are divided by `choose_val`, and train.txt and val.txt are written
  into the folder, where later runs and other programs find them.

  Args:
    source: The folder or bucket.
    listing: All images. Those without a label map are divided as well.

  Returns:
    The images of each split.

  Raises:
    UserError: If lists name no images, or contradict each other; or there are none and none can be
      written.
  """
  names = [sample.id for sample in listing.samples]
  names += [_stem(name) for name in listing.incomplete]
  known, warning = Names(names), ''
  all_lists = find_lists(source)
  tested = {name for path in all_lists.tests for name in listed_names(path, known)}
  pool = set(names) if all_lists.both is None else listed_names(all_lists.both, known)
  pool -= tested
  lists, written = all_lists.of_split, []
  if not lists:
    written = _write_lists(source, listing, [name for name in names if name in pool])
    lists = find_lists(source).of_split
  labels = {sample.id: sample.label for sample in listing.samples}
  found: dict[Split, set[str]] = {}
  missing: dict[Split, dict[str, str]] = {'train': {}, 'val': {}}
  for split, path in lists.items():
    found[split] = set()
    for number, line in numbered_lines(path):
      name, rest = known.find(line)
      if name is not None and rest and not _is_label(rest, labels.get(name)):
        raise UserError(
          f'{path} has {rest!r} after the image {name!r} in line {number}, which is not its label '
          'map: a list names images, and their label maps are found by their names.'
        )
      if name is None:
        missing[split][line] = (
          f'There is no image {line.strip()!r} in {source}, which {path} names in line {number}: '
          'add it, or strike it out there.'
        )
      else:
        found[split].add(name)
  if len(found) == 2:
    if both := sorted(found['train'] & found['val']):
      more = f' and {len(both) - 1} more' if len(both) > 1 else ''
      raise UserError(
        f'Image {both[0]!r}{more} stands both in {lists["train"]} and in {lists["val"]}: strike it '
        'out in one of them.'
      )
    sentence = f'{_listed(source, lists.values())} divide the images'
    neither = {sample.id for sample in listing.samples} - found['train'] - found['val'] - tested
    if neither:
      warning = (
        f'{counted(len(neither), "labeled image")} of {source} left out, which neither list has, '
        f'such as {min(neither)!r}.'
      )
  else:
    ((split, path),) = lists.items()
    other: Split = 'val' if split == 'train' else 'train'
    found[other] = pool - found[split]
    others = f'other {len(found[other]):,}'
    if all_lists.both is not None:
      others += f' of {_listed(source, [all_lists.both])}'
    sentence = (
      f'{_listed(source, [path])} lists the {split} images; the {others} are {other} images'
    )
    if not found[other]:
      if tested:
        raise UserError(
          f'{path} and {all_lists.tests[0]} name all images of {source}, so that none is left for '
          f'{other}: rename the latter to {other}.txt, or strike some out.'
        )
      raise UserError(
        f'{path} names all images of {source}, so that none is left for {other}: strike some out.'
      )
  if unused := [*all_lists.tests, *all_lists.unread]:
    sentence += f'; {_listed(source, unused)} {"are" if unused[1:] else "is"} not used'
  listings = {
    split: _part(listing, found[split], missing[split], of_all=split == 'train') for split in found
  }
  return Division(listings, sentence, warning, written)


def has_lists(source: Path) -> bool:
  """Whether a folder has a list of the images for training or for validation."""
  return bool(find_lists(source).of_split)


def unused_lists(source: Path) -> str:
  """Says that the lists of a folder whose images are divided already are not used; '' if none."""
  lists = find_lists(source, folders=[''])
  paths = [*lists.of_split.values(), *([lists.both] if lists.both else []), *lists.tests]
  if not paths:
    return ''
  names = _listed(source, paths)
  return f'{names} {"are" if paths[1:] else "is"} not used: the images are divided already'


def _part(
  listing: Listing, names: set[str], missing: Mapping[str, str], *, of_all: bool
) -> Listing:
  """Some of the images; with what was found of all of them, to be told once."""
  incomplete = {name: reason for name, reason in listing.incomplete.items() if _stem(name) in names}
  return listing._replace(
    samples=[sample for sample in listing.samples if sample.id in names],
    incomplete={**incomplete, **missing},
    unused_labels=listing.unused_labels if of_all else 0,
    passed_over=listing.passed_over if of_all else (),
  )


def _stem(name: str) -> str:
  return without_suffix(name, IMAGE_SUFFIXES) or name


def _listed(source: Path, paths) -> str:
  return ' and '.join(path.relative_to(source).as_posix() for path in paths)


def _is_label(text: str, label: Path | None) -> bool:
  """Whether text is the path of a label map, or the end of it, perhaps without suffix."""
  path = PurePosixPath(in_one_form(text).replace('\\', '/'))
  return label is not None and in_one_form(label.stem) in (path.name, path.stem)


def _write_lists(source: Path, listing: Listing, names: Sequence[str]) -> list[Path]:
  """Chooses the val images and writes the lists.

  Args:
    source: The folder.
    listing: Its images.
    names: Those of them that are divided, first those with a label map, in the same order.

  Returns:
    The lists.

  Raises:
    UserError: If there is one image only, no label map can be read, or a list cannot be written.
  """
  samples = [sample for sample in listing.samples if sample.id in set(names)]
  if not listing.samples:
    raise UserError(next(iter(listing.incomplete.values())))
  if wrong := next((name for name in names if '\n' in name or not is_utf8(name)), None):
    raise UserError(f'The name {wrong!a} has a line break or is not UTF-8: rename the file.')
  if len(names) < 2:
    raise UserError(
      f'Folder {source} has {counted(len(names), "image")} for training and validation, which '
      'cannot be divided: add more.'
    )
  present = np.zeros((len(names), IGNORE), bool)
  present[: len(samples)] = present_classes(samples)
  is_val = choose_val(names, present)
  train, val = (
    [name for name, of_val in zip(names, is_val, strict=True) if of_val == wanted]
    for wanted in (False, True)
  )
  _write_list(source / 'train.txt', train)
  try:
    _write_list(source / 'val.txt', val)
  except UserError:
    (source / 'train.txt').unlink(missing_ok=True)
    raise
  if is_first_process():
    print(
      f'No list divided the images of {source}: {np.sum(~is_val):,} were chosen for training and '
      f'{np.sum(is_val):,} for validation, and listed in train.txt and val.txt there.',
      file=sys.stderr,
    )
  return [source / 'train.txt', source / 'val.txt']


@contextlib.contextmanager
def withdrawn_after_errors(written: Sequence[Path]) -> Iterator[None]:
  """Context after a `UserError` in which lists that were written for it are removed.

  What is wrong may be images or label values, which the user mends: then they are divided anew.

  Args:
    written: See `Found.written`.
  """
  try:
    yield
  except UserError:
    if is_first_process():
      for path in written:
        path.unlink(missing_ok=True)
      if written:
        print(f'{" and ".join(path.name for path in written)} were removed again.', file=sys.stderr)
    raise


def _write_list(path: Path, names: Sequence[str]) -> None:
  text = ''.join(f'{name}\n' for name in names)
  try:
    if path.exists():
      if read_text(path) != text:  # another process writes the same
        raise UserError(f'{path} was written by somebody else in the meantime: start again.')
    elif is_remote(path):
      path.write_text(text, encoding='utf-8')
    else:
      write_whole(path, text)
  except Exception as error:  # clients of buckets raise many types
    cause = error.__cause__ or error
    reason = getattr(cause, 'strerror', None) or str(error).rstrip('.') or type(error).__name__
    raise UserError(
      f'The images of {path.parent} are not divided into train and val, and the list {path.name} '
      f'cannot be written there ({reason}): put images and labels into folders train and val, or '
      'add train.txt and val.txt with an image name in each line.'
    ) from error
