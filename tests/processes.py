"""What processes leave behind, as the kernel lists it."""

import contextlib
import os
from pathlib import Path


def members(group: int) -> list[str]:
  """Returns the command lines of the processes of a group that have not ended."""
  found = []
  for folder in Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      state, _, process_group = (folder / 'stat').read_text().rpartition(')')[2].split()[:3]
      if process_group == str(group) and state != 'Z':
        found.append((folder / 'cmdline').read_text().replace('\0', ' ')[:200])
  return found


def runs(process: int) -> bool:
  """Whether a process exists and has not ended; its new parent may not ask for its status."""
  try:
    return ') Z ' not in Path(f'/proc/{process}/stat').read_text()
  except FileNotFoundError:
    return False


def unused_shared_memory() -> set[str]:
  """Returns the names of shared memory and semaphores that no process has mapped."""
  mapped = ''
  names = set(os.listdir('/dev/shm'))
  for path in Path('/proc').glob('[0-9]*/maps'):
    with contextlib.suppress(OSError):
      mapped += path.read_text()
  return {name for name in names if f'/dev/shm/{name}' not in mapped}
