"""The exported page in headless Chromium, beside ONNX Runtime in Python; it needs npm."""

import contextlib
import dataclasses
import functools
import http.server
import json
import re
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from playwright.sync_api import Page, expect

import nonlocal_jax
from nonlocal_jax import UserError
from nonlocal_jax.cli import export as command
from nonlocal_jax.export.page import (
  RUNTIME_ADDRESS,
  RUNTIME_FILES,
  RUNTIME_VERSION,
  check_channels,
)
from tests.browsers import SECONDS, chromium, point_at, ready_page, shown_labels

pytestmark = pytest.mark.slow

WEIGHTS = Path(__file__).parent / 'data/converted_of_2026_11'
SIZE = (97, 161)


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
  """The address of a web server for a folder."""
  handler = functools.partial(_Quiet, directory=str(folder))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_address[1]}/'
    finally:
      server.shutdown()
      thread.join()


@pytest.fixture(scope='module')
def mirror(tmp_path_factory):
  """ONNX Runtime Web from its npm package, laid out as at its address."""
  root = tmp_path_factory.mktemp('mirror')
  package = f'onnxruntime-web@{RUNTIME_VERSION}'
  subprocess.run(['npm', 'pack', '--silent', package], cwd=root, check=True, capture_output=True)
  (archive,) = root.glob('*.tgz')
  folder = root / RUNTIME_ADDRESS.partition('//')[2].partition('/')[2]
  folder.mkdir(parents=True)
  with tarfile.open(archive) as opened:
    for name in RUNTIME_FILES:
      member = opened.extractfile(f'package/dist/{name}')
      assert member is not None
      (folder / name).write_bytes(member.read())
  return root


