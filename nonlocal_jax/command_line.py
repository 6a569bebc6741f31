"""How the programs end: one line instead of a traceback, and an exit status that tells."""

import signal
import sys
from collections.abc import Callable

from absl import logging

from nonlocal_jax.errors import UserError


def run_program(program: Callable[[], object]) -> None:
  """Runs a program from the command line.

  What the user can mend is one line on stderr and exit status 1; interrupted programs clean up and
  exit with 130 (SIGINT) or 143 (SIGTERM).

  Args:
    program: The program.

  Raises:
    SystemExit: If it does not come to its own end.
  """
  logging.set_verbosity(logging.ERROR)  # libraries' messages are not for the user
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    program()
  except UserError as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)
  finally:
    signal.signal(signal.SIGTERM, before)
