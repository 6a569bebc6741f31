"""What a config describes: the dataset and its prepared splits, the network, how to test."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nonlocal_jax.data import synthetic
from nonlocal_jax.data.datasets import (
  PUBLISHED,
  Dataset,
  Split,
  custom_dataset,
  merge_classes,
  read_description,
)
from nonlocal_jax.data.loader import TrainIterator, train_batches
from nonlocal_jax.data.preparation import prepare
from nonlocal_jax.data.prepared import PreparedSplit, check_split, open_prepared
from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import STAGE_BLOCKS, Execution, NonLocalNetConfig
from nonlocal_jax.ops.attention import check_attention
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.parallel import Platform, is_first_process, platform_of

_OF_THE_DATASET = ('num_classes', 'classes', 'palette', 'ignore_labels', 'label_map')


def dataset_of(config: ConfigDict) -> Dataset:
  """The dataset that a config describes; for a custom one, together with its `dataset.json`.

  Raises:
    UserError: If the name is unknown, or classes, colours and label map do not fit together.
  """
  data = config.data
  given = {key: data[key] for key in _OF_THE_DATASET if data[key]}
  if data.reduce_zero_label is not None:
    given['reduce_zero_label'] = data.reduce_zero_label
  if data.dataset == 'custom':
    described = read_description(data.source_dir) if data.source_dir else {}
    return custom_dataset(**{**described, **given})
  datasets = {**PUBLISHED, 'demo': synthetic.DEMO}
  if data.dataset not in datasets:
    raise UserError(
      f'config.data.dataset is {data.dataset!r}; it must be one of '
      f'{", ".join((*datasets, "custom"))}.'
    )
  published = datasets[data.dataset]
  if given.pop('reduce_zero_label', published.reduce_zero_label) != published.reduce_zero_label:
    raise UserError(
      f'config.data.reduce_zero_label is {data.reduce_zero_label}, but the label files of '
      f'{published.name} are to be read with {published.reduce_zero_label}: leave it.'
    )
  num_classes = given.pop('num_classes', published.num_classes)
  dataset = merge_classes(published, given.pop('label_map', ()))
  dataset = dataclasses.replace(
    dataset, **{key: tuple(map(_frozen, value)) for key, value in given.items()}
  )
  if num_classes not in (published.num_classes, dataset.num_classes):
    raise UserError(
      f'config.data.num_classes is {num_classes}, but {dataset.name} has {dataset.num_classes} '
      'classes; leave it, or describe your own set with configs/custom.py.'
    )
  if len(dataset.classes) != len(dataset.palette):
    raise UserError(
      f'Dataset {dataset.name} has {len(dataset.classes)} class names but {len(dataset.palette)} '
      'colours: give one for each.'
    )
  return dataset


def _frozen(value):
  return tuple(value) if isinstance(value, (list, tuple)) else value


def network_of(config: ConfigDict) -> NonLocalNetConfig:
  """The network that a config describes.

  Raises:
    UserError: If the depth or the number of classes is unknown, see `dataset_of`.
  """
  model = config.model
  if model.depth not in STAGE_BLOCKS:
    raise UserError(
      f'config.model.depth is {model.depth}; it must be one of {", ".join(map(str, STAGE_BLOCKS))}.'
    )
  return NonLocalNetConfig.from_depth(
    model.depth,
    num_classes=dataset_of(config).num_classes,
    width=model.width,
    non_local=model.non_local,
    align_corners=model.align_corners,
    dropout=model.dropout,
    zero_init=model.zero_init,
  )


def execution_of(
  config: ConfigDict, mesh: Mesh, *, train: bool, platform: Platform | None = None
) -> Execution:
  """How a config's network is computed on the devices of a mesh, in training or prediction.

  Args:
    config: The config.
    mesh: The devices.
    train: Whether it is for training.
    platform: In place of that of the devices.
  """
  chosen: dict[str, Any] = {'attention': config.model.attention}
  if config.model.convolution == 'direct':
    chosen['convolution'] = 'direct'
  if train:
    chosen['batch_norm'] = config.train.batch_norm
    chosen['rematerialize'] = config.train.rematerialize
    if config.train.batch_norm == 'per_device':
      chosen['batch_norm_groups'] = mesh.size
  else:
    chosen['batch_norm'] = 'folded'
  return Execution.for_platform(platform or platform_of(list(mesh.devices.flat)), **chosen)


def check_device(config: ConfigDict, mesh: Mesh) -> None:
  """Checks that the devices of a mesh can compute as the config says.

  Raises:
    UserError: If they cannot.
  """
  if config.model.attention != 'blocks':
    channels = network_of(config).inner_channels
    check_attention(config.model.attention, channels, mesh.local_devices[0])


def protocol_of(config: ConfigDict) -> EvalProtocol:
  """How a config tests images."""
  return EvalProtocol.from_version(
    config.eval.protocol,
    scale=tuple(config.eval.scale),
    window_crop=tuple(config.eval.window_crop) or None,
    window_stride=tuple(config.eval.window_stride) or None,
    multi_scale_flip=config.eval.multi_scale_flip,
    pad_windows=config.eval.pad_windows,
    align_corners=config.model.align_corners,
  )


def open_splits(
  config: ConfigDict, dataset: Dataset, workdir: Path, splits: Sequence[Split]
) -> dict[Split, PreparedSplit]:
  """Prepares the splits of the config's dataset where needed, checks them and says what is odd.

  Args:
    config: Says where the images are; without a source folder, what was prepared before is opened.
    dataset: See `dataset_of`.
    workdir: Gets the demo set, if the config is the demo's.
    splits: Which splits.

  Returns:
    The splits by name.

  Raises:
    UserError: If images or labels are missing, broken or outside the classes.
  """
  source_dir, data_dir = config.data.source_dir, config.data.data_dir or None
  if config.data.dataset == 'demo' and not source_dir:
    source_dir = workdir / 'demo_set'
    synthetic.write_demo_set(source_dir)
  if source_dir:
    opened = prepare(dataset, source_dir, splits=splits, data_dir=data_dir)
  else:
    opened = open_prepared(dataset, splits=splits, data_dir=data_dir)
  for split in opened.values():
    report_split(split, dataset)
  return opened


def report_split(split: PreparedSplit, dataset: Dataset) -> None:
  """Says on stderr what a prepared split is, and what is odd about it (the first process).

  Args:
    split: The split.
    dataset: What it is taken to be.

  Raises:
    UserError: If a label value is no class and not ignored.
  """
  odd = check_split(split, dataset)
  if not is_first_process():
    return
  print(
    f'{split.name}: {len(split):,} images, from {split.source}, prepared in {split.directory}',
    file=sys.stderr,
  )
  for sentence in odd:
    print(f'warning: {sentence}', file=sys.stderr)


def train_batches_of(config: ConfigDict, split: PreparedSplit, dataset: Dataset) -> TrainIterator:
  """This process's part of the endless stream of batches that a config describes."""
  return train_batches(
    split,
    batch_size=config.train.batch_size,
    seed=config.seed,
    scale=tuple(config.train.scale),
    crop_size=tuple(config.train.crop),
    ratio_range=tuple(config.train.ratio_range),
    cat_max_ratio=config.train.cat_max_ratio,
    flip_prob=config.train.flip_probability,
    photometric=config.train.photometric_distortion,
    label_lookup=dataset.label_lookup,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_workers=config.data.workers,
  )
