"""How programs are compiled, and where compiled ones are kept.

On CPUs memory counts more than running side by side. A second start does not compile again.
"""

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

# In an order that needs little memory, not one in which much can start early.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
_MOST_BYTES = 4 * 2**30  # of the compilation cache


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


def use_compilation_cache() -> None:
  """Turns on JAX's persistent compilation cache, unless JAX was told of one (or of none) already.

  It lies in the user's cache directory, `~/.cache/nonlocal_jax` or below `XDG_CACHE_HOME`; those
  used least recently go when it exceeds 4 GiB. `JAX_COMPILATION_CACHE_DIR` names another place,
  `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  caches = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  # Programs for one processor may not run on another that shares the home directory.
  jax.config.update(
    'jax_compilation_cache_dir', str(caches / 'nonlocal_jax' / f'compiled_{_processor()}')
  )
  jax.config.update('jax_compilation_cache_max_size', _MOST_BYTES)


def _processor() -> str:
  """Short name of what the processor can do."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    features = next(line for line in lines if line.startswith(('flags', 'Features')))
  except (OSError, StopIteration):
    features = platform.processor()
  return hashlib.sha256(f'{platform.machine()} {features}'.encode()).hexdigest()[:8]
