"""How programs are compiled, and where compiled ones are kept.

On CPUs memory counts more than running side by side. A second start does not compile again.
"""

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any, cast

import jax

from nonlocal_jax.runtime.parallel import Platform

# In an order that needs little memory, not one in which much can start early.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
_COMPILED = '/jax/core/compile/backend_compile_duration'  # JAX's name of the event
_MOST_BYTES = 4 * 2**30  # of the compilation cache


def compiler_options(platform: Platform) -> dict[str, str]:
  """For `jax.jit(compiler_options=...)`: none but on CPUs."""
  return dict(_CPU_OPTIONS) if platform == 'cpu' else {}


def trim_memory_after_compiling() -> None:
  """Returns memory that compiling leaves free, some 0.5 GiB, to the system before programs run.

  It does so after each compilation of this process, from now on, where the C library is glibc.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
  if trim is None:
    return

  def listener(event: str, duration_secs: float, **unused: Any) -> None:
    del duration_secs, unused
    if event == _COMPILED:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(listener)


def use_compilation_cache() -> None:
  """Turns on JAX's persistent compilation cache, unless JAX was told of one (or of none) already.

  It lies in the user's cache directory, `~/.cache/nonlocal_jax` or below `XDG_CACHE_HOME`; those
  used least recently go when it exceeds 4 GiB. `JAX_COMPILATION_CACHE_DIR` names another place,
  `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
  """
  if cast(Any, jax.config).jax_compilation_cache_dir is not None:
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
