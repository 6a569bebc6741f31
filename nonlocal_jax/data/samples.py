"""Samples, images with their label maps, and lists of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nonlocal_jax.data.paths import in_one_form, not_a_file, without_suffix
from nonlocal_jax.errors import UserError


class Sample(NamedTuple):
  """One image with its label map.

  Attributes:
    id: The image's path below its folder, without suffix.
    image: The image file.
    label: The file that its labels come from, which several samples may share.
    read_label: Makes the label map, (h, w) uint8, of the height and width of the decoded image;
      raises a `UserError` that names the file. None for label maps that are files of their own.
  """

  id: str
  image: Path
  label: Path
  read_label: Callable[[int, int], np.ndarray] | None = None


class Listing(NamedTuple):
  """The contents of the folders.

  Attributes:
    samples: Images with a label map; the order depends on the names alone.
    incomplete: A sentence on each image that is missing, lacks a label map, or where one of the two
      is no file, by the image's name.
    unused_labels: Number of label maps without an image.
    passed_over: Files beside the images that are none by their names.
    reading: What decides the pixels of the label maps beyond their files; empty if nothing does.
  """

  samples: list[Sample]
  incomplete: dict[str, str]
  unused_labels: int = 0
  passed_over: Sequence[str] = ()
  reading: str = ''


def by_stem(folder: Path, files: Sequence[Path], suffixes: Sequence[str]) -> dict[str, Path]:
  """Finds the files that end with one of the suffixes, by the rest of their relative paths.

  Args:
    folder: A folder.
    files: Files below it.
    suffixes: See `paths.without_suffix`.

  Returns:
    The files by their paths below the folder, in one form of Unicode, without suffix.

  Raises:
    UserError: If two differ in nothing else.
  """
  found: dict[str, Path] = {}
  for path in files:
    name = in_one_form(path.relative_to(folder).as_posix())
    stem = without_suffix(name, suffixes)
    if stem is not None and found.setdefault(stem, path) != path:
      raise UserError(
        f'Files {found[stem]} and {path} cannot be told apart, since neither suffixes nor forms of '
        'Unicode count: rename or delete one of them.'
      )
  return found


def no_files(*paths: Path) -> str | None:
  """Returns a sentence on the first path that is no file, if there is one."""
  found = ((path, not_a_file(path)) for path in paths)
  return next((f'File {path} is {what}: replace it.' for path, what in found if what), None)
