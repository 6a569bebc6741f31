"""Kills the download of a small dataset at random moments and runs it again, until it is whole.

    python -m tests.campaigns.killed_downloads --count=20

A slow server on loopback serves format-true archives of VOC 2012 and SBD. After each SIGKILL no
folder may be there under its own name unless it is whole; in the end nothing else may be left, and
the images must be those that were packed. Prints what was there at each kill; exits with 1 if there
was a fault.
"""

import argparse
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from nonlocal_jax.data import datasets, distributions
from nonlocal_jax.data.archives import missing_files
from nonlocal_jax.data.layouts import list_samples
from nonlocal_jax.runtime import addresses
from tests.dataset_archives import PATHS, make_set, publish, serve
from tests.file_server import file_server

NAME = 'voc12aug'
FETCH = """
import os, pickle, sys, time
from pathlib import Path
import pytest
from nonlocal_jax.data import archives, downloads
from tests.dataset_archives import publish

folder = Path(sys.argv[1])
publish('voc12aug', pickle.loads((folder / 'set').read_bytes()), pytest.MonkeyPatch())
copy = archives.shutil.copyfileobj

def slowly(*arguments):
  time.sleep(0.04)
  copy(*arguments)

archives.shutil.copyfileobj = slowly
print('started', flush=True)
downloads.fetch_dataset('voc12aug', folder / 'new')
os._exit(0)  # at once, so that no kill comes after the work
"""


def state_of(folder: Path) -> str:
  """What a killed process left: the names that are not locks or records."""
  paths = [*folder.glob('*'), *(folder / 'VOCdevkit').rglob('*')]
  names = {
    path.name
    for path in paths
    if re.search(r'\.(part|partial|downloaded|tar|tgz)$', path.name)
    or path.name in ('VOC2012', 'VOCaug', 'dataset')
  }
  return ' '.join(sorted(names)) or 'nothing'


def fault_of(folder: Path) -> str:
  """A sentence on a folder that is there but not whole; '' if there is none."""
  for archive in distributions.DISTRIBUTIONS[NAME].archives:
    target = folder / archive.folder
    if target.exists() and missing_files(target, archive.contents):
      return f'{target.name} is there, but not whole.'
  return ''


def main() -> None:
  """Kills and runs again."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=20, help='how many kills')
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  rng, faults, killed, finished = random.Random(options.seed), [], 0, 0
  states: Counter[str] = Counter()
  with tempfile.TemporaryDirectory() as temporary, file_server() as server:
    made = Path(temporary)
    small = make_set(NAME, made / 'made')
    publish(NAME, small, pytest.MonkeyPatch())
    serve(small, server)
    for file in small.archives:
      server.files[PATHS[file]].seconds_per_piece = 0.04
    environment = {**os.environ, addresses.MIRROR: server.address}
    while killed < options.count:
      folder = made / f'try{finished}'
      folder.mkdir(exist_ok=True)
      (folder / 'set').write_bytes(pickle.dumps(small))
      command = [sys.executable, '-c', FETCH, str(folder)]
      with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
      ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
          _, said = process.communicate(timeout=rng.uniform(0, 1.5))
        except subprocess.TimeoutExpired:
          process.send_signal(signal.SIGKILL)
          process.communicate()
          killed += 1
          states[state_of(folder / 'new')] += 1
        else:
          finished += 1
          if process.returncode:
            faults.append(said.decode()[-500:])
      faults += filter(None, [fault_of(folder / 'new')])
      if process.returncode == 0:
        found = {
          sample.id: sample.image.read_bytes()
          for sample in list_samples(datasets.PUBLISHED[NAME], folder / 'new', 'train').samples
        }
        left = state_of(folder / 'new')
        if found != {s.id: s.image.read_bytes() for s in small.samples['train']}:
          faults.append('other images')
        if left != 'VOC2012 VOCaug dataset':
          faults.append(f'left: {left}')
  print('| what a kill left | times |\n|---|---|')
  for state, count in states.most_common():
    print(f'| {state} | {count} |')
  print(f'{killed} kills, {finished} runs came to their end, {len(faults)} faults.')
  for fault in faults:
    print(fault)
  sys.exit(bool(faults))


if __name__ == '__main__':
  main()
