"""Headless Chromium, and what the tests of web pages ask of it."""

import base64
import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, Position, expect, sync_playwright

SECONDS = 120
# Chromium runs as root in containers, and asks nobody on the network for anything.
_FLAGS = ['no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-sync']
_FLAGS += ['disable-background-networking', 'disable-component-update']


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
  """Debian's Chromium."""
  with sync_playwright() as playwright:
    flags = [f'--{flag}' for flag in _FLAGS]
    browser = playwright.chromium.launch(executable_path='/usr/bin/chromium', args=flags)
    yield browser
    browser.close()


@contextlib.contextmanager
def ready_page(
  browser: Browser, address: str, *, width: int = 390, requests_fail: bool = False
) -> Iterator[Page]:
  """A page that says that it is ready; it may ask no other server, and nothing may fail in it."""
  context = browser.new_context(viewport={'width': width, 'height': 800})
  page = context.new_page()
  asked, faults = [], []
  page.on('request', lambda request: asked.append(request.url))
  page.on('pageerror', lambda error: faults.append(str(error)))
  page.on('console', lambda said: faults.append(said.text) if said.type == 'error' else None)
  page.goto(address)
  expect(page.locator('#status')).to_have_text('Ready.', timeout=1000 * SECONDS)
  yield page
  context.close()
  if requests_fail:  # which the browser tells as well
    faults = [fault for fault in faults if not fault.startswith('Failed to load resource')]
  assert faults == []
  assert [url for url in asked if not url.startswith((address, 'blob:', 'data:'))] == []


def pixels_of(page: Page, selector: str) -> np.ndarray:
  """The pixels of a canvas, (h, w, 4) uint8."""
  address = page.locator(selector).first.evaluate('canvas => canvas.toDataURL("image/png")')
  with Image.open(io.BytesIO(base64.b64decode(address.partition(',')[2]))) as picture:
    return np.asarray(picture.convert('RGBA'))


def shown_labels(page: Page, palette: np.ndarray) -> np.ndarray:
  """The label map that is drawn, from its colors, (classes, 3)."""
  pixels = pixels_of(page, '.viewer-layer')
  same = (pixels[:, :, None, :3] == palette).all(axis=-1)
  assert same.any(axis=-1).all()
  assert (pixels[..., 3] == 255).all()
  return same.argmax(axis=-1)


def point_at(page: Page, pixel: tuple[int, int], size: tuple[int, int]) -> None:
  """Moves the pointer to a pixel (x, y) of an image of (width, height)."""
  page.locator('.viewer-stage').hover(position=_position(page, pixel, size))


def click_at(page: Page, pixel: tuple[int, int], size: tuple[int, int]) -> None:
  """Clicks at a pixel (x, y) of an image of (width, height)."""
  page.locator('.viewer-stage').click(position=_position(page, pixel, size))


def _position(page: Page, pixel: tuple[int, int], size: tuple[int, int]) -> Position:
  box = page.locator('.viewer-stage').bounding_box()
  assert box is not None
  (x, y), (width, height) = pixel, size
  return {'x': (x + 0.5) * box['width'] / width, 'y': (y + 0.5) * box['height'] / height}