@pytest.fixture(scope='module')
def folder(mirror, tmp_path_factory):
  """An exported page."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('NONLOCAL_JAX_MIRROR', f'file://{mirror}')
    model = nonlocal_jax.load(WEIGHTS)
    exported = model.export(
      tmp_path_factory.mktemp('exported') / 'page', format='browser', size=SIZE
    )
  assert exported.difference < 1e-4
  return exported.path


@pytest.fixture(scope='module')
def browser():
  with chromium() as browser:
    yield browser


@pytest.fixture
def page(browser, folder):
  """The page, 390 pixels wide."""
  with served(folder) as address, ready_page(browser, address) as page:
    yield page


def segment(page: Page, path: Path) -> None:
  page.set_input_files('#file', path)
  expect(page.locator('#status')).to_contain_text('Segmented in', timeout=1000 * SECONDS)


def of_onnxruntime(folder: Path, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  session = onnxruntime.InferenceSession(str(folder / 'network.onnx'))
  classes, confidence = session.run(['classes', 'confidence'], {'images': image[None]})
  return classes[0], confidence[0]


def test_label_map_equals_that_of_onnxruntime(page, folder, tmp_path, rng):
  network = json.loads((folder / 'network.json').read_text())
  image = rng.integers(0, 256, (13, 21, 3), np.uint8).repeat(8, 0).repeat(8, 1)[:97, :161]
  Image.fromarray(image).save(tmp_path / 'image.png')
  segment(page, tmp_path / 'image.png')
  classes, confidence = of_onnxruntime(folder, image)
  assert_array_equal(shown_labels(page, np.array(network['palette'])), classes)

  present, counts = np.unique(classes, return_counts=True)
  order = np.argsort(-counts, kind='stable')
  expected = [
    f'{network["classes"][present[i]]}{100 * counts[i] / classes.size:.1f} %' for i in order
  ]
  assert page.locator('.viewer-legend li').all_text_contents() == expected

  x, y = 100, 40
  point_at(page, (x, y), (161, 97))
  name = network['classes'][classes[y, x]]
  expect(page.locator('.viewer-pointed')).to_have_text(
    f'{name}{100 * confidence[y, x]:.1f} %({x}, {y})'
  )
  page.locator('.viewer-opacity').fill('25')
  assert page.locator('.viewer-layer').first.evaluate('canvas => canvas.style.opacity') == '0.25'


def test_images_are_fitted_into_the_size(page, folder, tmp_path, rng):
  """Resized as OpenCV does, with the mean color beside them; the label map covers the image."""
  network = json.loads((folder / 'network.json').read_text())
  assert network['fill'] == [124, 116, 104]
  image = rng.integers(0, 256, (9, 5, 3), np.uint8).repeat(24, 0).repeat(24, 1)  # 216x120
  Image.fromarray(image).save(tmp_path / 'image.png')
  segment(page, tmp_path / 'image.png')
  resized = nonlocal_jax.resize(image, (54, 97))
  fitted = np.empty((*SIZE, 3), np.uint8)
  fitted[:] = network['fill']
  fitted[:, :54] = resized
  by_page = page.evaluate(
    """async () => {
      const { fitted } = await import('./resize.js');
      const canvas = document.querySelector('.viewer-image');
      const context = canvas.getContext('2d');
      const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
      const { data, rows, columns } = fitted(pixels, 97, 161, [124, 116, 104]);
      return [rows, columns, Array.from(data)];
    }"""
  )
  assert by_page[:2] == [97, 54]
  given = np.array(by_page[2], np.uint8).reshape(*SIZE, 3)
  assert_allclose(given.astype(int), fitted.astype(int), atol=1)  # OpenCV has fewer bits
  classes, _ = of_onnxruntime(folder, given)
  assert_array_equal(shown_labels(page, np.array(network['palette'])), classes[:97, :54])


def test_files_that_are_no_images(page, tmp_path, rng):
  (tmp_path / 'notes.png').write_text('no picture')
  page.set_input_files('#file', tmp_path / 'notes.png')
  expect(page.locator('#status')).to_have_text('notes.png is no image that this browser reads.')
  Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / 'image.png')
  segment(page, tmp_path / 'image.png')


def test_a_network_that_cannot_be_loaded(browser, folder, tmp_path):
  for path in folder.rglob('*'):
    if path.is_file() and path.name != 'network.onnx':
      (tmp_path / path.relative_to(folder)).parent.mkdir(exist_ok=True)
      (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
  with served(tmp_path) as address:
    opened = browser.new_page()
    opened.goto(address)
    expected = 'The network cannot be loaded: network.onnx cannot be read (404)'
    expect(opened.locator('#status')).to_have_text(expected, timeout=1000 * SECONDS)
    opened.goto(f'file://{tmp_path}/index.html')
    expect(opened.locator('#status')).to_contain_text('Open this page through a web server.')
    opened.close()


def test_nothing_is_wider_than_a_phone(page, folder, tmp_path, rng):
  Image.fromarray(rng.integers(0, 256, (20, 400, 3), np.uint8)).save(tmp_path / 'wide.png')
  segment(page, tmp_path / 'wide.png')
  assert page.evaluate('document.documentElement.scrollWidth') == 390


def test_bad_requests(script, mirror, tmp_path, monkeypatch):
  arguments = [f'--checkpoint={WEIGHTS}', '--format=browser', f'--out={tmp_path / "page"}']
  monkeypatch.setenv('NONLOCAL_JAX_MIRROR', f'file://{mirror}')
  status, said = script(command, *arguments, '--size=8,8', '--batch=1')
  assert (status, 'has batch and confidence of its own' in said) == (1, True)
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('NONLOCAL_JAX_MIRROR', f'file://{tmp_path}/nothing')
  status, said = script(command, *arguments, '--size=8,8')
  assert status == 1
  assert re.search(r'ort\.wasm\.min\.mjs cannot be downloaded from .*; its sha256 is ', said)
  assert not (tmp_path / 'page').exists()
  assert not list(tmp_path.glob('.*'))

  description = nonlocal_jax.load(WEIGHTS).description
  config = dataclasses.replace(description.config, in_channels=4)
  with pytest.raises(UserError, match='takes 4 channels of 8 bits, and a browser reads 3 channels'):
    check_channels(dataclasses.replace(description, config=config))
