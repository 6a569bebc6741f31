"""How programs are compiled on CPUs, where memory counts more than running side by side."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

# In an order that needs little memory, not one in which much can start early.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def compiler_options() -> dict[str, str]:
  """For `jax.jit(compiler_options=...)`, on the default backend: none but on the CPU."""
  return dict(_CPU_OPTIONS) if jax.default_backend() == 'cpu' else {}


class Program:
  """A pure function, compiled like by `jax.jit` whenever it is called with other shapes.

  What compiling leaves free goes back to the system before the program runs, so that a process does
  not need both at once. To be called from outside of other programs only.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    *,
    static_argnames: Sequence[str] = (),
    out_shardings: Any = None,
  ):
    """Compiles nothing yet.

    Args:
      function: Takes trees of arrays, and by name what is static.
      static_argnames: Names of arguments, hashable, that a program is made for.
      out_shardings: See `jax.jit`.
    """
    self._jitted = jax.jit(
      function,
      static_argnames=static_argnames,
      out_shardings=out_shardings,
      compiler_options=compiler_options(),
    )
    self._compiled: dict[Any, Callable[..., Any]] = {}

  def __call__(self, *arrays: Any, **static: Any) -> Any:
    """What the function returns; as with `jax.jit`, the devices may not be done yet."""
    leaves, structure = jax.tree.flatten(arrays)
    kinds = tuple((x.shape, x.dtype, getattr(x, 'sharding', None)) for x in leaves)
    key = structure, kinds, tuple(static.items())
    if key not in self._compiled:
      self._compiled[key] = compiled(self._jitted.lower(*arrays, **static))
    return self._compiled[key](*arrays)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles a program and gives free memory, of which there is some 0.5 GiB, to the system."""
  program = lowered.compile()
  if sys.platform == 'linux':
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # other C libraries than glibc have none
    if trim is not None:
      trim(0)
  return program
