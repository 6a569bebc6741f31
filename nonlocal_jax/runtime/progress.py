"""Progress bars: a live line on a terminal, an occasional line in a log file."""

import sys

from tqdm import tqdm

from nonlocal_jax.runtime.parallel import is_first_process


def progress_bar(
  total: int, description: str, *, unit: str, initial: int = 0, leave: bool = True
) -> tqdm:
  """Returns a progress bar on stderr with rate and remaining time; silent in all but one process.

  Args:
    total: Number of units of work.
    description: Name of the work.
    unit: Name of a unit.
    initial: Units that are already done.
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
