"""What the system allows a process: raised, or told before libraries fail."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nonlocal_jax.cli import limits

ROOT = Path(__file__).resolve().parents[1]
INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
  ('before', 'after'),
  [
    ((256, 1024), (1024, 1024)),
    ((1024, 1 << 20), (4096, 1 << 20)),
    ((256, INFINITE), (4096, INFINITE)),
    ((1 << 16, 1 << 20), (1 << 16, 1 << 20)),
    ((INFINITE, INFINITE), (INFINITE, INFINITE)),
  ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_allowed(before, after, monkeypatch, capsys):
  found = {resource.RLIMIT_NOFILE: before, resource.RLIMIT_AS: (INFINITE, INFINITE)}
  monkeypatch.setattr(limits.resource, 'getrlimit', found.__getitem__)
  monkeypatch.setattr(limits.resource, 'setrlimit', found.__setitem__)
  limits.check_limits()
  assert found[resource.RLIMIT_NOFILE] == after
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
  ('setup', 'status', 'said'),
  [
    (
      'ulimit -n 15',
      1,
      'error: Only 15 files may be open at once, and libraries need more: raise the limit, as in '
      'ulimit -n 1024.',
    ),
    (
      'mkdir deleted && cd deleted && rmdir ../deleted',
      1,
      'error: The working directory was deleted: change to one that exists.',
    ),
    (
      'ulimit -v 4194304',
      0,
      'warning: This process may have 4.0 GiB of address space (ulimit -v); where that does not '
      'suffice, XLA aborts it.',
    ),
    (
      'mkdir é && cd é && export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0',
      1,
      "error: Paths are ascii in this locale, which '{folder}/\\udcc3\\udca9' is not: set "
      'PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8.',
    ),
  ],
  ids=['files', 'folder', 'addresses', 'locale'],
)
def test_what_cannot_be_changed_is_said(setup, status, said, tmp_path):
  command = f'{setup} && PYTHONPATH={ROOT} {sys.executable} -m nonlocal_jax doctor --help'
  result = subprocess.run(
    ['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True, timeout=120
  )
  assert (result.returncode, result.stderr.strip()) == (status, said.format(folder=tmp_path))
