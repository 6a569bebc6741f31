"""The page of `nonlocal-jax demo` in headless Chromium: real files, clicks and keys."""

import base64
import contextlib
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from playwright.sync_api import Page, expect

import nonlocal_jax
from nonlocal_jax.demo import application as web
from nonlocal_jax.demo import results
from nonlocal_jax.evaluation.attention_picture import shades
from tests.browsers import (
  SECONDS,
  chromium,
  click_at,
  pixels_of,
  point_at,
  ready_page,
  shown_labels,
)
from tests.test_demo_page import WEIGHTS, changed, served, small_image

pytestmark = pytest.mark.slow

SIZE = (94, 61)  # width and height of the image


@pytest.fixture(scope='module')
def model():
  return nonlocal_jax.load(WEIGHTS)


@pytest.fixture(scope='module')
def image():
  return small_image()


@pytest.fixture(scope='module')
def browser():
  with chromium() as browser:
    yield browser


@pytest.fixture(scope='module')
def address(model):
  with served(model) as address:
    yield address


@pytest.fixture(scope='module')
def photo(image, tmp_path_factory):
  """The image as a file, whose name is no markup."""
  path = tmp_path_factory.mktemp('photos') / '<b>photo.png'
  Image.fromarray(image).save(path)
  return path


@pytest.fixture(params=[390, 1280])
def page(browser, address, request):
  with ready_page(browser, address, width=request.param) as page:
    yield page


def says(page: Page, text: str | re.Pattern[str]) -> None:
  expect(page.locator('#status')).to_have_text(text, timeout=1000 * SECONDS)


def give(page: Page, path: Path) -> None:
  page.set_input_files('#file', path)
  says(page, re.compile(rf'{re.escape(path.name)}: segmented in [\d.]+ s\.'))


def choose(page: Page, view: str) -> None:
  page.get_by_role('radio', name=view).check()


def drop(page: Page, content: bytes, name: str) -> None:
  data = page.evaluate_handle(
    """([content, name]) => {
      const bytes = Uint8Array.from(atob(content), (byte) => byte.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name));
      return data;
    }""",
    [base64.b64encode(content).decode(), name],
  )
  page.dispatch_event('body', 'drop', {'dataTransfer': data})


def ramp(page: Page, kind: str, values: np.ndarray) -> np.ndarray:
  """The colors of shades in [0, 1]."""
  colors = np.array(page.evaluate('kind => import("./ramps.js").then(file => file[kind])', kind))
  places = np.linspace(0, 1, len(colors))
  return np.stack([np.interp(values, places, colors[:, channel]) for channel in range(3)], -1)


def test_classes_and_what_is_under_the_pointer(page, model, image, photo):
  give(page, photo)
  labels, confidence = model.predict(image, return_confidence=True)
  assert_array_equal(shown_labels(page, np.array(model.palette)), labels)
  legend = page.locator('.viewer-legend li').all_text_contents()
  present, counts = np.unique(labels, return_counts=True)
  assert sorted(legend) == sorted(
    f'{model.classes[index]}{100 * count / labels.size:.1f} %'
    for index, count in zip(present, counts, strict=True)
  )
  for x, y in [(0, 0), (50, 30), (93, 60)]:
    point_at(page, (x, y), SIZE)
    said = page.locator('.viewer-pointed')
    expect(said).to_contain_text(f'({x}, {y})')
    name, percent = re.fullmatch(r'(.*?)([\d.]+) %\(.*\)', said.text_content()).groups()
    assert name == model.classes[labels[y, x]]
    assert float(percent) == pytest.approx(100 * confidence[y, x], abs=0.06)
  page.locator('.viewer-opacity').fill('25')
  layer = page.locator('.viewer-layer').first
  assert layer.evaluate('canvas => canvas.style.opacity') == '0.25'
  assert page.evaluate('document.documentElement.scrollWidth') == page.viewport_size['width']


def test_confidence(page, model, image, photo):
  give(page, photo)
  choose(page, 'Confidence')
  _, confidence = model.predict(image, return_confidence=True)
  drawn = pixels_of(page, '.viewer-layer')[..., :3].astype(float)
  assert np.abs(drawn - ramp(page, 'VIRIDIS', confidence)).max() < 3
  choose(page, 'Classes')
  shown_labels(page, np.array(model.palette))


