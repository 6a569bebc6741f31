"""Reads a `ConfigDict`; no other module but `config_values` looks into one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nonlocal_jax.data import synthetic
from nonlocal_jax.data.datasets import PUBLISHED, Dataset, custom_dataset, merge_classes
from nonlocal_jax.data.formats.detection import NothingFound, read_folder
from nonlocal_jax.data.pixel_formats import MAX_CHANNELS, RGB, PixelFormat
from nonlocal_jax.data.prepared import prepared_description
from nonlocal_jax.data.transforms import AugmentConfig
from nonlocal_jax.errors import UserError, explained_by
from nonlocal_jax.experiment.config_values import check_names, check_values
from nonlocal_jax.models import Execution, NonLocalNetConfig
from nonlocal_jax.models.config import chosen_attention
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.recipes import BALANCED
from nonlocal_jax.runtime.files import given_path
from nonlocal_jax.runtime.parallel import data_mesh, platform_of_mesh
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.training.loss import LossConfig, Ohem
from nonlocal_jax.training.optimizer import OptimizerConfig
from nonlocal_jax.training.run import ScheduleConfig
from nonlocal_jax.training.train_step import StepConfig

# Arguments of the data that errors name, and the flags that set them.
DATA_FLAGS = {
  'source_dir': '--config.data.source_dir=DIR',
  'data_dir': '--config.data.data_dir=DIR',
  'num_classes': '--config.data.num_classes=NUMBER',
  'ignore_labels': "--config.data.ignore_labels='(VALUE,)'",
  'reduce_zero_label': '--config.data.reduce_zero_label=True',
  'skip_bad': '--config.data.skip_bad=True',
  'num_workers': '--config.data.workers=NUMBER',
}
_DATASET_FIELDS = ('num_classes', 'classes', 'palette', 'ignore_labels', 'label_map')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where images and labels are stored.

  Attributes:
    source_dir: Folder or bucket in the layout of the dataset's authors; None to open data that was
      prepared before.
    data_dir: Folder of the prepared data; None for the default, see `preparation.prepare`.
    skip_bad: Whether to leave out bad samples, see `preparation.prepare`.
    workers: Number of processes that load batches; 0 for threads of the main process.
  """

  source_dir: str | None
  data_dir: str | None
  skip_bad: bool
  workers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """How an evaluation is computed; `EvalProtocol` says what is computed.

  Attributes:
    batch_size: Maximum number of images per device and batch; None for what is fast, see
      `batches.images_at_once`.
    shapes: Maximum number of padded shapes that the images are grouped into.
    precision: Matmul precision of the network, see `jax_default_matmul_precision`.
    more_scores: Whether to also report Dice, Fscore, Precision and Recall.
    report: Whether to collect what the report shows beyond the scores, and to write it.
  """

  batch_size: int | None
  shapes: int
  precision: str
  more_scores: bool
  report: bool


