"""3x3 convolutions by Winograd's minimal filtering (Lavin and Gray, https://arxiv.org/abs/1509.09308).

F(4x4, 3x3) computes a tile of 4x4 outputs with 36 multiplications per channel pair instead of 144.
They form 36 matrix products, (tiles, c) by (c, d), one for each element of a transformed tile. In
float32 the rounding error is about 1e-5 times the standard deviation of the outputs.

A dilated convolution is an undilated one on each of the `dilation`^2 interleaved grids of the
input. Transformed kernels are four times and transformed inputs twice as large as the originals, so
channels are processed in chunks.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 4  # edge of an output tile
_PLACES = TILE + 2  # edge of the input tile it depends on

# The one-dimensional transforms of 6 inputs, 3 taps and 6 products (section 4.3 of the paper).
_INPUT = np.array(
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ]
)
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUT = np.array(
  [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)

_CHANNELS_AT_ONCE = 512
# Below these sizes the transforms cost more than the products save (measured on CPUs).
_FEWEST_CHANNELS = 64
_FEWEST_POSITIONS = 512


def saves_work(x_shape: Sequence[int], kernel_shape: Sequence[int], dilation: int) -> bool:
  """Returns whether Winograd is faster: the input is large enough and fills its tiles.

  Args:
    x_shape: (n, h, w, in_channels).
    kernel_shape: (3, 3, in_channels, out_channels).
    dilation: Step between the taps of the kernel.
  """
  positions = math.prod(x_shape[:3])
  covered = x_shape[0] * math.prod(n * TILE * dilation for n in _tile_counts(x_shape, dilation))
  return (
    min(kernel_shape[2:]) >= _FEWEST_CHANNELS
    and positions >= _FEWEST_POSITIONS
    and covered <= 2 * positions
  )


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  dilation: int,
  precision: lax.PrecisionLike = None,
  *,
  transpose: bool = False,
) -> jax.Array:
  """Computes a convolution of stride 1 with `dilation` zeros of padding on each side.

  Args:
    x: (n, h, w, in_channels) floats.
    kernel: (3, 3, in_channels, out_channels), the same dtype; (3, 3, out_channels, in_channels) in
      the transpose.
    dilation: Step between the taps.
    precision: Matmul precision.
    transpose: Whether to apply the transposed convolution, which maps the gradient of the output to
      that of the input.

  Returns:
    (n, h, w, out_channels).
  """
  into, out = (3, 2) if transpose else (2, 3)
  in_channels, out_channels = kernel.shape[into], kernel.shape[out]

  def products(tiles: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = ((2,), (into - 1,)), ((0,), (0,))
    transformed = _kernel_tiles(kernel, mirrored=transpose)
    return lax.dot_general(tiles, transformed, axes, precision=precision)

  if in_channels < out_channels:
    tiles = _input_tiles(x, dilation)
    return _concatenated(
      lambda part: _outputs(products(tiles, part(kernel, out)), x.shape, dilation),
      out_channels,
      axis=3,
    )
  total = _summed(
    lambda part: products(_input_tiles(part(x, 3), dilation), part(kernel, into)), in_channels
  )
  return _outputs(total, x.shape, dilation)


def kernel_gradient(
  x: jax.Array, gradient: jax.Array, dilation: int, precision: lax.PrecisionLike = None
) -> jax.Array:
  """Computes the kernel gradient of `convolve`, with the transposes of its transforms.

  Args:
    x: (n, h, w, in_channels), the input of the convolution.
    gradient: (n, h, w, out_channels), the gradient of its output.
    dilation: Step between the taps.
    precision: Matmul precision.

  Returns:
    (3, 3, in_channels, out_channels).
  """
  in_channels, out_channels = x.shape[3], gradient.shape[3]

  def products(tiles: jax.Array, gradients: jax.Array) -> jax.Array:
    axes = ((1,), (1,)), ((0,), (0,))
    return _taps(lax.dot_general(tiles, gradients, axes, precision=precision))

  if in_channels < out_channels:
    tiles = _input_tiles(x, dilation)
    return _concatenated(
      lambda part: products(tiles, _gradient_tiles(part(gradient, 3), dilation)),
      out_channels,
      axis=3,
    )
  gradients = _gradient_tiles(gradient, dilation)
  return _concatenated(
    lambda part: products(_input_tiles(part(x, 3), dilation), gradients), in_channels, axis=2
  )


Part = Callable[[jax.Array, int], jax.Array]  # takes a chunk of an array along an axis


def _parts(channels: int) -> int:
  """Returns the number of equal chunks that the channels are processed in."""
  few = -(-channels // _CHANNELS_AT_ONCE)
  return next((n for n in range(few, 4 * few) if channels % n == 0), 1)


def _part(index: jax.typing.ArrayLike, size: int) -> Part:
  return lambda array, axis: lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _summed(function: Callable[[Part], jax.Array], channels: int) -> jax.Array:
  """Sums `function` over the chunks of the channels."""
  count = _parts(channels)
  size = channels // count
  first = function(_part(0, size))
  if count == 1:
    return first
  return lax.fori_loop(1, count, lambda i, total: total + function(_part(i, size)), first)


def _concatenated(function: Callable[[Part], jax.Array], channels: int, *, axis: int) -> jax.Array:
  """Concatenates the results of `function` for the chunks of the channels."""
  count = _parts(channels)
  size = channels // count
  if count == 1:
    return function(_part(0, size))
  shape = jax.eval_shape(lambda: function(_part(0, size)))
  whole = lax.empty((*shape.shape[:axis], channels, *shape.shape[axis + 1 :]), shape.dtype)
  return lax.fori_loop(
    0,
    count,
    lambda i, whole: lax.dynamic_update_slice_in_dim(
      whole, function(_part(i, size)), i * size, axis
    ),
    whole,
  )


def _tile_counts(shape: Sequence[int], dilation: int) -> tuple[int, int]:
  """Returns the number of tiles along both axes of an interleaved grid."""
  height, width = (-(-size // (TILE * dilation)) for size in shape[1:3])
  return height, width


def _input_tiles(x: jax.Array, dilation: int) -> jax.Array:
  """(n, h, w, c) -> (36, tiles, c), transformed."""
  n, height, width, channels = x.shape
  rows, columns = _tile_counts(x.shape, dilation)
  # Each tile reads the first two rows and columns of the next one, so one extra tile is padded.
  padding = [
    (dilation, (count + 1) * TILE * dilation - size - dilation)
    for count, size in ((rows, height), (columns, width))
  ]
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  x = x.reshape(n, rows + 1, TILE, dilation, -1, channels)
  x = _combine(_INPUT, [x[:, :-1, i] for i in range(TILE)] + [x[:, 1:, i] for i in range(2)])
  x = x.reshape(_PLACES, n, rows, dilation, columns + 1, TILE, dilation, channels)
  x = _combine(
    _INPUT, [x[..., :-1, i, :, :] for i in range(TILE)] + [x[..., 1:, i, :, :] for i in range(2)]
  )
  return x.reshape(_PLACES**2, -1, channels)


def _gradient_tiles(gradient: jax.Array, dilation: int) -> jax.Array:
  """(n, h, w, c) -> (36, tiles, c), by the transpose of `_outputs`."""
  n, height, width, channels = gradient.shape
  rows, columns = _tile_counts(gradient.shape, dilation)
  padding = [
    (0, count * TILE * dilation - size) for count, size in ((rows, height), (columns, width))
  ]
  x = jnp.pad(gradient, ((0, 0), *padding, (0, 0)))
  x = x.reshape(n, rows, TILE, dilation, -1, channels)
  x = _combine(_OUTPUT.T, [x[:, :, i] for i in range(TILE)])
  x = x.reshape(_PLACES, n, rows, dilation, columns, TILE, dilation, channels)
  x = _combine(_OUTPUT.T, [x[..., i, :, :] for i in range(TILE)])
  return x.reshape(_PLACES**2, -1, channels)


def _outputs(products: jax.Array, shape: Sequence[int], dilation: int) -> jax.Array:
  """(36, tiles, c) -> (n, h, w, c), with n, h and w as in `shape`."""
  n, height, width, _ = shape
  rows, columns = _tile_counts(shape, dilation)
  x = products.reshape(_PLACES, _PLACES, n, rows, dilation, columns, dilation, -1)
  x = _combine(_OUTPUT, list(x), axis=-3)  # (6, n, rows, dilation, columns, TILE, dilation, c)
  x = _combine(_OUTPUT, list(x), axis=2)
  return x.reshape(n, rows * TILE * dilation, columns * TILE * dilation, -1)[:, :height, :width]


# Elements of a tile are numbered in column-major order, as in `_input_tiles`.
_KERNEL_OF_TILE = np.einsum('ai,bj->baij', _KERNEL, _KERNEL).reshape(_PLACES**2, 9)


def _kernel_tiles(kernel: jax.Array, *, mirrored: bool) -> jax.Array:
  """(3, 3, c, d) -> (36, c, d), transformed; `mirrored` flips both axes first."""
  matrix = jnp.asarray(_KERNEL_OF_TILE[:, ::-1] if mirrored else _KERNEL_OF_TILE, kernel.dtype)
  taps = kernel.reshape(9, -1)
  return jnp.matmul(matrix, taps, precision='highest').reshape(-1, *kernel.shape[2:])


def _taps(products: jax.Array) -> jax.Array:
  """(36, c, d) -> (3, 3, c, d), by the transpose of `_kernel_tiles`."""
  matrix = jnp.asarray(_KERNEL_OF_TILE.T, products.dtype)
  flat = products.reshape(_PLACES**2, -1)
  return jnp.matmul(matrix, flat, precision='highest').reshape(3, 3, *products.shape[1:])


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array], *, axis: int = 0) -> jax.Array:
  """Multiplies a small, sparse matrix by a list of arrays; stacks the results along `axis`."""
  sums = []
  for row in matrix.tolist():
    terms = [part * factor for factor, part in zip(row, parts, strict=True) if factor]
    sums.append(sum(terms[1:], start=terms[0]))
  return jnp.stack(sums, axis=axis)