def test_a_click_shows_where_a_pixel_looks(page, model, image, photo):
  give(page, photo)
  look = model.image_attention(image)
  for by_keys in (False, True):
    x, y = (20, 45) if not by_keys else (SIZE[0] // 2 + 2, SIZE[1] // 2 - 1)
    if by_keys:
      page.locator('.viewer-stage').focus()
      for key in ('ArrowRight', 'ArrowRight', 'ArrowUp'):  # by one pixel in this small image
        page.keyboard.press(key)
      expect(page.locator('.viewer-pointed')).to_contain_text(f'({x}, {y})')
      page.keyboard.press('Enter')
    else:
      click_at(page, (x, y), SIZE)
    explanation = page.locator('#explanation')
    expect(explanation).to_contain_text(f'Where ({x}, {y}) looks', timeout=1000 * SECONDS)
    assert page.locator('input[value=attention]').is_checked()
    found = look((x, y))
    drawn = pixels_of(page, '.viewer-layer')[..., :3].astype(float)
    expected = ramp(page, 'INFERNO', shades(found, SIZE[::-1]) / 255)
    assert np.abs(drawn - expected).max() < 3
    marks = marks_of(page)
    query_x, query_y = found.window.point_of(found.position)
    scale = marks.shape[1] / SIZE[0]
    left = marks[round((query_y + 0.5) * scale), round((query_x + 0.5) * scale - 7.5)]
    assert_allclose(left.astype(int), (64, 224, 208, 255), atol=20)  # of the ring
    choose(page, 'Classes')
    assert not marks_of(page).any()
    choose(page, 'Attention')
    assert marks_of(page).any()


def marks_of(page: Page) -> np.ndarray:
  return pixels_of(page, '.viewer-layer ~ .viewer-layer')


def test_faults_are_said(browser, address, photo, monkeypatch, tmp_path, image):
  with ready_page(browser, address, requests_fail=True) as page:
    check_faults(page, photo, monkeypatch, tmp_path, image)


def check_faults(page, photo, monkeypatch, tmp_path, image):
  give(page, photo)
  drop(page, b'no picture', '<i>notes</i>.txt')
  says(page, '<i>notes</i>.txt is not an image, or broken.')
  expect(page.locator('#status')).to_have_class(re.compile('is-fault'))
  monkeypatch.setattr(web, 'MOST_BYTES', 10)
  with photo.open('rb') as file:
    drop(page, file.read(), 'photo.png')
  says(page, re.compile(r'photo\.png has more than .* MiB\.'))
  monkeypatch.undo()
  Image.new('1', (8000, 5000)).save(tmp_path / 'large.png')
  page.set_input_files('#file', tmp_path / 'large.png')
  says(page, 'large.png has 40,000,000 pixels, more than 33,554,432: shrink it.')
  Image.fromarray(image).save(tmp_path / 'photo.tiff')  # browsers do not read it
  give(page, tmp_path / 'photo.tiff')
  assert np.abs(pixels_of(page, '.viewer-image')[..., :3].astype(int) - image).mean() < 3


def test_samples(page):
  page.click('text=Or try a sample >> button >> nth=1')
  says(page, re.compile(r'Sample 2: segmented in'))
  assert page.locator('.samples img').nth(1).get_attribute('alt').startswith('Sample 2: ')


def test_without_the_block_and_without_the_server(browser, photo, monkeypatch, image):
  labels, confidence = np.zeros(SIZE, np.uint8), np.zeros(SIZE, '<u2')
  result = results.Segmentation(
    image=image,
    shown=image.shape[:2],
    picture=b'',
    labels=gzip.compress(labels.tobytes()),
    confidence=gzip.compress(confidence.tobytes()),
  )
  monkeypatch.setattr(web, 'segment', lambda model, data: result)
  server = contextlib.ExitStack()
  address = server.enter_context(served(changed(non_local=False)))
  with server, ready_page(browser, address, requests_fail=True) as page:
    expect(page.locator('#about')).to_contain_text('has no non-local block, and so no attention')
    give(page, photo)
    click_at(page, (20, 40), SIZE)
    expected = 'This network has no non-local block, and so no attention.'
    expect(page.locator('#explanation')).to_have_text(expected)
    expect(page.locator('#ramp')).to_be_hidden()
    server.close()
    page.set_input_files('#file', photo)
    says(page, 'The server does not answer: is nonlocal-jax demo still running?')
