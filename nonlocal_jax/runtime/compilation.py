"""Compiler options and the persistent compilation cache."""

import contextlib
import ctypes
import hashlib
import platform
import sys
from pathlib import Path
from typing import Any, cast

import jax
from filelock import FileLock

from nonlocal_jax.runtime.files import cache_folder
from nonlocal_jax.runtime.parallel import Platform

# Schedules operations for low memory instead of concurrency.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
# No kernels that add in any order, and no algorithms chosen by trials.
_DETERMINISTIC_GPU_OPTIONS = {
  'xla_gpu_deterministic_ops': True,
  'xla_gpu_exclude_nondeterministic_ops': True,
}
_COMPILED = '/jax/core/compile/backend_compile_duration'  # JAX's monitoring event
_LONG_SECS = 0.5
_MAX_CACHE_BYTES = 4 * 2**30


def compiler_options(
  platform: Platform, *, deterministic: bool = False
) -> dict[str, str | bool | int | float]:
  """Returns options for `jax.jit(compiler_options=...)`.

  Args:
    platform: Platform to compile for.
    deterministic: Whether the program must give the same bits in every process on GPUs of one kind,
      with one version of JAX and of the CUDA libraries. It does so on CPUs and TPUs anyway.
  """
  if platform == 'cpu':
    return dict(_CPU_OPTIONS)
  return dict(_DETERMINISTIC_GPU_OPTIONS) if platform == 'gpu' and deterministic else {}


def trim_memory_after_compiling() -> None:
  """Returns freed memory to the system after each long compilation, about 0.5 GiB.

  Registers a listener for all later compilations of this process. Does nothing without glibc.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
  if trim is None:
    return

  def listener(event: str, duration_secs: float, **unused: Any) -> None:
    del unused
    # Short compilations free little, and what is trimmed has to be mapped again.
    if event == _COMPILED and duration_secs >= _LONG_SECS:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listener)


def use_compilation_cache() -> None:
  """Turns on JAX's persistent compilation cache, unless a cache directory is configured already.

  The directory is in `files.cache_folder`. Above 4 GiB the least recently used entries are deleted.
  `JAX_COMPILATION_CACHE_DIR` sets another directory, `JAX_ENABLE_COMPILATION_CACHE=false` turns the
  cache off.
  """
  if cast(Any, jax.config).jax_compilation_cache_dir is not None:
    return
  # A program compiled for one processor may crash on another that shares the home directory.
  folder = cache_folder() / f'compiled_{_processor()}'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_compilation_cache_max_size', _MAX_CACHE_BYTES)
  _remove_unfinished(folder)


def _remove_unfinished(folder: Path) -> None:
  """Removes programs that a killed process has not written to their end.

  JAX could not read them, would not replace them, and would store no others. It writes the time of
  use after the program, both under a lock.
  """
  if not folder.is_dir():
    return
  with contextlib.suppress(OSError, NotImplementedError), FileLock(folder / '.lockfile', timeout=5):
    for program in folder.glob('*-cache'):
      if not program.with_name(f'{program.name.removesuffix("-cache")}-atime').exists():
        program.unlink()


def _processor() -> str:
  """Returns a short hash of the processor's instruction set."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    features = next(line for line in lines if line.startswith(('flags', 'Features')))
  except (OSError, StopIteration):
    features = platform.processor()
  return hashlib.sha256(f'{platform.machine()} {features}'.encode()).hexdigest()[:8]
