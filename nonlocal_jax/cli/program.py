"""Option parsing and error handling that all commands share."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging

from nonlocal_jax.cli.limits import check_limits
from nonlocal_jax.cli.streams import keep_streams_open, output_error
from nonlocal_jax.errors import STOPPED_STATUS, RunStopped, UsageError, UserError, nearest
from nonlocal_jax.runtime.compilation import trim_memory_after_compiling, use_compilation_cache
from nonlocal_jax.runtime.files import given_path
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.runtime.signals import LeaveOnSignals
from nonlocal_jax.weights.loading import NOTES
from nonlocal_jax.weights.run_checkpoints import chosen_weights

# Import names of the packages that only extras install; `train` has those of `plot`.
PLOT_PACKAGES = frozenset(('matplotlib',))
TRAIN_PACKAGES = frozenset(
  (
    'array_record',
    'clu',
    'grain',
    'matplotlib',
    'pycocotools',
    'tensorboardX',
    'tensorflow_datasets',
  )
)

EXPORT_PACKAGES = frozenset(('onnx', 'onnxruntime', 'safetensors'))
DEMO_PACKAGES = frozenset(('starlette', 'uvicorn'))


def run_program(program: Callable[[], object]) -> None:
  """Runs the main function of a program and converts its errors to exit statuses.

  A `UserError` is printed to stderr without a traceback and exits with 1, a `UsageError` with 2. A
  program that gets SIGINT or SIGTERM leaves at once with 130 or 143, see `LeaveOnSignals`, a
  training run that saves a checkpoint before with `errors.STOPPED_STATUS`. Turns on the compilation
  cache. A closed standard output or error ends no program.

  Args:
    program: The main function.

  Raises:
    SystemExit: If the program fails or is interrupted.
  """
  # An error is reported once, below. Libraries would log it as well.
  absl.logging.set_verbosity(absl.logging.ERROR)
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  _print_notes()
  keep_streams_open()
  use_compilation_cache()
  trim_memory_after_compiling()
  with LeaveOnSignals():
    try:
      check_limits()
      program()
      _check_output()
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


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are `UsageError`s of one sentence."""

  def __init__(self, program: str, description: str | None, **options: Any):
    """Creates a parser whose only option is --help.

    Args:
      program: The program's name in messages, such as 'nonlocal-jax train'.
      description: The text at the top of --help: what the command does, and an example.
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
    """Parses the options of a command without a config."""
    self._refuse_unknown(arguments)
    return self.parse_args(arguments)

  def parse_with_config(
    self, arguments: Sequence[str], fields: Sequence[str]
  ) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options of a command; returns the remaining arguments for `read_config`.

    Args:
      arguments: The command line.
      fields: Names of the config's fields, which errors may suggest.
    """
    self._refuse_unknown(arguments, fields=fields, but=('--config.', '--noconfig.'))
    return self.parse_known_args(arguments)

  def _refuse_unknown(
    self, arguments: Sequence[str], fields: Sequence[str] = (), but: tuple[str, ...] = ()
  ) -> None:
    """Raises for unknown options, which argparse would report after missing ones."""
    known = self._option_string_actions
    for argument in arguments:
      option = argument.partition('=')[0]
      if option == '--':
        return
      if option.startswith('--') and option not in known and not option.startswith(but or '='):
        likely = _likely(option, known, fields)
        raise UsageError(
          f'there is no option {option};{f" the nearest is {likely}," if likely else ""} see '
          f'{self.prog} -h.'
        )

  def print_help(self, file=None):
    """Prints the help and exits."""
    print_and_exit(self.format_help().rstrip())

  def error(self, message: str) -> NoReturn:
    """Raises `UsageError`."""
    raise UsageError(f'{message}; see {self.prog} --help.')


def _likely(option: str, known: Iterable[str], fields: Sequence[str]) -> str | None:
  """The option or fields of the config that are probably meant by an unknown option."""
  meant: dict[str, list[str]] = {}
  for name in known:
    if name.startswith('--'):
      meant[name[2:].replace('-', '_')] = [name]
  for field in fields:
    for name in {field, field.rpartition('.')[2]}:
      meant.setdefault(name, []).append(f'--config.{field}')
  likely = nearest(option[2:].replace('-', '_'), meant)
  return ' or '.join(meant[likely]) if likely else None


@contextlib.contextmanager
def needs_extra(command: str) -> Iterator[None]:
  """Converts a missing package of the extra `train` to a `UserError` that says what to install.

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
      f'nonlocal-jax {command} needs the package {package}, which the core installation '
      "leaves out; in a clone, run: pip install '.[train]'."
    ) from error


def print_and_exit(text: str) -> NoReturn:
  """Prints text and exits."""
  print(text, flush=True)
  _check_output()
  sys.exit()


def _check_output() -> None:
  """Exits with status 1 if some of the output was lost, e.g. on a full disk."""
  if error := output_error():
    sys.exit(f'error: the output cannot be written: {error.strerror}.')


def _print_notes() -> None:
  """Prints notes on weights to stderr, from the first of several processes."""

  class Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      if is_first_process():
        print(f'Note on {record.getMessage()}', file=sys.stderr)

  NOTES.handlers = [Printer()]
  NOTES.propagate = False


def say_weights(path: Path) -> None:
  """Says on stderr which weights of a workdir are taken."""
  if is_first_process() and (sentence := chosen_weights(path)):
    print(sentence, file=sys.stderr)


def path_option(text: str) -> Path:
  """Converts the path of an option, see `given_path`; '' is none, as of an unset variable."""
  if not text:
    raise argparse.ArgumentTypeError('the path is empty')
  return given_path(text)


def add_ema(parser: argparse.ArgumentParser) -> None:
  """Adds the option --ema."""
  parser.add_argument(
    '--ema',
    action='store_true',
    help='take the exponential moving average that MMSegmentation 0.x saved beside the weights of '
    'a .pth file (ema_*)',
  )


def add_align_corners(parser: argparse.ArgumentParser) -> None:
  """Adds the option --align-corners, and --no-align-corners."""
  parser.add_argument(
    '--align-corners',
    action=argparse.BooleanOptionalAction,
    help='corner convention, for files that do not record it',
  )


def add_scale(parser: argparse.ArgumentParser) -> None:
  """Adds the option --scale."""
  parser.add_argument(
    '--scale',
    nargs=2,
    type=_side,
    metavar=('WIDTH', 'HEIGHT'),
    help='box that images are resized into; default: that of the checkpoint',
  )


def _side(text: str) -> int:
  if not (text.isascii() and text.isdigit() and int(text) > 0):
    raise UserError(f'--scale has {text}; give width and height in pixels, e.g. --scale 2048 512.')
  return int(text)


def child_environment() -> dict[str, str]:
  """Returns an environment in which a subprocess can import this package, installed or not."""
  paths = [str(Path(__file__).resolve().parents[2]), os.environ.get('PYTHONPATH')]
  return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}


def program_name() -> str:
  """Returns the command that starts this program: 'nonlocal-jax' or 'python -m nonlocal_jax'."""
  return 'nonlocal-jax' if Path(sys.argv[0]).name == 'nonlocal-jax' else 'python -m nonlocal_jax'
