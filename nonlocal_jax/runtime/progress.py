"""Progress bars: a live line on a terminal, an occasional line in a log file; durations."""

import sys

from tqdm import tqdm

from nonlocal_jax.runtime.parallel import is_first_process


def progress_bar(
  total: int | None,
  description: str,
  *,
  unit: str,
  unit_scale: bool = False,
  initial: int = 0,
  leave: bool = True,
) -> tqdm:
  """Returns a progress bar on stderr with rate and remaining time; silent in all but one process.

  Args:
    total: Number of units of work; None if unknown.
    description: Name of the work.
    unit: Name of a unit.
    unit_scale: Whether to count in thousands and millions of units, as for bytes.
    initial: Units that are already done.
    leave: Whether the finished bar stays on the screen.
  """
  live = sys.stderr.isatty()
  return tqdm(
    total=total,
    desc=description,
    unit=unit,
    unit_scale=unit_scale,
    initial=initial,
    leave=leave,
    disable=not is_first_process(),
    dynamic_ncols=live,
    mininterval=0.1 if live else 10,
    maxinterval=10 if live else 60,
  )


def as_duration(seconds: float) -> str:
  """Formats a duration to its largest units.

  >>> as_duration(40), as_duration(5000), as_duration(400_000)
  ('40 s', '1 h 23 min', '4 d 15 h')
  """
  if seconds < 59.5:
    return f'{max(1, round(seconds))} s'
  minutes = round(seconds / 60)
  if minutes < 60:
    return f'{minutes} min'
  hours, minutes = divmod(minutes, 60)
  if hours < 48:
    return f'{hours} h {minutes} min'
  return f'{hours // 24} d {hours % 24} h'
