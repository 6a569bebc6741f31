"""What each dataset is, and where its files lie in the folders people have."""

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nonlocal_jax.data import classes as tables
from nonlocal_jax.errors import UserError

Split = Literal['train', 'val']
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Dataset:
  """A dataset: its classes, how its label files are read, and how its folders are laid out.

  Attributes:
    name: Short name, used in folder names and messages.
    classes: Name of each class.
    palette: RGB colour of each class, 0..255.
    layout: Which of the folder layouts of `list_samples` it comes in.
    reduce_zero_label: Whether value 0 in the label files has no class and value k is class k - 1.
  """

  name: str
  classes: tuple[str, ...]
  palette: tuple[Colour, ...]
  layout: Literal['cityscapes', 'ade20k', 'voc12aug', 'custom']
  reduce_zero_label: bool = False

  @property
  def num_classes(self) -> int:
    """Number of classes."""
    return len(self.classes)


class Sample(NamedTuple):
  """One image with its label map; `id` is the image's path below its folder, without suffix."""

  id: str
  image: Path
  label: Path


def _published(
  name: Literal['cityscapes', 'ade20k', 'voc12aug'],
  table: Sequence[tuple[str, Colour]],
  *,
  reduce_zero_label: bool = False,
) -> Dataset:
  classes, palette = zip(*table, strict=True)
  return Dataset(name, classes, palette, layout=name, reduce_zero_label=reduce_zero_label)


PUBLISHED = {
  'cityscapes': _published('cityscapes', tables.CITYSCAPES),
  'ade20k': _published('ade20k', tables.ADE20K, reduce_zero_label=True),
  'voc12aug': _published('voc12aug', tables.VOC12AUG),
}


def custom_dataset(
  num_classes: int,
  *,
  name: str = 'custom',
  classes: Sequence[str] | None = None,
  palette: Sequence[Colour] | None = None,
  reduce_zero_label: bool = False,
) -> Dataset:
  """Describes a dataset of one's own, in folders `images/{train,val}` and `labels/{train,val}`.

  Args:
    num_classes: Number of classes; label values are 0 .. num_classes - 1, and 255 to ignore.
    name: Short name, used in folder names and messages.
    classes: Name of each class; None for 'class 0', 'class 1', ...
    palette: RGB colour of each class; None for `distinct_colours`.
    reduce_zero_label: Whether value 0 has no class and the classes are 1 .. num_classes.

  Returns:
    The dataset.

  Raises:
    UserError: If the number of names or colours is not `num_classes`.
  """
  classes = tuple(classes or (f'class {index}' for index in range(num_classes)))
  palette = tuple(tuple(colour) for colour in palette or distinct_colours(num_classes))
  for given, what in ((classes, 'class names'), (palette, 'colours')):
    if len(given) != num_classes:
      raise UserError(
        f'Dataset {name} has {num_classes} classes but {len(given)} {what}: give one for each.'
      )
  return Dataset(name, classes, palette, layout='custom', reduce_zero_label=reduce_zero_label)


def distinct_colours(count: int) -> tuple[Colour, ...]:
  """Makes up to 255 different colours: hues in golden-ratio steps, in four shades by turns.

  Args:
    count: How many.

  Returns:
    RGB colours, 0..255.
  """
  shades = ((0.85, 0.95), (0.55, 0.75), (0.95, 0.55), (0.35, 0.95))
  return tuple(
    tuple(
      round(255 * channel)
      for channel in colorsys.hsv_to_rgb(index * 0.618034 % 1, *shades[index % len(shades)])
    )
    for index in range(count)
  )


def list_samples(dataset: Dataset, source_dir: str | Path, split: Split) -> list[Sample]:
  """Lists the images of a split with their label maps; the other split need not exist.

  The layouts are mmsegmentation's, and a custom one:

      cityscapes  leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png
                  gtFine/SPLIT/CITY/ID_gtFine_labelTrainIds.png
      ade20k      images/{training,validation}/ID.jpg
                  annotations/{training,validation}/ID.png
      voc12aug    JPEGImages/ID.jpg
                  SegmentationClass/ID.png, or SegmentationClassAug/ID.png for the IDs in aug.txt
                  ImageSets/Segmentation/{train,aug,val}.txt; training takes train and aug
      custom      images/SPLIT/**/ID.{jpg,jpeg,png,bmp,tif,tiff}
                  labels/SPLIT/**/ID.png

  Args:
    dataset: Whose layout to expect.
    source_dir: The folder that holds these, or the one it was unpacked in.
    split: 'train' or 'val'.

  Returns:
    At least one sample; the order depends on the names alone.

  Raises:
    UserError: If a folder is missing or empty, or an image has no label map.
  """
  source_dir = Path(source_dir).expanduser()
  if not source_dir.is_dir():
    raise UserError(f'There is no folder {source_dir}: give the folder that holds {dataset.name}.')
  lister = _list_voc if dataset.layout == 'voc12aug' else _list_tree
  samples = lister(dataset, source_dir, split)
  for sample in samples:
    if not sample.label.is_file():
      raise UserError(
        f'Image {sample.image} has no label map: expected {sample.label}{_hint(sample.label)}.'
      )
  return samples


