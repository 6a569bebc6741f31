"""Initial weights of a new run: a checkpoint, a backbone, or none."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNetConfig
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.training.class_matching import check_order, describe_matches, matched_classes
from nonlocal_jax.weights.first_convolution import with_channels
from nonlocal_jax.weights.loading import read_backbone, read_weights
from nonlocal_jax.weights.names import find_backbone, find_weights, named_release
from nonlocal_jax.weights.released import ReleasedBackbone

_CLASSIFIER = 'conv_seg'  # of both heads


class InitialWeights(NamedTuple):
  """The part of a network that is not initialized at random.

  Attributes:
    state: Parameters and running statistics as host arrays; None if everything is random.
    source: Description of their origin, for the log.
    matched: Where the classifiers in `state` are those of other classes: the index of each class
      that keeps its part of them, and its index there. None where they fit or are left out.
  """

  state: nnx.State | None
  source: str
  matched: Mapping[int, int] | None = None

  def fitted_to(self, random: nnx.State) -> nnx.State | None:
    """Returns `state` with the classifiers of the network's classes.

    Args:
      random: Random parameters of the network, which classes have that are not in `matched`.
    """
    if self.state is None or self.matched is None:
      return self.state
    here, there = list(self.matched), list(self.matched.values())
    initial, fitted = dict(nnx.to_flat_state(random)), []
    for path, variable in nnx.to_flat_state(self.state):
      if _CLASSIFIER in path:  # kernel (1, 1, channels, classes) and bias (classes,)
        array = np.array(initial[path][...])
        array[..., here] = np.asarray(variable[...])[..., there]
        variable = variable.replace(array)
      fitted.append((path, variable))
    return nnx.from_flat_state(fitted)


def read_initial_weights(
  network: NonLocalNetConfig,
  protocol: EvalProtocol,
  *,
  backbone: Path | None = None,
  checkpoint: Path | None = None,
  new_classifier: bool = False,
  match_classes: Sequence[str] | None = None,
  classes: Sequence[str] | None = None,
  ema: bool = False,
) -> InitialWeights:
  """Reads the initial weights of a new run; `checkpoint` takes precedence over `backbone`.

  Args:
    network: Architecture of the network.
    protocol: How images are normalized, also in training.
    backbone: A .pth file with a backbone, or its name, see `names.find_backbone`.
    checkpoint: Weights of a whole network: a .pth file, a converted directory, a workdir, or the
      name of a released model, see `names.find_weights`.
    new_classifier: Whether to leave out the last layer of both heads of the checkpoint.
    match_classes: Names of the network's classes: those that the checkpoint has keep their part of
      the last layers, see `matched_classes`; None to take these layers as they are.
    classes: Names of the network's classes, whose order is compared; None if unknown.
    ema: Whether to take the moving average that the .pth file of a checkpoint holds.

  Returns:
    The weights and their origin.

  Raises:
    UserError: If the weights belong to another network, or to other inputs.
  """
  if checkpoint is None:
    if backbone is None:
      return InitialWeights(None, 'scratch')
    path = _find_backbone(backbone, network)
    state, channels = read_backbone(path, network)
    return InitialWeights(state, f'the backbone in {path}{_adapted(channels, network)}')
  checkpoint = find_weights(checkpoint)
  description, state = read_weights(checkpoint, align_corners=network.align_corners, ema=ema)
  found, tested = description.config, description.protocol
  adapted = _adapted(found.in_channels, network)
  if adapted:
    state = with_channels(state, network.in_channels)
    found = dataclasses.replace(found, in_channels=network.in_channels)
  with_their_classes = dataclasses.replace(network, num_classes=found.num_classes)
  of_other_classes = new_classifier or match_classes is not None
  if not found.predicts_like(with_their_classes if of_other_classes else network):
    hint = (
      '; to fine-tune it on other classes, set match_classes, which keeps what it knows of classes '
      'with the same names, or new_classifier'
      if found.predicts_like(with_their_classes)
      else '; use its own config, or set the model to match'
    )
    listed = '; '.join(found.differences(network))
    raise UserError(
      f'{checkpoint} holds {description.config}, but the config describes {network}{hint} '
      f'({listed}).'
    )
  inputs = ('channel_order', 'mean', 'std')
  there, here = ({name: getattr(of, name) for name in inputs} for of in (tested, protocol))
  # Other images are normalized by their own mean and standard deviation.
  if there != here and not adapted and tested.bits == protocol.bits:
    raise UserError(
      f'{checkpoint} takes images normalized by {there}, but training normalizes them by {here}; '
      'start from other weights.'
    )
  source = f'{checkpoint}{adapted}'
  if not found.auxiliary_head:
    source += ' but for a new auxiliary head'
  if match_classes is not None:
    matched = matched_classes(match_classes, description.classes, source=str(checkpoint))
    described = describe_matches(matched, match_classes, description.classes)
    return InitialWeights(state, f'{source}; {described}', matched)
  if not new_classifier:
    check_order(classes or description.classes, description.classes, source=str(checkpoint))
    return InitialWeights(state, source)
  kept = nnx.from_flat_state(
    (path, variable) for path, variable in nnx.to_flat_state(state) if _CLASSIFIER not in path
  )
  classes = f'{found.num_classes} classes there, {network.num_classes} here'
  joint = ' but for' if found.auxiliary_head else ' and'
  return InitialWeights(kept, f'{source}{joint} new classifiers in both heads ({classes})')


def _adapted(channels: int, network: NonLocalNetConfig) -> str:
  """Says that the first convolution is adapted to another number of channels, if it is."""
  if channels == network.in_channels:
    return ''
  return f', its first convolution adapted from {channels} to {network.in_channels} channels'


def _find_backbone(backbone: Path, network: NonLocalNetConfig) -> Path:
  """Finds a backbone, after it was checked that one of that name fits."""
  remedy = 'with --config.init_backbone=none it starts from random weights'
  named = None if backbone.exists() else named_release(backbone)
  if isinstance(named, ReleasedBackbone):
    fitting = NonLocalNetConfig.from_depth(named.depth, num_classes=network.num_classes)
    if (network.stage_blocks, network.width) != (fitting.stage_blocks, fitting.width):
      raise UserError(
        f'{backbone} is the backbone of R-{named.depth} at width {fitting.width}, but the config '
        f'describes {network}: {remedy}.'
      )
  try:
    return find_backbone(backbone)
  except UserError as error:
    raise UserError(f'{str(error).removesuffix(".")}; {remedy}.') from error
