"""Runs commands in environments with faults: full disks, closed streams, low limits.

    python -m tests.campaigns.environment [--commands predict convert] [--faults 'disk full']

Each command must end with status 0 and the results of a run without faults, or with status 1, one
line that begins with 'error:' and no traceback. The same command without the fault must then give
the same results in the same folder, and no part of a file may be left. Full and read-only disks are
mounted in a namespace of their own, which needs `unshare` of Linux.
"""

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from nonlocal_jax.data.prepared import PreparedSplit
from nonlocal_jax.data.synthetic import write_demo_set
from nonlocal_jax.evaluation.report import read_report
from nonlocal_jax.weights.loading import read_weights

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 400
_TINY = (
  *('model.depth=14', 'model.width=4', 'data.num_classes=8', 'train.steps=2', 'train.batch_size=2'),
  *('train.scale=(96,96)', 'train.crop=(64,64)', 'eval.scale=(96,96)', 'eval.every=2'),
  *('checkpoint.every=1', 'train.log_every=1'),
)


@dataclasses.dataclass(frozen=True)
class Fault:
  """What is wrong with the environment.

  Attributes:
    shell: Shell commands before the program is started; {out} is the output folder.
    redirect: Redirections of the program.
    environment: Variables to set; None to unset.
    is_mounted: Whether `shell` mounts something, which needs a namespace.
    prepare: Called with the folder of the inputs before the run.
  """

  shell: str = ''
  redirect: str = ''
  environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  is_mounted: bool = False
  prepare: Callable[[Path], object] = lambda inputs: None


def _full_disk(kilobytes: int) -> Fault:
  return Fault(shell=f'mount -t tmpfs -o size={kilobytes}k none "{{out}}"', is_mounted=True)


def _read_only(folder: str) -> str:
  return f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}"'


def _touch(year: int) -> Callable[[Path], None]:
  def touch(inputs: Path) -> None:
    seconds = (year - 1970) * 365.25 * 24 * 3600
    for path in inputs.rglob('*'):
      os.utime(path, (seconds, seconds))

  return touch


_C_LOCALE = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
FAULTS = {
  'none': Fault(),
  'disk full at once': _full_disk(4),
  'disk full soon': _full_disk(60),
  'disk full later': _full_disk(600),
  'files of 2 KiB at most': Fault(shell='ulimit -f 4'),
  'closed stdin': Fault(redirect='<&-'),
  'closed stdout': Fault(redirect='>&-'),
  'closed stderr': Fault(redirect='2>&-'),
  'closed stdin, stdout and stderr': Fault(redirect='<&- >&- 2>&-'),
  'full stdout': Fault(redirect='>/dev/full'),
  'full stderr': Fault(redirect='2>/dev/full'),
  'read-only output': Fault(shell=_read_only('{out}'), is_mounted=True),
  'read-only home': Fault(shell=_read_only('{home}'), is_mounted=True),
  'no home': Fault(environment={'HOME': None}),
  'missing TMPDIR': Fault(environment={'TMPDIR': '/nowhere'}),
  '40 open files': Fault(shell='ulimit -n 40'),
  '15 open files': Fault(shell='ulimit -n 15'),
  '3 GiB of memory': Fault(shell=f'ulimit -v {3 << 20}'),
  '1 GiB of memory': Fault(shell=f'ulimit -v {1 << 20}'),
  'inputs of the year 2100': Fault(prepare=_touch(2100)),
  'inputs of 1971': Fault(prepare=_touch(1971)),
  'locale C': Fault(environment=_C_LOCALE),
  'deleted working directory': Fault(
    shell='mkdir "{out}/../cwd" && cd "{out}/../cwd" && rmdir ../cwd'
  ),
}


class Setup:
  """Inputs of the commands, below a folder whose name is not ASCII."""

  def __init__(self, folder: Path):
    """Makes the inputs: a data set, photos, and weights as a workdir and as a .pth file."""
    self.home = folder / 'home'
    self.home.mkdir()
    self.inputs = folder / 'é 中'
    self.inputs.mkdir()
    write_demo_set(self.inputs / 'set', train=6, val=2)
    photos = self.inputs / 'photos'
    photos.mkdir()
    for index, path in enumerate(sorted((self.inputs / 'set/images/val').iterdir())):
      shutil.copy(path, photos / f'ü{index}.jpg')
    weights = self.inputs / 'run'
    self._run(self.command('train', folder / 'made'))
    shutil.copytree(folder / 'made/run', weights)
    self._run(['convert', str(weights), f'--to-pth={self.inputs}/model.pth'])

  def _run(self, command: Sequence[str]) -> None:
    status, said = run(command, Fault(), self.home, self.home)
    if status:
      raise SystemExit(f'{command} fails without a fault: {said}')

  def command(self, name: str, out: Path) -> list[str]:
    """The arguments of a command that writes into `out`."""
    data = [
      *('--config=custom', f'--config.data.source_dir={self.inputs}/set'),
      *(f'--config.data.data_dir={out}/prepared', f'--workdir={out}/run'),
      *(f'--config.{setting}' for setting in _TINY),
    ]
    return {
      'train': ['train', *data],
      'eval': ['eval', *data, f'--checkpoint={self.inputs}/run'],
      'predict': [
        *('predict', f'{self.inputs}/photos', f'--checkpoint={self.inputs}/run'),
        *('--scale', '96', '96', f'--out={out}/predicted'),
      ],
      'convert': ['convert', f'{self.inputs}/model.pth', f'{out}/converted'],
      'prepare': [
        *('prepare', '--dataset=custom', f'--source={self.inputs}/set'),
        f'--data-dir={out}/prepared',
      ],
    }[name]


