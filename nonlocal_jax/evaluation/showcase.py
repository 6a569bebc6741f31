"""Small pictures of the images that an evaluation shows: the best, the worst, the doubtful ones."""

import heapq
import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.evaluation.image_results import CERTAIN

EACH = 6  # images of each kind

_SIDE = 320  # the longer one of a picture, in pixels
_MARK_COLOR = (255, 0, 200)  # of pixels that contradict their labels

Panels = Mapping[str, bytes]  # encoded files by name, such as 'truth.png'


class Example(NamedTuple):
  """An image of an evaluation, reduced.

  Attributes:
    image: (h, w, 3) uint8 RGB.
    truth: (h, w) uint8; 255 is ignored.
    prediction: (h, w) uint8.
    confidence: (h, w) uint8, 255 is certain.
  """

  image: np.ndarray
  truth: np.ndarray
  prediction: np.ndarray
  confidence: np.ndarray

  def reduced(self) -> 'Example':
    """Returns it with a longer side of at most 320 pixels, each array at the same size."""
    height, width = self.truth.shape
    factor = min(_SIDE / max(height, width), 1)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return Example(
      cv2.resize(self.image, size, interpolation=cv2.INTER_AREA),
      *(cv2.resize(x, size, interpolation=cv2.INTER_NEAREST) for x in self[1:]),
    )

  def encoded(self, palette: Sequence[tuple[int, int, int]]) -> Panels:
    """Encodes the panels that a report shows, with the colors of the classes."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    contradicted = (
      (self.truth != self.prediction)
      & (self.truth != IGNORE)
      & (self.confidence >= math.floor(255 * CERTAIN + 0.5))
    )
    marked = np.repeat(cv2.cvtColor(self.image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=-1)
    marked[contradicted] = _MARK_COLOR
    panels = {}
    for name, labels in (('truth', self.truth), ('prediction', self.prediction)):
      picture = Image.fromarray(labels)
      picture.putpalette(colors.ravel().tolist())
      panels[f'{name}.png'] = _file(picture, 'PNG')
    for name, pixels in (
      ('image', self.image),
      ('confidence', self.confidence),
      ('contradicted', marked),
    ):
      panels[f'{name}.jpg'] = _file(Image.fromarray(pixels), 'JPEG', quality=85)
    return panels


class Showcase:
  """Keeps the images with the best and the worst mIoU, and those with the most doubtful labels.

  Attributes:
    examples: The images that are kept, by index.
  """

  def __init__(self):
    """Starts empty."""
    self.examples: dict[int, Example] = {}
    self._heaps: dict[str, list[tuple[float, int]]] = {'worst': [], 'best': [], 'doubtful': []}

  def wants(self, index: int, *, mean_iou: float, contradicted: float) -> bool:
    """Takes note of an image; whether it is to be kept, which `keep` does.

    Args:
      index: Its place in the split.
      mean_iou: Its mean IoU, or NaN.
      contradicted: The share of its pixels that contradict their labels.
    """
    ranks = {'doubtful': contradicted} if contradicted > 0 else {}
    if not math.isnan(mean_iou):
      ranks |= {'worst': -mean_iou, 'best': mean_iou}
    for kind, rank in ranks.items():
      heap = self._heaps[kind]
      heapq.heappush(heap, (rank, index))
      if len(heap) > EACH:
        heapq.heappop(heap)
    kept = {index for heap in self._heaps.values() for _, index in heap}
    self.examples = {key: value for key, value in self.examples.items() if key in kept}
    return index in kept

  def keep(self, index: int, example: Example) -> None:
    """Keeps an image that is wanted, reduced."""
    self.examples[index] = example.reduced()


def pictures_file(pictures: Mapping[int, Panels]) -> bytes:
  """Packs the panels of images, by index, into a ZIP file."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for index, panels in sorted(pictures.items()):
      for name, data in panels.items():
        archive.writestr(zipfile.ZipInfo(f'{index}/{name}'), data)
  return file.getvalue()


def read_pictures(data: bytes) -> dict[int, dict[str, bytes]]:
  """Reads what `pictures_file` returned.

  Raises:
    ValueError: If it is none, or damaged.
  """
  pictures: dict[int, dict[str, bytes]] = {}
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      for entry in archive.infolist():
        index, _, name = entry.filename.partition('/')
        pictures.setdefault(int(index), {})[name] = archive.read(entry)
  except zipfile.BadZipFile as error:
    raise ValueError(str(error)) from error
  return pictures


def _file(picture: Image.Image, kind: str, **options: int) -> bytes:
  encoded = io.BytesIO()
  picture.save(encoded, kind, **options)
  return encoded.getvalue()
