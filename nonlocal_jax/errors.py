"""What ends a program early and is no fault in it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """Something outside the program is wrong: a path, a file, a config value.

  The message is one sentence that names what was found, where, and what to do. Command-line
  programs print it without a traceback and exit with status 1; library callers may catch it.
  """


class UsageError(UserError):
  """The command line names a command or an option that does not exist, or leaves one out.

  Command-line programs exit with status 2.
  """


class RunStopped(Exception):
  """A training run was asked to stop, and has saved where it stands.

  Command-line programs print the message and exit with `STOPPED_STATUS`.
  """


STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


def nearest(name: str, choices: Iterable[str]) -> str:
  """Returns the choice that is spelt most like a name.

  >>> nearest('trian', ['train', 'eval', 'predict'])
  'train'
  """
  return difflib.get_close_matches(name, list(choices), n=1, cutoff=0)[0]
