"""check_published.py, on tiny stand-ins for the released files."""

import json
import shutil
import sys
import textwrap
import types
from pathlib import Path

import pytest

from nonlocal_jax.cli import check_published, published_plan
from nonlocal_jax.cli.check_published import check_all, checks_of, run_and_time
from nonlocal_jax.cli.published_plan import Check, Places, say_plan
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.deviations import likely_causes
from nonlocal_jax.runtime.locks import used_alone
from nonlocal_jax.runtime.progress import as_duration
from nonlocal_jax.weights.loading import sha256_of
from nonlocal_jax.weights.names import released_path
from nonlocal_jax.weights.released import RELEASED, released_model

PRESENT = released_model('nonlocal_r50-d8_512x512_80k_ade20k')
ABSENT = released_model('nonlocal_r101-d8_512x512_80k_ade20k')


def test_all_published_numbers_are_on_the_list():
  """Sixteen models; ms+flip was published for as many as the table says."""
  current = [model for model in RELEASED if not model.replaced]
  checks = checks_of('all', {}, multi_scale_flip=True)
  assert len({check.name for check in checks}) == len(checks)
  single = [check for check in checks if not check.multi_scale_flip]
  assert [check.published for check in single] == [model.miou for model in current]
  assert checks_of('all', {}) == tuple(single)
  several = [check.published for check in checks if check.multi_scale_flip]
  assert several == [m.miou_ms_flip for m in current if m.miou_ms_flip is not None]
  assert len(several) == 12


def test_models_are_chosen_by_name(tmp_path):
  names = 'ade20k_r50,nonlocal_r50-d8_512x512_160k_ade20k,ade20k_r101:512x512_80k'
  assert [check.model.miou for check in checks_of(names, {})] == [42.03, 42.90]
  (old,) = (model for model in RELEASED if model.replaced)
  assert old in {check.model for check in checks_of('all', {old.sha256_prefix: tmp_path})}
  assert checks_of(old.file, {})[0].model is old
  with pytest.raises(UserError, match="called 'ade20k_r5'; the nearest is ade20k_r50"):
    checks_of('ade20k_r5', {})
  with pytest.raises(UserError, match='names a backbone'):
    checks_of('resnet50_v1c', {})


@pytest.fixture
def runner():
  """Stands in for the command eval: writes the report that it is told to, keeps the arguments."""

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


def report(measured, published, **changes):
  """What the command eval writes, but for what nothing here reads."""
  difference = round(measured - published, 2)
  compared = {'mIoU': published, 'difference': difference, 'agrees': abs(difference) <= 0.02}
  return {
    'mIoU': measured,
    'published': compared,
    'not_comparable': [],
    'peak_memory_gib': {'host': 1.5, 'device': None},
    'protocol': PRESENT.protocol.to_dict(),
    'images': 2000,
    'seconds': 8.0,
    'sha256': '5ae0aa33' + 56 * '0',
    'dataset': 'ade20k',
    'devices': '1 device (cpu) of 1 process',
    'platform': 'cpu',
    'decoder': 'OpenCV 5.0, JPEG by libjpeg-turbo 3.1',
    'versions': {'python': '3.11', 'jax': '0.10'},
    'date': '2026-11-26',
    'config_values': {'eval': {'precision': 'highest'}},
    'classes': {'wall': {'IoU': 50.0}, 'sky': {'IoU': 60.0}},
    'confusion': [[3, 1], [2, 4]],
    **changes,
  }


