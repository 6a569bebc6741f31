"""Progress bars: a live line on a terminal, a line now and then in a log file."""

import sys

from tqdm import tqdm

from nonlocal_jax.runtime.parallel import is_first_process


def progress_bar(
  total: int, description: str, *, unit: str, initial: int = 0, leave: bool = True
) -> tqdm:
  """A bar on stderr with rate and time left; of several processes only the first shows it.

  Args:
    total: Units of work.
    description: What the work is.
    unit: What one unit is, in the plural or short.
    initial: Units done before.
    leave: Whether the finished bar stays on the screen.
  """
  live = sys.stderr.isatty()
  return tqdm(
    total=total,
    desc=description,
    unit=unit,
    initial=initial,
    leave=leave,
    disable=not is_first_process(),
    dynamic_ncols=live,
    mininterval=0.1 if live else 10,
    maxinterval=10 if live else 60,
  )
