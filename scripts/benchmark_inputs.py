"""What benchmark.py measures with: random weights, a folder of a few images with labels."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from nonlocal_jax.data.synthetic import DEMO, write_demo_set
from nonlocal_jax.errors import UserError
from nonlocal_jax.weights.torch_names import Architecture, to_state_dict
from nonlocal_jax.weights.torch_writer import write_torch_checkpoint


def random_state(architecture: Architecture) -> nnx.State:
  """Random parameters and statistics, none of which is zero; activations keep their scale."""
  rng = np.random.default_rng(0)
  arrays = {}
  for path, variable in nnx.to_flat_state(architecture.state_shapes()):
    if len(variable.shape) > 1:
      fan_in = np.prod(variable.shape[:-1])
      values = rng.standard_normal(variable.shape, np.float32) * np.sqrt(2 / fan_in)
    else:
      low = {'var': 0.5, 'scale': 0.2}.get(str(path[-1]), -0.3)
      values = rng.uniform(low, low + 0.6, variable.shape)
    arrays[path] = variable.replace(values.astype(np.float32))
  return nnx.from_flat_state(arrays)


def evaluated_folder(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
  """Makes the folder of images to evaluate and the weights; returns what the measures need."""
  source, num_classes = arguments.data, arguments.num_classes
  if source is None:
    source, num_classes = folder / 'synthetic', DEMO.num_classes
    write_demo_set(source, train=arguments.limit, val=arguments.limit)
  linked = folder / 'data'
  for split in ('train', 'val'):
    link_first(source, linked, split, arguments.limit)
  checkpoint = arguments.checkpoint
  if checkpoint is None:
    checkpoint = folder / 'random.pth'
    architecture = Architecture.of_depth(
      arguments.depth, width=arguments.width, num_classes=num_classes
    )
    arrays = to_state_dict(random_state(architecture), num_batches_tracked={})
    write_torch_checkpoint(checkpoint, arrays, meta={})
  return {
    'data': str(linked),
    'checkpoint': str(checkpoint.absolute()),
    'num_classes': num_classes,
    'ignore_labels': list(arguments.ignore_label),
  }


def link_first(source: Path, linked: Path, split: str, limit: int) -> None:
  """Makes a folder of links to the first images of a split and their labels.

  Raises:
    UserError: If there are no images with labels.
  """
  labels = {path.stem: path for path in (source / 'labels' / split).glob('*.png')}
  images = sorted(path for path in (source / 'images' / split).glob('*') if path.stem in labels)
  if not images:
    raise UserError(f'{source} has no images/{split} with labels/{split} of the same stems.')
  for kind in ('images', 'labels'):
    (linked / kind / split).mkdir(parents=True)
  for image in images[:limit]:
    label = labels[image.stem]
    (linked / 'images' / split / image.name).symlink_to(image.absolute())
    (linked / 'labels' / split / label.name).symlink_to(label.absolute())
