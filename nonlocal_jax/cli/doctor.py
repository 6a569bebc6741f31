"""Checks the installation: versions, devices, folders, and what is missing.

    nonlocal-jax doctor
    nonlocal-jax doctor --json

Multiplies two small matrices on each device and compares the product with NumPy's. The exit status
is 0 if everything that is installed works, and 1 if not.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax
from nonlocal_jax.cli.program import (
  DEMO_PACKAGES,
  EXPORT_PACKAGES,
  PLOT_PACKAGES,
  TRAIN_PACKAGES,
  Parser,
  child_environment,
)
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.devices import (
  advice_on_cuda,
  cpu_is_chosen,
  cuda_plugins,
  nvidia_driver,
)
from nonlocal_jax.weights import released
from nonlocal_jax.weights.names import is_downloaded, weights_folder

Findings = dict[str, Any]

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
_START_SECS = 180
_LITTLE_GIB = 2.0
_CHECK = (sys.executable, '-c', 'from nonlocal_jax.cli import doctor; doctor.print_devices()')


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax doctor`.

  Raises:
    UserError: If something does not work.
  """
  parser = Parser('nonlocal-jax doctor', __doc__)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  options = parser.parse(arguments)
  findings = examine()
  print(json.dumps(findings, indent=2) if options.json else as_text(findings))
  if count := len(findings['problems']):
    raise UserError(f'{count} problem(s) found, see above.')


def examine() -> Findings:
  """Returns what `nonlocal-jax doctor --json` prints.

  Returns:
    `versions`, `driver` (NVIDIA's, or None), `devices` (see `check_devices`), `folders` (the path
    and size of each, and the space that is free there), `weights` (the released files that are
    here), `missing` (packages of each extra), `problems` (what does not work) and `notes` (what is
    good to know), both lists of sentences.
  """
  driver, plugins = nvidia_driver(), cuda_plugins()
  names = (*_PACKAGES, *plugins)
  devices, said = devices_of_subprocess()
  findings = {
    'versions': {
      'nonlocal_jax': nonlocal_jax.__version__,
      'Python': platform.python_version(),
      **{name: _version(name) for name in names},
    },
    'driver': None if driver is None else driver.version,
    'devices': devices,
    'folders': {name: _folder(path) for name, path in folders().items()},
    'weights': [
      known.file for known in (*released.RELEASED, *released.BACKBONES) if is_downloaded(known)
    ],
    'missing': missing_packages(),
  }
  problems = [said] if not devices else []
  problems += [
    f'The product of two matrices on {device["name"]} is wrong: {device["product"]}.'
    for device in devices
    if device['product'] != 'correct'
  ]
  notes = []
  on_cpu = not devices or devices[0]['platform'] == 'cpu'
  if advice := advice_on_cuda(driver, plugins) if on_cpu else None:
    notes.append(advice)
  elif driver is not None and devices and on_cpu and not cpu_is_chosen(os.environ):
    notes.append(f'JAX has {", ".join(plugins)}, but uses the CPU: {said or "it says nothing"}')
  jaxlib = _version('jaxlib')
  notes += [
    f'{name} {_version(name)} does not fit jaxlib {jaxlib}; install {name}=={jaxlib}.'
    for name in plugins
    if _version(name) != jaxlib
  ]
  for extra, packages in findings['missing'].items():
    notes.append(
      f"{_NEEDED_FOR[extra]} need {', '.join(packages)}; in a clone, run: pip install '.[{extra}]'"
    )
  for name, folder in findings['folders'].items():
    if not folder['writable']:
      notes.append(f'The {name} folder {folder["path"]} cannot be written.')
    elif folder['free_gib'] < _LITTLE_GIB:
      notes.append(f'Only {folder["free_gib"]:.1f} GiB are free in {folder["path"]}.')
  return {**findings, 'problems': problems, 'notes': notes}


_NEEDED_FOR = {
  'train': 'The commands train, eval, prepare, browse and benchmark',
  'plot': 'Curves, legends and pictures of an evaluation',
  'export': 'ONNX and safetensors files',
  'demo': 'The pages of the command demo',
}


