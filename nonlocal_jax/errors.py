"""The one exception that means: the user can mend this, and the message says how."""


class UserError(Exception):
  """Something outside the program is wrong: a path, a file, a config value.

  The message is one sentence that names what was found, where, and what to do. Command-line
  programs print it without a traceback and exit with status 1; library callers may catch it.
  """
