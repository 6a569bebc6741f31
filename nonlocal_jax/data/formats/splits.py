"""Divides images into those for training and those for validation."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nonlocal_jax.data.datasets import Split
from nonlocal_jax.data.samples import Listing
from nonlocal_jax.errors import UserError


class Division(NamedTuple):
  """Images by split.

  Attributes:
    listings: The images of each split.
    sentence: How they were divided.
  """

  listings: Mapping[Split, Listing]
  sentence: str


def divided(source: Path, listing: Listing) -> Division:
  """Divides the images of a folder into splits.

  Args:
    source: The folder or bucket.
    listing: All images.

  Returns:
    The images of each split.

  Raises:
    UserError: If lists name no images.
  """
  raise UserError(f'The images of {source} are not divided into train and val.')
