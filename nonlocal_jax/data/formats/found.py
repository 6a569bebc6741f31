"""What a folder is found to hold."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nonlocal_jax.data.datasets import Split
from nonlocal_jax.data.samples import Listing


@dataclasses.dataclass(frozen=True)
class Found:
  """The contents of a folder in one format.

  Attributes:
    sentence: What it is, for `prepare` to print; without a full stop.
    description: Some of the arguments of `custom_dataset`, as JSON has them: lists, no tuples.
    listing: All images; or a function that lists a split, where the folder has splits.
    reading: What decides the pixels of the label maps beyond their files, such as the order of the
      classes; empty where label files are PNG files of indices, taken as they are.
    warning: A sentence on what is allowed but odd; empty if nothing is.
    written: Lists of splits that were written into the folder for this.
  """

  sentence: str
  description: Mapping[str, Any]
  listing: Listing | Callable[[Split], Listing]
  reading: str = ''
  warning: str = ''
  written: Sequence[Path] = ()


class Candidate(NamedTuple):
  """A format that a folder holds, before its contents are read.

  Attributes:
    evidence: The files or folders that show it, relative to the folder.
    read: Reads the contents; raises a `UserError` where they are wrong.
  """

  evidence: str
  read: Callable[[], Found]
