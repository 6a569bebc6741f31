"""What a process may use here: checked before it starts, where libraries would abort later."""

import os
import resource
import sys

from nonlocal_jax.errors import UserError

_LEAST_FILES = 64
_WANTED_FILES = 4096
_LEAST_ADDRESSES = 8 * 2**30


def check_limits() -> None:
  """Raises the limit of open files as far as allowed, and checks what cannot be changed.

  Warns of a limit of the address space, above which XLA aborts the process.

  Raises:
    UserError: If the working directory was deleted, the locale cannot write a path that was given,
      or very few files may be open at once.
  """
  try:
    directory = os.getcwd()
  except OSError as error:
    raise UserError('The working directory was deleted: change to one that exists.') from error
  encoding = sys.getfilesystemencoding()
  foreign = next((text for text in (*sys.argv, directory) if not text.isascii()), None)
  if foreign is not None and encoding != 'utf-8':  # libraries in C++ take UTF-8 alone
    raise UserError(
      f'Paths are {encoding} in this locale, which {foreign!a} is not: set PYTHONUTF8=1, or a '
      'locale such as LC_ALL=C.UTF-8.'
    )
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < _WANTED_FILES:
    soft = _WANTED_FILES if hard == resource.RLIM_INFINITY else max(soft, min(hard, _WANTED_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < _LEAST_FILES:
      raise UserError(
        f'Only {soft} files may be open at once, and libraries need more: raise the limit, as in '
        'ulimit -n 1024.'
      )
  addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
  if addresses != resource.RLIM_INFINITY and addresses < _LEAST_ADDRESSES:
    print(
      f'warning: This process may have {addresses / 2**30:.1f} GiB of address space (ulimit -v); '
      'where that does not suffice, XLA aborts it.',
      file=sys.stderr,
    )
