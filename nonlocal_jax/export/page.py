"""A folder for any web server: a page that runs a network in the browser, by ONNX Runtime Web."""

import json
import shutil
from pathlib import Path

from nonlocal_jax import viewer
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat
from nonlocal_jax.errors import UserError
from nonlocal_jax.export.interface import Interface
from nonlocal_jax.runtime.download import download
from nonlocal_jax.runtime.files import cache_folder
from nonlocal_jax.weights.description import ModelDescription

NETWORK = 'network.onnx'  # the file that `write_page` leaves to others

# ONNX Runtime Web, from the npm package onnxruntime-web.
RUNTIME_VERSION = '1.30.0'
RUNTIME_ADDRESS = f'https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist'
RUNTIME_FILES = {  # and the sha256 of each
  'ort.wasm.min.mjs': '219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b',
  'ort-wasm-simd-threaded.mjs': 'e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b',
  'ort-wasm-simd-threaded.wasm': '3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2',
}

_RUNTIME_LICENSE = """\
ONNX Runtime Web, from the npm package onnxruntime-web

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def check_channels(description: ModelDescription) -> None:
  """Raises a `UserError` if the network does not take images as browsers have them."""
  pixels = PixelFormat(description.config.in_channels, description.protocol.bits)
  if pixels != RGB:
    raise UserError(f'The network takes {pixels}, and a browser reads {RGB}; use onnx.')


def runtime_files() -> list[Path]:
  """Returns the files of ONNX Runtime Web, downloaded when they are first used.

  Raises:
    UserError: If they cannot be downloaded.
  """
  folder = cache_folder() / f'onnxruntime-web-{RUNTIME_VERSION}'
  return [
    download(f'{RUNTIME_ADDRESS}/{name}', folder=folder, sha256=sha256)
    for name, sha256 in RUNTIME_FILES.items()
  ]


def write_page(folder: Path, description: ModelDescription, interface: Interface) -> None:
  """Writes all of the page but the network itself, which belongs at `NETWORK`.

  Args:
    folder: Where to; there and empty.
    description: What the network is.
    interface: What its program takes: one image of a size.

  Raises:
    UserError: If ONNX Runtime Web cannot be downloaded.
  """
  files = runtime_files()
  for source in (*viewer.STATIC.iterdir(), *viewer.BROWSER.iterdir()):
    shutil.copyfile(source, folder / source.name)
  runtime = folder / 'onnxruntime'
  runtime.mkdir()
  for source in files:
    shutil.copyfile(source, runtime / source.name)
  (runtime / 'LICENSE.txt').write_text(_RUNTIME_LICENSE)
  protocol = description.protocol
  mean = protocol.mean[::-1] if protocol.channel_order == 'bgr' else protocol.mean
  dataset = '' if description.dataset == 'custom' else f' ({description.dataset})'
  page = {
    'title': f'NonLocalNet {description.config}{dataset}',
    'size': interface.size,
    'classes': description.classes,
    'palette': description.palette,
    'fill': [min(max(round(value), 0), 255) for value in mean],
  }
  (folder / 'network.json').write_text(json.dumps(page, indent=2) + '\n')
