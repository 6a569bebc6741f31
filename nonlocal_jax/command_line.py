"""How the programs end: one line instead of a traceback, and an exit status that tells."""

import logging
import signal
import sys
from collections.abc import Callable

import absl.logging

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
  # What libraries say on their way to an error is not for the user.
  absl.logging.set_verbosity(absl.logging.ERROR)
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
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
