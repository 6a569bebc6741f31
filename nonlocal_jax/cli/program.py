"""How the programs read configs, and how they end: one line instead of a traceback."""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import absl.logging
from absl import flags
from ml_collections import ConfigDict, config_flags

from nonlocal_jax.errors import STOPPED_STATUS, RunStopped, UserError
from nonlocal_jax.runtime.compilation import trim_memory_after_compiling, use_compilation_cache


def run_program(program: Callable[[], object]) -> None:
  """Runs a program from the command line.

  What the user can mend is one line on stderr and exit status 1; interrupted programs clean up and
  exit with 130 (SIGINT) or 143 (SIGTERM), training runs that saved where they stand with
  `errors.STOPPED_STATUS`. Compiled programs are kept for the next start.

  Args:
    program: The program.

  Raises:
    SystemExit: If it does not come to its own end.
  """
  # What libraries say on their way to an error is not for the user.
  absl.logging.set_verbosity(absl.logging.ERROR)
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  use_compilation_cache()
  trim_memory_after_compiling()
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    program()
  except UserError as error:
    sys.exit(f'error: {error}')
  except RunStopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(STOPPED_STATUS)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)
  finally:
    signal.signal(signal.SIGTERM, before)


def read_config(arguments: Sequence[str]) -> ConfigDict:
  """Reads a config file, and what the command line says in place of its values.

  Args:
    arguments: `--config=FILE` and any number of `--config.FIELD=VALUE`.

  Returns:
    The config.

  Raises:
    UserError: If there is no such file, no such field, or a value is of a wrong type.
  """
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file('config', flag_values=values)
  with config_errors(values):
    values(['', *arguments])
    if config.value is None:
      raise UserError('--config=FILE is missing; configs/ holds those to choose from.')
    _ = config.value.name  # raises where the file could not be loaded
    return config.value


@contextlib.contextmanager
def config_errors(values: flags.FlagValues) -> Iterator[None]:
  """Turns what is raised where a flag 'config' is read into a `UserError`.

  Args:
    values: The flags.

  Raises:
    UserError: If there is no such file, no such field, or a value is of a wrong type.
  """
  try:
    yield
  except OSError as error:
    named = values['config']
    # Where the name ends in no .py, even the flag is not read.
    what = f' {config_flags.get_config_filename(named)}' if named.present else ' of that name'
    raise UserError(
      f'there is no config file{what}; configs/ holds those to choose from, as '
      '--config=configs/NAME.py.'
    ) from error
  except (AttributeError, KeyError) as error:
    said = str(error).replace('\\n', '. ').replace('\\', '').replace("'", '')  # quoted twice
    raise UserError(f'the config has no such field: {said}') from error
  except (TypeError, ValueError, flags.Error) as error:
    raise UserError(' '.join(str(error).split())) from error
