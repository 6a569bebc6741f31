"""Label maps that are image files of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nonlocal_jax.data.datasets import Split
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, in_one_form
from nonlocal_jax.data.samples import Listing, Sample, by_stem, no_files
from nonlocal_jax.errors import UserError


def find(source: Path, own: Mapping[str, Any]) -> Candidate | None:
  """Finds images/{train,val} and labels/{train,val}."""
  del own
  if not any((source / 'images' / split).is_dir() for split in ('train', 'val')):
    return None
  if not any((source / 'labels' / split).is_dir() for split in ('train', 'val')):
    return None
  found = Found('PNG files of class indices', {}, lambda split: _list(source, split))
  return Candidate('labels', lambda: found)


def _list(source: Path, split: Split) -> Listing:
  image_folder, label_folder = source / 'images' / split, source / 'labels' / split
  if not image_folder.is_dir():
    raise UserError(
      f'There is no folder images/{split} in {source}: give the folder of custom that holds it.'
    )
  image_files, label_files = files_below(image_folder), files_below(label_folder)
  images = by_stem(image_folder, image_files, IMAGE_SUFFIXES)
  labels = by_stem(label_folder, label_files, ['.png'])
  if not images:
    raise UserError(f'Folder {image_folder} holds no images: put the {split} images there.')
  other_labels = {  # e.g. TIFF files
    in_one_form(path.relative_to(label_folder).with_suffix('').as_posix()): path
    for path in label_files
  }
  samples, incomplete = [], {}
  for stem, image in images.items():
    name = in_one_form(image.relative_to(image_folder).as_posix())
    label = labels.get(stem)
    if not label:
      found = f', found {other_labels[stem]}' if stem in other_labels else ''
      incomplete[name] = (
        f'Image {image} has no label map: expected {label_folder / f"{stem}.png"}{found}.'
      )
    elif reason := no_files(image, label):
      incomplete[name] = reason
    else:
      samples.append(Sample(stem, image, label))
  taken = set(images.values())
  others = [path.name for path in image_files if path not in taken]
  return Listing(samples, incomplete, len(labels.keys() - images.keys()), others)
