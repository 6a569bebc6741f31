"""Exceptions that are not bugs: invalid input, wrong usage, and a requested stop."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """Raised for invalid input from outside the program: a path, a file, a config value.

  The message is one sentence that says what was found, where, and what to do. Commands print it
  without a traceback and exit with status 1.
  """


class UsageError(UserError):
  """Raised for an unknown or missing command or option; commands exit with status 2."""


class RunStopped(Exception):
  """Raised after a training run was asked to stop and has saved its state.

  Commands print the message and exit with `STOPPED_STATUS`.
  """


STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to resume


def nearest(name: str, choices: Iterable[str]) -> str:
  """Returns the choice whose spelling is closest to `name`.

  >>> nearest('trian', ['train', 'eval', 'predict'])
  'train'
  """
  return difflib.get_close_matches(name, list(choices), n=1, cutoff=0)[0]
