"""Reads weights from a .pth or safetensors file, a converted directory or a training run."""

import collections
import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from nonlocal_jax.data.datasets import PUBLISHED, custom_dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.torch_format.reader import read_torch_checkpoint
from nonlocal_jax.weights.checkpoints import load_weights
from nonlocal_jax.weights.config_literals import MAX_CHARACTERS
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.first_convolution import with_channels
from nonlocal_jax.weights.foreign_arrays import as_two_classes, choose_average, without_wrappers
from nonlocal_jax.weights.mmseg_config import (
  RecordedSettings,
  recorded_settings,
)
from nonlocal_jax.weights.mmseg_network import DEFAULT_THRESHOLD
from nonlocal_jax.weights.names import find_backbone, find_weights
from nonlocal_jax.weights.released import (
  ReleasedModel,
  released_model_of_file,
  released_model_of_sha256,
)
from nonlocal_jax.weights.safetensors_file import is_safetensors, read_safetensors
from nonlocal_jax.weights.state_dict import (
  from_state_dict,
  infer_config,
  skipped,
  tracked_batches,
)


@dataclasses.dataclass(frozen=True)
class TorchWeights:
  """The contents of a .pth file.

  Attributes:
    description: What is known about the network.
    state: Parameters and running statistics as float32 host arrays.
    released: The released model, recognized by the file's sha256; None for other files.
    skipped: Number of arrays in the file that the network does not use, by reason.
    notes: Remarks for the user, one sentence each.
  """

  description: ModelDescription
  state: nnx.State
  released: ReleasedModel | None
  skipped: Mapping[str, int]
  notes: tuple[str, ...]


# What `read_weights` has to say; programs choose how it is printed.
NOTES = logging.getLogger('nonlocal_jax.notes')


def read_weights(
  path: Path, *, align_corners: bool | None = None, ema: bool = False
) -> tuple[ModelDescription, nnx.State]:
  """Reads weights and what is known about them; logs the notes on a .pth file as warnings.

  Args:
    path: A .pth file, a converted directory, the workdir of a training run, an exported
      safetensors file, or the name of a released model, see `names.find_weights`.
    align_corners: Overrides the corner convention; None for that of the directory or file.
    ema: Whether to take the exponential moving average that a .pth file holds beside the weights.

  Returns:
    The description, and parameters and running statistics as float32 host arrays.

  Raises:
    UserError: If there are no weights of a NonLocalNet, a released file is not what its name says,
      or there is no moving average.
  """
  path = find_weights(path)
  if not path.is_dir() and not is_safetensors(path):
    weights = read_torch_weights(path, align_corners=align_corners, ema=ema)
    for note in weights.notes:
      NOTES.warning('%s: %s', path, note)
    return weights.description, weights.state
  if ema:
    kind = 'safetensors file' if is_safetensors(path) else 'directory'
    raise UserError(
      f'{path} is a {kind}, which holds one set of weights: leave out ema (--ema), which is for '
      '.pth files.'
    )
  description, state = (read_safetensors if is_safetensors(path) else load_weights)(path)
  if align_corners is not None:
    description = description.with_align_corners(align_corners)
  return description, state


def read_torch_weights(
  path: Path, *, align_corners: bool | None = None, ema: bool = False
) -> TorchWeights:
  """Reads the .pth file of a segmentation network.

  A released file is recognized by its sha256, whatever its name. For other files the settings that
  arrays do not tell come from the config that MMSegmentation saved in them, see
  `mmseg_config.recorded_settings`.

  Args:
    path: The file.
    align_corners: Overrides the corner convention; None for that of the file.
    ema: Whether to take the exponential moving average that the file holds beside the weights.

  Raises:
    UserError: If there are no weights of a NonLocalNet, a released file is not what its name says,
      the recorded config has a setting that is not supported, or there is no moving average.
  """
  sha256 = sha256_of(path)
  released = released_model_of_sha256(sha256)
  notes = _check_name(path, sha256, released)
  checkpoint = read_torch_checkpoint(path)
  arrays, prefix_notes = without_wrappers(checkpoint.state_dict, source=str(path))
  is_average = checkpoint.has_average or _swaps_averages(checkpoint.meta)
  arrays, average_notes = choose_average(arrays, ema=ema, is_average=is_average, source=str(path))
  notes += prefix_notes + average_notes
  config = infer_config(arrays, source=str(path))
  if released:
    recorded = RecordedSettings({}, released.protocol, ())
  else:
    recorded = recorded_settings(checkpoint.meta, source=str(path), in_channels=config.in_channels)
  network = dict(recorded.network)
  if config.num_classes == 1:
    threshold = network.setdefault('threshold', DEFAULT_THRESHOLD)
    arrays, channel_notes = as_two_classes(arrays, threshold)
    notes += channel_notes
    config = dataclasses.replace(config, num_classes=2)
  elif 'threshold' in network:
    raise UserError(
      f'{path} records a network of one output channel, but its arrays have {config.num_classes}; '
      'load the weights from a file without a config.'
    )
  config = dataclasses.replace(config, **network)
  state = from_state_dict(arrays, config, source=str(path))
  skips = skipped(arrays)
  if not checkpoint.has_checksums and not released:
    notes.append('It has no checksums: damaged weights would not be noticed.')
  if not config.auxiliary_head:
    notes.append('It has no auxiliary head, which only training needs.')
  rounded = sum(array.dtype == np.float64 for name, array in arrays.items() if name not in skips)
  if rounded:
    notes.append(f'{rounded} float64 arrays were rounded to float32.')

  notes += recorded.notes
  if align_corners is None and 'align_corners' in recorded.assumed:
    notes.append(
      'The file does not tell the corner convention: half-pixel corners (align_corners=False) are '
      'assumed.'
    )
  dataset, classes, palette = _classes(config.num_classes, released, checkpoint.meta)
  description = ModelDescription(
    config=dataclasses.replace(config, align_corners=recorded.protocol.align_corners),
    protocol=recorded.protocol,
    dataset=dataset,
    classes=classes,
    palette=palette,
    source=path.name,
    sha256=sha256,
    num_batches_tracked=tracked_batches(arrays),
    assumed=recorded.assumed,
  )
  if align_corners is not None:
    description = description.with_align_corners(align_corners)
  reasons = collections.Counter(skips.values())
  return TorchWeights(description, state, released, reasons, tuple(notes))


