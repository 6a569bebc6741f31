"""Max pooling whose gradient is a sum of selections."""

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

MaxPool = Literal['scatter', 'selections']

_TAPS = tuple(itertools.product(range(3), repeat=2))


def max_pool(x: jax.Array, method: MaxPool) -> jax.Array:
  """Computes the maximum of each 3x3 window at stride 2, padded by one on each side.

  >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 'selections')[0, ..., 0].tolist()
  [[5.0, 7.0], [13.0, 15.0]]

  The gradient of a window goes to its first maximum, in the order of rows.

  Args:
    x: (n, h, w, c) floats.
    method: Implementation of the gradient. 'scatter' adds the windows' gradients into the input's,
      which a GPU does in any order. 'selections' gathers those of the up to four windows that an
      input lies in, always in the same order; supports reverse-mode differentiation only.

  Returns:
    (n, ceil(h / 2), ceil(w / 2), c).
  """
  return _pool(x) if method == 'scatter' else _pool_with_selections(x)


def _pool(x: jax.Array) -> jax.Array:
  return nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


@jax.custom_vjp
def _pool_with_selections(x: jax.Array) -> jax.Array:
  return _pool(x)


def _pool_forwards(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, tuple[int, int]]]:
  h, w = x.shape[1:3]
  rows, columns = -(-h // 2), -(-w // 2)
  # The right and bottom edges are padded up to the last window of an even size.
  padding = ((0, 0), (1, 2 * rows - h + 1), (1, 2 * columns - w + 1), (0, 0))
  padded = jnp.pad(x, padding, constant_values=-jnp.inf)
  maximum, first = None, jnp.zeros((), jnp.uint8)
  for tap, (i, j) in enumerate(_TAPS):
    value = padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2]
    if maximum is None:
      maximum, first = value, jnp.zeros(value.shape, jnp.uint8)
    else:
      greater = (value > maximum) | jnp.isnan(value)
      maximum, first = jnp.where(greater, value, maximum), jnp.where(greater, jnp.uint8(tap), first)
  assert maximum is not None
  return maximum, (first, (h, w))


def _pool_backwards(
  residuals: tuple[jax.Array, tuple[int, int]], gradient: jax.Array
) -> tuple[jax.Array]:
  first, (h, w) = residuals
  n, rows, columns, channels = gradient.shape
  after = ((0, 0), (0, 1), (0, 1), (0, 0))
  first = jnp.pad(first, after, constant_values=len(_TAPS))
  gradient = jnp.pad(gradient, after)

  def of_parity(row: int, column: int) -> jax.Array:
    """Returns (n, rows, columns, c), the gradients of the inputs (2 i + row, 2 j + column)."""
    terms = []
    # An even row is the middle one of its window; an odd one is the last one and the next's first.
    for (below, i), (right, j) in itertools.product(
      [((0, 1),), ((0, 2), (1, 0))][row], [((0, 1),), ((0, 2), (1, 0))][column]
    ):
      window = (slice(None), slice(below, below + rows), slice(right, right + columns))
      terms.append(jnp.where(first[window] == _TAPS.index((i, j)), gradient[window], 0))
    return functools.reduce(jnp.add, terms)

  columns_of = [jnp.stack([of_parity(row, 0), of_parity(row, 1)], axis=3) for row in (0, 1)]
  whole = jnp.stack(columns_of, axis=2).reshape(n, 2 * rows, 2 * columns, channels)
  return (whole[:, :h, :w],)


_pool_with_selections.defvjp(_pool_forwards, _pool_backwards)
