"""Plots of a report, as SVG."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from nonlocal_jax.evaluation.calibration import Calibration
from nonlocal_jax.evaluation.html import Markup, data_uri, tag

# All are 360 wide, as a phone's page: text of 11 is 11 pixels high there, and larger elsewhere.
_WIDTH = 360
_TEXT = 11
_LEFT, _TOP, _RIGHT, _BOTTOM = 42, 12, 350, 196  # of the axes
_BLUE, _DARK, _LINE = '#2f6fb5', '#1d2733', '#d9dee5'
_TOO_SURE, _TOO_UNSURE = '#f0b47c', '#7fbf95'  # where confidence is above accuracy, or below
_DEEP = np.array((8, 48, 107))  # of the largest cell
_NONE = (225, 225, 225)  # of the rows of classes that are not labeled
_MOST_COLUMNS = 20  # numbers of classes beside a heat map


def heat_map(confusion: np.ndarray) -> Markup:
  """Draws a confusion matrix, each row relative to its sum.

  Args:
    confusion: (classes, classes) integers, rows by label, columns by prediction.
  """
  sums = confusion.sum(axis=1, keepdims=True)
  shares = confusion / np.maximum(sums, 1)
  shade = np.sqrt(shares)[..., None]  # small shares show as well
  cells = np.where(sums[..., None] > 0, 255 + shade * (_DEEP - 255.0), np.array(_NONE))
  encoded = io.BytesIO()
  Image.fromarray(np.rint(cells).astype(np.uint8)).save(encoded, 'PNG')
  count, side, left, top = len(confusion), 318, 34, 34
  cell = side / count
  steps = [step for step in (1, 2, 5, 10, 20, 50) if count / step <= _MOST_COLUMNS]
  shown = range(0, count, steps[0] if steps else 100)
  parts = [
    tag(
      'image',
      attributes={'href': data_uri(encoded.getvalue(), 'image/png')},
      x=left,
      y=top,
      width=side,
      height=side,
      preserveAspectRatio='none',
      style='image-rendering:pixelated',
    ),
    _rectangle(left, top, side, side, fill='none', stroke='#999'),
    _label(left + side / 2, 10, 'predicted'),
    _label(10, top + side / 2, 'labeled', rotate=True),
  ]
  for index in shown:
    middle = (index + 0.5) * cell
    parts.append(_label(left + middle, top - 5, str(index)))
    parts.append(_label(left - 3, top + middle + 4, str(index), anchor='end'))
  return _svg(parts, top + side + 2, 'confusion matrix')


def histogram(
  values: np.ndarray, *, marks: Sequence[tuple[float, str, str]], x_name: str, y_name: str
) -> Markup:
  """Draws a histogram of values in [0, 1], as percent.

  Args:
    values: (n,) floats; NaN is left out.
    marks: Values that lines show, their colors and dashes as in SVG.
    x_name: What the values are.
    y_name: What is counted.
  """
  counts, edges = np.histogram(values[~np.isnan(values)], bins=20, range=(0, 1))
  most = max(int(counts.max()), 1)
  bars = [
    _rectangle(_x(low), _y(count / most), _x(high) - _x(low) - 1, _BOTTOM - _y(count / most))
    for low, high, count in zip(edges, edges[1:], counts, strict=False)
  ]
  lines = [
    _line(_x(value), _TOP, _x(value), _BOTTOM, stroke=color, width=2, dashes=dashes)
    for value, color, dashes in marks
    if not np.isnan(value)
  ]
  ticks = [(0.0, '0'), (1.0, str(most))]
  return _svg([*_axes(ticks, x_name, y_name), *bars, *lines], 236, f'histogram of {x_name}')


def reliability(calibration: Calibration) -> Markup:
  """Draws the accuracy of pixels against their confidence; right ones lie on the diagonal."""
  parts = [*_axes([(x / 4, f'{25 * x}') for x in range(5)], 'confidence', 'accuracy')]
  bins = len(calibration.pixels)
  triples = zip(calibration.pixels, calibration.accuracy, calibration.mean_confidence, strict=True)
  for place, (pixels, accuracy, confidence) in enumerate(triples):
    if not pixels:
      continue
    low, high = _x(place / bins), _x((place + 1) / bins)
    parts.append(_rectangle(low, _y(accuracy), high - low - 1, _BOTTOM - _y(accuracy)))
    between = sorted((_y(accuracy), _y(confidence)))
    parts.append(
      _rectangle(
        *(low, between[0], high - low - 1, between[1] - between[0]),
        fill=_TOO_SURE if confidence > accuracy else _TOO_UNSURE,
      )
    )
  parts.append(_line(_x(0), _y(0), _x(1), _y(1), stroke=_DARK, width=1.5, dashes='5 4'))
  return _svg(parts, 236, 'reliability diagram')


def confidence_shares(calibration: Calibration) -> Markup:
  """Draws the share of pixels by confidence."""
  shares = calibration.pixels / max(int(calibration.pixels.sum()), 1)
  most = max(float(shares.max()), 1e-9)
  bins = len(shares)
  bars = [
    _rectangle(
      _x(place / bins), _y(share / most), (_RIGHT - _LEFT) / bins - 1, _BOTTOM - _y(share / most)
    )
    for place, share in enumerate(shares)
  ]
  ticks = [(0.0, '0'), (1.0, f'{100 * most:.0f}')]
  return _svg([*_axes(ticks, 'confidence', 'pixels in %'), *bars], 236, 'pixels by confidence')


def _x(share: float) -> float:
  return _LEFT + float(share) * (_RIGHT - _LEFT)


def _y(share: float) -> float:
  return _BOTTOM - float(share) * (_BOTTOM - _TOP)


def _axes(ticks: Iterable[tuple[float, str]], x_name: str, y_name: str) -> list[Markup]:
  parts = []
  for share, text in ticks:
    parts.append(_line(_LEFT, _y(share), _RIGHT, _y(share), stroke=_LINE))
    parts.append(_label(_LEFT - 4, _y(share) + 4, text, anchor='end'))
  for share in (0, 0.25, 0.5, 0.75, 1):
    text = f'{100 * share:.0f}{" %" if share == 1 else ""}'
    parts.append(_label(_x(share), _BOTTOM + 14, text, anchor='end' if share == 1 else 'middle'))
  parts.append(_label((_LEFT + _RIGHT) / 2, _BOTTOM + 32, x_name))
  parts.append(_label(10, (_TOP + _BOTTOM) / 2, y_name, rotate=True))
  return parts


def _svg(parts: Iterable[Markup], height: float, name: str) -> Markup:
  return tag('svg', *parts, viewBox=f'0 0 {_WIDTH} {height}', role='img', aria_label=name)


def _rectangle(
  x: float,
  y: float,
  width: float,
  height: float,
  *,
  fill: str = _BLUE,
  stroke: str | None = None,
) -> Markup:
  return tag(
    'rect',
    x=round(x, 2),
    y=round(y, 2),
    width=round(max(width, 0.0), 2),
    height=round(max(height, 0.0), 2),
    fill=fill,
    stroke=stroke,
  )


def _line(
  x1: float,
  y1: float,
  x2: float,
  y2: float,
  *,
  stroke: str,
  width: float = 1,
  dashes: str | None = None,
) -> Markup:
  ends = {'x1': round(x1, 2), 'y1': round(y1, 2), 'x2': round(x2, 2), 'y2': round(y2, 2)}
  return tag(
    'line',
    attributes={**ends, 'stroke-width': width, 'stroke-dasharray': dashes or None},
    stroke=stroke,
  )


def _label(
  x: float, y: float, text: str, *, anchor: str = 'middle', rotate: bool = False
) -> Markup:
  where = {'x': round(x, 2), 'y': round(y, 2), 'font-size': _TEXT, 'text-anchor': anchor}
  turn = f'rotate(-90 {x:.2f} {y:.2f})' if rotate else None
  return tag('text', text, attributes=where, transform=turn)
