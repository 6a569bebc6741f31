"""Draws where a pixel looks: its weights over the image, and links to the largest ones."""

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nonlocal_jax.inference.attention import AttentionMap

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
  window, weights = attention.window, attention.weights
  low, high, mean = (float(x) for x in (weights.min(), weights.max(), weights.mean()))
  over = window.over_image(weights)
  # The square root shows small weights beside a large one.
  shade = np.sqrt(np.clip((over - low) / max(high - low, 1e-30), 0, 1))
  colors = cv2.applyColorMap(np.rint(255 * shade).astype(np.uint8), cv2.COLORMAP_INFERNO)
  gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2BGR)
  canvas = cv2.addWeighted(gray, _GRAY_SHARE, colors, 1 - _GRAY_SHARE, 0)[..., ::-1].copy()

  largest = np.argsort(-weights, axis=None, kind='stable')[:_LINKS]
  unit = max(min(image.shape[:2]) / 256, 1)
  query = _pixel(window.point_of(attention.position))
  for row, column in np.stack(np.unravel_index(largest, weights.shape), axis=1).tolist():
    if (row, column) == attention.position:
      continue
    strength = float(weights[row, column] - low) / max(high - low, 1e-30)
    end = _pixel(window.point_of((row, column)))
    cv2.line(canvas, query, end, _LINK_COLOR, max(round(1.5 * unit * strength), 1), cv2.LINE_AA)
    cv2.circle(canvas, end, round(2 * unit), _LINK_COLOR, cv2.FILLED, cv2.LINE_AA)
  cv2.circle(canvas, query, round(5 * unit), _QUERY_COLOR, round(2 * unit), cv2.LINE_AA)
  range_ = f'from {low / mean:.2f} to {high / mean:.2f}' if mean else 'none'
  return _with_caption(canvas, f'{caption}; weights relative to their mean: {range_}')


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