def run(command: Sequence[str], fault: Fault, out: Path, home: Path) -> tuple[int, str]:
  """Runs a command with a fault; returns its status and what it wrote to stderr."""
  said = out.parent / 'said'
  said.write_text('')
  given = {**os.environ, 'HOME': str(home), 'PYTHONPATH': str(_ROOT), **fault.environment}
  environment = {name: value for name, value in given.items() if value is not None}
  kept = out.parent / 'kept'
  prefix = f'({fault.shell.format(out=out, home=home)}) && ' if fault.is_mounted else ''
  if fault.shell and not fault.is_mounted:
    prefix = f'{fault.shell.format(out=out)} && '
  # What is on a mounted disk is gone with the namespace.
  suffix = f'; status=$?; cp -a "{out}/." "{kept}"; exit $status' if fault.is_mounted else ''
  shell = f'{prefix}"$@" >"{said}.out" 2>"{said}" {fault.redirect}{suffix}'
  kept.mkdir(exist_ok=True)
  namespace = ['unshare', '-rm'] if fault.is_mounted else []

  process = subprocess.Popen(
    [*namespace, 'sh', '-c', shell, 'sh', sys.executable, '-m', 'nonlocal_jax', *command],
    env=environment,
    cwd=out.parent,
    start_new_session=True,
  )
  try:
    status = process.wait(_SECONDS)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    status = -1
  if fault.is_mounted and any(kept.iterdir()):
    shutil.copytree(kept, out, dirs_exist_ok=True)
  shutil.rmtree(kept)
  return status, said.read_text(errors='replace')


def results(name: str, out: Path) -> dict[str, object]:
  """What a command made, without times and paths."""
  if name == 'predict':
    return {
      str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*') if path.is_file()
    }
  if name in ('train', 'convert'):
    _, state = read_weights(out / ('run' if name == 'train' else 'converted'))
    return {str(path): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(state)}
  if name == 'eval':
    report = read_report(out / 'run')
    return {key: report[key] for key in ('images', 'mIoU', 'classes', 'confusion')}
  found = {}
  for info in sorted(out.glob('prepared/nonlocal_jax/custom-*/*/dataset_info.json')):
    split = PreparedSplit('x', info.parent)
    found[info.parent.parent.name.split('-')[1]] = [split[index] for index in range(len(split))]
  return found


def differs(found: dict[str, object], expected: dict[str, object]) -> str:
  """Says how results differ from those without a fault, '' if not at all."""
  if found.keys() != expected.keys():
    return f'results {sorted(found)[:5]}, expected {sorted(expected)[:5]}'
  for key, value in expected.items():
    other = found[key]
    same = np.array_equal(other, value) if isinstance(value, np.ndarray) else other == value
    if not same:
      return f'{key} differs'
  return ''


def check(
  name: str, fault: Fault, setup: Setup, folder: Path, expected: dict[str, object] | None
) -> tuple[str, str, dict[str, object]]:
  """Runs a command with a fault; returns how it ended, what is wrong with that, and its results."""
  shutil.rmtree(folder, ignore_errors=True)
  out = folder / 'out é'
  out.mkdir(parents=True)
  fault.prepare(setup.inputs)
  status, said = run(setup.command(name, out), fault, out, setup.home)
  lines = [line for line in re.split(r'[\r\n]+', said.rstrip()) if line]
  if 'Traceback' in said:
    return f'status {status}', f'traceback: {lines[-1]}', {}
  if status not in (0, 1):
    return f'status {status}', f'status {status}: {" | ".join(lines[-3:])}', {}
  if partial := [path for path in out.rglob('*') if '.partial' in path.name]:
    return f'status {status}', f'left behind: {partial}', {}
  ended = 'result'
  if status == 1:
    ended = next((line for line in lines if line.startswith('error: ')), 'no sentence')
    if ended == 'no sentence' and '2>' not in fault.redirect:
      return ended, f'no sentence: {" | ".join(lines[-3:])}', {}
    if fault.redirect.startswith('>/dev/full') and 'output cannot be written' in said:
      pass  # the results must be there
    else:
      status, said = run(setup.command(name, out), Fault(), out, setup.home)
      if status:
        return ended, f'and then without the fault: {said.rstrip().splitlines()[-1:]}', {}
  try:
    found = results(name, out)
  except Exception as error:  # noqa: BLE001 (of several libraries)
    return ended, f'the results cannot be read: {error}', {}
  return ended, differs(found, expected) if expected is not None else '', found


def main() -> int:
  """Prints a table; returns the exit status."""
  commands = ('predict', 'convert', 'prepare', 'eval', 'train')
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--commands', nargs='+', choices=commands, default=commands)
  parser.add_argument('--faults', nargs='+', choices=list(FAULTS), default=list(FAULTS))
  options = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  num_faults, num_runs = 0, 0
  with tempfile.TemporaryDirectory() as folder:
    setup = Setup(Path(folder))
    for name in options.commands:
      _, wrong, expected = check(name, Fault(), setup, Path(folder, 'case'), None)
      if wrong:
        raise SystemExit(f'{name} fails without a fault: {wrong}')
      for title in options.faults:
        ended, wrong, _ = check(name, FAULTS[title], setup, Path(folder, 'case'), expected)
        num_runs += 1
        num_faults += bool(wrong)
        print(f'{name:8} {title:32} {"FAULT: " + wrong if wrong else ended[:150]}', flush=True)
  print(f'{num_runs} runs, {num_faults} faults')
  return int(bool(num_faults))


if __name__ == '__main__':
  sys.exit(main())
