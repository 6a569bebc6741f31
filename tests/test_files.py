"""Files are whole or absent, and lost output costs no result."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.cli import prediction_files
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import write_png
from nonlocal_jax.runtime.files import given_path, write_whole
from nonlocal_jax.torch_format.writer import write_torch_checkpoint

# Prints before it writes its result, and more than a pipe holds.
PROGRAM = """
import sys
from pathlib import Path
from nonlocal_jax.cli.program import run_program
from nonlocal_jax.runtime.progress import progress_bar

def program():
  print('Größe ' * 50_000)
  with progress_bar(1, 'Working', unit='step') as bar:
    bar.update()
  Path('result').write_text('whole')

run_program(program)
"""


@pytest.mark.parametrize(
  ('redirection', 'status'),
  [
    ('>&- 2>&-', 0),
    ('2>&1 | true', 0),
    ('>/dev/full', 1),
    ('>said.txt', 0),
  ],
)
def test_lost_output_costs_no_result(redirection, status, tmp_path):
  command = f'set -o pipefail; "$0" -c "$1" {redirection}'
  environment = {'PYTHONPATH': str(Path(__file__).parents[1]), 'PYTHONIOENCODING': 'ascii'}
  found = subprocess.run(
    ['bash', '-c', command, sys.executable, PROGRAM],
    cwd=tmp_path,
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert found.returncode == status, found.stderr
  assert (tmp_path / 'result').read_text() == 'whole'
  assert 'Traceback' not in found.stderr
  if status:
    assert found.stderr.endswith('error: the output cannot be written: No space left on device.\n')
  if redirection == '>said.txt':
    assert (tmp_path / 'said.txt').read_text().startswith('Gr\\xf6\\xdfe ')


def test_files_are_whole_or_absent_when_there_is_no_room(tmp_path, rng):
  """A limit on the size of files ends writes as a full disk does: first short, then an error."""
  picture = rng.integers(0, 256, (100, 100, 3), np.uint8)
  writers = {
    'label.png': lambda path: prediction_files.save(Image.fromarray(picture), path),
    'overlay.jpg': lambda path: prediction_files.save(Image.fromarray(picture), path),
    'picture.png': lambda path: write_png(path, picture),
    'text.json': lambda path: write_whole(path, 'x' * 10_000),
    'model.pth': lambda path: write_torch_checkpoint(path, {'a': np.zeros(10_000, np.float32)}, {}),
  }
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for name, write in writers.items():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
      with pytest.raises(UserError, match=f'{name} cannot be written: File too large'):
        write(tmp_path / name)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert list(tmp_path.iterdir()) == []
  for name, write in writers.items():
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 2000


def test_only_the_home_folder_is_expanded(monkeypatch):
  monkeypatch.setenv('HOME', '/home/anna')
  assert given_path('~/runs') == Path('/home/anna/runs')
  assert given_path('runs~/~') == Path('runs~/~')
