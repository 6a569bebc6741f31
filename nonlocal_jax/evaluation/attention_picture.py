"""Draws where a pixel looks: its weights over the image, and links to the largest ones."""

import dataclasses

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nonlocal_jax.inference.attention import AttentionMap, Point
from nonlocal_jax.protocol import Size

_LINKS = 20  # as in the figures of https://arxiv.org/abs/1711.07971
_GRAY_SHARE = 0.45  # of the image behind the weights
_QUERY_COLOR = (64, 224, 208)
_LINK_COLOR = (255, 255, 255)


def attention_picture(image: np.ndarray, attention: AttentionMap, *, caption: str) -> np.ndarray:
  """Draws the weights of a query over its image.

  Args:
    image: (h, w, 3) uint8 RGB.
    attention: Where one of its pixels looks.
    caption: A line below the picture, to which the range of the weights is added.

  Returns:
    (h', w, 3) uint8 RGB with h' > h: the image in gray, the weights in colors from black (the
    smallest) to yellow (the largest), lines to the 20 largest ones, thicker for larger weights, and
    a ring around the query.
  """
  colors = cv2.applyColorMap(shades(attention, image.shape[:2]), cv2.COLORMAP_INFERNO)
  gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2BGR)
  canvas = cv2.addWeighted(gray, _GRAY_SHARE, colors, 1 - _GRAY_SHARE, 0)[..., ::-1].copy()
  unit = max(min(image.shape[:2]) / 256, 1)
  query = _pixel(attention.window.point_of(attention.position))
  for point, strength in links(attention):
    end = _pixel(point)
    cv2.line(canvas, query, end, _LINK_COLOR, max(round(1.5 * unit * strength), 1), cv2.LINE_AA)
    cv2.circle(canvas, end, round(2 * unit), _LINK_COLOR, cv2.FILLED, cv2.LINE_AA)
  cv2.circle(canvas, query, round(5 * unit), _QUERY_COLOR, round(2 * unit), cv2.LINE_AA)
  return _with_caption(canvas, f'{caption}; weights relative to their mean: {span(attention)}')


def shades(attention: AttentionMap, size: Size) -> np.ndarray:
  """Returns the weights over the image as shades, (h, w) uint8.

  Shades are square roots, which show small weights beside a large one: 0 for the smallest weight
  and 255 for the largest.

  Args:
    attention: Where a pixel looks.
    size: (height, width) of the result, which covers the whole image.
  """
  weights = attention.weights
  low, high = float(weights.min()), float(weights.max())
  over = dataclasses.replace(attention.window, image=size).over_image(weights)
  return np.rint(255 * np.sqrt(_relative(over, low, high))).astype(np.uint8)


def links(attention: AttentionMap) -> list[tuple[Point, float]]:
  """Returns the pixels of the 20 largest weights, but for the query's, each with a strength.

  The strength is linear in the weight, 0 for the smallest and 1 for the largest.
  """
  window, weights = attention.window, attention.weights
  low, high = float(weights.min()), float(weights.max())
  largest = np.argsort(-weights, axis=None, kind='stable')[:_LINKS]
  places = np.stack(np.unravel_index(largest, weights.shape), axis=1).tolist()
  return [
    (window.point_of((row, column)), float(_relative(weights[row, column], low, high)))
    for row, column in places
    if (row, column) != attention.position
  ]


def span(attention: AttentionMap) -> str:
  """Returns the smallest and the largest weight relative to their mean, in words."""
  low, high, mean = (
    float(x) for x in (attention.weights.min(), attention.weights.max(), attention.weights.mean())
  )
  return f'from {low / mean:.2f} to {high / mean:.2f}' if mean else 'none'


def _relative(weights: np.ndarray, low: float, high: float) -> np.ndarray:
  return np.clip((weights - low) / max(high - low, 1e-30), 0, 1)


def _pixel(point: tuple[float, float]) -> tuple[int, int]:
  return round(point[0]), round(point[1])


def _with_caption(picture: np.ndarray, caption: str) -> np.ndarray:
  """Adds lines of text below a picture, wrapped at its width."""
  height, width = picture.shape[:2]
  size = max(11, min(height, width) // 36)
  font = ImageFont.load_default(size)
  lines, line = [], ''
  for word in caption.split():
    longer = f'{line} {word}'.strip()
    if line and font.getlength(longer) > width - size:
      lines.append(line)
      longer = word
    line = longer
  lines.append(line)
  step = round(1.4 * size)
  sheet = Image.new('RGB', (width, height + step * len(lines) + size // 2), 'white')
  sheet.paste(Image.fromarray(picture))
  draw = ImageDraw.Draw(sheet)
  for number, text in enumerate(lines):
    top = height + size // 4 + number * step
    draw.text((size // 2, top), text, fill='black', font=font)
  return np.asarray(sheet)
