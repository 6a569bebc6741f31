"""Writes tiny datasets in the folder layouts that `nonlocal_jax.data.layouts` knows."""

import io
from pathlib import Path

import cv2
import numpy as np
import scipy.io
from PIL import Image

from nonlocal_jax.data.layouts import Sample

CLASSES = 4  # of the custom layout
VALUES = {  # in label files
  'cityscapes': [*range(19), 255],
  'ade20k': [*range(151)],
  'voc12aug': [*range(21), 255],
  'custom': [*range(CLASSES), 255],
}


def write_tree(layout: str, root: Path) -> dict[str, list[Sample]]:
  """Writes a dataset of three training and two validation images, in its own file formats.

  Args:
    layout: One of the layouts of `Dataset`.
    root: Where its folders go.

  Returns:
    For each split, the samples as `list_samples` should list them.
  """
  splits = {split: _samples(layout, root, split) for split in ('train', 'val')}
  for split, samples in splits.items():
    for index, sample in enumerate(samples):
      write_sample(sample, seed=len(split) + index, layout=layout)
  if layout == 'voc12aug':
    ids = {'train': ['2007_000032', '2007_000039'], 'aug': ['2008_000002'], 'val': ['a', 'b']}
    (root / 'ImageSets/Segmentation').mkdir(parents=True)
    for name, lines in ids.items():
      (root / f'ImageSets/Segmentation/{name}.txt').write_text('\n'.join(lines) + '\n')
  return splits


def turn_into_sbd(root: Path) -> None:
  """Puts in place of SegmentationClassAug and aug.txt what SBD's own archive has."""
  sbd = root.parent / 'benchmark_RELEASE/dataset'
  (sbd / 'cls').mkdir(parents=True)
  for png in (root / 'SegmentationClassAug').iterdir():
    write_sbd_label(sbd / f'cls/{png.stem}.mat', np.asarray(Image.open(png)))
    png.unlink()
  (root / 'SegmentationClassAug').rmdir()
  (root / 'ImageSets/Segmentation/aug.txt').unlink()
  # SBD's lists overlap with VOC's, its val images too.
  (sbd / 'train.txt').write_text('2007_000032\n2008_000002\n')
  (sbd / 'val.txt').write_text('a\n')


def write_sbd_label(path: Path, label: np.ndarray) -> None:
  """Writes a label map as SBD does: a struct with other fields beside Segmentation."""
  fields = {'Segmentation': label, 'Boundaries': np.zeros((20, 1)), 'CategoriesPresent': 1}
  scipy.io.savemat(path, {'GTcls': fields}, do_compression=True)


def write_sample(
  sample: Sample, *, seed: int, size: tuple[int, int] | None = None, layout: str = 'custom'
) -> None:
  """Writes a random image and a label map with all the values of a layout.

  Args:
    sample: Where to.
    seed: What of.
    size: (h, w) of the image; None for a random one. The label map's size does not depend on it.
    layout: Which values, and whether the label map has a palette.
  """
  rng = np.random.default_rng(seed)
  h, w = rng.integers(30, 50, size=2)
  image = rng.integers(256, size=(*(size or (h, w)), 3), dtype=np.uint8)
  values = np.array(VALUES[layout], np.uint8)
  cells = np.resize(rng.permuted(values), (-(-len(values) // 5), 5))
  label = cv2.resize(cells, (int(w), int(h)), interpolation=cv2.INTER_NEAREST)
  for path in sample[1:3]:
    path.parent.mkdir(parents=True, exist_ok=True)
  sample.image.write_bytes(cv2.imencode(sample.image.suffix, image)[1].tobytes())
  sample.label.write_bytes(png_of(label, palette=layout == 'voc12aug'))


def png_of(label: np.ndarray, *, palette: bool = False) -> bytes:
  """A label map as a PNG file, perhaps with a palette, in which only the indices count."""
  file, image = io.BytesIO(), Image.fromarray(label)
  if palette:
    image.putpalette(np.random.default_rng(0).permutation(768) % 256)
  image.save(file, 'PNG')
  return file.getvalue()


def _samples(layout: str, root: Path, split: str) -> list[Sample]:
  if layout == 'cityscapes':
    ids = {'train': ['aachen/a_0', 'aachen/a_1', 'bonn/b_0'], 'val': ['ulm/u_0', 'ulm/u_1']}[split]
    images, labels = root / 'leftImg8bit' / split, root / 'gtFine' / split
    suffixes = ['_leftImg8bit.png'] * 3, '_gtFine_labelTrainIds.png'
  elif layout == 'ade20k':
    folder = {'train': 'training', 'val': 'validation'}[split]
    ids = {'train': ['ADE_1', 'ADE_2', 'ADE_3'], 'val': ['ADE_4', 'ADE_5']}[split]
    images, labels = root / 'images' / folder, root / 'annotations' / folder
    suffixes = ['.jpg'] * 3, '.png'
  elif layout == 'voc12aug':
    ids = {'train': ['2007_000032', '2007_000039', '2008_000002'], 'val': ['a', 'b']}[split]
    images, labels = root / 'JPEGImages', root / 'SegmentationClass'
    suffixes = ['.jpg'] * 3, '.png'
  else:
    ids = {'train': ['a.b', 'deep/down/c', 'x'], 'val': ['v', 'w']}[split]
    images, labels = root / 'images' / split, root / 'labels' / split
    suffixes = ['.jpg', '.PNG', '.tif'], '.png'
  samples = [
    Sample(id_, images / f'{id_}{suffix}', labels / f'{id_}{suffixes[1]}')
    for id_, suffix in zip(ids, suffixes[0], strict=False)
  ]
  if layout == 'voc12aug' and split == 'train':
    augmented = root / 'SegmentationClassAug' / samples[-1].label.name
    samples[-1] = samples[-1]._replace(label=augmented)
  return samples
