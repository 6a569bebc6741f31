"""The entry point of `nonlocal-jax`: dispatches to a command."""

import importlib
import sys
from collections.abc import Mapping, Sequence

import nonlocal_jax
from nonlocal_jax.errors import UsageError, nearest
from nonlocal_jax.runtime.signals import LeaveOnSignals

_EXAMPLES = """\
Non-local segmentation networks: train, evaluate, predict, convert.

  nonlocal-jax train                                      # a demo that makes its own images
  nonlocal-jax train --config=ade20k_r101 --config.data.source_dir=DIR
  nonlocal-jax predict --checkpoint=WEIGHTS photos --out=predicted"""

# The module in this package and the line in `nonlocal-jax --help`.
COMMANDS: Mapping[str, tuple[str, str]] = {
  'train': ('train', 'Train a network, or resume where a run was stopped.'),
  'eval': ('evaluate', 'Evaluate weights on the val images of a dataset.'),
  'report': ('report', 'Write the report of an evaluation again, or compare two evaluations.'),
  'predict': ('predict', 'Segment images and videos: write label maps and overlays.'),
  'attention': ('attention', 'Draw where pixels look, over an image.'),
  'convert': ('convert', 'Convert .pth checkpoints, and weights trained here to .pth files.'),
  'demo': ('demo', 'Serve a page that segments images and shows where pixels look.'),
  'export': ('export', 'Write a network to files that run elsewhere: ONNX, JAX, a web page.'),
  'prepare': ('prepare', 'Check a dataset and pack it into ArrayRecord files.'),
  'browse': ('browse', 'Draw augmented training samples and count the pixels of each class.'),
  'check-published': ('check_published', 'Reproduce the published scores of released checkpoints.'),
  'models': ('models', 'List the released models and backbones, or download some.'),
  'benchmark': ('benchmark', 'Measure speed and memory on this machine.'),
  'doctor': ('doctor', 'Check the installation: versions, devices, and what is missing.'),
}


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs `nonlocal-jax`.

  Args:
    arguments: The command line without the program's name; None for that of this process.

  Raises:
    SystemExit: If the command fails, see `run_program`.
  """
  given = sys.argv[1:] if arguments is None else list(arguments)
  with LeaveOnSignals(until_exit=arguments is None):
    from nonlocal_jax.cli.program import run_program  # imports JAX, which takes seconds

    run_program(lambda: run(given))


def run(arguments: Sequence[str]) -> None:
  """Runs a command.

  Args:
    arguments: The command's name and its options.

  Raises:
    UserError: If there is no such command, or a package that it needs is not installed.
  """
  from nonlocal_jax.cli.program import needs_extra, print_and_exit
  from nonlocal_jax.cli.supervision import reported_errors

  command, *options = arguments or ['--help']
  if command in ('-h', '--help', 'help'):
    print_and_exit(help_text())
  if command == '--version':
    print_and_exit(f'nonlocal-jax {nonlocal_jax.__version__}')
  if command not in COMMANDS:
    likely = nearest(command, COMMANDS)
    raise UsageError(
      f'there is no command {command!r};{f" the nearest is {likely}," if likely else ""} see '
      'nonlocal-jax --help.'
    )
  module, _ = COMMANDS[command]
  with reported_errors(), needs_extra(command):
    importlib.import_module(f'nonlocal_jax.cli.{module}').main(options)


def help_text() -> str:
  """Returns what `nonlocal-jax --help` prints."""
  commands = '\n'.join(f'  {name:17}{summary}' for name, (_, summary) in COMMANDS.items())
  return (
    f'usage: nonlocal-jax COMMAND [OPTION...]\n\n{_EXAMPLES}\n\ncommands:\n'
    f'{commands}\n\n'
    'nonlocal-jax COMMAND --help says more; nonlocal-jax --version prints the version.'
  )