def test_table_of_what_agrees_differs_fails_and_is_missing(runner, tmp_path):
  checks = [Check(PRESENT, False, 40.75), Check(PRESENT, True, 42.05), Check(ABSENT, False, 42.90)]
  places = Places({PRESENT.sha256_prefix: tmp_path / 'x.pth'}, tmp_path / 'data')
  settings = ['--config.eval.shapes=3']

  def check():
    return check_all(checks, places, tmp_path / 'out', settings, run=runner, command='the command')

  runner.reports = {False: report(40.741, 40.75)}
  rows = check()
  assert [row['verdict'] for row in rows] == ['agrees', 'failed: error: no data', 'missing']
  assert rows[0]['measured'] == 40.74
  assert len(runner.calls) == 2
  config, *rest = runner.calls[0]
  assert config == '--config=ade20k_r50:512x512_80k'
  assert rest == [
    f'--checkpoint={tmp_path / "x.pth"}',
    f'--workdir={tmp_path / "out" / checks[0].name}',
    f'--config.data.source_dir={tmp_path / "data"}',
    '--config.eval.multi_scale_flip=False',
    '--config.eval.shapes=3',
  ]

  runner.reports[True] = report(42.00, 42.05)  # goes on: what was done is not done again
  rows = check()
  assert [row['verdict'] for row in rows] == ['agrees', 'differs', 'missing']
  assert len(runner.calls) == 3
  saved = json.loads((tmp_path / 'out/published.json').read_text())
  assert saved['rows'] == rows
  assert saved['command'] == 'the command'
  evidence = rows[0]['evidence']
  assert evidence['sha256'][:8] == '5ae0aa33'
  assert (evidence['label_pixels'], evidence['predicted_pixels']) == ([4, 6], [5, 5])
  assert rows[0]['command'].startswith('nonlocal-jax eval --config=ade20k_r50:512x512_80k --check')
  assert rows[0]['likely_causes'] == []
  text = (tmp_path / 'out/published.md').read_text()
  table = [line for line in text.splitlines() if line.startswith('|')]
  assert table[2:] == [
    '| nonlocal_r50-d8_512x512_80k_ade20k | single scale | 40.75 | 40.74 | -0.01 '
    '| v0, 2048x512, whole | 12 | 250 | 1.5 | agrees |',
    '| nonlocal_r50-d8_512x512_80k_ade20k | ms+flip | 42.05 | 42.00 | -0.05 '
    '| v0, 2048x512, whole | 12 | 250 | 1.5 | differs |',
    '| nonlocal_r101-d8_512x512_80k_ade20k | single scale | 42.90 |  |  |  |  |  |  | missing |',
  ]
  assert 'the likeliest first:\n\n1. The released weights were trained and tested with code' in text
  assert '- images: 2,000 of ade20k, decoded by OpenCV 5.0, JPEG by libjpeg-turbo 3.1' in text


