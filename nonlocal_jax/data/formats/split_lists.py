"""Finds lists of the images of a split, and the images that they name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nonlocal_jax.data.datasets import Split
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, in_one_form, read_text, without_suffix
from nonlocal_jax.errors import UserError

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
  'train': ('train', 'training'),
  'val': ('val', 'valid', 'validation'),
}
_LIST_FOLDERS = ('', 'ImageSets/Segmentation', 'ImageSets')
_TEST, _BOTH = ('test.txt', 'testing.txt'), 'trainval.txt'
_UNREAD = tuple(
  f'{name}.csv' for name in (*SPLIT_NAMES['train'], *SPLIT_NAMES['val'], 'trainval', 'test')
)


class Lists(NamedTuple):
  """The lists of a folder.

  Attributes:
    of_split: That of each split.
    tests: Those of images for testing, which are used for nothing.
    both: That of images for training and validation together, if there is one.
    unread: Tables that may be lists, which are not read.
  """

  of_split: Mapping[Split, Path]
  tests: Sequence[Path] = ()
  both: Path | None = None
  unread: Sequence[Path] = ()


def find_lists(source: Path, folders: Sequence[str] = _LIST_FOLDERS) -> Lists:
  """Finds the lists of a folder; those of splits are in the one place that has some.

  Args:
    source: The folder or bucket.
    folders: Where lists may be, below it.

  Raises:
    UserError: If several folders have lists, or a folder has two of a split.
  """
  found: dict[Split, Path] = {}
  tests, both, unread = [], None, []
  for folder in folders:
    place = source / folder if folder else source
    here: dict[Split, Path] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else []:
      name = path.name.lower()
      if name in _TEST:
        tests.append(path)
      elif name == _BOTH:
        both = both or path
      elif name in _UNREAD:
        unread.append(path)
      for split, stems in SPLIT_NAMES.items():
        if name in [f'{stem}.txt' for stem in stems] and path.is_file():
          if split in here:
            raise UserError(f'{here[split]} and {path} both list {split} images: delete one.')
          here[split] = path
    if here and found:
      one, other = (next(iter(lists.values())) for lists in (found, here))
      raise UserError(f'{one} and {other} both divide the images: delete the lists of one folder.')
    found = found or here
  of_split = {split: found[split] for split in SPLIT_NAMES if split in found}
  return Lists(of_split, tests, both, unread)


def listed_names(path: Path, known: 'Names') -> set[str]:
  """Reads which of the known images a list names."""
  return {name for _, line in numbered_lines(path) if (name := known.find(line)[0]) is not None}


def numbered_lines(path: Path) -> list[tuple[int, str]]:
  """Reads the lines of a list with their numbers, from 1 on, without empty ones.

  Raises:
    UserError: If there are none.
  """
  lines = read_text(path).split('\n')
  numbered = [(number, line.rstrip('\r')) for number, line in enumerate(lines, 1) if line.strip()]
  if not numbered:
    raise UserError(f'There are no image names in {path}: add them, or delete the list.')
  return numbered


class Names:
  """Finds images by what stands in lists."""

  def __init__(self, names: Sequence[str]):
    """Takes the names of all images: their paths without suffix."""
    self._names = set(names)
    self._by_last: dict[str, list[str]] = {}
    for name in names:
      self._by_last.setdefault(name.rpartition('/')[2], []).append(name)

  def find(self, line: str) -> tuple[str | None, str]:
    """Finds a whole line or its first word, with or without leading folders and suffix.

    Returns:
      The image's name, None if there is none; and what follows in the line.
    """
    text = line.strip()
    by_space, by_comma = text.split(maxsplit=1), text.split(',', maxsplit=1)
    for parts in ([line], [text], by_space, by_comma):
      path = in_one_form(parts[0]).replace('\\', '/').strip('/')
      for name in dict.fromkeys((path, without_suffix(path, IMAGE_SUFFIXES) or path)):
        while name not in self._names and '/' in name and not _holds_image(name):
          name = name.partition('/')[2]
        same = [name] if name in self._names else self._by_last.get(name, [])
        if len(same) == 1:
          return same[0], parts[-1].strip() if len(parts) > 1 else ''
    return None, ''


def _holds_image(name: str) -> bool:
  """Whether a folder's name ends an image's and goes on: the line has two paths."""
  folder, *_ = name.partition('/')
  words = re.split(r'[\s,;]+', folder)
  return any(without_suffix(word, IMAGE_SUFFIXES) for word in words[:-1])
