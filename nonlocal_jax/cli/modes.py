"""The command line of `main.py`: `train` and `eval`, selected by --mode."""

import sys
from collections.abc import Sequence

from nonlocal_jax.cli import main
from nonlocal_jax.errors import UsageError
from nonlocal_jax.runtime.signals import LeaveOnSignals

_MODES = ('train', 'eval')


def run() -> None:
  """Runs `main.py`."""
  with LeaveOnSignals(until_exit=True):
    from nonlocal_jax.cli.program import run_program  # imports JAX, which takes seconds

    run_program(lambda: main.run(command_of(sys.argv[1:])))


def command_of(arguments: Sequence[str]) -> list[str]:
  """Translates the arguments of main.py to those of `nonlocal-jax`.

  >>> command_of(['--config=custom', '--mode=eval', '--checkpoint=run'])
  ['eval', '--config=custom', '--checkpoint=run']

  Raises:
    UsageError: If the mode is neither 'train' nor 'eval'.
  """
  mode, rest = 'train', []
  given = iter(arguments)
  for argument in given:
    if argument == '--mode':
      mode = next(given, '')
    elif argument.startswith('--mode='):
      mode = argument.removeprefix('--mode=')
    else:
      rest.append(argument)
  if mode not in _MODES:
    raise UsageError(f'--mode is {mode!r}; it must be {" or ".join(_MODES)}.')
  return [mode, *rest]
