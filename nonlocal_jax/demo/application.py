"""The web application behind the page: takes images, answers with classes and attention.

Answers that have to be computed come as lines of JSON, one after the other: {"ahead": COUNT} while
others come before, then {"result": ...} or {"fault": MESSAGE}. Any other fault is {"fault":
MESSAGE} with a status from 400 on.
"""

import asyncio
import io
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nonlocal_jax import viewer
from nonlocal_jax.data.synthetic import demo_sample
from nonlocal_jax.demo.line import Line, LineFullError
from nonlocal_jax.demo.results import MOST_PIXELS, Attention, NotKeptError, Results, segment
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.pretrained import PretrainedModel

MOST_BYTES = 2**25  # of an image file
MOST_WAITING = 8
SAMPLES = 3

_UPLOAD_SECS = 120
_POINT_BYTES = 1000
_PAGE = Path(__file__).parent / 'page'
_TYPES = {'.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css'}
# Nothing comes from elsewhere, and no other page may show or use this one.
_HEADERS = {
  'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; "
  "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'",
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'referrer-policy': 'no-referrer',
  'x-content-type-options': 'nosniff',
  'cache-control': 'no-store',
}


def application(model: PretrainedModel, *, names: Collection[str] = ()) -> ASGIApp:
  """Creates the application.

  Args:
    model: The network, of images with three channels.
    names: Names of this machine, beside localhost, by which browsers may ask for the page.
  """
  page = _Page(model)
  routes = [
    Route('/', page.file),
    Route('/{name}', page.file),
    Route('/samples/{index:int}.png', page.sample),
    Route('/images', page.segment, methods=['POST']),
    Route('/images/{image}/attention', page.attend, methods=['POST']),
    Route('/images/{image}/{part}', page.part),
  ]
  handlers: Any = {
    LineFullError: lambda _, error: _fault(str(error), 503),
    NotKeptError: lambda _, error: _fault(str(error), 404),
    404: lambda *_: _fault('There is no such page.', 404),
    405: lambda *_: _fault('This page is asked in another way.', 405),
  }
  return _Guard(Starlette(routes=routes, exception_handlers=handlers), names)


class _Page:
  """The answers to requests."""

  def __init__(self, model: PretrainedModel):
    """Reads the files of the page."""
    self._model = model
    self._line = Line(MOST_WAITING)
    self._results = Results()
    self._attention = Attention(model) if model.description.config.non_local else None
    self._samples = [_sample(index) for index in range(SAMPLES)]
    sources = sorted([*_PAGE.iterdir(), *viewer.STATIC.iterdir()])
    self._files = {
      source.name: (source.read_bytes(), _TYPES[source.suffix])
      for source in sources
      if source.suffix in _TYPES
    }
    self._files['network.json'] = json.dumps(self._description()).encode(), 'application/json'

  async def file(self, request: Request) -> Response:
    """Answers with a file of the page."""
    name = request.path_params.get('name', 'index.html')
    if name not in self._files:
      return _fault('There is no such page.', 404)
    content, media_type = self._files[name]
    return Response(content, media_type=media_type)

  async def sample(self, request: Request) -> Response:
    """Answers with an image of the demo set."""
    index = request.path_params['index']
    if index >= len(self._samples):
      return _fault('There is no such sample.', 404)
    return Response(self._samples[index], media_type='image/png')

  async def segment(self, request: Request) -> Response:
    """Takes an image file; answers with the name of its result, and its sizes."""
    with self._line.arriving():
      data = await _body(request, most=MOST_BYTES, what='The file')
    if isinstance(data, Response):
      return data

    def compute() -> dict[str, Any]:
      result = segment(self._model, data)
      height, width = result.image.shape[:2]
      return {
        'image': self._results.add(result),
        'width': width,
        'height': height,
        'shown': {'width': result.shown[1], 'height': result.shown[0]},
      }

    return self._told(compute)

  async def part(self, request: Request) -> Response:
    """Answers with a part of a result: the picture, its labels or their confidence."""
    result = self._results.get(request.path_params['image'])
    match request.path_params['part']:
      case 'picture':
        return Response(result.picture, media_type='image/jpeg')
      case 'labels':
        return _compressed(result.labels)
      case 'confidence':
        return _compressed(result.confidence)
    return _fault('There is no such page.', 404)

  async def attend(self, request: Request) -> Response:
    """Takes a pixel of an image, {"x": X, "y": Y}; answers with where it looks."""
    attention = self._attention
    if attention is None:
      return _fault('This network has no non-local block, and so no attention.', 400)
    name = request.path_params['image']
    result = self._results.get(name)
    data = await _body(request, most=_POINT_BYTES, what='The pixel')
    if isinstance(data, Response):
      return data
    height, width = result.image.shape[:2]
    pixel = _pixel(data)
    if pixel is None:
      return _fault('A pixel is {"x": X, "y": Y}, two whole numbers.', 400)
    x, y = pixel
    if not (0 <= x < width and 0 <= y < height):
      return _fault(f'({x}, {y}) lies outside the image, which has {width}x{height} pixels.', 400)
    return self._told(lambda: attention(name, result, (x, y)))

  def _description(self) -> dict[str, Any]:
    config, dataset = self._model.description.config, self._model.description.dataset
    return {
      'title': f'NonLocalNet {config}' + (f' ({dataset})' if dataset != 'custom' else ''),
      'classes': self._model.classes,
      'palette': self._model.palette,
      'attention': config.non_local,
      'mostBytes': MOST_BYTES,
      'mostPixels': MOST_PIXELS,
      'samples': SAMPLES,
    }

  def _told(self, compute: Callable[[], dict[str, Any]]) -> Response:
    """Answers with what is computed, once it is its turn."""

    async def lines() -> AsyncIterator[bytes]:
      try:
        with self._line.place() as place:
          async for ahead in place.turns():
            yield _as_line(ahead=ahead)
          yield _as_line(result=await place.compute(compute))
      except UserError as error:
        yield _as_line(fault=str(error))
      except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).partition('\n')[0] or 'the memory does not suffice'
        yield _as_line(fault=f'The network cannot be run on this image: {reason}')

    return StreamingResponse(lines(), media_type='application/x-ndjson')


