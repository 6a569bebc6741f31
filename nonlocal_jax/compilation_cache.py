"""Compiled programs are kept on disk, so that a second start does not compile again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

_MOST_BYTES = 4 * 2**30


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
