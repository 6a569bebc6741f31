"""Serves the page at a port of this machine."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from nonlocal_jax.errors import UserError

_WAITING_CONNECTIONS = 128
_CONNECTIONS = 256  # at a time


def open_socket(host: str, port: int) -> socket.socket:
  """Listens at a port.

  Args:
    host: A name or address of this machine; '0.0.0.0' or '::' for all of its addresses.
    port: The port; 0 for a free one.

  Raises:
    UserError: If the port is in use, or may not be used, or `host` is no address of this machine.
  """
  try:
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listening = socket.socket(family, kind, protocol)
  except (OSError, UnicodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is no name'
    raise UserError(f'--host={host} cannot be found: {reason}.') from error
  try:
    # The port of a server that has just ended may be used again.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen(_WAITING_CONNECTIONS)
  except OSError as error:
    listening.close()
    if error.errno == errno.EADDRNOTAVAIL:
      raise UserError(f'--host={host} is no address of this machine.') from error
    raise UserError(
      f'Port {port} of {host} cannot be used: {error.strerror}; choose another by --port, or 0 for '
      'a free one.'
    ) from error
  return listening


def is_loopback(listening: socket.socket) -> bool:
  """Returns whether only this machine can reach a socket."""
  return _address(listening).is_loopback


def address_of(listening: socket.socket) -> str:
  """Returns the address for a browser, such as 'http://127.0.0.1:8000/'."""
  address, port = _address(listening), listening.getsockname()[1]
  if address.is_unspecified:
    name = socket.gethostname()
  else:
    name = f'[{address}]' if address.version == 6 else str(address)
  return f'http://{name}:{port}/'


def server_of(application: ASGIApp) -> uvicorn.Server:
  """Returns a server of an application; `run(sockets=[...])` serves it until the program ends."""
  config = uvicorn.Config(
    application,
    loop='asyncio',
    http='h11',
    ws='none',
    lifespan='off',
    log_level='warning',
    access_log=False,
    server_header=False,
    limit_concurrency=_CONNECTIONS,
  )
  return _Server(config)


class _Server(uvicorn.Server):
  """A server that leaves signals to `runtime.signals`: it would wait for open connections."""

  @contextlib.contextmanager
  def capture_signals(self) -> Generator[None, None, None]:
    """Captures none."""
    yield


def _address(listening: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
  return ipaddress.ip_address(listening.getsockname()[0].partition('%')[0])
