"""SIGTERM and SIGINT ask a run to stop; it does so between two steps."""

import signal
import sys
from types import FrameType
from typing import Self


class StopRequest:
  """While this context lasts, a first signal is only noted and a second one ends the program.

  Attributes:
    received: Name of the signal that came, '' if none did.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    """Nothing is received yet."""
    self.received = ''

  def __enter__(self) -> Self:
    """Handles the signals."""
    self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    """Handles them as before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.received:
      sys.exit(128 + number)
    self.received = signal.Signals(number).name
    print(f'\n{self.received}: saving after this step; once more to leave at once', file=sys.stderr)
