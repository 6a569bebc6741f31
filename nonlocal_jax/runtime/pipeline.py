"""Overlaps reading, computing and writing: work in threads, a bounded number of items ahead."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar('T')
R = TypeVar('R')


def in_threads(
  function: Callable[[T], R],
  items: Iterable[T],
  *,
  size: Callable[[T], float],
  most: float,
  eager: bool = False,
  num_threads: int | None = None,
) -> Generator[R, None, None]:
  """Applies a function to items in threads; yields the results in order.

  >>> list(in_threads(lambda x: x * x, range(5), size=lambda _: 1, most=2))
  [0, 1, 4, 9, 16]

  Args:
    function: Applied to each item; its first error is raised here, and later items are given up.
    items: Read in the thread that asks for results, a bounded number ahead.
    size: Of an item, in the unit of `most`.
    most: Sum of the sizes of the items that are being worked on or whose results wait, and at most
      two for each thread. A larger item waits until it is alone.
    eager: Whether to yield a result as soon as it is there. Otherwise `function` runs ahead as far
      as `most` allows.
    num_threads: Number of threads; None for the number of cores.

  Yields:
    The results.
  """
  num_threads = num_threads or num_cores()
  waiting: deque[tuple[Future[R], float]] = deque()
  held = 0.0
  with ThreadPoolExecutor(num_threads) as pool:
    try:
      for item in items:
        added = size(item)
        while waiting and (
          held + added > most or len(waiting) >= 2 * num_threads or (eager and waiting[0][0].done())
        ):
          first, freed = waiting.popleft()
          held -= freed
          yield first.result()
        waiting.append((pool.submit(function, item), added))
        held += added
        del item
      while waiting:
        yield waiting.popleft()[0].result()
    finally:
      for future, _ in waiting:
        future.cancel()


def one_behind(items: Iterable[T]) -> Iterator[T]:
  """Yields each item after requesting the next.

  Where items are results that devices are still computing, a device has the next computation before
  one waits for a result.
  """
  before = []
  for item in items:
    yield from before
    before = [item]
  yield from before


def num_cores() -> int:
  """Returns the number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
