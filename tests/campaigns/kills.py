"""Kills a training run at random moments, and compares what it becomes with one never stopped.

    python -m tests.campaigns.kills --count=100
    python -m tests.campaigns.kills --count=10 --processes=2

A run of a tiny network is started again and again until it is finished. Each start gets a signal
after a random time: SIGTERM, SIGINT, SIGKILL, SIGKILL of the whole process group, or SIGSTOP and
SIGCONT. Then the next run begins, every fourth with nothing prepared and nothing compiled. With
several processes (on this machine, with four simulated devices in all) one of them gets the signal.

A fault is a weight, loss or score that differs from those of the run that was never stopped, an
exit status other than the documented one, a traceback, a process that is not gone in time, and
files, worker processes or shared memory that stay.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.processes import members, unused_shared_memory

ROOT = Path(__file__).resolve().parents[2]
TIMING = ('images_per_second', 'waiting_for_data')
_OWN = 'KILLS_IN_OWN_NAMESPACE'
LEFTOVERS = ('*.partial', 'incomplete*', '*orbax-checkpoint-tmp*')
# What is sent to one process, and the statuses that are right for it alone.
KINDS = {
  'SIGTERM': (143, 75),
  'SIGINT': (130, 75),
  'SIGKILL': (-9,),
  'SIGKILL group': (-9,),
  'SIGSTOP, SIGCONT': (),
}
IN_TIME = 5.0  # seconds from SIGTERM until a process is gone that has no step to save
PARTNER_SECONDS = 60  # in which the others notice that one is gone
ALONE = (0, 1, 75, 143)  # statuses of a process whose partner was killed or stopped


@dataclasses.dataclass
class Tried:
  """What was tried, and what came of it."""

  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  slowest: dict[str, float] = dataclasses.field(default_factory=dict)
  faults: list[str] = dataclasses.field(default_factory=list)


class Campaign:
  """The runs of a campaign, in a temporary folder."""

  def __init__(self, folder: Path, *, processes: int, workers: int, seed: int):
    """Makes the images; `folder` exists and is empty."""
    self.folder, self.processes, self.workers = folder, processes, workers
    self.rng, self.tried = random.Random(seed), Tried()
    from nonlocal_jax.data.synthetic import write_demo_set

    write_demo_set(folder / 'images', train=24, val=5)

  def command(self, name: str) -> list[str]:
    """The command line of a run."""
    values = {
      'data.source_dir': self.folder / 'images',
      'data.data_dir': self.folder / f'prepared_{name}',
      'data.num_classes': 8,
      'data.workers': self.workers,
      'model.depth': 14,
      'model.width': 4,
      'train.steps': 9,
      'train.batch_size': 4,
      'train.scale': '(96,96)',
      'train.crop': '(64,64)',
      'train.log_every': 1,
      'eval.scale': '(96,96)',
      'eval.every': 3,
      'checkpoint.every': 2,
    }
    fields = [f'--config.{key}={value}' for key, value in values.items()]
    return [
      *(sys.executable, str(ROOT / 'main.py'), f'--config={ROOT}/configs/custom.py'),
      f'--workdir={self.folder / name}',
      *fields,
    ]

  def start(self, name: str) -> list[subprocess.Popen]:
    """Starts all processes of a run, each in a group of its own."""
    devices = 4 // self.processes
    environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
      '--xla_backend_optimization_level=0',
      'XDG_CACHE_HOME': str(self.folder / f'cache_{name}'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    }
    together = []
    if self.processes > 1:
      with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
      together = [
        '--distributed',
        f'--coordinator=localhost:{port}',
        f'--processes={self.processes}',
      ]
    started = []
    for index in range(self.processes):
      arguments = [*together, f'--process={index}'] if together else []
      with (self.folder / f'{name}.{index}.txt').open('ab') as output:
        started.append(
          subprocess.Popen(
            [*self.command(name), *arguments],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
          )
        )
    return started

  def unstopped(self, name: str) -> float:
    """Runs to the end; returns the seconds it took."""
    started = time.monotonic()
    statuses = [process.wait() for process in self.start(name)]
    if any(statuses):
      sys.exit(f'the run that is not stopped ended with {statuses}: {self.said(name)}')
    return time.monotonic() - started

  def said(self, name: str) -> str:
    """What the processes of a run have printed."""
    return '\n'.join(path.read_text() for path in sorted(self.folder.glob(f'{name}.*.txt')))

  def disturb(self, name: str, kind: str, seconds: float) -> bool:
    """Starts a run and sends a signal; returns whether the run came to its end."""
    for output in self.folder.glob(f'{name}.*.txt'):
      output.unlink()
    shared = unused_shared_memory()
    processes = self.start(name)
    victim = self.rng.choice(processes)
    time.sleep(seconds)
    if victim.poll() is not None:
      return self._ended(name, 'none', processes, victim, shared)
    self.tried.counts[kind] += 1
    sent = time.monotonic()
    had_step = 'step ' in self.said(name)  # 'step/s' of the bar, or an evaluation
    if kind == 'SIGSTOP, SIGCONT':
      victim.send_signal(signal.SIGSTOP)
      time.sleep(self.rng.uniform(0, 3))
      victim.send_signal(signal.SIGCONT)
    elif kind == 'SIGKILL group':
      os.killpg(victim.pid, signal.SIGKILL)
    else:
      victim.send_signal(getattr(signal, kind.partition(',')[0]))
    if KINDS[kind]:
      with contextlib.suppress(subprocess.TimeoutExpired):
        victim.wait(timeout=120)
      took = time.monotonic() - sent
      key = f'{kind}, {victim.poll()}'
      self.tried.slowest[key] = max(took, self.tried.slowest.get(key, 0))
      if victim.poll() in (130, 143, -9) and took > IN_TIME and not had_step:
        self.fault(name, kind, seconds, f'gone after {took:.1f} s')
    return self._ended(name, kind, processes, victim, shared, seconds)

  def _ended(self, name, kind, processes, victim, shared, seconds=0.0) -> bool:
    deadline = time.monotonic() + (PARTNER_SECONDS if KINDS.get(kind) else 300)
    for process in processes:
      try:
        process.wait(timeout=max(deadline - time.monotonic(), 1))
      except subprocess.TimeoutExpired:
        self.fault(name, kind, seconds, f'process {processes.index(process)} is not gone')
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    statuses = [process.returncode for process in processes]
    self.tried.statuses[f'{kind}: {statuses}'] += 1
    if victim.returncode not in (*KINDS.get(kind, ()), 0):
      self.fault(name, kind, seconds, f'status {victim.returncode}: {self.said(name)[-2000:]}')
    if any(process.returncode not in ALONE for process in processes if process is not victim):
      self.fault(name, kind, seconds, f'statuses {statuses}: {self.said(name)[-2000:]}')
    if 'Traceback' in self.said(name) or 'Fatal Python' in self.said(name):
      self.fault(name, kind, seconds, self.said(name)[-3000:])
    # Workers that still import notice that they are alone once they have.
    patience = time.monotonic() + 20
    while time.monotonic() < patience and (
      any(members(process.pid) for process in processes) or unused_shared_memory() - shared
    ):
      time.sleep(0.5)
    for process in processes:
      if stay := members(process.pid):
        self.fault(name, kind, seconds, f'processes stay: {stay}')
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
    if kind != 'SIGKILL group' and (stay := unused_shared_memory() - shared):
      self.fault(name, kind, seconds, f'shared memory stays: {sorted(stay)[:5]}')
    if not kind.startswith('SIGKILL'):
      folders = (self.folder / name, self.folder / f'prepared_{name}')
      stay = [path for place in folders for glob in LEFTOVERS for path in place.rglob(glob)]
      if stay and self.processes == 1:
        self.fault(name, kind, seconds, f'files stay: {stay[:5]}')
    return all(status == 0 for status in statuses)

  def fault(self, name: str, kind: str, seconds: float, text: str) -> None:
    """Keeps a fault and prints it."""
    self.tried.faults.append(f'{name}, {kind} after {seconds:.2f} s: {text}')
    print(f'FAULT {self.tried.faults[-1]}', flush=True)

  def compare(self, name: str, expected: str) -> None:
    """Compares weights, best weights and the log of two finished runs, bit for bit."""
    import numpy as np

    from nonlocal_jax.weights.arrays import to_arrays
    from nonlocal_jax.weights.loading import read_weights

    for part in ('', 'best'):
      found, wanted = (
        to_arrays(read_weights(self.folder / run / part)[1]) for run in (name, expected)
      )
      differ = [key for key, array in wanted.items() if not np.array_equal(found.get(key), array)]
      if differ or found.keys() != wanted.keys():
        self.fault(name, 'the end', 0, f'weights differ in {part or "the workdir"}: {differ[:5]}')
    logs = []
    for run in (name, expected):
      lines = (self.folder / run / 'log.jsonl').read_text().splitlines()
      logs.append([_without_timing(json.loads(line)) for line in lines])
    if logs[0] != logs[1]:
      differ = [pair for pair in zip(*logs, strict=False) if pair[0] != pair[1]][:2]
      self.fault(name, 'the end', 0, f'logs of {list(map(len, logs))} lines differ: {differ}')


def _without_timing(line: dict) -> dict:
  return {key: value for key, value in line.items() if key not in TIMING}


def _use_own_shared_memory() -> None:
  """Starts this program anew where /dev/shm has nothing of other programs."""
  if os.environ.get(_OWN) is None:
    mount = 'mount -t tmpfs none /dev/shm && exec "$@"'
    command = ['unshare', '-rm', 'sh', '-c', mount, 'sh', *sys.orig_argv]
    os.execvpe(command[0], command, {**os.environ, _OWN: '1'})


def main() -> None:
  """Runs the campaign."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--count', type=int, default=100, help='signals to send')
  parser.add_argument('--seconds', type=float, default=float('inf'), help='when to stop')
  parser.add_argument('--processes', type=int, default=1, choices=(1, 2))
  parser.add_argument('--workers', type=int, default=0, help='worker processes that load batches')
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
  _use_own_shared_memory()
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    campaign = Campaign(
      Path(folder), processes=options.processes, workers=options.workers, seed=options.seed
    )
    tried, rng, runs = campaign.tried, campaign.rng, 0
    cold = campaign.unstopped('unstopped')
    for kind in ('prepared', 'cache'):
      shutil.copytree(Path(folder) / f'{kind}_unstopped', Path(folder) / f'{kind}_again')
    warm = campaign.unstopped('again')
    campaign.compare('again', 'unstopped')
    print(f'a run that is not stopped takes {cold:.1f} s, later ones {warm:.1f} s', flush=True)
    while tried.counts.total() < options.count and time.monotonic() - started < options.seconds:
      name = f'run_{runs}'
      if runs % 4:  # prepared and compiled already
        for kind in ('prepared', 'cache'):
          shutil.copytree(Path(folder) / f'{kind}_unstopped', Path(folder) / f'{kind}_{name}')
      finished = False
      while not finished:
        kind = rng.choice(list(KINDS))
        finished = campaign.disturb(name, kind, rng.uniform(0, warm if runs % 4 else cold))
        print(f'{tried.counts.total()} {name} {kind} {dict(tried.statuses)}', flush=True)
      campaign.compare(name, 'unstopped')
      runs += 1
    print(f'\n{tried.counts.total()} signals in {runs} runs, {time.monotonic() - started:.0f} s')
    for title, values in (('sent', tried.counts), ('ended', tried.statuses)):
      print(title)
      for key, value in sorted(values.items()):
        print(f'  {key:45} {value:5}')
    print('longest time until the process was gone, in seconds')
    for key, value in sorted(tried.slowest.items()):
      print(f'  {key:45} {value:5.1f}')
    print(f'{len(tried.faults)} faults')
  sys.exit(1 if tried.faults else 0)


if __name__ == '__main__':
  main()
