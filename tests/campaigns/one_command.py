"""From nothing to the published numbers in one command, against a server on loopback.

    python -m tests.campaigns.one_command --kill-after=30 [--python=PYTHON] [--sets ade20k]

Serves a narrow network and a small dataset of each kind under the real addresses. Their "published"
scores are those of MMSegmentation's own network on the same images. PYTHON, e.g. of a fresh
environment with the package installed, runs `check-published --download` in an empty folder with an
empty home, is killed once in the middle, and runs again. Prints all output, and exits with 1 if a
score does not agree.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from nonlocal_jax.data import datasets, distributions
from nonlocal_jax.weights import released
from tests import peer
from tests.dataset_archives import make_set, publish, serve
from tests.file_server import FileServer, file_server
from tests.test_downloads import without_zero

ROOT = Path(__file__).parents[2]
NAMES = {
  'ade20k': 'nonlocal_r50-d8_512x512_80k_ade20k',
  'voc12aug': 'nonlocal_r50-d8_512x512_20k_voc12aug',
}
# Runs the command with the small stand-ins for what was released; so do the processes it starts.
PROGRAM = """
import pickle, sys
from nonlocal_jax.cli import check_published
from nonlocal_jax.cli.main import main
from nonlocal_jax.data import datasets, distributions
from nonlocal_jax.weights import released
with open({facts!r}, 'rb') as file:
  released.RELEASED, published, archives = pickle.load(file)
datasets.PUBLISHED.update(published)
distributions.DISTRIBUTIONS.update(archives)
check_published.EVALUATE = (sys.executable, __file__, 'eval')
main()
"""


def stand_in(name: str, folder: Path, server: FileServer, patch: pytest.MonkeyPatch) -> None:
  """Serves a small dataset and a narrow network with its score."""
  small = make_set(name, folder / name)
  publish(name, small, patch)
  serve(small, server)
  known = released.released_model(NAMES[name])
  network = peer.build(known.config_name, width=8)
  torch.save({'meta': {}, 'state_dict': network.state_dict()}, folder / 'model.pth')
  data = (folder / 'model.pth').read_bytes()
  scores = peer.scores_of_files(
    network,
    small.samples['val'],
    box=(2048, 512),
    num_classes=datasets.PUBLISHED[name].num_classes,
    label_of=without_zero if name == 'ade20k' else lambda label: label,
  )
  file = f'{known.file[: -len("00000000.pth")]}{hashlib.sha256(data).hexdigest()[:8]}.pth'
  model = dataclasses.replace(known, file=file, miou=round(scores['mIoU'], 2))
  models = tuple(model if other == known else other for other in released.RELEASED)
  patch.setattr(released, 'RELEASED', models)
  server.serve(f'/mmsegmentation/v0.5/nonlocal_net/{known.name}/{file}', data)
  print(f'{name}: {file}, mIoU of the original {scores["mIoU"]:.4f}')


def main() -> None:
  """Runs the campaign."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--python', default=sys.executable)
  parser.add_argument('--sets', nargs='+', choices=NAMES, default=list(NAMES))
  parser.add_argument('--kill-after', type=float, default=30, help='seconds; 0: not at all')
  options = parser.parse_args()
  warnings.simplefilter('ignore')  # those of MMSegmentation
  with (
    tempfile.TemporaryDirectory() as temporary,
    pytest.MonkeyPatch.context() as patch,
    file_server() as server,
  ):
    folder = Path(temporary)
    for name in options.sets:
      stand_in(name, folder, server, patch)
    facts = [released.RELEASED]
    facts += [
      {name: there[name] for name in options.sets}
      for there in (datasets.PUBLISHED, distributions.DISTRIBUTIONS)
    ]
    (folder / 'facts').write_bytes(pickle.dumps(facts))
    (folder / 'program.py').write_text(PROGRAM.format(facts=str(folder / 'facts')))
    (folder / 'home').mkdir()
    environment = {
      **{key: value for key, value in os.environ.items() if not key.startswith('NONLOCAL_JAX')},
      'HOME': str(folder / 'home'),
      'NONLOCAL_JAX_MIRROR': server.address,
    }
    if options.python == sys.executable:
      environment['PYTHONPATH'] = str(ROOT)
    models = ','.join(released.released_model(NAMES[name]).recipe for name in options.sets)
    command = ['check-published', f'--models={models}', '--download', '--config.model.width=8']
    print('$ nonlocal-jax', *command, flush=True)
    run = [options.python, str(folder / 'program.py'), *command]
    process = subprocess.Popen(run, cwd=folder / 'home', env=environment, start_new_session=True)
    if options.kill_after:
      time.sleep(options.kill_after)
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      print('\n(killed; the same command again)', flush=True)
      process = subprocess.Popen(run, cwd=folder / 'home', env=environment)
    status = process.wait()
    print(f'exit status {status}; requests to the server:')
    for path, part in server.requests:
      print(f'  {path} {part or ""}')
    out = folder / 'home/published'
    print((out / 'published.md').read_text())
    rows = json.loads((out / 'published.json').read_text())['rows']
    sys.exit(0 if status == 0 and all(row['verdict'] == 'agrees' for row in rows) else 1)


if __name__ == '__main__':
  main()
