"""A line of requests for the one thread that computes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nonlocal_jax.errors import UserError

_Result = TypeVar('_Result')


class LineFullError(UserError):
  """Raised where as many requests wait as may."""


class Line:
  """Computes one thing after another, in one thread; the others wait in a line of limited length.

  All methods are for one event loop.
  """

  def __init__(self, most: int):
    """Creates an empty line.

    Args:
      most: Requests that may wait or arrive, beside the one that is computed.
    """
    self._most = most
    self._places: list[Place] = []  # that of the request that is computed first
    self._arriving = 0
    self._moved = asyncio.Event()
    self._thread = ThreadPoolExecutor(1, thread_name_prefix='compute')

  @contextlib.contextmanager
  def arriving(self) -> Iterator[None]:
    """Context in which a request arrives; it counts among those that wait.

    Raises:
      LineFullError: If there is no room.
    """
    self._check_room()
    self._arriving += 1
    try:
      yield
    finally:
      self._arriving -= 1

  @contextlib.contextmanager
  def place(self) -> Iterator['Place']:
    """Context with a place at the end of the line, which is left at the end or once computed.

    Raises:
      LineFullError: If there is no room.
    """
    self._check_room()
    place = Place(self)
    self._places.append(place)
    try:
      yield place
    finally:
      if not place.is_computing:
        self.leave(place)

  def ahead_of(self, place: 'Place') -> int:
    """Returns how many requests come before one, that which is computed among them."""
    return self._places.index(place)

  def leave(self, place: 'Place') -> None:
    """Takes a place out of the line."""
    self._places.remove(place)
    moved, self._moved = self._moved, asyncio.Event()
    moved.set()

  async def moved(self) -> None:
    """Waits until a place is left."""
    await self._moved.wait()

  async def compute(self, place: 'Place', function: Callable[[], _Result]) -> _Result:
    """Computes in the thread; the place is left when it is done, whoever still waits for it."""
    loop = asyncio.get_running_loop()
    future = self._thread.submit(function)
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(self.leave, place))
    return await asyncio.shield(asyncio.wrap_future(future))

  def _check_room(self) -> None:
    waiting = max(len(self._places) - 1, 0) + self._arriving
    if waiting >= self._most:
      raise LineFullError(f'{waiting} requests are waiting already: try again in a moment.')


class Place:
  """A place in a `Line`.

  Attributes:
    is_computing: Whether the request is computed, or was.
  """

  def __init__(self, line: Line):
    """Creates a place, which `Line.place` puts into the line."""
    self._line = line
    self.is_computing = False

  async def turns(self) -> AsyncIterator[int]:
    """Yields how many requests come before this one, now and when it changes, down to 0."""
    while ahead := self._line.ahead_of(self):
      yield ahead
      await self._line.moved()
    yield 0

  async def compute(self, function: Callable[[], _Result]) -> _Result:
    """Computes something, once it is this request's turn."""
    assert self._line.ahead_of(self) == 0
    self.is_computing = True
    return await self._line.compute(self, function)
