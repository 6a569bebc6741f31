"""Handles SIGTERM and SIGINT as a request to stop between two steps."""

import signal
import sys
from types import FrameType
from typing import Self


class StopRequest:
  """Context in which a first signal is only recorded and a second one exits the program.

  Attributes:
    received: Name of the received signal; '' if none.
  """

  _SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    """Initializes the request without a received signal."""
    self.received = ''

  def __enter__(self) -> Self:
    """Installs the signal handlers."""
    self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    """Restores the previous signal handlers."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.received:
      sys.exit(128 + number)
    self.received = signal.Signals(number).name
    print(f'\n{self.received}: saving after this step; once more to leave at once', file=sys.stderr)
