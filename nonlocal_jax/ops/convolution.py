"""Convolutions whose forward and backward passes are fast on CPUs and GPUs.

On CPUs, XLA's convolutions are slower than its matrix products, most of all for kernel gradients.
There a 1x1 convolution becomes one matrix product, a 3x3 convolution uses Winograd's algorithm
where that saves work, and the gradient of any other kernel is one matrix product per tap.

On GPUs, cuDNN computes the gradients of dilated convolutions slowly. There a dilated convolution
becomes an undilated one over interleaved sub-images.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops import winograd

Convolution = Literal['direct', 'matmul', 'products', 'sub_images']


class _Window(NamedTuple):
  """Parameters of a convolution, equal for both spatial axes."""

  stride: int
  dilation: int
  padding: int


def convolution_function(convolution: Convolution) -> Callable[..., jax.Array]:
  """Returns a convolution function for `nnx.Conv(conv_general_dilated=...)`.

  Args:
    convolution: 'direct' for `jax.lax.conv_general_dilated`, 'matmul' for `matmul_convolution`
      (fast on CPUs), 'products' for `product_convolution` (nearly as fast, and differentiable in
      both modes), 'sub_images' for `sub_image_convolution` (fast on GPUs).

  Raises:
    ValueError: If `convolution` is unknown.
  """
  functions = {
    'direct': lax.conv_general_dilated,
    'matmul': matmul_convolution,
    'products': product_convolution,
    'sub_images': sub_image_convolution,
  }
  if convolution not in functions:
    expected = ', '.join(get_args(Convolution))
    raise ValueError(f'convolution is {convolution!r}, expected one of {expected}')
  return functions[convolution]


def matmul_convolution(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  rhs_dilation: Sequence[int],
  precision: lax.PrecisionLike = None,
  **others,
) -> jax.Array:
  """Computes a square 2-D convolution, with matrix products where they are faster on CPUs.

  Supports reverse-mode differentiation only.

  Args:
    inputs: (n, h, w, in_channels) floats.
    kernel: (edge, edge, in_channels, out_channels), the same dtype.
    window_strides: Step between outputs, the same for both axes.
    padding: Zeros before and after each axis, all equal.
    rhs_dilation: Step between the taps of the kernel, the same for both axes.
    precision: Matmul precision, see `jax.lax.dot_general`.
    **others: Further arguments of `jax.lax.conv_general_dilated`, which must have the defaults of
      `nnx.Conv`.

  Returns:
    (n, out_h, out_w, out_channels) with
    `out_h = (h + 2 * padding - dilation * (edge - 1) - 1) // stride + 1`, and out_w likewise.
  """
  window = _square_window(window_strides, padding, rhs_dilation, others)
  return _convolve_by_matmul(inputs, kernel, window, precision)


def product_convolution(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  rhs_dilation: Sequence[int],
  precision: lax.PrecisionLike = None,
  **others,
) -> jax.Array:
  """Computes a square 2-D convolution; one with a 1x1 kernel is a matrix product.

  Arguments and result are those of `matmul_convolution`. Supports both modes of differentiation;
  the gradient of a 1x1 kernel is slower, because XLA transposes the larger of its operands.
  """
  window = _square_window(window_strides, padding, rhs_dilation, others)
  if _is_pointwise(kernel, window):
    return _product(_strided(inputs, window.stride), kernel[0, 0], precision)
  return _convolve_directly(inputs, kernel, window=window, precision=precision)


def sub_image_convolution(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  rhs_dilation: Sequence[int],
  precision: lax.PrecisionLike = None,
  **others,
) -> jax.Array:
  """Computes a square 2-D convolution; dilated ones of stride 1 run on interleaved sub-images.

  Arguments and result are those of `matmul_convolution`. `jax.jvp` works for all kernels.
  """
  window = _square_window(window_strides, padding, rhs_dilation, others)
  return _convolve_in_sub_images(inputs, kernel, window, precision)


def _convolve_in_sub_images(
  x: jax.Array, kernel: jax.Array, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  if x.dtype == jnp.float32 and _is_high(precision):
    (x_high, x_low), (kernel_high, kernel_low) = _tf32_parts(x), _tf32_parts(kernel)
    of_parts = functools.partial(
      _convolve_in_sub_images, window=window, precision=lax.Precision.DEFAULT
    )
    small = of_parts(x_high, kernel_low) + of_parts(x_low, kernel_high)
    return of_parts(x_high, kernel_high) + small
  same_size = window.stride == 1 and 2 * window.padding == window.dilation * (len(kernel) - 1)
  if window.dilation == 1 or not same_size:
    return _convolve_directly(x, kernel, window=window, precision=precision)
  plain = _Window(stride=1, dilation=1, padding=window.padding // window.dilation)
  y = _convolve_directly(sub_images(x, window.dilation), kernel, window=plain, precision=precision)
  return from_sub_images(y, window.dilation, x.shape[1:3])


def _square_window(
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  dilations: Sequence[int],
  others: dict,
) -> _Window:
  (stride,), (dilation,) = set(strides), set(dilations)
  ((before, after),) = set(padding)
  assert before == after
  assert set(others.get('lhs_dilation', (1,))) == {1}
  assert others.get('feature_group_count', 1) == 1
  return _Window(stride, dilation, before)


def _is_high(precision: lax.PrecisionLike) -> bool:
  if precision is None:
    precision = cast(Any, jax.config).jax_default_matmul_precision
  pair = precision if isinstance(precision, tuple) else (precision,) * 2
  return {str(p).rpartition('.')[2].lower() for p in pair} == {'high'}


def _tf32_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits float32 into its TF32 part and the remainder."""
  high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
  return high, x - high