def read_config(config: ConfigDict, devices: Sequence[jax.Device] | None) -> dict[str, Any]:
  """Checks a config and returns the fields of an `Experiment` by name.

  Args:
    config: See `recipes.base_config`.
    devices: See `Experiment.from_config`.

  Raises:
    UserError: See `Experiment.from_config`.
  """
  check_names(config)
  check_values(config)
  dataset, mesh = _dataset(config), data_mesh(devices)
  weights = tuple(config.train.class_weights)
  is_balanced = weights == BALANCED
  if weights and not is_balanced and len(weights) != dataset.num_classes:
    raise UserError(
      f'config.train.class_weights has {len(weights)} weights, but there are '
      f'{dataset.num_classes} classes: give one for each.'
    )
  train, evaluation = config.train, config.eval
  pixels = _pixel_format(config)
  network = NonLocalNetConfig.from_depth(
    config.model.depth,
    num_classes=dataset.num_classes,
    in_channels=pixels.channels,
    width=config.model.width,
    non_local=config.model.non_local,
    align_corners=config.model.align_corners,
    dropout=config.model.dropout,
    zero_init=config.model.zero_init,
  )
  platform = platform_of_mesh(mesh)
  chosen = {'convolution': 'direct'} if config.model.convolution == 'direct' else {}
  attention, eval_attention = (
    _attention(config, network, mesh, precision=precision, train=is_train)
    for precision, is_train in ((train.precision, True), (evaluation.precision, False))
  )
  protocol = EvalProtocol.from_version(
    evaluation.protocol,
    scale=tuple(evaluation.scale) or None,
    scale_factor=tuple(evaluation.scale_factor) or None,
    keep_ratio=evaluation.keep_ratio,
    window_crop=tuple(evaluation.window_crop) or None,
    window_stride=tuple(evaluation.window_stride) or None,
    multi_scale_flip=evaluation.multi_scale_flip,
    pad_windows=evaluation.pad_windows,
    align_corners=config.model.align_corners,
    bits=pixels.bits,
    **_normalization(config, pixels),
  )
  ohem = Ohem(train.ohem_threshold, train.ohem_min_kept) if train.ohem else None
  return {
    'name': config.name,
    'dataset': dataset,
    'data': DataConfig(
      source_dir=config.data.source_dir or None,
      data_dir=config.data.data_dir or None,
      skip_bad=config.data.skip_bad,
      workers=config.data.workers,
    ),
    'network': network,
    'execution': Execution.for_platform(
      platform,
      attention=attention,
      batch_norm=train.batch_norm,
      batch_norm_groups=mesh.size if train.batch_norm == 'per_device' else 1,
      rematerialize=train.rematerialize,
      deterministic=train.deterministic,
      **chosen,
    ),
    'eval_execution': Execution.for_platform(
      platform,
      attention=eval_attention,
      batch_norm='folded',
      deterministic=train.deterministic,
      **chosen,
    ),
    'protocol': protocol,
    'augment': AugmentConfig(
      crop=tuple(train.crop),
      scale=tuple(train.scale),
      ratio_range=tuple(train.ratio_range),
      cat_max_ratio=train.cat_max_ratio,
      flip_probability=train.flip_probability,
      photometric=train.photometric_distortion,
    ),
    'step': StepConfig(
      loss=LossConfig(
        auxiliary_weight=train.auxiliary_weight,
        avg_non_ignore=train.avg_non_ignore,
        class_weights=None if is_balanced else weights or None,
        ohem=ohem,
        focal_gamma=train.focal_gamma,
        dice_weight=train.dice_weight,
      ),
      dtype=train.dtype,
      precision=train.precision,
      accumulate=train.accumulate,
      ema_decay=train.ema_decay,
      mean=protocol.mean,
      std=protocol.std,
      bits=protocol.bits,
    ),
    'balance_classes': is_balanced,
    'optimizer': OptimizerConfig(**config.optimizer),
    'schedule': ScheduleConfig(
      steps=train.steps,
      batch_size=train.batch_size,
      seed=config.seed,
      log_every=train.log_every,
      eval_every=evaluation.every,
      checkpoint_every=config.checkpoint.every,
      keep=config.checkpoint.keep,
      patience=evaluation.patience,
    ),
    'evaluation': EvalConfig(
      batch_size=evaluation.batch_size,
      shapes=evaluation.shapes,
      precision=evaluation.precision,
      more_scores=evaluation.more_scores,
      report=evaluation.report,
    ),
    'wandb_project': config.log.wandb or None,
    'mlflow_experiment': config.log.mlflow or None,
    'init_backbone': None if _is_random(config) else given_path(config.init_backbone),
    'mesh': mesh,
    'values': _values(config, dataset),
  }


