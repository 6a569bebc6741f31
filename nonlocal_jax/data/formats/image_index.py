"""Finds images by the names that annotation files give them."""

import re
from collections.abc import Sequence
from pathlib import Path

from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, in_one_form, without_suffix


class ImageIndex:
  """The image files below a folder, by the names that annotation files give them.

  Annotation files have paths of the machine or the server where they were written. An image is the
  file whose path agrees with the longest end of that path; of several, the one whose folders the
  path of the annotation file names, too. So no path leads out of the folder.
  """

  def __init__(self, source: Path):
    """Lists the images below a folder or bucket."""
    self._source = source
    self._by_name: dict[str, list[Path]] = {}
    for path in files_below(source):
      if without_suffix(path.name, IMAGE_SUFFIXES) is not None:
        self._by_name.setdefault(in_one_form(path.name), []).append(path)
    self._used: set[Path] = set()

  def find(self, names: Sequence[str], file: Path) -> Path:
    """Returns the image for the first of some names that there is one for.

    Raises:
      ValueError: If there is none or more than one; the message lacks the full stop.
    """
    for name in names:
      parts = [
        part for part in re.split(r'[/\\]', in_one_form(name)) if part not in ('', '.', '..')
      ]
      candidates = self._by_name.get(parts[-1], []) if parts else []
      for measure in (
        lambda path, parts=parts: _common_end(parts, self._parts(path)),
        lambda path: _named_in(self._parts(path.parent), self._parts(file)),
      ):
        best = max(map(measure, candidates), default=0)
        candidates = [path for path in candidates if measure(path) == best]
      if len(candidates) > 1:
        raise ValueError(
          f'Image {name}, which {file} names, may be {candidates[0]} or {candidates[1]}: move one '
          'away, or give the folder in the name'
        )
      if candidates:
        self._used.add(candidates[0])
        return candidates[0]
    raise ValueError(
      f'There is no image {names[0]} in {self._source}, which {file} names: add it, or take it out'
    )

  def unused(self) -> int:
    """Returns how many images were never found."""
    return sum(map(len, self._by_name.values())) - len(self._used)

  def _parts(self, path: Path) -> Sequence[str]:
    return [in_one_form(part) for part in path.relative_to(self._source).parts]


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
  pairs = zip(reversed(first), reversed(second), strict=False)
  return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _named_in(folders: Sequence[str], parts: Sequence[str]) -> int:
  """Counts the folders that are among the parts of a path, or in the name at its end."""
  return sum(folder in parts or folder in parts[-1] for folder in folders)
