"""How the commands read options and how they end: one sentence instead of a traceback."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging

from nonlocal_jax.errors import STOPPED_STATUS, RunStopped, UsageError, UserError, nearest
from nonlocal_jax.runtime.compilation import trim_memory_after_compiling, use_compilation_cache

# What only the extra `train` installs, by the names under which it is imported.
TRAIN_PACKAGES = frozenset(
  ('array_record', 'clu', 'grain', 'matplotlib', 'tensorboardX', 'tensorflow_datasets')
)


def run_program(program: Callable[[], object]) -> None:
  """Runs a program from the command line.

  What the user can fix is one line on stderr and exit status 1, or 2 if the command line names a
  command or an option that does not exist. Interrupted programs clean up and exit with 130 (SIGINT)
  or 143 (SIGTERM), training runs that saved where they stand with `errors.STOPPED_STATUS`. Compiled
  programs are kept for the next start.

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
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
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


class Parser(argparse.ArgumentParser):
  """The options of a command, whose errors are a `UsageError` of one sentence."""

  def __init__(self, program: str, description: str | None, **options: Any):
    """A parser without options but --help.

    Args:
      program: How the program is called, as in 'nonlocal-jax train'.
      description: What --help shows first: what the command does, and an example.
      **options: See `argparse.ArgumentParser`.
    """
    super().__init__(
      prog=program,
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **options,
    )

  def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
    """Parses options of this command alone."""
    self._refuse_unknown(arguments)
    return self.parse_args(arguments)

  def parse_with_config(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options of this command, and returns the rest for `config.read_config`."""
    self._refuse_unknown(arguments, but='--config.')
    return self.parse_known_args(arguments)

  def _refuse_unknown(self, arguments: Sequence[str], but: str | None = None) -> None:
    """Names an option that does not exist before one is missed that does."""
    known = self._option_string_actions
    for argument in arguments:
      option = argument.partition('=')[0]
      if option == '--':
        return
      if option.startswith('--') and option not in known and not (but and option.startswith(but)):
        likely = nearest(option, known)
        raise UsageError(
          f'there is no option {option}; the nearest is {likely}, see {self.prog} -h.'
        )

  def print_help(self, file=None):
    """Prints the help and exits."""
    print_and_exit(self.format_help().rstrip())

  def error(self, message: str) -> NoReturn:
    """Raises `UsageError`."""
    raise UsageError(f'{message}; see {self.prog} --help.')


@contextlib.contextmanager
def needs_extra(command: str) -> Iterator[None]:
  """Turns a missing package of the extra `train` into a `UserError` with the remedy.

  Args:
    command: The command's name, as in 'nonlocal-jax COMMAND'.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    if package not in TRAIN_PACKAGES:
      raise
    raise UserError(
      f'nonlocal-jax {command} needs the package {package}, which the core installation leaves '
      "out: pip install 'nonlocal-jax[train]'."
    ) from error


def print_and_exit(text: str) -> NoReturn:
  """Prints text and exits, quietly if nobody reads it to its end, as with `| head`."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit()


def child_environment() -> dict[str, str]:
  """The environment of a process that runs a module of this package, installed or not."""
  paths = [str(Path(__file__).resolve().parents[2]), os.environ.get('PYTHONPATH')]
  return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}


def program_name() -> str:
  """How this program can be started again: 'nonlocal-jax', or with `python -m` if not installed."""
  return 'nonlocal-jax' if Path(sys.argv[0]).name == 'nonlocal-jax' else 'python -m nonlocal_jax'