def test_what_cannot_be_had_is_told_and_the_rest_goes_on(runner, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  released_path(PRESENT).parent.mkdir(parents=True)
  released_path(PRESENT).write_bytes(b'another file')  # of an earlier download
  monkeypatch.setattr(Places, 'source_of', lambda self, dataset: None)  # prepared before
  checks = [Check(PRESENT, False, 40.75), Check(ABSENT, False, 42.90)]
  places = Places({ABSENT.sha256_prefix: tmp_path / 'x.pth'})
  runner.reports = {False: report(42.90, 42.90)}
  rows = check_all(checks, places, tmp_path / 'out', [], run=runner, command='')
  assert [row['verdict'] for row in rows][1:] == ['agrees']
  assert 'delete it, and it is downloaded anew' in rows[0]['verdict']
  assert 'error: ' in capsys.readouterr().err
  assert not any(argument.startswith('--config.data.source_dir') for argument in runner.calls[0])
  offline = Places({}, may_download=True)
  released_path(PRESENT).unlink()
  rows = check_all(checks[:1], offline, tmp_path / 'none', [], run=runner, command='')
  assert (
    'failed: nonlocal_r50-d8_512x512_80k_ade20k_20200615_015801-5ae0aa33.pth cannot be'
    in (rows[0]['verdict'])
  )


def test_missing_images_are_told_once_before_weights_are_downloaded(
  runner, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  monkeypatch.setitem(sys.modules, 'cityscapesscripts', None)
  checks = checks_of('cityscapes_r50,cityscapes_r101', {})
  places = Places({}, data_dir=str(tmp_path / 'data'), may_download=True)
  rows = check_all(checks, places, tmp_path / 'out', [], run=runner, command='')
  for row in rows:
    assert row['verdict'].startswith('failed: Cityscapes can be downloaded with a login only')
  said = capsys.readouterr().err
  assert said.count('Register at') == 1
  assert 'Downloading' not in said
  lines = (tmp_path / 'out/published.md').read_text().splitlines()[2:]
  assert [line[0] + line[-1] for line in lines] == ['||'] * 4  # a line for each row

  found = {model.sha256_prefix: tmp_path for model in RELEASED}
  here = Places(found, data_dir=str(tmp_path / 'no'))
  (row,) = check_all(checks[:1], here, tmp_path / 'out', [], run=runner, command='')
  assert 'was not prepared' in row['verdict']
  assert row['verdict'].endswith('as source_dir. As a flag: --data=DIR, or --download.')
  assert runner.calls == []


def test_the_plan_tells_sizes_and_time(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  checks = [Check(PRESENT, False, 40.75), Check(ABSENT, False, 42.90)]
  devices = [{'kind': 'NVIDIA H100', 'platform': 'gpu', 'products_per_second': 25e12}]
  monkeypatch.setattr(published_plan, 'devices_of_subprocess', lambda _: (devices, ''))
  usage = types.SimpleNamespace(free=5e9)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  say_plan(checks, Places({}, may_download=True))
  said = capsys.readouterr().err
  assert said.startswith('2 scores of 2 models to measure.\n')
  assert f'To download, in {tmp_path / "home"}, where 5.0 GB are free:' in said
  assert f'{PRESENT.file}: about 200.7 MB' in said
  assert 'ade20k with its unpacked files: about 1.9 GB' in said
  # Two starts of a minute, and 45 and 62 s at half the rate of one product after the other.
  assert 'On 1 x NVIDIA H100 it takes about 4 min: reckoned from the speed of matrix' in said
  assert said.endswith(
    'no evaluation was timed on a GPU yet, so it may take half or twice as long.\n'
  )
  say_plan(checks, Places({}))
  assert 'To download' not in capsys.readouterr().err
  # Reading 2 x 2000 images takes longer than the network does in TF32.
  devices[0]['products_per_second'] = 180e12
  say_plan(checks, Places({}), precision='default')
  assert 'it takes about 3 min' in capsys.readouterr().err
  devices[0] |= {'kind': 'cpu', 'platform': 'cpu', 'products_per_second': 1e11}
  say_plan(checks, Places({}))
  assert 'it takes about 3 h 7 min' in capsys.readouterr().err


def test_the_estimate_is_that_of_figures_measured_on_an_h100():
  """Times of whole predictions in benchmarks/, and the speed of matrix products of that GPU."""
  path = Path(__file__).parents[1] / 'benchmarks/nvidia_h100_80gb_hbm3.json'
  measured = {
    entry['label']: entry['seconds']
    for entry in json.loads(path.read_text())
    if entry['section'] == 'inference' and entry['side'] == 'first'
  }
  check = Check(released_model('nonlocal_r50-d8_512x1024_80k_cityscapes'), False, 0.0)
  seconds = check.multiplications / check.images
  for label, products, is_float32 in (('highest', 49e12 / 2, True), ('default', 360e12 / 2, False)):
    reckoned = seconds / (products * published_plan._EFFICIENCY['gpu', is_float32])
    assert 1 / 2 < reckoned / measured[f'1024x2048, {label}'] < 2


def test_the_rate_is_measured(capsys):
  published_plan.print_rate('highest')
  devices = json.loads(capsys.readouterr().out)
  assert {device['platform'] for device in devices} == {'cpu'}
  assert all(device['products_per_second'] > 1e8 for device in devices)


def test_the_work_of_several_scales_and_windows():
  """Against counts of patches in MMSegmentation: 62 windows over six scales, twice for flips."""
  model = released_model('nonlocal_r50-d8_769x769_80k_cityscapes')
  single, several = (Check(model, flag, 0.0).multiplications for flag in (False, True))
  assert several / single == pytest.approx(2 * 62 / 8)
  whole = released_model('nonlocal_r50-d8_512x512_80k_ade20k')
  ratio = Check(whole, True, 0.0).multiplications / Check(whole, False, 0.0).multiplications
  assert 17 < ratio < 20  # more than the area, for the pairs of positions


def test_durations():
  assert [as_duration(seconds) for seconds in (3, 59.6, 3599, 7260)] == [
    '3 s',
    '1 min',
    '1 h 0 min',
    '2 h 1 min',
  ]


@pytest.mark.parametrize(
  ('changes', 'sentences'),
  [
    ({}, ['code of before the first public version']),
    (
      {'not_comparable': ['1999 images were tested, not 2000']},
      ['The test differs from the published one: 1999 images were tested, not 2000.'],
    ),
    ({'confusion': [[0, 3], [1, 1]]}, ['Most predictions are one class after the label']),
    ({'confusion': [[9, 0], [5, 0]]}, ['100% of the pixels are predicted as wall']),
    ({'confusion': [[5, 4], [0, 0]]}, ['1 of 2 classes are in no label map, such as sky']),
    (
      {'platform': 'gpu', 'config_values': {'eval': {'precision': 'default'}}},
      ['Matrix products had precision default'],
    ),
  ],
)
def test_likely_causes_begin_with_what_the_report_shows(changes, sentences):
  causes = likely_causes(report(40.70, 40.75, **changes), -0.05)
  for cause, sentence in zip(causes, sentences, strict=False):
    assert sentence in cause
  assert any('JPEG files were decoded by OpenCV 5.0' in cause for cause in causes)


def test_likely_causes_fit_the_size_of_the_difference():
  large = likely_causes(report(3.0, 40.75), -37.75)
  assert "not the authors'" in large[0]
  small = likely_causes(report(40.76, 40.75), 0.01)
  assert small[0].startswith('Sums in another order')
  assert set(large) == set(small)
  slide = {**PRESENT.protocol.to_dict(), 'window_crop': [769, 769], 'flip': True}
  assert 'do not pad them' in likely_causes(report(80.5, 80.68, protocol=slide), -0.18)[0]


@pytest.mark.parametrize(
  ('verdict', 'status', 'sentence'),
  [
    ('agrees', None, ''),
    ('differs', 1, 'error: 1 of 1 published numbers were not reproduced.'),
    ('missing', 1, 'are not here: give their folder as --checkpoints, or --download.'),
  ],
)
def test_exit_status(verdict, status, sentence, script, tmp_path, monkeypatch, capsys):
  row = {'model': 'm', 'mode': 'single scale', 'published': 1.0, 'difference': None}
  row |= {'seconds': None, 'peak_gib': None, 'verdict': verdict, 'protocol': ''}
  row |= {'images_per_second': None}
  row['measured'] = None if verdict == 'missing' else 1.0
  monkeypatch.setattr(check_published, 'check_all', lambda *_, **__: [row])
  monkeypatch.setattr(check_published, 'say_plan', lambda *_, **__: None)
  folder = f'={tmp_path}'
  found = script(check_published, f'--checkpoints{folder}', f'--data{folder}', f'--out{folder}')
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


@pytest.mark.parametrize(
  ('arguments', 'status', 'message'),
  [
    (['--config.nonsense=3'], 1, 'there is no field config.nonsense'),
    (['x'], 2, "'x' is no flag"),
    (['--config.eval.precision=3'], 1, 'config.eval.precision is 3; it must be'),
    (['--config.eval.multi_scale_flip=True'], 2, 'is set by --multi-scale-flip: give that'),
    (['--config.data.source_dir=DIR'], 2, 'is set by --data: give that'),
    (['--username=me'], 2, '--username is a login for Cityscapes, which no model'),
    (['--out=file'], 1, 'Folder file cannot be made: File exists'),
  ],
)
def test_wrong_options_are_told_before_anything_is_downloaded(
  arguments, status, message, script, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  Path('file').touch()
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  found = script(check_published, '--models=ade20k_r50', '--download', *arguments)
  assert found[0] == status
  assert message in found[1]
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_weights_that_are_named_and_not_here(script, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(check_published, 'say_plan', lambda *_, **__: pytest.fail('there is no plan'))
  status, said = script(check_published, '--models=ade20k_r50', f'--out={tmp_path / "out"}')
  assert status == 1
  assert said.startswith('error: The weights of 1 of 1 published numbers are not here: give their')


def test_one_run_at_a_time_in_a_folder(script, tmp_path):
  with used_alone(tmp_path, 'taken'):
    status, said = script(check_published, '--models=ade20k_r50', f'--out={tmp_path}')
  assert status == 1
  assert 'is in use by another run; wait for its end, or give another --out.' in said


def test_wrong_arguments_are_refused(script, tmp_path):
  found = script(check_published, '--checkpoints=nowhere', f'--data={tmp_path}')
  assert found == (
    1,
    'error: There is no folder nowhere: give the one with the released .pth files.',
  )
  found = script(check_published, f'--checkpoints={tmp_path}', '--data=nowhere')
  assert found[1].startswith('error: There is no folder nowhere: give the one with cityscapes')
  status, said = script(check_published, '--checkpoints=x', '--data=y', '--ouf=z')
  assert (status, said[:53]) == (2, 'error: there is no option --ouf; the nearest is --out')
