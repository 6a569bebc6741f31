"""The program `nonlocal-jax`: help, configs by name, and what the core installation leaves out."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nonlocal_jax
from nonlocal_jax import recipes
from nonlocal_jax.cli import main
from nonlocal_jax.cli.config import config_text, read_config
from nonlocal_jax.cli.main import COMMANDS
from nonlocal_jax.cli.program import (
  DEMO_PACKAGES,
  EXPORT_PACKAGES,
  TRAIN_PACKAGES,
  Parser,
  run_program,
)
from nonlocal_jax.errors import UserError
from tests.conftest import run_in_process

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> tuple[object, str]:
  return run_in_process(lambda: run_program(lambda: main.run(arguments)))


def run_elsewhere(folder: Path, *arguments: str, program: str = '') -> subprocess.CompletedProcess:
  """Runs `python -m nonlocal_jax` in another folder, after a line of Python."""
  code = f'{program}\nfrom nonlocal_jax.cli.main import main\nmain({list(arguments)})'
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  return subprocess.run(
    [sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True
  )


_PACKAGES = sorted(TRAIN_PACKAGES | EXPORT_PACKAGES | DEMO_PACKAGES)
WITHOUT_EXTRAS = f'import sys; sys.modules.update(dict.fromkeys({_PACKAGES}))'


def test_module_and_version(tmp_path):
  result = subprocess.run(
    [sys.executable, '-m', 'nonlocal_jax', '--version'],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout == f'nonlocal-jax {nonlocal_jax.__version__}\n'


def test_help_names_each_command(capsys):
  assert run('--help')[0] is None
  printed = capsys.readouterr().out
  for command in COMMANDS:
    assert re.search(rf'^  {command} +[A-Z].*\.$', printed, re.MULTILINE), command
  assert run() == (None, '')
  assert capsys.readouterr().out == printed


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example(command, capsys):
  assert run(command, '--help')[0] is None
  printed = capsys.readouterr().out
  assert printed.startswith(f'usage: nonlocal-jax {command} ')
  assert re.search(
    rf'^    nonlocal-jax {command} .*--?\w|^    nonlocal-jax {command} ', printed, re.MULTILINE
  )


@pytest.mark.parametrize('command', COMMANDS)
def test_every_argument_has_a_help_text(command, monkeypatch):
  parsers = []
  monkeypatch.setattr(Parser, 'format_help', lambda parser: parsers.append(parser) or '')
  run(command, '--help')
  (parser,) = parsers
  assert all(len(action.help or '') > 3 for action in parser._actions), parser._actions


def test_help_lists_the_fields_of_the_config(capsys):
  for command in ('train', 'eval'):
    assert run(command, '--help')[0] is None
    printed = capsys.readouterr().out
    assert 'depth: 50  # layers of the backbone: 14, 26, 50 or 101' in printed
    assert "# How convolutions are computed on CPUs: 'fast', or" in printed


def test_print_config_resolves_names_and_settings(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  arguments = ('--config.train.steps=7', '--print-config')
  assert run('train', '--config=ade20k_r101:512x512_80k', *arguments)[0] is None
  by_name = capsys.readouterr().out
  path = f'--config={ROOT}/configs/ade20k_r101.py:512x512_80k'
  assert run('train', path, *arguments)[0] is None
  assert capsys.readouterr().out == by_name
  assert '  steps: 7\n' in by_name
  assert "name: 'nonlocal_r101-d8_512x512_80k_ade20k'" in by_name
  assert not list(tmp_path.iterdir())


def test_the_printed_config_has_every_field_and_comment():
  text = config_text(recipes.base_config())
  names = [line.split(':')[0].strip() for line in text.splitlines() if '#' not in line[:5]]
  config = recipes.base_config()
  for name, value in config.items():
    assert name in names
    for field in value if hasattr(value, 'keys') else ():
      assert field in names
  source = Path(recipes.__file__).read_text()
  body = source[source.index('def base_config') : source.index('def demo_config')]
  comments = re.findall(r'# (.*)', body)
  assert len(comments) > 40
  assert [comment for comment in comments if comment not in text] == []


@pytest.mark.parametrize('name', recipes.config_names())
def test_configs_by_name_are_the_files(name):
  by_file = read_config([f'--config={ROOT}/configs/{name}.py'])
  assert read_config([f'--config={name}']) == by_file


def test_a_file_without_a_suffix_goes_before_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  source = 'from configs.common import base_config\ndef get_config():\n  c = base_config()\n'
  Path('demo').write_text(f"{source}  c.name = 'mine'\n  return c\n")
  assert read_config(['--config', 'demo']).name == 'mine'
  with pytest.raises(UserError, match=r"no config 'dem'; the nearest is demo, of ade20k_r101, "):
    read_config(['--config=dem'])


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['trian'], "there is no command 'trian'; the nearest is train, see nonlocal-jax --help."),
    (
      ['predict', '--chekpoint=x'],
      'there is no option --chekpoint; the nearest is --checkpoint, see',
    ),
    (['trainn', '--x'], "there is no command 'trainn'; the nearest is train, see"),
    (['segment'], "there is no command 'segment'; see nonlocal-jax --help."),
    (
      ['train', '--steps=5'],
      'there is no option --steps; the nearest is --config.train.steps, see nonlocal-jax train -h.',
    ),
    (
      ['train', '--learning-rate', '1'],
      'there is no option --learning-rate; the nearest is --config.',
    ),
    (
      ['eval', '--batch_size=5'],
      'there is no option --batch_size; the nearest is --config.eval.batch_size or --config.',
    ),
    (['eval', '--dist'], 'there is no option --dist; the nearest is --distributed, see'),
    (['predict', '--steps=5'], 'there is no option --steps; see nonlocal-jax predict -h.'),
    (['predict', 'a.jpg'], 'the following arguments are required: --checkpoint, --out; see'),
    (['convert', 'a', 'b', 'c'], 'unrecognized arguments: c; see nonlocal-jax convert --help'),
  ],
)
def test_unknown_commands_and_options_are_a_sentence(arguments, sentence):
  status, said = run(*arguments)
  assert status == 2
  assert said.startswith(f'error: {sentence}')


def test_the_core_says_what_training_needs(tmp_path):
  for command in ('train', 'prepare', 'browse'):
    options = {
      'train': [],
      'prepare': ['--dataset=custom', f'--source={tmp_path}'],
      'browse': ['--config=demo', '--out=out'],
    }
    result = run_elsewhere(tmp_path, command, *options[command], program=WITHOUT_EXTRAS)
    assert result.returncode == 1
    assert re.fullmatch(
      rf'error: nonlocal-jax {command} needs the package \w+, which the core installation leaves '
      r"out; in a clone, run: pip install '\.\[train\]'\.\n",
      result.stderr,
    ), result.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_names_its_extra(tmp_path):
  result = run_elsewhere(tmp_path, 'demo', '--checkpoint=any', program=WITHOUT_EXTRAS)
  assert result.returncode == 1
  assert result.stderr == (
    'error: web pages need the package starlette, which the core installation leaves out; in a '
    "clone, run: pip install '.[demo]'.\n"
  )


def test_the_core_predicts_and_converts(tmp_path, peer_checkpoint, photos):
  converted = run_elsewhere(
    tmp_path, 'convert', str(peer_checkpoint), 'converted', program=WITHOUT_EXTRAS
  )
  assert converted.returncode == 0, converted.stderr
  predicted = run_elsewhere(
    tmp_path,
    *('predict', '--checkpoint=converted', f'{photos}/images/val/0.png', '--out=out'),
    program=WITHOUT_EXTRAS,
  )
  assert predicted.returncode == 0, predicted.stderr
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {'0.png', '0_overlay.jpg'}


def test_packages_of_the_extras_are_known_by_their_imports():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  names = {re.match(r'[\w-]+', line)[0] for line in (*extras['train'], *extras['plot'])}
  assert {name.replace('-', '_') for name in names - {'nonlocal-jax'}} == TRAIN_PACKAGES
  exports = {re.match(r'[\w-]+', line)[0] for line in extras['export']}
  assert exports == EXPORT_PACKAGES
  assert {re.match(r'[\w-]+', line)[0] for line in extras['demo']} == DEMO_PACKAGES