class _Tree(NamedTuple):
  parents: tuple[str, ...]  # where the tree may lie below the folder given
  images: dict[Split, str]
  labels: dict[Split, str]
  image_suffixes: tuple[str, ...]
  label_suffix: str


_TREES = {
  'cityscapes': _Tree(
    parents=('.', 'cityscapes'),
    images={'train': 'leftImg8bit/train', 'val': 'leftImg8bit/val'},
    labels={'train': 'gtFine/train', 'val': 'gtFine/val'},
    image_suffixes=('_leftImg8bit.png',),
    label_suffix='_gtFine_labelTrainIds.png',
  ),
  'ade20k': _Tree(
    parents=('.', 'ADEChallengeData2016', 'ade/ADEChallengeData2016'),
    images={'train': 'images/training', 'val': 'images/validation'},
    labels={'train': 'annotations/training', 'val': 'annotations/validation'},
    image_suffixes=('.jpg',),
    label_suffix='.png',
  ),
  'custom': _Tree(
    parents=('.',),
    images={'train': 'images/train', 'val': 'images/val'},
    labels={'train': 'labels/train', 'val': 'labels/val'},
    image_suffixes=('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff'),
    label_suffix='.png',
  ),
}


def _list_tree(dataset: Dataset, source_dir: Path, split: Split) -> list[Sample]:
  tree = _TREES[dataset.layout]
  root = _find_root(dataset, source_dir, tree.parents, tree.images[split])
  images, labels = root / tree.images[split], root / tree.labels[split]
  samples = {}
  for image in _files_below(images):
    suffix = next((s for s in tree.image_suffixes if image.name.lower().endswith(s.lower())), None)
    if suffix is None:
      continue
    stem = image.relative_to(images).as_posix().removesuffix(image.name[-len(suffix) :])
    if stem in samples:
      raise UserError(
        f'Images {samples[stem].image} and {image} would share one label map: rename one of them.'
      )
    samples[stem] = Sample(stem, image, labels / f'{stem}{tree.label_suffix}')
  if not samples:
    raise UserError(
      f'Folder {images} holds no images: put the {split} images of {dataset.name} there, as '
      f'{" or ".join(f"ID{suffix}" for suffix in tree.image_suffixes)}.'
    )
  return list(samples.values())


def _list_voc(dataset: Dataset, source_dir: Path, split: Split) -> list[Sample]:
  root = _find_root(dataset, source_dir, ('.', 'VOC2012', 'VOCdevkit/VOC2012'), 'JPEGImages')
  label_folders = {
    'train': {'train': 'SegmentationClass', 'aug': 'SegmentationClassAug'},
    'val': {'val': 'SegmentationClass'},
  }
  samples = []
  for name, label_folder in label_folders[split].items():
    id_file = root / 'ImageSets/Segmentation' / f'{name}.txt'
    ids = id_file.read_text().split() if id_file.is_file() else []
    if not ids:
      raise UserError(f'There are no image names in {id_file}: add them{_hint(id_file)}.')
    for id_ in ids:
      sample = Sample(id_, root / f'JPEGImages/{id_}.jpg', root / label_folder / f'{id_}.png')
      if not sample.image.is_file():
        raise UserError(f'There is no image {sample.image}: add it, or strike it out in {id_file}.')
      samples.append(sample)
  return samples


def _find_root(dataset: Dataset, source_dir: Path, parents: Sequence[str], folder: str) -> Path:
  for parent in parents:
    if (source_dir / parent / folder).is_dir():
      return source_dir / parent
  raise UserError(
    f'There is no folder {folder} in {source_dir}: give the folder of {dataset.name} that holds it.'
  )


def _files_below(folder: Path) -> list[Path]:
  return sorted(
    Path(parent, name)
    for parent, _, names in os.walk(folder, followlinks=True)
    for name in names
    if not name.startswith('.')
  )


def _hint(missing: Path) -> str:
  if missing.name.endswith('_labelTrainIds.png'):
    return ' (made by csCreateTrainIdLabelImgs of the package cityscapesscripts)'
  if missing.name == 'aug.txt' or missing.parent.name == 'SegmentationClassAug':
    return ' (made by tools/dataset_converters/voc_aug.py of mmsegmentation)'
  return ''
