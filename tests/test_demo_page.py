"""The page of `nonlocal-jax demo`: its server beside the model, its line, its limits."""

import asyncio
import base64
import contextlib
import dataclasses
import gzip
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import requests
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import nonlocal_jax
from nonlocal_jax import PretrainedModel
from nonlocal_jax.cli import demo as command
from nonlocal_jax.demo import application as web
from nonlocal_jax.demo import results
from nonlocal_jax.demo.line import Line, LineFullError
from nonlocal_jax.demo.server import address_of, is_loopback, open_socket, server_of
from nonlocal_jax.weights.loading import read_weights

WEIGHTS = Path(__file__).parent / 'data/converted_of_2026_11'
_SECONDS = 60


@contextlib.contextmanager
def served(model: PretrainedModel, **options):
  """The address of the page."""
  listening = open_socket('127.0.0.1', 0)
  server = server_of(web.application(model, **options))
  thread = threading.Thread(target=server.run, kwargs={'sockets': [listening]})
  thread.start()
  try:
    yield address_of(listening)
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture(scope='module')
def model():
  return nonlocal_jax.load(WEIGHTS)


@pytest.fixture(scope='module')
def image():
  return small_image()


def small_image() -> np.ndarray:
  """(61, 94, 3) uint8."""
  coarse = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
  return cv2.resize(coarse, (94, 61), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def address(model):
  with served(model) as address:
    yield address


@pytest.fixture
def web_session():
  with requests.Session() as session:
    session.trust_env = False  # no proxy
    yield session


def png_of(image: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return file.getvalue()


def lines_of(answer: requests.Response) -> list[dict]:
  assert answer.status_code == 200, answer.text
  return [json.loads(line) for line in answer.text.splitlines()]


def changed(**fields) -> PretrainedModel:
  """A network with another config, which is never run."""
  description, state = read_weights(WEIGHTS)
  config = dataclasses.replace(description.config, **fields)
  return PretrainedModel(dataclasses.replace(description, config=config), state)


def test_classes_confidence_and_attention_are_those_of_the_model(
  address, web_session, model, image
):
  network = web_session.get(f'{address}network.json').json()
  assert tuple(network['classes']) == model.classes
  assert tuple(map(tuple, network['palette'])) == model.palette
  assert network['attention'] is True
  *turns, last = lines_of(web_session.post(f'{address}images', data=png_of(image)))
  assert turns == [{'ahead': 0}]
  found = last['result']
  assert (found['width'], found['height']) == (94, 61)
  assert found['shown'] == {'width': 94, 'height': 61}
  parts = f'{address}images/{found["image"]}'

  labels, confidence = model.predict(image, return_confidence=True)
  given = np.frombuffer(web_session.get(f'{parts}/labels').content, np.uint8)
  assert_array_equal(given.reshape(61, 94), labels)
  given = np.frombuffer(web_session.get(f'{parts}/confidence').content, '<u2') / 65535
  assert_allclose(given.reshape(61, 94), confidence, atol=1e-5)
  with Image.open(io.BytesIO(web_session.get(f'{parts}/picture').content)) as picture:
    assert np.abs(np.asarray(picture).astype(int) - image).mean() < 3

  (*_, last) = lines_of(web_session.post(f'{parts}/attention', json={'x': 70, 'y': 12}))
  attention, look = last['result'], model.image_attention(image)((70, 12))
  weights = model.attention(image, (70, 12)).astype(np.float64)
  window = look.window
  assert_allclose(attention['query'], window.point_of(look.position))
  order = np.argsort(-weights, axis=None, kind='stable')[:20].tolist()
  places = [divmod(place, weights.shape[1]) for place in order]
  places = [place for place in places if place != look.position]
  assert_allclose([link[:2] for link in attention['links']], list(map(window.point_of, places)))
  strengths = [(weights[place] - weights.min()) / np.ptp(weights) for place in places]
  assert_allclose([link[2] for link in attention['links']], strengths, atol=1e-3)
  shades = np.frombuffer(base64.b64decode(attention['shades']), np.uint8).reshape(61, 94)
  relative = (window.over_image(look.weights) - weights.min()) / np.ptp(weights)
  assert_allclose(shades, 255 * np.sqrt(np.clip(relative, 0, 1)), atol=0.6)
  low, high = weights.min() / weights.mean(), weights.max() / weights.mean()
  assert attention['span'] == f'from {low:.2f} to {high:.2f}'


def test_large_images_are_shown_smaller(monkeypatch, model, image):
  labels, confidence = model.predict(image, return_confidence=True)
  monkeypatch.setattr(results, '_SHOWN_PIXELS', 61 * 94 // 9)
  found = results.segment(model, png_of(image))
  height, width = found.shown
  assert (height, width) == (20, 31)
  rows, columns = ((np.arange(n) + 0.5) * of / n for n, of in ((height, 61), (width, 94)))
  nearest = np.ix_(rows.astype(int), columns.astype(int))
  given = np.frombuffer(gzip.decompress(found.labels), np.uint8).reshape(height, width)
  assert_array_equal(given, labels[nearest])
  given = np.frombuffer(gzip.decompress(found.confidence), '<u2').reshape(height, width)
  assert_allclose(given / 65535, confidence[nearest], atol=1e-5)
  with Image.open(io.BytesIO(found.picture)) as picture:
    assert picture.size == (width, height)
  assert found.image.shape == (61, 94, 3)


def test_bad_uploads(address, web_session, monkeypatch):
  def fault(data) -> str:
    (*_, last) = lines_of(web_session.post(f'{address}images', data=data))
    return last['fault']

  assert fault(b'no image') == fault(b'') == 'The file is not an image, or broken.'
  many = io.BytesIO()
  Image.new('1', (8000, 5000)).save(many, 'PNG')
  expected = 'The file has 40,000,000 pixels, more than 33,554,432: shrink it.'
  assert fault(many.getvalue()) == expected
  monkeypatch.setattr(web, 'MOST_BYTES', 2**20)
  for data in (bytes(2**20 + 1), iter([bytes(2**19)] * 3)):  # with and without a length
    answer = web_session.post(f'{address}images', data=data)
    assert answer.status_code == 413
    assert answer.json() == {'fault': 'The file has more than 1 MiB.'}


@pytest.mark.parametrize(
  ('data', 'status', 'said'),
  [
    ('{"x": 94, "y": 5}', 400, '(94, 5) lies outside the image, which has 94x61 pixels.'),
    ('{"x": 5, "y": -1}', 400, '(5, -1) lies outside the image, which has 94x61 pixels.'),
    ('{"x": 5.5, "y": 1}', 400, 'A pixel is {"x": X, "y": Y}, two whole numbers.'),
    ('{"x": true, "y": 1}', 400, 'A pixel is {"x": X, "y": Y}, two whole numbers.'),
    ('[' * 900, 400, 'A pixel is {"x": X, "y": Y}, two whole numbers.'),
    (' ' * 2000, 413, 'The pixel has more than 0.000954 MiB.'),
  ],
)
def test_bad_points(address, web_session, monkeypatch, image, data, status, said):
  monkeypatch.setattr(web, 'segment', lambda model, data: segmentation_of(image))
  (*_, last) = lines_of(web_session.post(f'{address}images', data=b''))
  answer = web_session.post(f'{address}images/{last["result"]["image"]}/attention', data=data)
  assert (answer.status_code, answer.json()['fault']) == (status, said)


def segmentation_of(image: np.ndarray) -> results.Segmentation:
  """A result without a network."""
  return results.Segmentation(
    image=image, shown=image.shape[:2], picture=b'', labels=b'', confidence=b''
  )


def test_old_results_go(monkeypatch):
  kept = results.Results()
  small = segmentation_of(np.zeros((2, 2, 3), np.uint8))
  names = [kept.add(small) for _ in range(16)]
  assert len(set(names)) == 16
  assert min(map(len, names)) >= 22
  assert kept.get(names[0]) is small  # used again
  kept.add(small)
  with pytest.raises(results.NotKeptError, match='is not kept any more: give it again'):
    kept.get(names[1])
  monkeypatch.setattr(results, '_PIXELS_KEPT', 100)
  large = segmentation_of(np.zeros((20, 20, 3), np.uint8))
  assert kept.get(kept.add(large)) is large
  with pytest.raises(results.NotKeptError):
    kept.get(names[0])


def test_other_addresses_and_other_pages_are_refused(address, web_session):
  for path in ('nothing', 'samples/3.png', 'images', 'page/page.js', '..%2fserver.py'):
    answer = web_session.get(address + path)
    assert (answer.status_code, list(answer.json())) == (404, ['fault']), path
  for path in ('images/x/labels', 'images/x/picture'):
    answer = web_session.get(address + path)
    assert answer.status_code == 404
    assert answer.json()['fault'] == 'This image is not kept any more: give it again.'
  assert web_session.delete(f'{address}images').status_code == 405

  for host in ('example.org', 'example.org:80', 'localhost.example.org', ''):
    answer = web_session.get(address, headers={'Host': host})
    assert answer.status_code == 400, host
  for host in ('localhost', 'LOCALHOST:8000', '10.0.0.1:8000', '[::1]:8000', '[::1]'):
    assert web_session.get(address, headers={'Host': host}).status_code == 200, host
  for origin in ('http://example.org', 'null', 'http://127.0.0.1'):
    answer = web_session.post(f'{address}images', data=b'', headers={'Origin': origin})
    assert answer.status_code == 403, origin
  same = {'Origin': address.rstrip('/')}
  assert web_session.post(f'{address}images', data=b'', headers=same).status_code == 200

  headers = web_session.get(address).headers
  assert "default-src 'none'" in headers['Content-Security-Policy']
  assert headers['X-Content-Type-Options'] == 'nosniff'
  assert not [name for name in headers if name.lower().startswith('access-control')]


def test_names_of_the_machine(model, web_session):
  with served(model, names=['Machine']) as address:
    assert web_session.get(address, headers={'Host': 'machine:8000'}).status_code == 200
    assert web_session.get(address, headers={'Host': 'machines'}).status_code == 400


def test_samples_are_images_of_the_demo_set(address, web_session):
  network = web_session.get(f'{address}network.json').json()
  for index in range(network['samples']):
    content = web_session.get(f'{address}samples/{index}.png').content
    with Image.open(io.BytesIO(content)) as sample:
      assert sample.size == (192, 192)


def test_a_network_without_the_block(web_session, monkeypatch, image):
  monkeypatch.setattr(web, 'segment', lambda model, data: segmentation_of(image))
  with served(changed(non_local=False)) as address:
    assert web_session.get(f'{address}network.json').json()['attention'] is False
    (*_, last) = lines_of(web_session.post(f'{address}images', data=b''))
    address += f'images/{last["result"]["image"]}/attention'
    answer = web_session.post(address, json={'x': 1, 'y': 1})
  assert answer.status_code == 400
  assert answer.json()['fault'] == 'This network has no non-local block, and so no attention.'


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 GB\nand more'), 'RESOURCE_EXHAUSTED: 9 GB'),
    (MemoryError(), 'the memory does not suffice'),
  ],
)
def test_what_fails_is_said_and_the_next_one_is_computed(
  address, web_session, monkeypatch, image, error, reason
):
  failures = [error]

  def segment(model, data):
    if failures:
      raise failures.pop()
    return segmentation_of(image)

  monkeypatch.setattr(web, 'segment', segment)
  (*_, last) = lines_of(web_session.post(f'{address}images', data=b''))
  assert last == {'fault': f'The network cannot be run on this image: {reason}'}
  (*_, last) = lines_of(web_session.post(f'{address}images', data=b''))
  assert 'result' in last


def test_requests_wait_in_line(address, monkeypatch, image):
  """One is computed, two may wait. One of these gives up, and the next one moves up."""
  begun, go_on = threading.Event(), threading.Event()

  def segment(model, data):
    begun.set()
    assert go_on.wait(_SECONDS)
    return segmentation_of(image)

  monkeypatch.setattr(web, 'segment', segment)
  monkeypatch.setattr(web, 'MOST_WAITING', 2)
  with contextlib.ExitStack() as stack, served(changed(non_local=False)) as address:

    def post() -> requests.Response:
      session = stack.enter_context(requests.Session())
      session.trust_env = False
      return session.post(f'{address}images', data=b'', stream=True, timeout=_SECONDS)

    try:
      first = post()
      assert begun.wait(_SECONDS)
      second = post()
      lines_of_second = second.iter_lines(1)
      assert json.loads(next(lines_of_second)) == {'ahead': 1}
      third = post()
      lines = third.iter_lines(1)
      assert json.loads(next(lines)) == {'ahead': 2}
      refused = post()
      assert refused.status_code == 503
      assert refused.json()['fault'] == '2 requests are waiting already: try again in a moment.'
      second.close()
      assert json.loads(next(lines)) == {'ahead': 1}
    finally:
      go_on.set()
    assert 'result' in lines_of(first)[-1]
    rest = [json.loads(line) for line in lines]
    assert rest[0] == {'ahead': 0}
    assert list(rest[-1]) == ['result']


def test_line():
  async def run() -> None:
    line, go_on = Line(most=1), threading.Event()

    async def compute() -> None:
      with line.place() as place:
        async for _ in place.turns():
          pass
        await place.compute(lambda: go_on.wait(_SECONDS))

    abandoned = asyncio.create_task(compute())
    await asyncio.sleep(0.05)
    abandoned.cancel()  # the thread goes on, and so the place stays
    with contextlib.suppress(asyncio.CancelledError):
      await abandoned
    with line.place() as place:
      assert line.ahead_of(place) == 1
      for context in (line.place, line.arriving):
        with pytest.raises(LineFullError, match='1 requests are waiting'), context():
          pass
      go_on.set()
      assert [ahead async for ahead in place.turns()] == [1, 0]
      assert await place.compute(lambda: 5) == 5
    with line.arriving(), pytest.raises(LineFullError), line.arriving():
      pass

  asyncio.run(run())


def test_bad_options(script, monkeypatch):
  checkpoint = f'--checkpoint={WEIGHTS}'
  with contextlib.closing(open_socket('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    status, said = script(command, checkpoint, f'--port={port}')
    assert status == 1
    assert f'Port {port} of 127.0.0.1 cannot be used: Address already in use; choose' in said
  for port in ('65536', '-1'):
    status, said = script(command, checkpoint, f'--port={port}')
    assert (status, said) == (1, f'error: --port is {port}; it must be from 0 to 65535.')
  status, said = script(command, checkpoint, '--port=http')
  assert (status, said) == (2, "error: --port is 'http'; give a number, e.g. --port=8000.")
  status, said = script(command, checkpoint, '--host=a..b')
  assert (status, said) == (1, 'error: --host=a..b cannot be found: it is no name.')
  status, said = script(command, checkpoint, '--host=192.0.2.1')  # of documentation
  assert (status, said) == (1, 'error: --host=192.0.2.1 is no address of this machine.')
  status, said = script(command, checkpoint, '--port=0', '--scale', '0', '10')
  assert (status, '--scale has 0; give width and height' in said) == (1, True)
  status, said = script(command, '--checkpoint=nothing', '--port=0')
  assert (status, 'nothing' in said) == (1, True)

  gray = changed(in_channels=1)
  monkeypatch.setattr(nonlocal_jax, 'load', lambda *_, **options: gray)
  status, said = script(command, checkpoint, '--port=0')
  assert status == 1
  assert 'takes images of 1 channel of 8 bits, and the page has such of 3 channels' in said


def test_addresses():
  with contextlib.closing(open_socket('127.0.0.1', 0)) as listening:
    port = listening.getsockname()[1]
    assert address_of(listening) == f'http://127.0.0.1:{port}/'
    assert is_loopback(listening)
  with contextlib.closing(open_socket('0.0.0.0', 0)) as listening:
    assert not is_loopback(listening)
    assert re.fullmatch(r'http://[\w.-]+:\d+/', address_of(listening))


@pytest.mark.slow
@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
def test_the_program_serves_and_leaves_at_once(sent, web_session, image):
  """Also while a connection is open and the network is compiled."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
  program = [sys.executable, '-m', 'nonlocal_jax', 'demo', f'--checkpoint={WEIGHTS}', '--port=0']
  process = subprocess.Popen(
    program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=WEIGHTS.parents[2]
  )
  signal.signal(signal.SIGINT, before)
  with process:
    try:
      line = process.stdout.readline()
      address = re.fullmatch(r'Open (http://127\.0\.0\.1:\d+/) in a browser; .*\n', line)[1]
      assert web_session.get(address).status_code == 200
      answer = web_session.post(f'{address}images', data=png_of(image), stream=True)
      assert next(answer.iter_lines(1)) == b'{"ahead": 0}'
      started = time.monotonic()
      process.send_signal(sent)
      process.wait(timeout=30)
    finally:
      process.kill()
    assert time.monotonic() - started < 5
    assert process.returncode == 128 + sent
    assert 'Traceback' not in process.stderr.read()