def _dataset(config: ConfigDict) -> Dataset:
  """Returns the dataset of a config; a custom one is looked up in its folder.

  Raises:
    UserError: If the name is unknown, or classes, colors and label map do not fit together.
  """
  data = config.data
  given = {key: data[key] for key in _DATASET_FIELDS if data[key]}
  if data.reduce_zero_label is not None:
    given['reduce_zero_label'] = data.reduce_zero_label
  if data.dataset == 'custom':
    with explained_by(DATA_FLAGS):
      return custom_dataset(**{**_description(data), **given})
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
  values: dict[str, Any] = {key: tuple(map(_frozen, value)) for key, value in given.items()}
  dataset = dataclasses.replace(dataset, **values)
  if num_classes not in (published.num_classes, dataset.num_classes):
    raise UserError(
      f'config.data.num_classes is {num_classes}, but {dataset.name} has {dataset.num_classes} '
      'classes; leave it, or describe your own set with configs/custom.py.'
    )
  if len(dataset.classes) != len(dataset.palette):
    raise UserError(
      f'Dataset {dataset.name} has {len(dataset.classes)} class names but {len(dataset.palette)} '
      'colors: give one for each.'
    )
  return dataset


def _pixel_format(config: ConfigDict) -> PixelFormat:
  """Returns the format of the images.

  Raises:
    UserError: If it is out of range.
  """
  channels, bits = (
    default if value is None else value
    for value, default in zip((config.data.channels, config.data.bits), RGB, strict=True)
  )
  if not 1 <= channels <= MAX_CHANNELS:
    raise UserError(f'config.data.channels is {channels}; it must be from 1 to {MAX_CHANNELS}.')
  if bits not in (8, 16):
    raise UserError(f'config.data.bits is {bits}; it must be 8 or 16.')
  return PixelFormat(channels, bits)


def _normalization(config: ConfigDict, pixels: PixelFormat) -> dict[str, tuple[float, ...]]:
  """Returns mean and standard deviation of the channels, none for ImageNet's.

  Raises:
    UserError: If they are not given, and the images are not RGB, or are not those of each channel.
  """
  given = {name: tuple(map(float, config.data[name])) for name in ('mean', 'std')}
  if pixels == RGB and not any(given.values()):
    return {}
  for name, values in given.items():
    if len(values) != pixels.channels:
      raise UserError(
        f'config.data.{name} has {counted(len(values), "value")}, and the images have {pixels}: '
        'give one for each channel; nonlocal-jax prepare measures them.'
      )
  if not all(map(math.isfinite, given['mean'])) or not all(0 < x < math.inf for x in given['std']):
    raise UserError(
      f'config.data.mean is {given["mean"]} and config.data.std {given["std"]}; they must be '
      'finite numbers, and std positive.'
    )
  return given


def _description(data: ConfigDict) -> dict[str, Any]:
  """Returns the description of a custom dataset, from its folder or its prepared copy."""
  if data.source_dir:
    try:
      return dict(read_folder(data.source_dir).description)
    except NothingFound as error:
      if not error.own and data.num_classes is None:
        raise
      return error.own  # a network needs no data; where they are used, the same error is raised
  try:
    return prepared_description(data.dataset, data.data_dir or None)
  except UserError:
    if data.num_classes is None:
      raise
    return {}  # a network needs no data; `open_prepared` raises the same error where they are used


def _frozen(value):
  return tuple(value) if isinstance(value, (list, tuple)) else value


def _values(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
  """Returns the config as a dict, completed by the description of a custom dataset."""
  values = config.to_dict()
  if _is_random(config):
    values['init_backbone'] = ''
  if dataset.layout == 'custom':
    values['data'].update(
      num_classes=dataset.num_classes,
      classes=dataset.classes,
      palette=dataset.palette,
      reduce_zero_label=dataset.reduce_zero_label,
      ignore_labels=dataset.ignore_labels,
      label_map=dataset.label_map,
    )
  return values


def _is_random(config: ConfigDict) -> bool:
  """Returns whether the backbone starts from random weights."""
  return config.init_backbone in ('', 'none')


def _attention(
  config: ConfigDict, network: NonLocalNetConfig, mesh: Mesh, *, precision: str, train: bool
) -> Attention:
  """Returns the attention implementation to use.

  Raises:
    UserError: If the devices do not support the one that the config names.
  """
  devices = list(mesh.devices.flat)
  try:
    return chosen_attention(
      config.model.attention, network, devices, precision=precision, train=train
    )
  except UserError as error:
    raise UserError(f'config.model.{error}') from error