def read_backbone(path: Path, config: NonLocalNetConfig) -> tuple[nnx.State, int]:
  """Reads the backbone alone, from a file of its own or of a whole segmentation network.

  Args:
    path: A .pth file with the names of a ResNetV1c (`stem.0.weight`, a classifier `fc.*` is left),
      or with the same names below `backbone.`; or a name, see `names.find_backbone`.
    config: The network that it is for.

  Returns:
    The part of the network's state below 'backbone', as float32 host arrays, its first convolution
    adapted to the network's number of channels; and the number that it had.

  Raises:
    UserError: If the file does not hold that backbone.
  """
  path = find_backbone(path)
  arrays, _ = without_wrappers(read_torch_checkpoint(path).state_dict, source=str(path))
  prefix = 'backbone.'
  inside = {name: array for name, array in arrays.items() if name.startswith(prefix)}
  if not inside:
    inside = {f'{prefix}{name}': array for name, array in arrays.items()}
  stem = inside.get('backbone.stem.0.weight')
  channels = stem.shape[1] if stem is not None and stem.ndim == 4 else config.in_channels
  of_file = dataclasses.replace(config, in_channels=channels or config.in_channels)
  state = from_state_dict(inside, of_file, source=str(path), part='backbone')
  if of_file == config:
    return state, config.in_channels
  return with_channels(state, config.in_channels), channels


def _swaps_averages(meta: Mapping[str, Any]) -> bool:
  """Whether mmcv's EMAHook swapped weights and averages before it saved them.

  It does so at the end of each epoch, and leaves them in place with a runner of iterations.
  """
  text = meta.get('config')
  is_epochs = type(text) is str and 'EpochBasedRunner' in text[:MAX_CHARACTERS]
  return is_epochs and re.search(r'\bEMAHook\b', text[:MAX_CHARACTERS]) is not None


def sha256_of(path: Path) -> str:
  """The sha256 of a file in hex digits; '' if it cannot be read, which the reader reports."""
  if not path.is_file():  # a pipe or a device could be read forever
    return ''
  try:
    with open(path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError:
    return ''


def _check_name(path: Path, sha256: str, released: ReleasedModel | None) -> list[str]:
  """Compares a file's name with its sha256; returns notes for the user.

  Raises:
    UserError: If a file with the name of a released one has other contents.
  """
  named = released_model_of_file(path.name)
  if named and sha256 and named != released:
    raise UserError(
      f'{path} has the name of a released file, but its sha256 begins with {sha256[:8]}, not '
      f'{named.sha256_prefix}: download it again, or rename it if it is another file.'
    )
  if released is None:
    return ['It is not a released file, so there is no sha256 to compare with.']
  if released.replaced:
    return ['It was replaced later by another file of the same model.']
  return []


def _classes(
  count: int, released: ReleasedModel | None, meta: Mapping[str, Any]
) -> tuple[str, tuple[str, ...], tuple[tuple[int, int, int], ...]]:
  """Dataset, names and colors of the classes; `meta` is not trusted."""
  if released:
    dataset = PUBLISHED[released.dataset]
    return dataset.name, dataset.classes, dataset.palette
  later = meta.get('dataset_meta')
  names = {'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')}  # of 0.x
  if type(later) is dict:
    names |= {key: later[key] for key in names if key in later}
  classes, palette = _names(names['classes'], count), _colors(names['palette'], count)
  known = (dataset for dataset in PUBLISHED.values() if dataset.classes == classes)
  dataset = next(known, custom_dataset(count))
  return dataset.name, classes or dataset.classes, palette or dataset.palette


def _names(value: Any, count: int) -> tuple[str, ...] | None:
  if not isinstance(value, list | tuple) or len(value) != count:
    return None
  fits = all(type(name) is str and name.isprintable() and len(name) <= 100 for name in value)
  return tuple(value) if fits else None


def _colors(value: Any, count: int) -> tuple[tuple[int, int, int], ...] | None:
  if isinstance(value, np.ndarray) and value.shape == (count, 3):
    value = value.tolist()
  if not isinstance(value, list | tuple) or len(value) != count:
    return None
  for row in value:
    if not isinstance(row, list | tuple) or len(row) != 3:
      return None
    if not all(type(channel) is int and 0 <= channel <= 255 for channel in row):
      return None
  return tuple((r, g, b) for r, g, b in value)
