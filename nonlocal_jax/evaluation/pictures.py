"""Draws label maps beside and over their images."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import needs_packages
from nonlocal_jax.runtime.files import write_whole

if TYPE_CHECKING:
  from matplotlib.patches import Patch

_MOST_INCHES = 9  # height of a row of panels, which are 3 inches wide; taller ones are compressed
_MOST_PIXELS = 4096  # side of a panel, which matplotlib copies several times
_PIXELS_AT_ONCE = 2**22  # of an overlay, whose parts are several times as large as the label map


def colorize(
  label: np.ndarray, palette: Sequence[tuple[int, int, int]], *, ignore_index: int = 255
) -> np.ndarray:
  """Maps each class to its color; ignored pixels are black.

  Args:
    label: (h, w) integers in [0, len(palette)) or `ignore_index`.
    palette: The RGB color of each class, in [0, 255].
    ignore_index: The label of ignored pixels.

  Returns:
    (h, w, 3) uint8 RGB.
  """
  colors = np.zeros((256, 3), np.uint8)
  colors[: len(palette)] = palette
  colors[ignore_index] = 0
  # Several times as fast as `colors[label]`, and other threads run meanwhile.
  channels = cv2.merge([label.astype(np.uint8, copy=False)] * 3)
  return cv2.LUT(channels, colors[None])


def comparison(
  examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
  *,
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> np.ndarray:
  """Draws image, truth and prediction of each example, with a legend of the classes.

  Args:
    examples: Image (h, w, 3) uint8 RGB, truth (h', w') and prediction (h', w'), integers; 255 in
      the truth is ignored.
    classes: The name of each class.
    palette: The RGB color of each class.

  Returns:
    (h', w', 3) uint8 RGB.
  """
  rows = [
    (image, colorize(truth, palette), colorize(prediction, palette))
    for image, truth, prediction in examples
  ]
  labels = [label for _, *both in examples for label in both]
  return _sheet(rows, ('image', 'truth', 'prediction'), _legend(labels, classes, palette))


def write_png(path: Path, picture: np.ndarray) -> None:
  """Writes a picture, (h, w, 3) uint8 RGB, as a PNG file atomically.

  Raises:
    UserError: If the file cannot be written.
  """
  encoded = io.BytesIO()
  Image.fromarray(picture).save(encoded, 'PNG')
  write_whole(path, encoded.getvalue())


def write_samples(
  path: Path,
  samples: Sequence[tuple[str, np.ndarray, np.ndarray]],
  *,
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> None:
  """Writes a PNG with image, label map and overlay of each sample, one sample per row.

  Args:
    path: The PNG file.
    samples: Name, image (h, w, 3) uint8 RGB and label map (h, w), integers; 255 is ignored.
    classes: The name of each class.
    palette: The RGB color of each class.
  """
  rows = []
  for _, image, label in samples:
    colors = colorize(label, palette)
    rows.append((image, colors, image // 2 + colors // 2))
  legend = _legend([label for *_, label in samples], classes, palette)
  names = [name for name, *_ in samples]
  sheet = _sheet(rows, ('image', 'label', 'both'), legend, names)
  write_png(path, sheet)


def overlay(
  image: np.ndarray,
  label: np.ndarray,
  *,
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> np.ndarray:
  """Blends the colors of the classes into an image and adds a legend on the right.

  Args:
    image: (h, w, 3) uint8 RGB.
    label: (h, w) integers in [0, len(classes)), or 255 for unknown pixels, which become darker.
    classes: Name of each class.
    palette: The RGB color of each class, in [0, 255].

  Returns:
    (h', w', 3) uint8 RGB with h' >= h and w' > w. The legend lists the classes that occur, the most
    frequent first, and 'unknown' among them.
  """
  height, width = label.shape
  blocks = _blocks(label.shape)
  present = _present(label, blocks)
  text = _text_size(label.shape)
  least_height = max(height, (2 * len(present) + 1) * text)
  legend = _list_of_classes(present, text, least_height, classes, palette)
  sheet = np.full((legend.shape[0], width + legend.shape[1], 3), 255, np.uint8)
  sheet[:, width:] = legend
  _blend(image, label, palette, blocks, into=sheet[:height, :width])
  return sheet


def frame_overlay(
  image: np.ndarray,
  label: np.ndarray,
  *,
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> np.ndarray:
  """Blends the colors of the classes into a frame of a video, with a legend on its upper left.

  Args:
    image: See `overlay`.
    label: See `overlay`.
    classes: See `overlay`.
    palette: See `overlay`.

  Returns:
    (h, w, 3) uint8 RGB. The legend lists the most frequent classes, as many as there is room for,
    in the order of the classes: they do not change places from frame to frame.
  """
  height, width = label.shape
  blocks = _blocks(label.shape)
  text = _text_size(label.shape)
  present = sorted(_present(label, blocks)[: max((height // text - 1) // 2, 0)])
  sheet = np.empty((height, width, 3), np.uint8)
  _blend(image, label, palette, blocks, into=sheet)
  if present:
    legend = _list_of_classes(present, text, (2 * len(present) + 1) * text, classes, palette)
    legend = legend[:, : width // 2]
    sheet[: legend.shape[0], : legend.shape[1]] = legend
  return sheet


def _blocks(size: tuple[int, ...]) -> list[slice]:
  """Blocks of rows of an overlay."""
  rows_at_once = max(_PIXELS_AT_ONCE // size[1], 1)
  return [slice(top, top + rows_at_once) for top in range(0, size[0], rows_at_once)]


def _present(label: np.ndarray, blocks: Sequence[slice]) -> list[int]:
  """The classes that occur, the most frequent first."""
  counts = np.zeros(256, np.int64)
  for rows in blocks:
    counts += np.bincount(label[rows].ravel(), minlength=256)
  return [index for index in np.argsort(-counts, kind='stable').tolist() if counts[index]]


def _text_size(size: tuple[int, ...]) -> int:
  """Height of a legend's text in pixels."""
  return max(12, min(size) // 40)


def _list_of_classes(
  present: Sequence[int],
  text: int,
  height: int,
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> np.ndarray:
  """Draws colors and names of classes, and of unknown pixels, below one another."""
  names = {**dict(enumerate(classes)), IGNORE: 'unknown'}
  shades = {**dict(enumerate(palette)), IGNORE: (0, 0, 0)}
  font = ImageFont.load_default(text)
  width = 3 * text + max(int(font.getlength(names[index])) for index in present)
  legend = Image.new('RGB', (width, height), 'white')
  draw = ImageDraw.Draw(legend)
  for row, index in enumerate(present):
    left, top = text // 2, (2 * row + 1) * text
    draw.rectangle((left, top, left + text, top + text), fill=tuple(shades[index]))
    draw.text((left + 3 * text // 2, top - text // 8), names[index], fill='black', font=font)
  return np.asarray(legend)


def _blend(
  image: np.ndarray,
  label: np.ndarray,
  palette: Sequence[tuple[int, int, int]],
  blocks: Sequence[slice],
  *,
  into: np.ndarray,
) -> None:
  """Writes the mean of an image and the colors of its classes."""
  for rows in blocks:
    into[rows] = cv2.addWeighted(image[rows], 0.5, colorize(label[rows], palette), 0.5, 0)


def _legend(
  labels: Sequence[np.ndarray],
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> list['Patch']:
  with needs_packages('these pictures', extra='plot'):
    from matplotlib.patches import Patch

  present = np.unique(np.concatenate([label.ravel() for label in labels])).tolist()
  return [
    Patch(color=tuple(channel / 255 for channel in palette[index]), label=classes[index])
    for index in present
    if index < len(classes)
  ]


def _sheet(
  rows: Sequence[Sequence[np.ndarray]],
  titles: Sequence[str],
  legend: Sequence['Patch'],
  names: Sequence[str] = (),
) -> np.ndarray:
  with needs_packages('these pictures', extra='plot'):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

  height = sum(min(3 * row[0].shape[0] / row[0].shape[1], _MOST_INCHES) for row in rows)
  figure = Figure(figsize=(9, 0.8 + height + 0.22 * -(-len(legend) // 4)), dpi=110)
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplots(len(rows), len(titles), squeeze=False)
  for axes_of_row, row in zip(axes, rows, strict=True):
    for axis, panel in zip(axes_of_row, row, strict=True):
      down, right = (-(-side // _MOST_PIXELS) for side in panel.shape[:2])
      axis.imshow(panel[::down, ::right], interpolation='nearest', aspect='auto')
      axis.set_axis_off()
  for axis, title in zip(axes[0], titles, strict=True):
    axis.set_title(title)
  for axis, name in zip(axes[:, 0], names, strict=False):
    axis.text(0.02, 0.03, name, transform=axis.transAxes, color='white', backgroundcolor='black')
  figure.legend(handles=legend, loc='lower center', ncols=4, frameon=False, fontsize='small')
  bottom = 0.22 * -(-len(legend) // 4) / figure.get_figheight() + 0.03
  figure.subplots_adjust(0.01, bottom, 0.99, 1 - 0.3 / figure.get_figheight(), 0.02, 0.02)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
