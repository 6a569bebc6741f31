"""Work in threads, in order and bounded."""

import threading
import time

import pytest

from nonlocal_jax.runtime.pipeline import in_threads, one_behind


def test_results_come_in_order_whatever_finishes_first():
  def work(item):
    time.sleep(0.02 if item % 3 == 0 else 0)
    return item * item

  found = in_threads(work, range(20), size=lambda _: 1, most=6, num_threads=3)
  assert list(found) == [item * item for item in range(20)]


@pytest.mark.parametrize('eager', [False, True])
@pytest.mark.parametrize(
  ('sizes', 'held'), [([1] * 12, 4), ([10] * 12, 3), ([50, 1, 1, 50, 1, 50, 50], 2)]
)
def test_few_items_are_held(sizes, held, eager):
  """At most two for each thread and 30 together, or one that is larger."""
  lock, holding, most, largest = threading.Lock(), [], [], []

  def work(index):
    with lock:
      holding.append(sizes[index])
      most.append(len(holding))
      largest.append(sum(holding))
    return index

  found = in_threads(
    work, range(len(sizes)), size=lambda i: sizes[i], most=30, num_threads=2, eager=eager
  )
  for index in found:
    with lock:
      holding.remove(sizes[index])
    time.sleep(0.005)  # threads work ahead meanwhile
  assert max(most) <= held
  assert max(largest) <= max(30, *sizes)
  if not eager:
    assert max(most) >= min(held, 2) - (max(sizes) > 30)


def test_eager_results_are_not_held_back():
  """The second item is asked for after the first one's result came."""
  asked = []

  def items():
    for item in range(3):
      asked.append(item)
      yield item
      time.sleep(0.1)

  found = in_threads(lambda x: x, items(), size=lambda _: 1, most=100, num_threads=4, eager=True)
  assert next(found) == 0
  assert asked == [0, 1]
  assert list(found) == [1, 2]


def test_the_first_error_is_raised_and_the_rest_given_up():
  done = []

  def work(item):
    if item == 1:
      raise OSError('broken')
    time.sleep(0.01)
    done.append(item)

  with pytest.raises(OSError, match='broken'):
    list(in_threads(work, range(1000), size=lambda _: 1, most=4, num_threads=2))
  assert len(done) <= 5


def test_the_next_item_is_requested_before_one_is_yielded():
  requested = []
  items = (requested.append(number) or number for number in range(4))
  seen = [(item, len(requested)) for item in one_behind(items)]
  assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