def devices_of_subprocess(
  command: Sequence[str] = _CHECK, *, timeout: float = _START_SECS
) -> tuple[list[Findings], str]:
  """Runs `check_devices` in a process of its own, which a broken driver may end.

  Args:
    command: Prints the result as JSON on the last line.
    timeout: Seconds after which the process is ended.

  Returns:
    The devices, and a sentence on what went wrong or the last line on stderr. If JAX does not
    start, there are no devices.
  """
  environment = {
    **child_environment(),
    'JAX_TRACEBACK_FILTERING': 'off',  # so that the last line of stderr is the error
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # beside a run that takes most of the memory
  }
  try:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
  except subprocess.TimeoutExpired:
    return [], (
      f'JAX did not start within {timeout:.0f} s; another process may hold the accelerator.'
    )
  last = done.stderr.strip().rpartition('\n')[2]
  if done.returncode == 0:
    return json.loads(done.stdout.strip().rpartition('\n')[2]), last
  chosen = os.environ.get('JAX_PLATFORMS')
  on = f' with JAX_PLATFORMS={chosen}' if chosen else ''
  return [], f'JAX does not start{on} (exit status {done.returncode}): {last or "it says nothing"}'


def print_devices() -> None:
  """Prints `check_devices` as JSON."""
  print(json.dumps(check_devices()))


def check_devices() -> list[Findings]:
  """Multiplies two matrices on each device of this process.

  Returns:
    For each device `name`, `kind`, `platform`, `memory_gib` (what JAX may use, None if unknown) and
    `product`, which is 'correct' or says what is wrong.
  """
  return [
    {
      'name': str(device),
      'kind': device.device_kind,
      'platform': device.platform,
      'memory_gib': _memory_gib(device),
      'product': check_product(device),
    }
    for device in jax.local_devices()
  ]


def check_product(device: jax.Device, multiply: Any = jnp.matmul) -> str:
  """Returns 'correct' if a product of small integers, exact in any precision, is exact on a device.

  Args:
    device: The device.
    multiply: The product.
  """
  rng = np.random.default_rng(0)
  a, b = rng.integers(-8, 9, (2, 128, 128))
  try:
    product = multiply(*jax.device_put((a.astype(np.float32), b.astype(np.float32)), device))
    wrong = int(np.sum(np.asarray(product) != a @ b))
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0]
  return 'correct' if wrong == 0 else f'{wrong} of {a.size} elements differ'


def folders() -> dict[str, Path]:
  """Returns the folders that the program writes to.

  These are compiled programs (`cache`), released weights, prepared data, and runs.
  """
  data = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  cache = cast(Any, jax.config).jax_compilation_cache_dir
  found = {
    'released weights': weights_folder(),
    'prepared data': Path(data).expanduser(),
    'runs': Path('runs').absolute(),
  }
  return {'cache': Path(cache), **found} if cache else found


def missing_packages() -> dict[str, list[str]]:
  """Returns the packages of each extra that are not installed."""
  extras = {
    'train': TRAIN_PACKAGES - PLOT_PACKAGES,
    'plot': PLOT_PACKAGES,
    'export': EXPORT_PACKAGES,
    'demo': DEMO_PACKAGES,
  }
  found = {
    extra: sorted(name for name in names if importlib.util.find_spec(name) is None)
    for extra, names in extras.items()
  }
  return {extra: names for extra, names in found.items() if names}


def as_text(findings: Mapping[str, Any]) -> str:
  """Formats what `examine` returns."""
  lines = [f'{name:18}{version or "?"}' for name, version in findings['versions'].items()]
  driver = findings['driver']
  lines.append(f'{"NVIDIA driver":18}{"none" if driver is None else driver or "unknown version"}')
  for device in findings['devices']:
    memory = device['memory_gib']
    size = '' if memory is None else f', {memory:.1f} GiB for JAX'
    lines.append(
      f'{device["name"]:18}{device["kind"]} ({device["platform"]}{size}); a product is '
      f'{device["product"]}'
    )
  for name, folder in findings['folders'].items():
    size = folder['size_gib']
    holds = 'does not exist yet' if size is None else f'holds {size:.2f} GiB'
    lines.append(f'{name:18}{folder["path"]}: {holds}, {folder["free_gib"]:.1f} GiB free')
  lines.append(f'{"weights here":18}{", ".join(findings["weights"]) or "none"}')
  for title in ('problems', 'notes'):
    if findings[title]:
      lines += ['', f'{title}:', *(f'- {sentence}' for sentence in findings[title])]
  return '\n'.join(lines if findings['problems'] else [*lines, '', 'Everything works.'])


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _memory_gib(device: jax.Device) -> float | None:
  limit = (device.memory_stats() or {}).get('bytes_limit')
  return None if limit is None else limit / 2**30


def _folder(path: Path) -> Findings:
  """Returns path, size, free space, and whether it can be written, for a folder or a future one."""
  existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
  size = None
  if existing == path:
    size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 2**30
  return {
    'path': str(path),
    'size_gib': size,
    'free_gib': shutil.disk_usage(existing).free / 2**30,
    'writable': os.access(existing, os.W_OK | os.X_OK),
  }
