"""Runs a measurement of the command `benchmark` in a process of its own."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from nonlocal_jax.cli.program import child_environment


@dataclasses.dataclass(frozen=True)
class Child:
  """A measurement in its own process.

  Attributes:
    section: One of `SECTIONS`.
    label: The label within the section, e.g. '512x1024'.
    measure: The name of the measurement, see `measurements.MEASURES`.
    options: Its arguments.
    side: 'first' starts with an empty compilation cache, 'ours' with a filled one; 'theirs' is the
      peer.
    cached: Whether to use a compilation cache, which measurements of a section and label share.
    program: The arguments of Python, followed by `measure` and `options`.
  """

  section: str
  label: str
  measure: str
  options: dict[str, Any]
  side: Literal['first', 'ours', 'theirs'] = 'ours'
  cached: bool = False
  program: tuple[str, ...] = ('-m', 'nonlocal_jax.cli.measurements')


def run_child(child: Child, folder: Path, *, timeout: float | None = None) -> dict[str, Any]:
  """Runs a measurement; returns its results, or an `error` if it fails.

  Args:
    child: The measurement.
    folder: A folder for the compilation caches.
    timeout: The seconds after which it is stopped, which is an error; None for no limit.
  """
  with subprocess.Popen(
    [sys.executable, *child.program, child.measure, json.dumps(started(child))],
    env=environment_of(child, folder),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      process.kill()
      return {'error': f'took longer than {timeout:.0f} s'}
    except BaseException:
      process.terminate()
      raise
  if process.returncode < 0:
    return {'error': f'ended by {signal.Signals(-process.returncode).name}'}
  if process.returncode > 0:
    return {'error': last_line(stderr)}
  return json.loads(last_line(stdout))


def environment_of(child: Child, folder: Path) -> dict[str, str]:
  """Returns the environment of a measurement, see `run_child`."""
  environment = {**child_environment(), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  environment['JAX_TRACEBACK_FILTERING'] = 'off'  # so that the last line of stderr is the error
  if child.measure == 'network':
    # On other platforms JAX counts the FLOPs of compiled programs only.
    environment['JAX_PLATFORMS'] = 'cpu'
  if child.cached:
    cache = folder / 'compiled' / f'{child.section} {child.label}'
    environment |= {
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
    }
  return environment


def started(child: Child) -> dict[str, Any]:
  """Returns the arguments of a measurement that starts now."""
  if child.measure in ('inference', 'training') or child.side == 'theirs':
    return {**child.options, 'started': time.time()}
  return child.options


def last_line(text: str) -> str:
  """Returns the last nonempty line."""
  return next((line for line in reversed(text.splitlines()) if line.strip()), '')
