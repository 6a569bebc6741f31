"""How programs are compiled on CPUs, where memory counts more than running side by side."""

import ctypes
import sys

import jax

# In an order that needs little memory, not one in which much can start early.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def compiler_options() -> dict[str, str]:
  """For `jax.jit(compiler_options=...)`, on the default backend: none but on the CPU."""
  return dict(_CPU_OPTIONS) if jax.default_backend() == 'cpu' else {}


def return_free_memory() -> None:
  """Gives back to the system what compiling has left: some 0.5 GiB, which glibc would keep."""
  if sys.platform == 'linux':
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # other C libraries have none
    if trim is not None:
      trim(0)
