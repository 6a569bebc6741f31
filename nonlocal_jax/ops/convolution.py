"""Convolutions that are fast on CPUs and GPUs, forwards and backwards.

On CPUs, XLA's convolutions are slower than its matrix products, above all the gradients of kernels.
There a 1x1 convolution is one product, a 3x3 convolution is computed by Winograd's algorithm where
that saves work, and the gradient of any other kernel is one product for each of its taps.

Elsewhere a dilated convolution is a plain one over the interleaved sub-images: cuDNN computes the
gradients of dilated convolutions slowly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops import winograd

Method = Literal['fast', 'direct']


class _Window(NamedTuple):
  """What a convolution does along both spatial axes."""

  stride: int
  dilation: int
  padding: int


def convolution_function(method: Method) -> Callable[..., jax.Array]:
  """The function that computes a network's convolutions, for `nnx.Conv(conv_general_dilated=...)`.

  Args:
    method: 'fast', which on other platforms than the CPU is 'direct', or 'direct', which is
      `jax.lax.conv_general_dilated` everywhere.

  Raises:
    ValueError: If `method` is unknown.
  """
  if method not in get_args(Method):
    raise ValueError(f'convolution is {method!r}, expected one of {", ".join(get_args(Method))}')
  return fast_convolution if method == 'fast' else lax.conv_general_dilated


def fast_convolution(
  inputs: jax.Array,
  kernel: jax.Array,
  window_strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  rhs_dilation: Sequence[int],
  precision: lax.PrecisionLike = None,
  **others,
) -> jax.Array:
  """A square 2-D convolution, by the fastest way of the default backend.

  On CPUs, `jax.jvp` goes through 1x1 convolutions only; `jax.grad` goes through everywhere.

  Args:
    inputs: (n, h, w, in_channels) floats.
    kernel: (edge, edge, in_channels, out_channels), the same dtype.
    window_strides: Step between outputs, the same for both axes.
    padding: Zeros before and after each axis, all alike.
    rhs_dilation: Step between the taps of the kernel, the same for both axes.
    precision: Of the products, see `jax.lax.dot_general`.
    **others: What else `nnx.Conv` hands to `jax.lax.conv_general_dilated`; at its defaults.

  Returns:
    (n, (h + 2 padding - dilation (edge - 1) - 1) // stride + 1, the same of w, out_channels).
  """
  (stride,), (dilation,) = set(window_strides), set(rhs_dilation)
  ((before, after),) = set(padding)
  assert before == after
  assert set(others.get('lhs_dilation', (1,))) == {1}
  assert others.get('feature_group_count', 1) == 1
  window = _Window(stride, dilation, before)
  if jax.default_backend() != 'cpu':
    return _convolve_on_accelerator(inputs, kernel, window, precision)
  if _is_pointwise(kernel, window):
    return _product(_strided(inputs, stride), kernel[0, 0], precision)
  return _convolve_on_cpu(inputs, kernel, window, precision)


def _convolve_on_accelerator(
  x: jax.Array, kernel: jax.Array, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  if x.dtype == jnp.float32 and _is_high(precision):
    (x_high, x_low), (kernel_high, kernel_low) = _tf32_parts(x), _tf32_parts(kernel)
    of_parts = functools.partial(
      _convolve_on_accelerator, window=window, precision=lax.Precision.DEFAULT
    )
    small = of_parts(x_high, kernel_low) + of_parts(x_low, kernel_high)
    return of_parts(x_high, kernel_high) + small
  same_size = window.stride == 1 and 2 * window.padding == window.dilation * (len(kernel) - 1)
  if window.dilation == 1 or not same_size:
    return _convolve_directly(x, kernel, window=window, precision=precision)
  plain = _Window(stride=1, dilation=1, padding=window.padding // window.dilation)
  y = _convolve_directly(sub_images(x, window.dilation), kernel, window=plain, precision=precision)
  return from_sub_images(y, window.dilation, x.shape[1:3])


def _is_high(precision: lax.PrecisionLike) -> bool:
  if precision is None:
    precision = jax.config.jax_default_matmul_precision
  pair = precision if isinstance(precision, tuple) else (precision,) * 2
  return {str(p).rpartition('.')[2].lower() for p in pair} == {'high'}


def _tf32_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What TF32 keeps of float32, and the rest."""
  high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
  return high, x - high


def sub_images(x: jax.Array, step: int) -> jax.Array:
  """The interleaved images that a dilated convolution sees, laid into the batch.

  Args:
    x: (n, h, w, c).
    step: Distance of neighbours in a sub-image; `h` and `w` are padded with zeros to multiples.

  Returns:
    (n * step^2, ceil(h / step), ceil(w / step), c).
  """
  n, height, width, channels = x.shape
  x = jnp.pad(x, ((0, 0), (0, -height % step), (0, -width % step), (0, 0)))
  x = x.reshape(n, -(-height // step), step, -(-width // step), step, channels)
  return x.transpose(0, 2, 4, 1, 3, 5).reshape(n * step**2, *x.shape[1:4:2], channels)


def from_sub_images(x: jax.Array, step: int, size: Sequence[int]) -> jax.Array:
  """The inverse of `sub_images`.

  Args:
    x: (n * step^2, ceil(h / step), ceil(w / step), c).
    step: As there.
    size: (h, w).

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
def _convolve_on_cpu(
  x: jax.Array, kernel: jax.Array, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  if _suits_winograd(x, kernel, window):
    return winograd.convolve(x, kernel, window.dilation, precision)
  return _convolve_directly(x, kernel, window=window, precision=precision)


def _forwards_on_cpu(x, kernel, window, precision):
  return _convolve_on_cpu(x, kernel, window, precision), (x, kernel)


def _gradients_on_cpu(
  window: _Window,
  precision: lax.PrecisionLike,
  inputs: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of input and kernel from that of the output."""
  x, kernel = inputs
  if _suits_winograd(x, kernel, window):
    of_input = winograd.convolve(gradient, kernel, window.dilation, precision, transpose=True)
    return of_input, winograd.kernel_gradient(x, gradient, window.dilation, precision)
  convolve = functools.partial(_convolve_directly, window=window, precision=precision)
  (of_input,) = jax.vjp(lambda x: convolve(x, kernel), x)[1](gradient)
  return of_input, _kernel_gradient(x, gradient, kernel.shape[:2], window, precision)


_convolve_on_cpu.defvjp(_forwards_on_cpu, _gradients_on_cpu)


def _is_pointwise(kernel: jax.Array, window: _Window) -> bool:
  return kernel.shape[:2] == (1, 1) and window.padding == 0


def _strided(x: jax.Array, stride: int) -> jax.Array:
  return x[:, ::stride, ::stride]


def _product(x: jax.Array, matrix: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
  """(..., c), (c, d) -> (..., d)."""
  return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _product_over_positions(x: jax.Array, y: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
  """(n, h, w, c), (n, h, w, d) -> (c, d), summed over the positions."""
  return lax.dot_general(x, y, (((0, 1, 2), (0, 1, 2)), ((), ())), precision=precision)


def _kernel_gradient(
  x: jax.Array,
  gradient: jax.Array,
  edges: tuple[int, int],
  window: _Window,
  precision: lax.PrecisionLike,
) -> jax.Array:
  """One product for each tap: what it saw, against the gradient of the output."""
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
