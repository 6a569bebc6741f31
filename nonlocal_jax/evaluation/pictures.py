"""Pictures of predictions beside the truth, for people."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch


def colourise(
  label: np.ndarray, palette: Sequence[tuple[int, int, int]], *, ignore_index: int = 255
) -> np.ndarray:
  """Paints each class in its colour; ignored pixels are black.

  Args:
    label: (h, w) integers in [0, len(palette)) or `ignore_index`.
    palette: RGB colours in [0, 255].
    ignore_index: Label of the pixels without a class.

  Returns:
    (h, w, 3) uint8 RGB.
  """
  colours = np.zeros((256, 3), np.uint8)
  colours[: len(palette)] = palette
  colours[ignore_index] = 0
  return colours[label]


def write_comparison(
  path: Path,
  examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
  *,
  classes: Sequence[str],
  palette: Sequence[tuple[int, int, int]],
) -> None:
  """Writes a PNG with a row for each example, and the classes that occur below.

  Args:
    path: The PNG file.
    examples: Image (h, w, 3) uint8 RGB, truth (h', w') and prediction (h', w'), integers, 255 for
      ignored truth.
    classes: Name of each class.
    palette: RGB colour of each class.
  """
  figure = Figure(figsize=(9, 0.8 + sum(3 * e[0].shape[0] / e[0].shape[1] for e in examples)))
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplots(len(examples), 3, squeeze=False)
  for row, (image, truth, prediction) in zip(axes, examples, strict=True):
    panels = (image, colourise(truth, palette), colourise(prediction, palette))
    for axis, panel in zip(row, panels, strict=True):
      axis.imshow(panel, interpolation='nearest', aspect='auto')
      axis.set_axis_off()
  for axis, title in zip(axes[0], ('image', 'truth', 'prediction'), strict=True):
    axis.set_title(title)
  present = np.unique(np.concatenate([x.ravel() for _, *both in examples for x in both]))
  patches = [
    Patch(color=np.array(palette[index]) / 255, label=classes[index])
    for index in present.tolist()
    if index < len(classes)
  ]
  figure.legend(handles=patches, loc='lower center', ncols=4, frameon=False, fontsize='small')
  bottom = 0.22 * -(-len(patches) // 4) / figure.get_figheight() + 0.03
  figure.subplots_adjust(0.01, bottom, 0.99, 1 - 0.3 / figure.get_figheight(), 0.02, 0.02)
  canvas.print_figure(path, format='png', dpi=110)
