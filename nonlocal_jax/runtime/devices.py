"""The devices a program runs on, and NVIDIA GPUs that JAX does not see."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from nonlocal_jax.runtime.parallel import is_first_process, platform_of_mesh
from nonlocal_jax.runtime.wording import counted

# The oldest driver of each CUDA that JAX is built for.
_OLDEST_DRIVERS = {13: 580, 12: 525}
# Set in a program whose parent has said what it runs on.
SAID = 'NONLOCAL_JAX_DEVICES_SAID'


class NvidiaDriver(NamedTuple):
  """The NVIDIA driver of a machine with at least one GPU.

  Attributes:
    version: For example '580.65.06'; '' if unknown.
  """

  version: str

  @property
  def extra(self) -> str | None:
    """The extra of the package jax for this driver: 'cuda13', 'cuda12', None if it is too old."""
    major = int(self.version.partition('.')[0] or _OLDEST_DRIVERS[12])
    return next(
      (f'cuda{cuda}' for cuda, oldest in _OLDEST_DRIVERS.items() if major >= oldest), None
    )


def nvidia_driver(root: Path = Path('/'), search_path: str | None = None) -> NvidiaDriver | None:
  """Finds the NVIDIA driver without loading CUDA.

  Args:
    root: Folder that holds `dev` and `proc`.
    search_path: Where `nvidia-smi` is searched, like `PATH`; None for `PATH`.

  Returns:
    The driver; None if no GPU is accessible.
  """
  devices = root / 'dev'
  if any(re.fullmatch(r'nvidia\d+', path.name) for path in devices.glob('nvidia*')):
    try:
      text = (root / 'proc/driver/nvidia/version').read_text()
    except OSError:
      text = ''
    if version := re.search(r'\s(\d+\.[\d.]+)\s', text):
      return NvidiaDriver(version[1])
    return NvidiaDriver(_ask_nvidia_smi(search_path) or '')
  # The Windows Subsystem for Linux has no such device files.
  version = _ask_nvidia_smi(search_path)
  return NvidiaDriver(version) if version else None


def _ask_nvidia_smi(search_path: str | None) -> str | None:
  """Returns the driver's version that `nvidia-smi` prints, or None."""
  program = shutil.which('nvidia-smi', path=search_path)
  if program is None:
    return None
  query = [program, '--query-gpu=driver_version', '--format=csv,noheader']
  try:
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):
    return None
  version = re.match(r'\d+\.[\d.]+', done.stdout)
  return version[0] if done.returncode == 0 and version else None


def cuda_plugins() -> list[str]:
  """Returns the installed packages that give JAX CUDA, e.g. ['jax-cuda13-plugin']."""
  names = [f'jax-cuda{cuda}-plugin' for cuda in _OLDEST_DRIVERS]
  return [name for name in names if importlib.util.find_spec(name.replace('-', '_'))]


def cpu_is_chosen(environment: Mapping[str, str]) -> bool:
  """Returns whether the user chose JAX's platform, or hid the GPUs from CUDA."""
  hidden = environment.get('CUDA_VISIBLE_DEVICES', '0').strip() in ('', '-1')
  return bool(environment.get('JAX_PLATFORMS') or environment.get('JAX_PLATFORM_NAME')) or hidden


def advice_on_cuda(driver: NvidiaDriver | None, plugins: Collection[str]) -> str | None:
  """Returns a sentence on how to use an NVIDIA GPU, for programs that JAX runs on the CPU.

  Args:
    driver: See `nvidia_driver`.
    plugins: See `cuda_plugins`.

  Returns:
    What to install; None if there is no GPU, or JAX has CUDA.
  """
  if driver is None or plugins:
    return None
  here = f'This machine has an NVIDIA GPU{driver.version and f" (driver {driver.version})"}, but '
  if driver.extra is None:
    return f'{here}its driver is too old for JAX: install {_OLDEST_DRIVERS[12]} or later.'
  install = f"pip install 'jax[{driver.extra}]'"
  return f'{here}JAX is installed without CUDA and uses the CPU; run: {install}'


def describe(kind: str, count: int, processes: int = 1) -> str:
  """Returns kind and count of devices, and the number of processes.

  >>> describe('NVIDIA H100', 4)
  '4 devices (NVIDIA H100) of 1 process'
  """
  return f'{counted(count, "device")} ({kind}) of {counted(processes, "process")}'


def describe_mesh(mesh: Mesh) -> str:
  """Returns kind and count of the devices of a mesh, and the number of processes they belong to."""
  devices = mesh.devices.flat
  processes = len({device.process_index for device in devices})
  return describe(devices[0].device_kind, mesh.size, processes)


def say_devices(mesh: Mesh) -> None:
  """Prints on stderr what a program runs on, and `advice_on_cuda`; only in the first process."""
  if is_first_process() and SAID not in os.environ:
    print(f'Runs on {describe_mesh(mesh)}', file=sys.stderr)
    say_advice_on_cuda(platform_of_mesh(mesh))


def say_advice_on_cuda(platform: str) -> None:
  """Prints `advice_on_cuda` on stderr if JAX runs on the CPU and nobody chose that.

  Args:
    platform: The platform of the devices that the program runs on.
  """
  if platform == 'cpu' and is_first_process() and not cpu_is_chosen(os.environ):
    advice = advice_on_cuda(nvidia_driver(), cuda_plugins())
    if advice is not None:
      print(advice, file=sys.stderr)
