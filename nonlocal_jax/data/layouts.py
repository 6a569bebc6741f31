"""Folder layouts of datasets: where images and label maps are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nonlocal_jax.data.datasets import Dataset, Split
from nonlocal_jax.data.formats.detection import list_folder, read_folder
from nonlocal_jax.data.formats.found import Found
from nonlocal_jax.data.paths import as_path, files_below, in_one_form, read_text, without_suffix
from nonlocal_jax.data.samples import Listing, Sample, by_stem, no_files
from nonlocal_jax.errors import UserError


def list_samples(
  dataset: Dataset,
  source_dir: str | os.PathLike[str],
  split: Split,
  found: Found | None = None,
) -> Listing:
  """Lists the images of a split with their label maps; the other split need not exist.

  The layouts are MMSegmentation's, and for custom datasets any of `formats`:

      cityscapes  leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png
                  gtFine/SPLIT/CITY/ID_gtFine_labelTrainIds.png, or else ID_gtFine_labelIds.png
      ade20k      images/{training,validation}/ID.jpg
                  annotations/{training,validation}/ID.png
      voc12aug    JPEGImages/ID.jpg
                  SegmentationClass/ID.png
                  ImageSets/Segmentation/{train,val}.txt
                  for more training images, SegmentationClassAug/ID.png (those of aug.txt beside
                  train.txt, if it is there), or SBD's cls/ID.mat and {train,val}.txt
      custom      images/SPLIT/**/ID.{jpg,png,...}, see `paths.IMAGE_SUFFIXES`
                  labels/SPLIT/**/ID.png, or another format

  Suffixes may be in upper case. Names are compared in one form of Unicode, see `paths.in_one_form`.
  SBD is looked for in VOCaug/dataset, VOCaug, benchmark_RELEASE/dataset, SBD/dataset and SBD,
  beside the folder of VOC or in it. Training on VOC takes its train images and SBD's, but none of
  its val images.

  Args:
    dataset: Whose layout to expect.
    source_dir: The folder or bucket that holds these, or the one it was unpacked in.
    split: 'train' or 'val'.
    found: What the folder of a custom dataset was found to hold, if that is known.

  Returns:
    The samples, at least one, and what is missing.

  Raises:
    UserError: If a folder is missing, holds no images, or no image has a label map.
  """
  source = as_path(source_dir)
  try:
    if not source.is_dir():
      raise UserError(f'There is no folder {source}: give the folder that holds {dataset.name}.')
    if dataset.layout == 'custom':
      listing = list_folder(source, found or read_folder(source), split)
    else:
      lister = _list_voc if dataset.layout == 'voc12aug' else _list_tree
      listing = lister(dataset, source, split)
  except (OSError, ImportError, ValueError) as error:
    raise UserError(f'Folder {source} cannot be read: {error}; see to it.') from error
  if not listing.samples:
    raise UserError(next(iter(listing.incomplete.values())))
  for sample in listing.samples:
    try:
      sample.id.encode()
    except UnicodeEncodeError as error:
      raise UserError(f'The name {str(sample.image)!r} is not UTF-8: rename the file.') from error
  return listing


class _Tree(NamedTuple):
  parents: tuple[str, ...]  # possible locations below the given folder
  images: dict[Split, str]
  labels: dict[Split, str]
  image_suffixes: tuple[str, ...]
  label_suffixes: tuple[str, ...]  # the first that exists is used


_TREES = {
  'cityscapes': _Tree(
    parents=('.', 'cityscapes'),
    images={'train': 'leftImg8bit/train', 'val': 'leftImg8bit/val'},
    labels={'train': 'gtFine/train', 'val': 'gtFine/val'},
    image_suffixes=('_leftImg8bit.png',),
    label_suffixes=('_gtFine_labelTrainIds.png', '_gtFine_labelIds.png'),
  ),
  'ade20k': _Tree(
    parents=('.', 'ADEChallengeData2016', 'ade/ADEChallengeData2016'),
    images={'train': 'images/training', 'val': 'images/validation'},
    labels={'train': 'annotations/training', 'val': 'annotations/validation'},
    image_suffixes=('.jpg',),
    label_suffixes=('.png',),
  ),
}


def _list_tree(dataset: Dataset, source: Path, split: Split) -> Listing:
  tree = _TREES[dataset.layout]
  root = _find_root(dataset, source, tree.parents, tree.images[split])
  image_folder, label_folder = root / tree.images[split], root / tree.labels[split]
  image_files, label_files = files_below(image_folder), files_below(label_folder)
  images = by_stem(image_folder, image_files, tree.image_suffixes)
  labels = [by_stem(label_folder, label_files, [suffix]) for suffix in tree.label_suffixes]
  if not images:
    raise UserError(
      f'Folder {image_folder} holds no images: put the {split} images of {dataset.name} there, '
      f'as {" or ".join(f"ID{suffix}" for suffix in tree.image_suffixes)}.'
    )
  other_labels = {  # e.g. TIFF files
    in_one_form(path.relative_to(label_folder).with_suffix('').as_posix()): path
    for path in label_files
  }
  samples, incomplete = [], {}
  for stem, image in images.items():
    name = in_one_form(image.relative_to(image_folder).as_posix())
    label = next((of_suffix[stem] for of_suffix in labels if stem in of_suffix), None)
    if not label:
      expected = label_folder / f'{stem}{tree.label_suffixes[-1]}'
      found = f', found {other_labels[stem]}' if stem in other_labels else ''
      incomplete[name] = f'Image {image} has no label map: expected {expected}{found}.'
    elif reason := no_files(image, label):
      incomplete[name] = reason
    else:
      samples.append(Sample(stem, image, label))
  stems = {stem for of_suffix in labels for stem in of_suffix}
  taken = set(images.values())
  others = [path.name for path in image_files if path not in taken]
  return Listing(samples, incomplete, len(stems - images.keys()), others)


_SBD_FOLDERS = ('VOCaug/dataset', 'VOCaug', 'benchmark_RELEASE/dataset', 'SBD/dataset', 'SBD')


def _list_voc(dataset: Dataset, source: Path, split: Split) -> Listing:
  root = _find_root(dataset, source, ('.', 'VOC2012', 'VOCdevkit/VOC2012'), 'JPEGImages')
  lists = root / 'ImageSets/Segmentation'
  ids = _read_ids(lists / f'{split}.txt')
  if not ids:
    raise UserError(f'There are no image names in {lists / f"{split}.txt"}: add them.')
  labels = _in_folder(root / 'SegmentationClass', '.png')
  sources = {id_: (lists / f'{split}.txt', labels.get(id_)) for id_ in ids}
  if split == 'train':
    more = _augmented(root)
    known = {*ids, *_read_ids(lists / 'val.txt')}
    sources |= {id_: found for id_, found in more.items() if id_ not in known}
  images = _in_folder(root / 'JPEGImages', '.jpg')
  samples, incomplete = [], {}
  for id_, (id_file, label) in sources.items():
    image = images.get(id_)
    if image is None:
      expected = root / f'JPEGImages/{id_}.jpg'
      incomplete[id_] = f'There is no image {expected}: add it, or strike it out in {id_file}.'
    elif label is None:
      incomplete[id_] = f'Image {image}, named in {id_file}, has no label map: add it.'
    elif reason := no_files(image, label):
      incomplete[id_] = reason
    else:
      samples.append(Sample(id_, image, label))
  return Listing(samples, incomplete)


def _augmented(root: Path) -> dict[str, tuple[Path, Path | None]]:
  """The images that SBD labels: the lists that name them, and their label maps, None if missing.

  Raises:
    UserError: If there are none.
  """
  pngs = _in_folder(root / 'SegmentationClassAug', '.png')
  candidates = (parent / name for parent in (root.parent, root) for name in _SBD_FOLDERS)
  sbd = next((folder for folder in candidates if (folder / 'cls').is_dir()), None)
  mats = _in_folder(sbd / 'cls', '.mat') if sbd else {}
  aug_list = root / 'ImageSets/Segmentation/aug.txt'
  if aug_list.is_file():
    listed = dict.fromkeys(_read_ids(aug_list), aug_list)
  elif sbd:
    lists = [sbd / f'{split}.txt' for split in ('train', 'val')]
    listed = {id_: id_file for id_file in lists for id_ in sorted(_read_ids(id_file))}
  else:
    listed = pngs
  if not listed:
    raise UserError(
      f'Nothing in or beside {root} is of SBD, the larger part of the training images: put '
      f'{_SBD_FOLDERS[0]} with train.txt, val.txt and cls/*.mat beside it, or SegmentationClassAug '
      'into it.'
    )
  return {id_: (id_file, pngs.get(id_) or mats.get(id_)) for id_, id_file in listed.items()}


def _in_folder(folder: Path, suffix: str) -> dict[str, Path]:
  return by_stem(folder, files_below(folder), [suffix])


def _read_ids(path: Path) -> list[str]:
  """The image names in a list: the first word of each line, without folder and suffix."""
  lines = read_text(path).splitlines() if path.is_file() else []
  names = [in_one_form(line.split()[0]).rpartition('/')[2] for line in lines if line.strip()]
  return [without_suffix(name, ('.jpg', '.png')) or name for name in names]


def _find_root(dataset: Dataset, source: Path, parents: Sequence[str], folder: str) -> Path:
  for parent in parents:
    if (source / parent / folder).is_dir():
      return source if parent == '.' else source / parent
  raise UserError(
    f'There is no folder {folder} in {source}: give the folder of {dataset.name} that holds it.'
  )
