"""Where a folder keeps images and label maps that are files of their own."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nonlocal_jax.data.datasets import Split
from nonlocal_jax.data.formats.split_lists import SPLIT_NAMES
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, files_below, in_one_form, without_suffix
from nonlocal_jax.data.samples import Listing, Sample, by_stem, no_files
from nonlocal_jax.errors import UserError

# Names of folders, in lower case.
_IMAGE_FOLDERS = (
  *('images', 'image', 'imgs', 'img', 'img_dir', 'jpegimages'),
  *('photos', 'photo', 'pictures', 'rgb'),
)
_LABEL_FOLDERS = (
  *(
    'labels',
    'label',
    'masks',
    'mask',
    'annotations',
    'annotation',
    'ann_dir',
    'segmentationclass',
  ),
  *('segmentationclasspng', 'masks_machine', 'gt', 'ground_truth', 'segmentations'),
)
# How the folder of a split's label maps continues the name of that of its images.
_FOLDER_ENDINGS = ('_labels', '_label', '_masks', '_mask', '_annotations', 'annot', '_gt')
# How the name of a label map continues that of its image, without suffix.
_ENDINGS = (
  *('', '_mask', '_masks', '-mask', '_label', '_labels', '_L', '_seg', '_segmentation', '_gt'),
  *('_annotation', '_semantic'),
)
# How the name of an image may continue what its label map has in common with it.
_IMAGE_ENDINGS = ('_sat', '_image', '_img', '_rgb', '-image', '_leftImg8bit')
_TEXTS = ('.txt', '.csv', '.json', '.xml', '.yaml', '.md', '.html')


class Pair(NamedTuple):
  """A folder of images and the one of their label maps, which may be the same one.

  Attributes:
    images: Folder of the images.
    labels: Folder of the label maps.
    prefix: What goes before the names of the images, so that they differ between folders.
  """

  images: Path
  labels: Path
  prefix: str = ''


class Places(NamedTuple):
  """The folders of a dataset.

  Attributes:
    pairs: The folders of each split; of None, where splits have no folders of their own.
    unused: Folders of a split that is not used, such as test.
  """

  pairs: Mapping[Split | None, Sequence[Pair]]
  unused: Sequence[str] = ()


def locate(source: Path) -> Places | None:
  """Finds folders of images and label maps.

  Args:
    source: The folder or bucket.

  Returns:
    The folders of the first arrangement that fits: images/SPLIT and labels/SPLIT, SPLIT/images and
    SPLIT/labels, SPLIT and SPLIT_labels, SPLIT with both side by side, images and labels, those in
    other folders, or both side by side; with their usual names.

  Raises:
    UserError: If several folders could be the one of the images, or of the label maps.
  """
  image_folder = _one(source, _IMAGE_FOLDERS, 'images')
  label_folder = _one(source, _LABEL_FOLDERS, 'label maps')
  splits = _splits(source)
  if image_folder and label_folder:
    if found := _in_splits(image_folder, label_folder):
      return found
    if not splits:
      return Places({None: [Pair(image_folder, label_folder)]})
  if not splits:  # train_images and train_masks
    splits = _splits(source, '_images')
  for find in (_in_folder, _beside_folder, _side_by_side):
    found = {split: find(folder) for split, folder in splits.items()}
    pairs: dict[Split | None, list[Pair]] = {s: [pair] for s, pair in found.items() if pair}
    if pairs:
      return Places(pairs, _tests(source))
  if image_folder and label_folder:
    return Places({None: [Pair(image_folder, label_folder)]})
  parts = [(folder, _in_folder(folder)) for folder in _folders(source)]
  pairs_of_parts = [pair._replace(prefix=f'{folder.name}/') for folder, pair in parts if pair]
  if pairs_of_parts:
    return Places({None: pairs_of_parts})
  if pair := _side_by_side(source):
    return Places({None: [pair]})
  image_folder, label_folder = source / 'images', source / 'labels'
  if image_folder.is_dir() and label_folder.is_dir() and not files_below(label_folder):
    return _in_splits(image_folder, label_folder)  # which tells what is missing
  return None


def _in_splits(image_folder: Path, label_folder: Path) -> Places | None:
  inner, labels = _splits(image_folder), _splits(label_folder)
  pairs: dict[Split | None, list[Pair]] = {}
  for split, folder in inner.items():
    default = label_folder / folder.name if labels else label_folder
    pairs[split] = [Pair(folder, labels.get(split, default))]
  return Places(pairs, _tests(image_folder)) if pairs else None


def lonely_labels(source: Path) -> Path | None:
  """The folder of label maps of a folder that has no folder of images, such as an export."""
  labels = _one(source, _LABEL_FOLDERS, 'label maps')
  images = any(path for path in _folders(source) if path.name.lower() in _IMAGE_FOLDERS)
  return None if images else labels


def _folders(folder: Path) -> list[Path]:
  # Few questions are asked about what is in buckets: each takes long.
  named = (path for path in folder.iterdir() if path.name[0] != '.' and not _is_image(path))
  return sorted(path for path in named if path.is_dir())


def _splits(folder: Path, ending: str = '') -> dict[Split, Path]:
  """The folders of splits in a folder, whose names may end with something.

  Raises:
    UserError: If two are of the same split.
  """
  found: dict[Split, Path] = {}
  for path in _folders(folder):
    for split, names in SPLIT_NAMES.items():
      if path.name.lower() in [f'{name}{ending}' for name in names]:
        if split in found:
          raise UserError(f'Folders {found[split]} and {path} are both of {split}: join them.')
        found[split] = path
  return {split: found[split] for split in SPLIT_NAMES if split in found}


def _tests(folder: Path) -> list[str]:
  names = ('test', 'testing', 'test_images')
  return [path.name for path in _folders(folder) if path.name.lower() in names]


def _one(folder: Path, names: Iterable[str], what: str) -> Path | None:
  """The folder with one of some names that has image files.

  Raises:
    UserError: If there are several.
  """
  named = [path for path in _folders(folder) if path.name.lower() in names]
  found = [path for path in named if any(map(_is_image, files_below(path)))]
  if len(found) > 1:
    raise UserError(
      f'Folders {found[0].name} and {found[1].name} in {folder} could both be that of the {what}: '
      'move one of them away.'
    )
  return found[0] if found else None


def _is_image(path: Path) -> bool:
  return path.suffix.lower() in IMAGE_SUFFIXES


def _in_folder(folder: Path) -> Pair | None:
  images = _one(folder, _IMAGE_FOLDERS, 'images')
  labels = _one(folder, _LABEL_FOLDERS, 'label maps')
  return Pair(images, labels) if images and labels else None


def _beside_folder(folder: Path) -> Pair | None:
  name = folder.name.lower().removesuffix('_images')
  names = [name + ending for ending in _FOLDER_ENDINGS]
  labels = _one(folder.parent, names, 'label maps')
  return Pair(folder, labels) if labels else None


def _side_by_side(folder: Path) -> Pair | None:
  return Pair(folder, folder) if _labels_beside(folder, files_below(folder)) else None


def _labels_beside(folder: Path, paths: Sequence[Path]) -> set[Path]:
  """The label maps among the files of a folder that has images as well."""
  named = [(_stem(folder, path), path) for path in paths if _is_image(path)]
  stems = {stem for stem, _ in named}
  for ending in _IMAGE_ENDINGS:
    stems |= {before for stem in stems if (before := _before(stem, ending)) is not None}
  most: set[Path] = set()
  for ending in _ENDINGS[1:]:
    found = {path for stem, path in named if _before(stem, ending) in stems}
    most = found if len(found) > len(most) else most
  if most:
    return most
  others = {stem for stem, path in named if path.suffix.lower() != '.png'}
  return {path for stem, path in named if path.suffix.lower() == '.png' and stem in others}


def _stem(folder: Path, path: Path) -> str:
  name = in_one_form(path.relative_to(folder).as_posix())
  return without_suffix(name, IMAGE_SUFFIXES) or name


def _before(stem: str, ending: str) -> str | None:
  return stem[: -len(ending)] if stem.endswith(ending) else None


def list_pair(pair: Pair) -> Listing:
  """Lists the images of a folder with their label maps.

  The name of a label map is that of its image, with or without its suffix, or one of the usual
  endings follows it: the one that most have.

  Args:
    pair: The folders.

  Returns:
    The images and what is missing.

  Raises:
    UserError: If there are no images.
  """
  image_files, label_files = files_below(pair.images), files_below(pair.labels)
  if pair.images == pair.labels:
    beside = _labels_beside(pair.images, image_files)
    label_files = [path for path in label_files if path in beside]
    image_files = [path for path in image_files if path not in beside]
  images = by_stem(pair.images, image_files, IMAGE_SUFFIXES)
  labels = by_stem(pair.labels, label_files, ['.png'])
  if not images:
    raise UserError(f'Folder {pair.images} holds no images: put images there.')
  other_labels = {_stem(pair.labels, path): path for path in label_files if _is_image(path)}
  names = {
    stem: in_one_form(path.relative_to(pair.images).as_posix()) for stem, path in images.items()
  }
  expected = _expected(names, {**other_labels, **labels})
  samples, incomplete = [], {}
  for stem, image in images.items():
    label = labels.get(expected[stem])
    if not label:
      other = other_labels.get(expected[stem])
      incomplete[f'{pair.prefix}{names[stem]}'] = (
        f'Image {image} has no label map: expected {pair.labels / f"{expected[stem]}.png"}'
        f'{_found(other)}.'
      )
    elif reason := no_files(image, label):
      incomplete[f'{pair.prefix}{names[stem]}'] = reason
    else:
      samples.append(Sample(f'{pair.prefix}{stem}', image, label))
  taken = {*images.values(), *label_files}
  others = [path.name for path in image_files if path not in taken]
  if pair.images == pair.labels:  # with what describes them
    others = [name for name in others if not name.lower().endswith(_TEXTS)]
  return Listing(samples, incomplete, len(labels.keys() - set(expected.values())), others)


def _expected(names: Mapping[str, str], known: Container[str]) -> dict[str, str]:
  """The names of the label maps of images by their stems: those by which most are found."""
  most, best = -1, {}
  for candidates in _candidates(names):
    count = sum(name in known for name in candidates.values())
    if count > most:
      most, best = count, candidates
    if count == len(names):
      break
  return best


def _candidates(names: Mapping[str, str]) -> Iterator[dict[str, str]]:
  for ending in _ENDINGS:
    yield {stem: f'{stem}{ending}' for stem in names}
  yield dict(names)
  for before in _IMAGE_ENDINGS:
    if all(stem.endswith(before) for stem in names):
      for ending in _ENDINGS:
        yield {stem: f'{stem.removesuffix(before)}{ending}' for stem in names}


def _found(other: Path | None) -> str:
  if other is None:
    return ''
  if other.suffix.lower() in ('.jpg', '.jpeg', '.jpe', '.webp'):
    return f', found {other}, a format whose compression changes labels: export PNG files'
  return f', found {other}: label maps are read from PNG files only; convert them'