class _Guard:
  """Refuses requests that other web pages sent, and adds headers against the use of this one."""

  def __init__(self, application: ASGIApp, names: Collection[str]):
    """Wraps an application, see `application`."""
    self._application = application
    self._names = {'localhost', *(name.lower() for name in names)}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request."""

    async def send_with_headers(message: Message) -> None:
      if message['type'] == 'http.response.start':
        MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    refusal = self._refusal(Headers(scope=scope)) if scope['type'] == 'http' else None
    answer = self._application if refusal is None else refusal
    await answer(scope, receive, send_with_headers)

  def _refusal(self, headers: Headers) -> Response | None:
    host, origin = headers.get('host', '').lower(), headers.get('origin')
    name = host.rpartition(':')[0] if host.rpartition(':')[2].isdigit() else host
    if not (_is_address(name.strip('[]')) or name in self._names):  # a name that leads here
      return _fault('Ask for this page by localhost, or an address or name of this machine.', 400)
    if origin is not None and origin.partition('://')[2].lower() != host:
      return _fault('Other pages may not use this one.', 403)
    return None


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


async def _body(request: Request, *, most: int, what: str) -> bytes | Response:
  """Receives the body of a request, at most so many bytes; returns a fault if that fails."""
  too_large = _fault(f'{what} has more than {most / 2**20:.3g} MiB.', 413)
  length = request.headers.get('content-length', '')
  if length.isdigit() and int(length) > most:
    return too_large
  body = bytearray()
  try:
    async with asyncio.timeout(_UPLOAD_SECS):
      async for chunk in request.stream():
        body += chunk
        if len(body) > most:
          return too_large
  except TimeoutError:
    return _fault(f'{what} did not arrive within {_UPLOAD_SECS} s.', 408)
  except ClientDisconnect:
    return _fault(f'{what} did not arrive.', 400)
  return bytes(body)


def _pixel(data: bytes) -> tuple[int, int] | None:
  try:
    point = json.loads(data)
    x, y = point['x'], point['y']
  except (ValueError, TypeError, KeyError, RecursionError):
    return None
  return (x, y) if type(x) is int and type(y) is int else None


def _sample(index: int) -> bytes:
  image, _ = demo_sample(np.random.default_rng(index))
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return file.getvalue()


def _fault(message: str, status: int) -> Response:
  return JSONResponse({'fault': message}, status_code=status)


def _compressed(content: bytes) -> Response:
  headers = {'content-encoding': 'gzip'}
  return Response(content, media_type='application/octet-stream', headers=headers)


def _as_line(**fields: Any) -> bytes:
  return json.dumps(fields).encode() + b'\n'
