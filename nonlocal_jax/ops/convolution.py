"""Convolutions that are fast on CPUs, too, forwards and backwards; elsewhere XLA's own.

On CPUs, XLA's convolutions are slower than its matrix products, above all the gradients of kernels.
There a 1x1 convolution is one product, a 3x3 convolution is computed by Winograd's algorithm where
that saves work, and the gradient of any other kernel is one product for each of its taps.
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
  """A square 2-D convolution, on CPUs by matrix products; `jax.grad` goes through, `jax.jvp` not.

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
  return _convolve(inputs, kernel, _Window(stride, dilation, before), precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(
  x: jax.Array, kernel: jax.Array, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  options = {'window': window, 'precision': precision}
  return lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(_convolve_on_cpu, **options),
    default=functools.partial(_convolve_directly, **options),
  )


def _convolve_forwards(x, kernel, window, precision):
  return _convolve(x, kernel, window, precision), (x, kernel)


def _convolve_backwards(window, precision, inputs, gradient):
  options = {'window': window, 'precision': precision}
  return lax.platform_dependent(
    *inputs,
    gradient,
    cpu=functools.partial(_gradients_on_cpu, **options),
    default=functools.partial(_gradients_directly, **options),
  )


_convolve.defvjp(_convolve_forwards, _convolve_backwards)


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


def _gradients_directly(
  x: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
  *,
  window: _Window,
  precision: lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
  convolve = functools.partial(_convolve_directly, window=window, precision=precision)
  return jax.vjp(convolve, x, kernel)[1](gradient)


def _convolve_on_cpu(
  x: jax.Array, kernel: jax.Array, *, window: _Window, precision: lax.PrecisionLike
) -> jax.Array:
  if _is_pointwise(kernel, window):
    return _product(_strided(x, window.stride), kernel[0, 0], precision)
  if _suits_winograd(x, kernel, window):
    return winograd.convolve(x, kernel, window.dilation, precision)
  return _convolve_directly(x, kernel, window=window, precision=precision)


def _gradients_on_cpu(
  x: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
  *,
  window: _Window,
  precision: lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of input and kernel from that of the output."""
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
  return of_input, _kernel_gradient(x, gradient, kernel.shape[:2], window, precision)


def _is_pointwise(kernel: jax.Array, window: _Window) -> bool:
  return kernel.shape[:2] == (1, 1) and window.padding == 0


def _strided(x: jax.Array, stride: int) -> jax.Array:
  return x[:, ::stride, ::stride]


def _spread(x: jax.Array, stride: int, shape: Sequence[int]) -> jax.Array:
  """Undoes `_strided` with zeros in between."""
  gaps = [
    (0, size - stride * (count - 1) - 1, stride - 1)
    for size, count in zip(shape, x.shape[1:3], strict=True)
  ]
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])


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
