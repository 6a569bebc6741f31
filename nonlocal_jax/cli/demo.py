"""Serves a page that segments images and shows where their pixels look.

    nonlocal-jax demo --checkpoint=WEIGHTS
    nonlocal-jax demo --checkpoint=WEIGHTS --port=8000 --scale 2048 512

Open the printed address in a browser and drop an image. The page needs no network, and keeps the
last images in memory only. Only this machine can reach it, unless --host says otherwise; from
another one, forward the port: ssh -L 8000:localhost:8000 HOST. Ctrl-C ends it.

Needs the extra: pip install '.[demo]'
"""

import dataclasses
import re
import socket
import sys
from collections.abc import Sequence
from typing import get_args

import jax

import nonlocal_jax
from nonlocal_jax.cli.program import (
  Parser,
  add_align_corners,
  add_ema,
  add_scale,
  path_option,
  say_weights,
)
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat
from nonlocal_jax.errors import UsageError, UserError, needs_packages
from nonlocal_jax.inference.pretrained import Precision
from nonlocal_jax.runtime.devices import say_devices
from nonlocal_jax.runtime.parallel import data_mesh

_MOST_PORT = 65535


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax demo`."""
  parser = Parser('nonlocal-jax demo', __doc__)
  parser.add_argument(
    '--checkpoint',
    required=True,
    type=path_option,
    metavar='WEIGHTS',
    help='a .pth file, a converted directory, the workdir of a training run, or the name of a '
    'released model, which is downloaded: see nonlocal-jax models',
  )
  parser.add_argument(
    '--port', type=_port, default=8000, help='port of the page; 0 for a free one (default: 8000)'
  )
  parser.add_argument(
    '--host',
    default='127.0.0.1',
    help='address or name of this machine at which to serve; 0.0.0.0 lets everybody use the page '
    'who can reach this machine (default: 127.0.0.1)',
  )
  add_scale(parser)
  add_align_corners(parser)
  parser.add_argument(
    '--precision',
    choices=get_args(Precision),
    default='highest',
    help='precision of matrix products, see nonlocal-jax predict --help (default: highest)',
  )
  add_ema(parser)
  options = parser.parse(arguments)
  with needs_packages('web pages', extra='demo'):
    from nonlocal_jax.demo.application import application
    from nonlocal_jax.demo.server import address_of, is_loopback, open_socket, server_of

  with open_socket(options.host, options.port) as listening:
    say_devices(data_mesh(jax.local_devices()[:1]))
    say_weights(options.checkpoint)
    model = nonlocal_jax.load(
      options.checkpoint,
      align_corners=options.align_corners,
      ema=options.ema,
      precision=options.precision,
    )
    pixels = PixelFormat(model.description.config.in_channels, model.protocol.bits)
    if pixels != RGB:
      raise UserError(
        f'{options.checkpoint} takes images of {pixels}, and the page has such of {RGB}: use '
        'nonlocal_jax.load.'
      )
    if options.scale:
      protocol = dataclasses.replace(model.protocol, scale=tuple(options.scale), scale_factor=None)
      model = model.with_protocol(protocol)
    names = () if is_loopback(listening) else (options.host, *_names_of_this_machine())
    if not is_loopback(listening):
      print(
        'Everybody who can reach this machine on the network can use the page.', file=sys.stderr
      )
    print(f'Open {address_of(listening)} in a browser; Ctrl-C ends this.', flush=True)
    server_of(application(model, names=names)).run(sockets=[listening])


def _names_of_this_machine() -> tuple[str, str]:
  name = socket.gethostname()
  return name, f'{name}.local'


def _port(text: str) -> int:
  if re.fullmatch(r'-?\d{1,9}', text) is None:
    raise UsageError(f'--port is {text!r}; give a number, e.g. --port=8000.')
  if not 0 <= int(text) <= _MOST_PORT:
    raise UserError(f'--port is {text}; it must be from 0 to {_MOST_PORT}.')
  return int(text)
