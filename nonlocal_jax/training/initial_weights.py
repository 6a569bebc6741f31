"""What a new run starts from: saved weights, a backbone, or nothing."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import network_of
from nonlocal_jax.weights.loading import read_backbone, read_weights

_CLASSIFIER = 'conv_seg'  # of both heads


class InitialWeights(NamedTuple):
  """The part of a network that is not initialised at random.

  Attributes:
    state: Parameters and running statistics as host arrays, None for nothing.
    source: Where they are from, in words.
  """

  state: nnx.State | None
  source: str


def read_initial_weights(
  config: ConfigDict, dataset: Dataset, *, checkpoint: Path | None, new_classifier: bool
) -> InitialWeights:
  """Reads what a config and the command line name: a checkpoint before a backbone.

  Args:
    config: Says which network it is for, and perhaps which backbone to read.
    dataset: The classes.
    checkpoint: Weights of a whole network: a .pth file, a converted directory or a workdir.
    new_classifier: Whether the last layer of both heads is left out of the checkpoint.

  Raises:
    UserError: If they are of another network.
  """
  network = network_of(config)
  if checkpoint is None:
    if new_classifier:
      raise UserError('--new_classifier is for the network of a --checkpoint; give one.')
    if not config.init_backbone:
      return InitialWeights(None, 'scratch')
    backbone = read_backbone(Path(config.init_backbone), network)
    return InitialWeights(backbone, f'the backbone in {config.init_backbone}')
  description, state = read_weights(checkpoint, align_corners=config.model.align_corners)
  found = description.config
  with_their_classes = dataclasses.replace(network, num_classes=found.num_classes)
  if not found.predicts_like(with_their_classes if new_classifier else network):
    hint = (
      '; to go on with other classes, give --new_classifier'
      if found.predicts_like(with_their_classes)
      else '; give its own config, or set config.model to match'
    )
    raise UserError(f'{checkpoint} holds {found}, but the config describes {network}{hint}.')
  if not new_classifier:
    return InitialWeights(state, str(checkpoint))
  kept = nnx.from_flat_state(
    (path, variable) for path, variable in nnx.to_flat_state(state) if _CLASSIFIER not in path
  )
  classes = f'{found.num_classes} classes there, {dataset.num_classes} here'
  return InitialWeights(kept, f'{checkpoint} but for new classifiers in both heads ({classes})')
