"""check_published.py, on tiny stand-ins for the released files."""

import json
import sys
import textwrap

import pytest

from nonlocal_jax.cli import check_published
from nonlocal_jax.cli.check_published import CHECKS, Check, check_all, run_and_time
from nonlocal_jax.weights.loading import sha256_of
from nonlocal_jax.weights.released import RELEASED, released_model


def test_all_published_numbers_are_on_the_list():
  """Sixteen models and the replaced one; ms+flip was published for as many as the table says."""
  assert len({check.name for check in CHECKS}) == len(CHECKS)
  single = [check for check in CHECKS if not check.multi_scale_flip]
  assert [check.published for check in single] == [model.miou for model in RELEASED]
  several = [check.published for check in CHECKS if check.multi_scale_flip]
  assert several == [m.miou_ms_flip for m in RELEASED if m.miou_ms_flip is not None]
  assert len(several) >= 12


@pytest.fixture
def runner():
  """Stands in for main.py: writes the report that it is told to, and keeps the arguments."""

  class Runner:
    def __init__(self):
      self.calls, self.reports = [], {}

    def __call__(self, arguments):
      self.calls.append(arguments)
      values = dict(argument[2:].split('=', 1) for argument in arguments)
      several = values['config.eval.multi_scale_flip'] == 'True'
      report = self.reports.get(several)
      if report is None:
        return {'status': 1, 'error': 'error: no data', 'seconds': 1.0}
      folder = check_published.Path(values['workdir'])
      folder.mkdir(parents=True, exist_ok=True)
      (folder / 'metrics.json').write_text(json.dumps(report))
      return {'status': 0, 'error': '', 'seconds': 12.0}

  return Runner()


def report(measured, published):
  difference = round(measured - published, 2)
  compared = {'mIoU': published, 'difference': difference, 'agrees': abs(difference) <= 0.02}
  memory = {'host': 1.5, 'device': None}
  return {'mIoU': measured, 'published': compared, 'peak_memory_gib': memory}


def test_table_of_what_agrees_differs_fails_and_is_missing(runner, tmp_path):
  present = released_model('nonlocal_r50-d8_512x512_80k_ade20k')
  absent = released_model('nonlocal_r101-d8_512x512_80k_ade20k')
  checks = [Check(present, False, 40.75), Check(present, True, 42.05), Check(absent, False, 42.90)]
  files = {present.sha256_prefix: tmp_path / 'x.pth'}
  arguments = (checks, files, tmp_path / 'data', tmp_path / 'out')
  runner.reports = {False: report(40.741, 40.75)}
  rows = check_all(*arguments, ['--config.eval.shapes=3'], run=runner)
  assert [row['verdict'] for row in rows] == ['agrees', 'failed: error: no data', 'missing']
  assert rows[0]['measured'] == 40.74
  assert len(runner.calls) == 2
  config, *rest = runner.calls[0]
  assert config == '--config=ade20k_r50:512x512_80k'
  assert rest[-2:] == ['--config.eval.multi_scale_flip=False', '--config.eval.shapes=3']

  runner.reports[True] = report(42.00, 42.05)  # goes on: what was done is not done again
  rows = check_all(*arguments, ['--config.eval.shapes=3'], run=runner)
  assert [row['verdict'] for row in rows] == ['agrees', 'differs', 'missing']
  assert len(runner.calls) == 3
  assert json.loads((tmp_path / 'out/published.json').read_text()) == rows
  table = (tmp_path / 'out/published.md').read_text().splitlines()
  assert table[2:] == [
    '| nonlocal_r50-d8_512x512_80k_ade20k | single scale | 40.75 | 40.74 | -0.01 | 12 | 1.5 '
    '| agrees |',
    '| nonlocal_r50-d8_512x512_80k_ade20k | ms+flip | 42.05 | 42.00 | -0.05 | 12 | 1.5 | differs |',
    '| nonlocal_r101-d8_512x512_80k_ade20k | single scale | 42.90 |  |  |  |  | missing |',
  ]


@pytest.mark.parametrize(
  ('verdict', 'status', 'sentence'),
  [
    ('agrees', None, ''),
    ('differs', 1, 'error: 1 of 1 published numbers were not reproduced.'),
    ('missing', 1, 'holds no released checkpoint that could be checked.'),
  ],
)
def test_exit_status(verdict, status, sentence, script, tmp_path, monkeypatch, capsys):
  row = {'model': 'm', 'mode': 'single scale', 'published': 1.0, 'difference': None}
  row |= {'seconds': None, 'peak_gib': None, 'verdict': verdict}
  row['measured'] = None if verdict == 'missing' else 1.0
  monkeypatch.setattr(check_published, 'check_all', lambda *_, **__: [row])
  found = script(check_published, f'--checkpoints={tmp_path}', f'--data={tmp_path}')
  assert found[0] == status
  assert found[1].endswith(sentence)
  assert verdict in capsys.readouterr().out


def test_released_files_are_found_by_their_contents(tmp_path, monkeypatch):
  (tmp_path / 'deep').mkdir()
  renamed, other = tmp_path / 'deep/renamed.pth', tmp_path / 'other.pth'
  renamed.write_bytes(b'weights')
  other.write_bytes(b'others')
  released = released_model('nonlocal_r50-d8_512x512_80k_ade20k')
  known = {sha256_of(renamed): released}
  monkeypatch.setattr(check_published, 'released_model_of_sha256', known.get)
  assert check_published.find_released(tmp_path) == {released.sha256_prefix: renamed}


def test_programs_are_run_and_timed(tmp_path, monkeypatch, capfd):
  program = tmp_path / 'main.py'
  program.write_text(
    textwrap.dedent("""
      import sys
      sys.stderr.write('working\\rerror: told why\\n')
      sys.exit(int(sys.argv[1]))
    """)
  )
  monkeypatch.setattr(check_published, 'EVALUATE', (sys.executable, str(program)))
  found = run_and_time(['3'])
  assert (found['status'], found['error']) == (3, 'error: told why')
  assert found['seconds'] > 0
  assert 'working' in capfd.readouterr().err
  assert run_and_time(['0'])['status'] == 0


def test_the_command_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = run_and_time(['--config=nonsense'])
  assert found['status'] == 1
  assert "there is no config 'nonsense'" in found['error']


def test_wrong_arguments_are_refused(script, tmp_path):
  found = script(check_published, '--checkpoints=nowhere', f'--data={tmp_path}')
  assert found == (
    1,
    'error: There is no folder nowhere: give the one with the released .pth files.',
  )
  status, said = script(check_published, '--checkpoints=x', '--data=y', '--ouf=z')
  assert (status, said[:53]) == (2, 'error: there is no option --ouf; the nearest is --out')
