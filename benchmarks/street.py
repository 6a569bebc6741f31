"""Draws an image of a dataset, its labels and what a network predicts, side by side.

    python benchmarks/street.py --checkpoint=runs/camvid --source=CamVid --image=0016E5_08155 \
      --out=docs/street.jpg

The dataset has images/val and labels/val, and a dataset.json with classes and palette.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import nonlocal_jax
from nonlocal_jax.data.datasets import custom_dataset, read_description
from nonlocal_jax.data.transforms import decode_label
from nonlocal_jax.evaluation.pictures import overlay

_GAP = 6  # pixels between the panels


def main() -> None:
  """Writes the picture, and prints the share of labeled pixels that are predicted rightly."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--checkpoint', required=True, help='a workdir, a directory or a .pth file')
  parser.add_argument('--source', required=True, type=Path, help='folder of the dataset')
  parser.add_argument('--image', required=True, help='name of a val image, without suffix')
  parser.add_argument('--out', required=True, type=Path, help='a JPEG file')
  options = parser.parse_args()

  dataset = custom_dataset(**read_description(options.source))
  model = nonlocal_jax.load(options.checkpoint)
  (path,) = (options.source / 'images/val').glob(f'{options.image}.*')
  image = np.asarray(Image.open(path))
  data = (options.source / f'labels/val/{options.image}.png').read_bytes()
  truth = dataset.label_lookup[decode_label(data)]
  labels = model.predict(path).astype(np.uint8)
  labeled = truth < dataset.num_classes
  print(f'{options.image}: {(labels == truth)[labeled].mean():.1%} of the labeled pixels are right')

  drawn = {'classes': model.classes, 'palette': model.palette}
  height, width = labels.shape
  predicted = overlay(image, labels, **drawn)  # with the legend at its right
  gap = np.full((height, _GAP, 3), 255, np.uint8)
  panels = [image, gap, overlay(image, truth, **drawn)[:height, :width], gap, predicted[:height]]
  Image.fromarray(np.concatenate(panels, axis=1)).save(options.out, quality=88)


if __name__ == '__main__':
  main()
