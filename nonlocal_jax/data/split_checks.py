"""Checks the contents of prepared splits, and tells what is odd about them."""

import sys

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.label_values import check_label_values, usual_mistakes
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat
from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.runtime.wording import counted


def check_split(split: PreparedSplit, dataset: Dataset) -> list[str]:
  """Checks the contents of a prepared split against the dataset's description.

  Args:
    split: The prepared split.
    dataset: Its classes and published sizes.

  Returns:
    A sentence on each thing that is allowed but odd.

  Raises:
    UserError: If a label value is no class and not ignored.
  """
  check_label_values(split.label_values, dataset, split=split.name)
  published = dataset.published_sizes.get(split.name.rsplit('-', 1)[1], len(split))
  odd = []
  if len(split) != published:
    odd.append(
      f'{split.name} has {counted(len(split), "image")}; the published split has {published:,}.'
    )
  if split.left_out:
    odd.append(f'Left out of {split.name}: {counted(len(split.left_out), "bad sample")}.')
  if split.unused_labels:
    odd.append(f'{split.name} has {counted(split.unused_labels, "label map")} without an image.')
  if split.passed_over[0]:
    count, name = split.passed_over
    odd.append(
      f'Left out of {split.name}: {counted(count, "file")} beside its images, such as {name}, with '
      'names that do not end as those of images do.'
    )
  return odd + usual_mistakes(split.label_values, dataset, split=split.name)


def check_pixels(split: PreparedSplit, pixels: PixelFormat) -> list[str]:
  """Checks that the images of a split can be read in a format.

  Args:
    split: The prepared split.
    pixels: The format; RGB of 8 bits is made of gray images, of more bits and of transparency.

  Returns:
    A sentence on what reading them so leaves out.

  Raises:
    UserError: If they cannot.
  """
  if pixels != RGB:
    fits = {pixels}
  else:
    fits = {found for found in split.pixel_formats if found.channels in (1, 3, 4)}
  for found, count in split.pixel_formats.items():
    if found not in fits:
      remedy = 'if all images of train and val have that, nonlocal-jax prepare prints the command'
      if len(split.pixel_formats) > 1:
        remedy = f'others have {next(x for x in split.pixel_formats if x != found)}'
      raise UserError(
        f'{split.name} has {counted(count, "image")} of {found}, and they are read as {pixels}: '
        f'{remedy}; else convert them, as all must have one format.'
      )
  deep = sum(count for found, count in split.pixel_formats.items() if found.bits == 16)
  if pixels == RGB and deep:
    why = 'nonlocal-jax prepare prints the command that reads them all'
    if len(split.pixel_formats) > 1:
      why = 'images of other formats are among them'
    return [
      f'{counted(deep, "image")} of {split.name} have 16 bits, of which the upper 8 are read: '
      f'{why}.'
    ]
  return []


def report_split(split: PreparedSplit, dataset: Dataset, *, pixels: PixelFormat = RGB) -> None:
  """Prints a summary of a prepared split and its warnings to stderr (first process only).

  Args:
    split: The split.
    dataset: The dataset whose classes its labels are checked against.
    pixels: The format in which images are read.

  Raises:
    UserError: If a label value is no class and not ignored, or images have another format.
  """
  odd = check_pixels(split, pixels) + check_split(split, dataset)
  if not is_first_process():
    return
  print(
    f'{split.name}: {counted(len(split), "image")}, from {split.source}, prepared in '
    f'{split.directory}',
    file=sys.stderr,
  )
  for sentence in odd:
    print(f'warning: {sentence}', file=sys.stderr)
