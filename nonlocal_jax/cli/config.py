"""Reads a config from the command line: `--config=NAME` or a file, and `--config.FIELD=VALUE`."""

import contextlib
import inspect
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from nonlocal_jax import recipes
from nonlocal_jax.errors import UsageError, UserError

Config = ConfigDict  # for the annotations of the commands, which do not import ml_collections

# A name such as ade20k_r101 or ade20k_r101:512x512_80k, and not a path.
_NAME = re.compile(r'(?P<name>[A-Za-z0-9_-]+)(:.*)?')

# What a value must be, by the beginning of absl's message on one that is not.
_KINDS = {
  'invalid literal for int': 'a whole number',
  'could not convert string to float': 'a number',
  r"\('Non-boolean": 'True or False',
}


def read_config(arguments: Sequence[str]) -> ConfigDict:
  """Reads a config and applies the fields that the command line sets.

  Args:
    arguments: `--config=NAME[:VARIANT]` with a name of `recipes.config_names`, or `--config=FILE`,
      and any number of `--config.FIELD=VALUE`.

  Returns:
    The config.

  Raises:
    UserError: If there is no such config, no such field, or a value has the wrong type.
  """
  named, rest = _split_config(arguments)
  if named is None:
    raise UserError(
      f'--config is missing; give one of {", ".join(recipes.config_names())}, or a file.'
    )
  match = _NAME.fullmatch(named)
  named = os.path.expanduser(named)
  path, file = named, named.partition(':')[0]
  if not match and not Path(file).is_file():
    raise UserError(
      f'there is no config file {file}; give a file, or one of {", ".join(recipes.config_names())}.'
    )
  if match and not Path(match['name']).is_file():
    recipes.get_config(named)  # raises if the name or variant is unknown
    path = f'{recipes.__file__}:{named}'
  _check_fields(fields_set(rest))
  values = flags.FlagValues()
  arguments = [f'--config={path}', *rest]
  config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=['', *arguments])
  with _config_errors(named), _errors_in_file(path):
    _, *positional = values(['', *arguments])
    if positional:
      raise UsageError(f'{positional[0]!r} is no flag; options start with --, see --help.')
    found = config.value
    try:
      _ = found.name  # raises an OSError where the file could not be loaded
    except AttributeError as error:
      raise UserError(
        f'get_config() in {named} returns no config; begin with that of a file in configs/.'
      ) from error
    return found


def _check_fields(names: Iterable[str]) -> None:
  """Checks that the command line sets fields that exist."""
  known = recipes.fields_of(recipes.base_config())
  for name in sorted(names):
    inner = next((field for field in known if field.startswith(f'{name}.')), None)
    if inner:
      raise UserError(f'config.{name} is a section; set its fields, such as config.{inner}.')
    if name.partition('[')[0] not in known and not name.startswith('published.'):
      raise recipes.no_such_field(name)


def fields_set(arguments: Sequence[str]) -> frozenset[str]:
  """Names of the config's fields that a command line sets.

  >>> sorted(fields_set(['--config=demo', '--config.eval.scale=(96,96)', '--config.seed', '3']))
  ['eval.scale', 'seed']
  """
  matches = (re.match(r'--?(?:no)?config\.([^=]+)', argument) for argument in arguments)
  return frozenset(match[1] for match in matches if match)


def _split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
  """Splits off the value of --config, the last one if there are several."""
  named, rest = None, []
  given = iter(arguments)
  for argument in given:
    if argument == '--config':
      named = next(given, None)
    elif argument.startswith('--config='):
      named = argument.removeprefix('--config=')
    else:
      rest.append(argument)
  return named, _with_tuples(rest)


def _with_tuples(arguments: Sequence[str]) -> list[str]:
  """Spells out the word that a field of numbers may have as its value."""
  flag = r'--?config\.train\.class_weights'
  return [
    re.sub(rf'^({flag}=)balanced$', rf'\g<1>{recipes.BALANCED}', argument)
    if before is None or argument != 'balanced' or not re.fullmatch(flag, before)
    else str(recipes.BALANCED)
    for before, argument in zip((None, *arguments), arguments, strict=False)
  ]


@contextlib.contextmanager
def _config_errors(named: str) -> Iterator[None]:
  """Converts errors from reading a config to `UserError`."""
  try:
    yield
  except OSError as error:
    raise UserError(f'config file {named} cannot be read: {error.strerror}.') from error
  except flags.UnrecognizedFlagError as error:
    raise UsageError(' '.join(str(error).split())) from error
  except (AttributeError, KeyError) as error:
    message = str(error).replace('\\n', '. ').replace('\\', '').replace("'", '')  # quoted twice
    raise UserError(f'the config has no such field: {message}') from error
  except (TypeError, ValueError, flags.Error) as error:
    text = ' '.join(str(error).split())
    for sign, kind in _KINDS.items():
      if wrong := re.match(rf'flag --(config\.[^=]+)=(.*?): {sign}', text):
        raise UserError(f'{wrong[1]} is {wrong[2]!r}; it must be {kind}.') from error
    raise UserError(text) from error


@contextlib.contextmanager
def _errors_in_file(path: str) -> Iterator[None]:
  """Converts errors that code in a config file raises to `UserError`, with their place."""
  file = os.path.abspath(path.partition(':')[0])
  try:
    yield
  except (UserError, OSError):
    raise
  except Exception as error:
    if file == os.path.abspath(recipes.__file__):
      raise
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == file]
    what = f'{type(error).__name__}: {" ".join(str(error).split())}'
    if isinstance(error, SyntaxError):
      lines, what = [error.lineno], f'SyntaxError: {error.msg}'
    if lines:
      raise UserError(f'{file} fails in line {lines[-1]}: {what}.') from error
    if isinstance(error, AttributeError) and error.name == 'get_config':
      raise UserError(f'{file} has no get_config(); begin with a file in configs/.') from error
    raise


def config_text(config: ConfigDict) -> str:
  """Formats a config like YAML, with the comments on its fields in recipes.py."""
  order, above, beside = _comments()
  lines = []

  def add(section: ConfigDict, prefix: str, indent: str) -> None:
    for name, value in sorted(section.items(), key=lambda item: order.get(prefix + item[0], 1000)):
      key = f'{prefix}{name}'
      lines.extend(f'{indent}# {comment}' for comment in above.get(key, ()))
      if isinstance(value, ConfigDict):
        lines.append(f'{indent}{name}:')
        add(value, f'{key}.', f'{indent}  ')
      else:
        comment = f'  # {beside[key]}' if key in beside else ''
        lines.append(f'{indent}{name}: {value!r}{comment}')

  add(config, '', '')
  return '\n'.join(lines)


def _comments() -> tuple[dict[str, int], dict[str, list[str]], dict[str, str]]:
  """Parses `recipes.base_config`.

  Returns:
    For each field the line number, the comment lines above it, and the comment beside it.
  """
  order: dict[str, int] = {}
  above: dict[str, list[str]] = {}
  beside: dict[str, str] = {}
  pending: list[str] = []
  for number, line in enumerate(inspect.getsource(recipes.base_config).splitlines()):
    stripped = line.strip()
    if stripped.startswith('# '):
      pending.append(stripped.removeprefix('# '))
      continue
    if field := re.match(r'config\.([a-z_.]+) = [^#]*(?:#\s*(.*))?$', stripped):
      order[field[1]] = number
      if pending:
        above[field[1]] = pending
      if field[2]:
        beside[field[1]] = field[2]
    pending = []
  return order, above, beside