def sub_images(x: jax.Array, step: int) -> jax.Array:
  """Splits images into the interleaved sub-images of a dilated convolution.

  Args:
    x: (n, h, w, c).
    step: Dilation: distance in `x` between neighbors in a sub-image. `h` and `w` are zero-padded to
      multiples of it.

  Returns:
    (n * step^2, ceil(h / step), ceil(w / step), c).
  """
  n, height, width, channels = x.shape
  x = jnp.pad(x, ((0, 0), (0, -height % step), (0, -width % step), (0, 0)))
  x = x.reshape(n, -(-height // step), step, -(-width // step), step, channels)
  return x.transpose(0, 2, 4, 1, 3, 5).reshape(n * step**2, *x.shape[1:4:2], channels)


def from_sub_images(x: jax.Array, step: int, size: Sequence[int]) -> jax.Array:
  """Inverts `sub_images`.

  Args:
    x: (n * step^2, ceil(h / step), ceil(w / step), c).
    step: As in `sub_images`.
    size: (h, w) of the result.

  Returns:
    (n, h, w, c).
  """
  _, rows, columns, channels = x.shape
  x = x.reshape(-1, step, step, rows, columns, channels).transpose(0, 3, 1, 4, 2, 5)
  return x.reshape(-1, rows * step, columns * step, channels)[:, : size[0], : size[1]]


def _convolve_directly(
  x: jax.Array, kernel: jax.Array, *, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    (window.stride,) * 2,
    ((window.padding,) * 2,) * 2,
    rhs_dilation=(window.dilation,) * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=precision,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_by_matmul(
  x: jax.Array, kernel: jax.Array, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  if _is_pointwise(kernel, window):
    return _product(_strided(x, window.stride), kernel[0, 0], precision)
  if _suits_winograd(x, kernel, window):
    return winograd.convolve(x, kernel, window.dilation, precision)
  return _convolve_directly(x, kernel, window=window, precision=precision)


def _matmul_forward(x, kernel, window, precision):
  return _convolve_by_matmul(x, kernel, window, precision), (x, kernel)


def _matmul_gradients(
  window: _Window,
  precision: lax.PrecisionLike,
  inputs: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the gradients of input and kernel from the gradient of the output."""
  x, kernel = inputs
  if _is_pointwise(kernel, window):
    of_input = _product(gradient, kernel[0, 0].T, precision)
    if window.stride > 1:
      of_input = _spread(of_input, window.stride, x.shape[1:3])
    strided = _strided(x, window.stride)
    return of_input, _product_over_positions(strided, gradient, precision)[None, None]
  if _suits_winograd(x, kernel, window):
    of_input = winograd.convolve(gradient, kernel, window.dilation, precision, transpose=True)
    return of_input, winograd.kernel_gradient(x, gradient, window.dilation, precision)
  convolve = functools.partial(_convolve_directly, window=window, precision=precision)
  (of_input,) = jax.vjp(lambda x: convolve(x, kernel), x)[1](gradient)
  height, width, *_ = kernel.shape
  return of_input, _kernel_gradient(x, gradient, (height, width), window, precision)


_convolve_by_matmul.defvjp(_matmul_forward, _matmul_gradients)


def _is_pointwise(kernel: jax.Array, window: _Window) -> bool:
  return kernel.shape[:2] == (1, 1) and window.padding == 0


def _strided(x: jax.Array, stride: int) -> jax.Array:
  return x[:, ::stride, ::stride]


def _spread(x: jax.Array, stride: int, size: Sequence[int]) -> jax.Array:
  """Inverts `_strided`, with zeros in between."""
  gaps = [
    (0, side - stride * (count - 1) - 1, stride - 1)
    for side, count in zip(size, x.shape[1:3], strict=True)
  ]
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])


def _product(x: jax.Array, matrix: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
  """(..., c), (c, d) -> (..., d)."""
  return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _product_over_positions(x: jax.Array, y: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
  """(n, h, w, c), (n, h, w, d) -> (c, d), summed over n, h and w."""
  return lax.dot_general(x, y, (((0, 1, 2), (0, 1, 2)), ((), ())), precision=precision)


def _kernel_gradient(
  x: jax.Array,
  gradient: jax.Array,
  edges: tuple[int, int],
  window: _Window,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """Computes the kernel's gradient, one matrix product per tap."""
  pad = (window.padding,) * 2
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  spans = [window.stride * (size - 1) + 1 for size in gradient.shape[1:3]]
  return jnp.stack(
    [
      jnp.stack(
        [
          _product_over_positions(
            _strided(x[:, top : top + spans[0], left : left + spans[1]], window.stride),
            gradient,
            precision,
          )
          for left in range(0, edges[1] * window.dilation, window.dilation)
        ]
      )
      for top in range(0, edges[0] * window.dilation, window.dilation)
    ]
  )


def _suits_winograd(x: jax.Array, kernel: jax.Array, window: _Window) -> bool:
  return (
    kernel.shape[:2] == (3, 3)
    and window.stride == 1
    and window.padding == window.dilation
    and winograd.saves_work(x.shape, kernel.shape, window.dilation)
  )
