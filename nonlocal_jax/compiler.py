"""How programs are compiled on CPUs, where memory counts more than running side by side."""

import ctypes
import sys

import jax

_CPU_OPTIONS = {
  # In an order that needs little memory, not one in which much can start early.
  'xla_cpu_enable_concurrency_optimized_scheduler': False,
  # Leaves out copies of what loops only read.
  'xla_cpu_copy_insertion_use_region_analysis': True,
}


def compiler_options() -> dict[str, bool]:
  """For `jax.jit(compiler_options=...)`, on the default backend: none but on the CPU."""
  return dict(_CPU_OPTIONS) if jax.default_backend() == 'cpu' else {}


def return_free_memory() -> None:
  """Gives back to the system what compiling has left: some 0.5 GiB, which glibc would keep."""
  if sys.platform == 'linux':
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # other C libraries have none
    if trim is not None:
      trim(0)
