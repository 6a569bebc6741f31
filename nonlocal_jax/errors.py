"""What ends a program early and is no fault in it."""


class UserError(Exception):
  """Something outside the program is wrong: a path, a file, a config value.

  The message is one sentence that names what was found, where, and what to do. Command-line
  programs print it without a traceback and exit with status 1; library callers may catch it.
  """


class RunStopped(Exception):
  """A training run was asked to stop, and has saved where it stands.

  Command-line programs print the message and exit with `STOPPED_STATUS`.
  """


STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
