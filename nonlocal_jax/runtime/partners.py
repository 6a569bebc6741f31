"""The processes of a distributed run: they meet before it starts, and watch each other later.

JAX's own coordination ends all processes in C++, with a stack dump, and does not compare what they
were started with. Here each process keeps a connection to the first one, which listens at the
coordinator's address until all are there; JAX's service listens at the same address afterwards.
Messages are lines of JSON. A process that ends without a word is noticed as its connection closes,
one that hangs, or whose machine is gone, by its silence.
"""

import contextlib
import errno
import json
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nonlocal_jax.errors import UserError

_BEAT_SECS = 1.0
_RETRY_SECS = 0.2
_LAST_WORDS_SECS = 2.0  # for a message to arrive before the connection is closed
_MOST_BYTES = 1 << 16  # of a message


class Place(NamedTuple):
  """The place of this process in a distributed run.

  Attributes:
    coordinator: HOST:PORT of the first process.
    processes: Number of processes.
    process: Index of this process.
  """

  coordinator: str
  processes: int
  process: int

  @property
  def address(self) -> tuple[str, int]:
    """Host and port of the coordinator.

    Raises:
      UserError: If there is no port.
    """
    host, _, port = self.coordinator.rpartition(':')
    if not (host and port.isdigit() and 0 < int(port) < 1 << 16):
      raise UserError(
        f'coordinator is {self.coordinator!r}; it must be HOST:PORT, as in node1:1234.'
      )
    return host.strip('[]'), int(port)


class Partners:
  """The other processes of a run.

  Each message is `{'beat': 1}`, or has one of the keys

    hello: the index of the sender, with 'processes' and 'host'
    start: everybody is there
    done: the sender came to its end
    end: why the run ends for everybody, a sentence
  """

  def __init__(self, place: Place, timeout: float):
    """Describes the run; `meet` waits for the others.

    Args:
      place: The place of this process.
      timeout: Seconds to wait for the others, and how long one may be silent.
    """
    self.place = place
    self.name = _name(place.process, socket.gethostname())
    self._timeout = timeout
    self._connections: list[_Connection] = []
    self._polled = self._beaten = time.monotonic()

  def meet(self) -> None:
    """Waits until all processes are there.

    Raises:
      UserError: If some do not come, or were started otherwise.
    """
    address, deadline = self.place.address, time.monotonic() + self._timeout
    try:
      if self.place.process == 0:
        self._gather(address[1], deadline)
      else:
        self._connect(address, deadline)
    except UserError as error:
      self.leave(str(error))
      raise

  def poll(self, seconds: float) -> str | None:
    """Waits for messages, at most some seconds.

    Returns:
      Why the run ends, a sentence on another process; None if it goes on.
    """
    for connection in self._exchange(seconds):
      for message in connection.messages():
        if 'done' in message:
          connection.is_done = True
        elif isinstance(message.get('end'), str):
          return message['end']
    now = time.monotonic()
    for connection in list(self._connections):
      if connection.is_closed:
        self._connections.remove(connection)
        if not connection.is_done:
          return f'{connection.name} is gone: it was killed, or its machine was.'
      elif not connection.is_done and now - connection.heard > self._timeout:
        return f'{connection.name} has not answered for {self._timeout:g} s.'
    return None

  def leave(self, reason: str | None) -> None:
    """Tells the others that this process ends.

    Args:
      reason: Why the others have to end, a sentence; None if this process came to its end.
    """
    message = {'done': 1} if reason is None else {'end': reason}
    for connection in self._connections:
      connection.send(message)
      with contextlib.suppress(OSError):
        connection.socket.shutdown(socket.SHUT_WR)
    # Closed too early, with unread bytes, a connection takes back what was sent last.
    deadline = time.monotonic() + _LAST_WORDS_SECS
    while self._open() and (left := deadline - time.monotonic()) > 0:
      self._exchange(left, beats=False)
    for connection in self._connections:
      connection.socket.close()

  def _gather(self, port: int, deadline: float) -> None:
    """Listens until all processes have said hello, then tells them to start."""
    wanted = set(range(1, self.place.processes))
    guests: list[_Connection] = []
    with (
      self._listen(port, deadline - self._timeout / 2) as listener,
      contextlib.ExitStack() as stack,
    ):
      stack.callback(lambda: [g.socket.close() for g in guests if g not in self._connections])
      while missing := wanted - {connection.process for connection in self._open()}:
        left = deadline - time.monotonic()
        if left <= 0:
          raise UserError(
            f'{_names(sorted(missing))} of {self.place.processes} did not come to '
            f'{self.place.coordinator} within {self._timeout:g} s; run the same command there, or '
            'wait longer with --partner-timeout.'
          )
        with contextlib.suppress(TimeoutError):
          listener.settimeout(min(left, _RETRY_SECS))
          guest, (host, *_) = listener.accept()
          guests.append(_Connection(guest, host))
        self._exchange(0)
        guests = [guest for guest in guests if not self._welcome(guest)]
    for connection in self._connections:
      connection.send({'start': 1})
    self._connections = self._open()

  def _listen(self, port: int, deadline: float) -> socket.socket:
    while True:
      try:
        # Not shared with a socket that listens already, as gRPC's are: of two runs at one port
        # each would get some of the other's processes.
        return socket.create_server(
          ('', port), family=_family(), dualstack_ipv6=socket.has_dualstack_ipv6()
        )
      except OSError as error:
        if error.errno != errno.EADDRINUSE:
          raise UserError(f'port {port} cannot be used: {error.strerror}.') from error
        if time.monotonic() > deadline:
          raise UserError(
            f'port {port} of this machine is in use, perhaps by another process 0 or an earlier '
            'run that has not ended; give --coordinator another port.'
          ) from error
        time.sleep(_RETRY_SECS)

  def _welcome(self, guest: '_Connection') -> bool:
    """Reads a hello; returns whether the guest is not waited for any more.

    Raises:
      UserError: If it belongs to a run of another number of processes.
    """
    guest.receive()
    hello = next(iter(guest.messages()), None)
    if hello is None:
      is_silent = guest.is_closed or time.monotonic() - guest.heard > self._timeout
      if is_silent:
        guest.socket.close()
      return is_silent
    try:
      process, processes = int(hello['hello']), int(hello['processes'])
      guest.process, guest.name = process, _name(process, str(hello['host']))
    except (LookupError, TypeError, ValueError):
      guest.socket.close()
      return True
    if processes != self.place.processes:
      self._connections.append(guest)
      raise UserError(
        f'{guest.name} was started with --processes={processes}, {self.name} with '
        f'--processes={self.place.processes}; give all the same number.'
      )
    taken = {connection.process: connection.name for connection in self._open()} | {0: self.name}
    if process in taken:
      guest.send(
        {'end': f'{taken[process]} has come before; give each process a --process of its own.'}
      )
      guest.socket.close()
    else:
      self._connections.append(guest)
    return True

  def _connect(self, address: tuple[str, int], deadline: float) -> None:
    """Says hello to the first process and waits until everybody is there."""
    reason, coordinator = 'nobody answers', self.place.coordinator
    hello = {'hello': self.place.process, 'host': socket.gethostname()}
    while (left := deadline - time.monotonic()) > 0:
      try:
        connected = socket.create_connection(address, timeout=max(left, _RETRY_SECS))
      except OSError as error:
        reason = error.strerror or 'it does not answer'
        time.sleep(min(left, _RETRY_SECS))
        continue
      first = _Connection(connected, '')
      first.name = f'process 0 ({address[0]})'
      first.send({**hello, 'processes': self.place.processes})
      while not first.is_closed:
        self._connections = [first]
        self._exchange(_RETRY_SECS)
        for message in first.messages():
          if 'start' in message:
            return
          if isinstance(message.get('end'), str):
            raise UserError(message['end'])
        if first.is_foreign or time.monotonic() - first.heard > self._timeout:
          raise UserError(
            f'{coordinator} is not a process 0 that waits for others: another program answers '
            'there, or a run that has all its processes; see --coordinator and --process.'
          )
      self._connections = []
      reason = 'it ended before all processes were there'
      time.sleep(_RETRY_SECS)
    raise UserError(
      f'process 0 was not found at {coordinator} within {self._timeout:g} s ({reason}); run the '
      'same command there, or correct --coordinator.'
    )

  def _open(self) -> list['_Connection']:
    return [connection for connection in self._connections if not connection.is_closed]

  def _exchange(self, seconds: float, *, beats: bool = True) -> Sequence['_Connection']:
    """Sends signs of life, receives what there is, and returns all connections."""
    now = time.monotonic()
    if (paused := now - self._polled - seconds) > 2 * _BEAT_SECS:  # this process was stopped
      for connection in self._connections:
        connection.heard += paused
    if beats and now - self._beaten >= _BEAT_SECS:
      self._beaten = now
      for connection in self._open():
        connection.send({'beat': 1})
    sockets = {connection.socket: connection for connection in self._open()}
    for readable in select.select(list(sockets), [], [], min(seconds, _BEAT_SECS))[0]:
      sockets[readable].receive()
    self._polled = time.monotonic()
    return self._connections


