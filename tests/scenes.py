"""Small pictures with known classes, to be written in the formats of annotation tools."""

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

NAMES = ('background', 'road', 'tree')
COLORS = ((0, 0, 0), (128, 64, 128), (20, 160, 40))  # of the classes, as tools assign them


class Scene(NamedTuple):
  """A picture: its name, RGB pixels (h, w, 3) uint8 and classes (h, w) uint8."""

  name: str
  image: np.ndarray
  label: np.ndarray


def make_scenes(
  count: int = 6, *, classes: int = 3, seed: int = 0, stem: str = 'scene'
) -> list[Scene]:
  """Makes pictures of boxes of each class on class 0; the pixels tell the classes."""
  rng = np.random.default_rng(seed)
  scenes = []
  for index in range(count):
    h, w = (int(side) for side in rng.integers(64, 90, size=2))
    label = np.zeros((h, w), np.uint8)
    for of_class in range(1, classes):
      top, left = (int(v) for v in rng.integers(0, 40, size=2))
      label[top : top + 22, left : left + 22] = of_class
    noise = rng.integers(0, 40, size=(h, w, 3))
    image = (np.arange(classes)[label][..., None] * 70 + noise).astype(np.uint8)
    scenes.append(Scene(f'{stem}_{index}', image, label))
  return scenes


def histogram(scenes: list[Scene], classes: int = 3) -> list[int]:
  """Pixels of each class."""
  return sum(np.bincount(scene.label.ravel(), minlength=classes) for scene in scenes).tolist()


def write(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> None:
  """Writes an image file of the type that its suffix says, perhaps converted to a mode first."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(pixels)
  file = io.BytesIO()
  kind = {'.jpg': 'JPEG', '.jpeg': 'JPEG', '.png': 'PNG', '.tif': 'TIFF'}[path.suffix.lower()]
  (image.convert(mode) if mode else image).save(file, kind, **options)
  path.write_bytes(file.getvalue())


def in_colors(label: np.ndarray, colors=COLORS) -> np.ndarray:
  """A label map as RGB pixels, (h, w, 3) uint8."""
  return np.array(colors, np.uint8)[label]


def enlarged(label: np.ndarray, factor: int) -> np.ndarray:
  """A label map of more pixels."""
  return cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
