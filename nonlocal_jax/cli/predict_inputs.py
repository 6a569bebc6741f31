"""Finds the images and videos that `nonlocal-jax predict` is given."""

import glob
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from nonlocal_jax.cli.prediction_files import is_prediction
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, without_suffix
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.videos import VIDEO_SUFFIXES, is_video_name
from nonlocal_jax.runtime.files import given_path
from nonlocal_jax.runtime.pipeline import num_cores
from nonlocal_jax.runtime.wording import counted


class Inputs(NamedTuple):
  """What the command line names, by the names of the results, without suffix.

  Attributes:
    images: The images.
    videos: The videos.
  """

  images: dict[str, Path]
  videos: dict[str, Path]


def find_inputs(inputs: Sequence[str]) -> Inputs:
  """Finds images and videos that the command line names, without results of earlier predictions.

  Raises:
    UserError: If an input names none, or two of a kind would have the same output file.
  """
  found = Inputs({}, {})
  num_left_out, others = 0, []
  for given in inputs:
    if not given:  # as of an unset variable
      raise UserError('an INPUT is empty: give an image, a video, a folder, or a pattern.')
    files = list(_files_of(given))
    named = [(name, path) for name, path in files if name is not None]
    results = [path for name, path in files if name is None and is_prediction(path)]
    num_left_out += len(results)
    others += [path for name, path in files if name is None and path not in results]
    if not named:
      raise UserError(
        f'{given} is neither an image or video nor a folder of them nor a pattern that matches any.'
      )
    with warnings.catch_warnings(), ThreadPoolExecutor(num_cores()) as pool:
      warnings.simplefilter('ignore')  # of large images and odd metadata
      are_predictions = list(pool.map(is_prediction, [path for _, path in named]))
    if all(are_predictions):
      raise UserError(f'{given} holds only results of earlier predictions: give their sources.')
    num_left_out += sum(are_predictions)
    for (name, path), is_left_out in zip(named, are_predictions, strict=True):
      is_video = is_video_name(path.name)
      of_kind = found.videos if is_video else found.images
      if not is_left_out and of_kind.setdefault(name, path) != path:
        result = f'{name}_labels.mkv' if is_video else f'{name}.png'
        raise UserError(f'{of_kind[name]} and {path} would both go to {result}: rename one.')
  if num_left_out:
    print(f'Left out: {counted(num_left_out, "result")} of earlier predictions.', file=sys.stderr)
  if others:
    print(
      f'Left out: {counted(len(others), "file")} with names that do not end as those of images or '
      f'videos do, such as {others[0]}.',
      file=sys.stderr,
    )
  return found


def _files_of(given: str) -> Iterable[tuple[str | None, Path]]:
  """The files that an input names, with the names of their results; None for other files."""
  folder = given_path(given)
  if folder.is_dir():
    for path in files_below(folder):
      name = path.relative_to(folder).as_posix()
      yield without_suffix(name, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)), path
    return
  paths = [folder] if folder.is_file() else sorted(glob.glob(str(folder), recursive=True))
  for path in map(Path, paths):
    if not path.is_dir():
      yield path.stem, path