class _Connection:
  """A connection that never blocks.

  Attributes:
    name: The other process in messages.
    process: Its index; -1 if it has not said hello.
    heard: When it was heard last.
    is_done: Whether it has come to its end.
    is_closed: Whether it is closed at the other end.
    is_foreign: Whether what came is not of this program.
  """

  def __init__(self, connected: socket.socket, name: str):
    connected.setblocking(False)
    self.socket, self.name, self.process = connected, name, -1
    self.heard = time.monotonic()
    self.is_done = self.is_closed = self.is_foreign = False
    self._received = b''
    self._waiting: deque[dict[str, Any]] = deque()

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message; what cannot be sent is noticed by `receive`, or as silence."""
    with contextlib.suppress(OSError):
      self.socket.send(json.dumps(message).encode() + b'\n')

  def receive(self) -> None:
    """Takes in what has come."""
    try:
      data = self.socket.recv(_MOST_BYTES)
    except BlockingIOError:
      return
    except OSError:
      data = b''
    if not data:
      self.is_closed = True
      self.socket.close()
    self.heard = time.monotonic()
    self._received += data

  def messages(self) -> Iterator[dict[str, Any]]:
    """Yields the messages that have come and were not yielded before."""
    *lines, self._received = self._received.split(b'\n')
    if len(self._received) > _MOST_BYTES:
      self.is_foreign, self._received = True, b''
    for line in lines:
      try:
        message = json.loads(line)
      except ValueError:
        message = None
      if isinstance(message, dict):
        self._waiting.append(message)
      else:
        self.is_foreign = True
    while self._waiting:
      yield self._waiting.popleft()


def _family() -> socket.AddressFamily:
  return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


def _name(process: int, host: str) -> str:
  return f'process {process} ({host})'


def _names(processes: Sequence[int]) -> str:
  """Returns 'process 1' or 'processes 1, 2'."""
  listed = ', '.join(map(str, processes[:20])) + (', ...' if len(processes) > 20 else '')
  return f'process{"es" if len(processes) > 1 else ""} {listed}'
