"""Exceptions that are not bugs: invalid input, wrong usage, and a requested stop."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping


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


@contextlib.contextmanager
def explained_by(flags: Mapping[str, str]) -> Iterator[None]:
  """Adds to a `UserError` the flags of the arguments that it names.

  >>> with explained_by({'skip_bad': '--skip-bad'}):
  ...   raise UserError('Leave it out with skip_bad.')
  Traceback (most recent call last):
  nonlocal_jax.errors.UserError: Leave it out with skip_bad. As a flag: --skip-bad.

  Args:
    flags: A command's flag for each argument, perhaps with a value.
  """
  try:
    yield
  except UserError as error:
    words = set(re.findall(r'\w+', str(error)))
    named = [flag for argument, flag in flags.items() if argument in words]
    if not named:
      raise
    raise UserError(f'{error} As a flag: {", or ".join(named)}.') from error


@contextlib.contextmanager
def needs_packages(what: str, *, extra: str) -> Iterator[None]:
  """Converts a package that is not installed to a `UserError` that says how to install it.

  >>> with needs_packages('these pictures', extra='plot'):  # doctest: +ELLIPSIS
  ...   import package_of_tomorrow
  Traceback (most recent call last):
  nonlocal_jax.errors.UserError: these pictures need the package package_of_tomorrow, ...

  Args:
    what: What needs it, in the plural.
    extra: The extra of this package that has it.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    raise UserError(
      f'{what} need the package {package}, which the core installation leaves out; in a clone, '
      f"run: pip install '.[{extra}]'."
    ) from error


def nearest(name: str, choices: Iterable[str]) -> str | None:
  """Returns the choice whose spelling is close to `name`, if there is one.

  >>> nearest('trian', ['train', 'eval', 'predict'])
  'train'
  >>> nearest('dist', ['processes', 'distributed'])
  'distributed'
  >>> nearest('steps', ['help', 'out']) is None
  True
  """
  choices = list(choices)
  close = difflib.get_close_matches(name, choices, n=1)
  longer = (choice for choice in choices if len(name) > 2 and choice.startswith(name))
  return next(iter(close), None) or next(longer, None)
