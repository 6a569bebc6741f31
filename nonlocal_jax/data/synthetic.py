"""The demo set: a disc outside the backbone's receptive field decides the class of a shape."""

import glob
import shutil
from pathlib import Path

import cv2
import filelock
import numpy as np

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import unfinished

_CLASSES = (
  'ground',
  'disc',
  'square, red disc',
  'square, green disc',
  'square, blue disc',
  'triangle, red disc',
  'triangle, green disc',
  'triangle, blue disc',
)
_PALETTE = (
  (40, 40, 40),
  (250, 250, 250),
  (200, 40, 40),
  (40, 180, 60),
  (50, 90, 220),
  (250, 150, 130),
  (150, 240, 140),
  (140, 190, 250),
)
DEMO = Dataset('demo', _CLASSES, _PALETTE, layout='custom')
IMAGE_SIZE = 192

_DISC_COLORS = ((220, 40, 40), (40, 190, 60), (50, 80, 230))
_DISC_RADIUS = 22
_SHAPE_RADIUS = 20
# The receptive field of backbone (one block per stage) and head convolutions extends 63 pixels to
# each side of a feature; bilinear upsampling adds one feature.
_SIGHT = 76
_SHAPES = 5
_TRIALS = 100  # positions tried for a shape


def demo_sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Draws one image: a disc in a corner and gray shapes far from it, on noisy ground.

  Args:
    rng: Source of everything random.

  Returns:
    Image (192, 192, 3) uint8 RGB and label (192, 192) uint8, an index into the classes of `DEMO`.
  """
  image = rng.normal(100, 8, (IMAGE_SIZE, IMAGE_SIZE, 3))
  label = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
  corner = rng.integers(2, size=2) * (IMAGE_SIZE - 1)
  disc = np.abs(corner - rng.integers(_DISC_RADIUS + 2, _DISC_RADIUS + 8, size=2))
  color = int(rng.integers(len(_DISC_COLORS)))
  _paint(image, label, _disc_mask(disc), _DISC_COLORS[color], 1, rng)

  margin, centers = _SHAPE_RADIUS + 1, []
  for center in rng.integers(margin, IMAGE_SIZE - margin, size=(_TRIALS, 2)):
    hidden = np.abs(center - disc).max() > _SIGHT + _DISC_RADIUS + _SHAPE_RADIUS
    apart = all(np.abs(center - other).max() > 2 * _SHAPE_RADIUS for other in centers)
    if not (hidden and apart) or len(centers) == _SHAPES:
      continue
    centers.append(center)
    shape, gray = int(rng.integers(2)), int(rng.integers(170, 200))
    _paint(image, label, _shape_mask(center, shape), (gray,) * 3, 2 + 3 * shape + color, rng)
  return np.clip(image, 0, 255).astype(np.uint8), label


def write_demo_set(directory: Path, *, train: int = 400, val: int = 48, seed: int = 0) -> None:
  """Writes the demo set as a folder of JPEG images and PNG labels, if it is not there.

  Of several processes one writes it and the others wait.

  Args:
    directory: Gets images/{train,val} and labels/{train,val}; once it exists it is complete.
    train: Training images.
    val: Validation images.
    seed: Seed of the set.

  Raises:
    UserError: If it cannot be written.
  """
  if directory.exists():
    return
  partial = directory.with_name(f'{directory.name}.partial')
  lock = directory.with_name(f'.{directory.name}.lock')
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock):
      if not directory.exists():  # else another process has made it meanwhile
        with unfinished(directory.parent, glob.escape(partial.name)):
          _write_files(partial, train=train, val=val, seed=seed)
          partial.rename(directory)
      lock.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'{directory} cannot be written: {error.strerror or error}.') from error


def _write_files(directory: Path, *, train: int, val: int, seed: int) -> None:
  shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed
  for split, count in (('train', train), ('val', val)):
    for kind in ('images', 'labels'):
      (directory / kind / split).mkdir(parents=True)
    for index in range(count):
      image, label = demo_sample(np.random.default_rng((seed, split == 'val', index)))
      _write(directory / 'images' / split / f'{index:04d}.jpg', image[..., ::-1])
      _write(directory / 'labels' / split / f'{index:04d}.png', label)


def _disc_mask(center: np.ndarray) -> np.ndarray:
  mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
  return cv2.circle(mask, center[::-1].tolist(), _DISC_RADIUS, 1, thickness=-1) == 1


def _shape_mask(center: np.ndarray, shape: int) -> np.ndarray:
  """A square (0) or an upright triangle (1) within `_SHAPE_RADIUS` of its center."""
  y, x = center.tolist()
  edge = _SHAPE_RADIUS
  corners = (
    [(x - edge, y - edge), (x + edge, y - edge), (x + edge, y + edge), (x - edge, y + edge)]
    if shape == 0
    else [(x, y - edge), (x + edge, y + edge), (x - edge, y + edge)]
  )
  mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
  return cv2.fillPoly(mask, [np.array(corners, np.int32)], 1) == 1


def _paint(image, label, mask, color, value, rng) -> None:
  image[mask] = np.asarray(color) + rng.normal(0, 6, (int(mask.sum()), 3))
  label[mask] = value


def _write(path: Path, image: np.ndarray) -> None:
  written, data = cv2.imencode(path.suffix, image)
  assert written
  path.write_bytes(data.tobytes())
