"""Writes tiny datasets in the folder layouts that `nonlocal_jax.data.datasets` knows."""

from pathlib import Path

import cv2
import numpy as np

from nonlocal_jax.data.datasets import Sample

CLASSES = 4  # of the custom layout


def write_tree(layout: str, root: Path) -> dict[str, list[Sample]]:
  """Writes a dataset of three training and two validation images.

  Args:
    layout: One of the layouts of `Dataset`.
    root: Where its folders go.

  Returns:
    For each split, the samples as `list_samples` should list them.
  """
  splits = {split: _samples(layout, root, split) for split in ('train', 'val')}
  for split, samples in splits.items():
    for index, sample in enumerate(samples):
      write_sample(sample, seed=len(split) + index)
  if layout == 'voc12aug':
    ids = {'train': ['2007_000032', '2007_000039'], 'aug': ['2008_000002'], 'val': ['a', 'b']}
    (root / 'ImageSets/Segmentation').mkdir(parents=True)
    for name, lines in ids.items():
      (root / f'ImageSets/Segmentation/{name}.txt').write_text('\n'.join(lines) + '\n')
  return splits


def write_sample(sample: Sample, *, seed: int, size: tuple[int, int] | None = None) -> None:
  """Writes a random image and a label map with the values 0 .. CLASSES - 1 and 255.

  Args:
    sample: Where to.
    seed: What of.
    size: (h, w) of the image; None for a random one. The label map's size does not depend on it.
  """
  rng = np.random.default_rng(seed)
  h, w = rng.integers(30, 50, size=2)
  image = rng.integers(256, size=(*(size or (h, w)), 3), dtype=np.uint8)
  values = np.array([*range(CLASSES), 255], np.uint8)
  label = cv2.resize(rng.permuted(values)[None], (int(w), int(h)), interpolation=cv2.INTER_NEAREST)
  for path, array in ((sample.image, image), (sample.label, label)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, array)[1].tobytes())


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
