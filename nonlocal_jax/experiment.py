"""A config, checked and resolved into typed parts: what is trained, evaluated and lowered."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
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
from nonlocal_jax.data.prepared import PreparedSplit, open_prepared, report_split
from nonlocal_jax.data.transforms import AugmentConfig
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.evaluate import comparable_miou, show_evaluation, write_evaluation
from nonlocal_jax.evaluation.evaluator import Evaluation, Evaluator
from nonlocal_jax.evaluation.report import ReportFacts, published_line
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.config import STAGE_BLOCKS
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.ops.attention import Attention, check_attention, fastest_attention
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.recipes import base_config
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import (
  data_mesh,
  is_first_process,
  over_batch,
  platform_of_mesh,
  replicated,
)
from nonlocal_jax.training.initial_weights import read_initial_weights
from nonlocal_jax.training.loop import ScheduleConfig, TrainingRun, train_and_evaluate
from nonlocal_jax.training.loss import LossConfig, Ohem
from nonlocal_jax.training.optimizer import OptimizerConfig
from nonlocal_jax.training.run_files import check_same_run, write_run_files
from nonlocal_jax.training.train_step import BatchShape, StepConfig, lower_train_step
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import read_weights
from nonlocal_jax.weights.released import released_model_of_sha256
from nonlocal_jax.weights.run_checkpoints import has_checkpoint

_PRECISIONS = ('default', 'high', 'highest', 'bfloat16', 'tensorfloat32', 'float32')
_OF_THE_DATASET = ('num_classes', 'classes', 'palette', 'ignore_labels', 'label_map')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where images and labels are.

  Attributes:
    source_dir: Folder or bucket, as the dataset's authors lay it out; None to open what was
      prepared before.
    data_dir: Where prepared data is kept; None for the default, see `preparation.prepare`.
    workers: Processes that prepare batches; 0 for threads of the main process.
  """

  source_dir: str | None
  data_dir: str | None
  workers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """How an evaluation is computed; how images are tested is the protocol's.

  Attributes:
    batch_size: Images at once on each device.
    shapes: Padded shapes that images of all sizes share.
    precision: Of matrix products in the network, see `jax_default_matmul_precision`.
    more_scores: Whether to report Dice, Fscore, Precision and Recall, too.
  """

  batch_size: int
  shapes: int
  precision: str
  more_scores: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """All that a config says, as values. It hands its parts down; nothing below knows the type.

  Attributes:
    name: What it is called.
    dataset: Classes, their colors, and how label values are read.
    data: Where images and labels are.
    network: What the network is.
    execution: How the network is computed in training.
    eval_execution: How the network is computed in evaluation, batch normalization folded.
    protocol: How images are tested.
    augment: How training samples are augmented.
    step: What a training step computes, with its loss.
    optimizer: Optimizer and learning rate.
    schedule: How long a run is, and what happens when.
    evaluation: How an evaluation is computed.
    init_backbone: A .pth file with the backbone's initial weights; None for random ones.
    mesh: The devices.
    values: The config's values, by section and name, as JSON has them: saved with a run and in
      reports.
  """

  name: str
  dataset: Dataset
  data: DataConfig
  network: NonLocalNetConfig
  execution: Execution
  eval_execution: Execution
  protocol: EvalProtocol
  augment: AugmentConfig
  step: StepConfig
  optimizer: OptimizerConfig
  schedule: ScheduleConfig
  evaluation: EvalConfig
  init_backbone: Path | None
  mesh: Mesh
  values: Mapping[str, Any] = dataclasses.field(repr=False)

  @classmethod
  def from_config(cls, config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Self:
    """Checks a config and resolves it.

    Args:
      config: See `recipes.base_config`. It is read here and nowhere else.
      devices: The devices to use, which may be described ones, see `jax.experimental.topologies`;
        None for all.

    Raises:
      UserError: If a value is out of its range, values do not fit together, or the devices cannot
        do what is asked; the message names the field.
    """
    _check_values(config)
    dataset, mesh = _dataset(config), data_mesh(devices)
    weights = config.train.class_weights
    if weights and len(weights) != dataset.num_classes:
      raise UserError(
        f'config.train.class_weights has {len(weights)} weights, but there are '
        f'{dataset.num_classes} classes: give one for each.'
      )
    train, evaluation = config.train, config.eval
    network = NonLocalNetConfig.from_depth(
      config.model.depth,
      num_classes=dataset.num_classes,
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
      scale=tuple(evaluation.scale),
      window_crop=tuple(evaluation.window_crop) or None,
      window_stride=tuple(evaluation.window_stride) or None,
      multi_scale_flip=evaluation.multi_scale_flip,
      pad_windows=evaluation.pad_windows,
      align_corners=config.model.align_corners,
    )
    ohem = Ohem(train.ohem_threshold, train.ohem_min_kept) if train.ohem else None
    return cls(
      name=config.name,
      dataset=dataset,
      data=DataConfig(
        source_dir=config.data.source_dir or None,
        data_dir=config.data.data_dir or None,
        workers=config.data.workers,
      ),
      network=network,
      execution=Execution.for_platform(
        platform,
        attention=attention,
        batch_norm=train.batch_norm,
        batch_norm_groups=mesh.size if train.batch_norm == 'per_device' else 1,
        rematerialize=train.rematerialize,
        **chosen,
      ),
      eval_execution=Execution.for_platform(
        platform, attention=eval_attention, batch_norm='folded', **chosen
      ),
      protocol=protocol,
      augment=AugmentConfig(
        crop=tuple(train.crop),
        scale=tuple(train.scale),
        ratio_range=tuple(train.ratio_range),
        cat_max_ratio=train.cat_max_ratio,
        flip_probability=train.flip_probability,
        photometric=train.photometric_distortion,
      ),
      step=StepConfig(
        loss=LossConfig(
          auxiliary_weight=train.auxiliary_weight,
          avg_non_ignore=train.avg_non_ignore,
          class_weights=tuple(train.class_weights) or None,
          ohem=ohem,
        ),
        dtype=train.dtype,
        precision=train.precision,
        accumulate=train.accumulate,
        ema_decay=train.ema_decay,
        mean=protocol.mean,
        std=protocol.std,
      ),
      optimizer=OptimizerConfig(**config.optimizer),
      schedule=ScheduleConfig(
        steps=train.steps,
        batch_size=train.batch_size,
        seed=config.seed,
        log_every=train.log_every,
        eval_every=evaluation.every,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
      ),
      evaluation=EvalConfig(
        batch_size=evaluation.batch_size,
        shapes=evaluation.shapes,
        precision=evaluation.precision,
        more_scores=evaluation.more_scores,
      ),
      init_backbone=Path(config.init_backbone) if config.init_backbone else None,
      mesh=mesh,
      values=_values(config, dataset),
    )

  def train(
    self, workdir: Path, *, checkpoint: Path | None = None, new_classifier: bool = False
  ) -> Evaluation:
    """Trains from where `workdir` stands; evaluates at intervals and at the end.

    A run goes on from the newest checkpoint in `workdir`; a new one starts from `checkpoint`, or
    from `init_backbone`, or from scratch.

    Args:
      workdir: Gets checkpoints, the weights with the best mIoU in `best`, `config.json`,
        `model.json`, `log.jsonl`, TensorBoard events, `curves.png`, `metrics.json` and
        `predictions.png`. Of several processes all must see it.
      checkpoint: Weights of a whole network: a .pth file, a converted directory or a workdir.
      new_classifier: Whether the classifiers of both heads are left out of `checkpoint`.

    Returns:
      The last evaluation.

    Raises:
      UserError: If weights or data are not as they should be, `workdir` holds another run, the loss
        is not finite, or checkpoints cannot be written.
      RunStopped: If SIGTERM or SIGINT came, once the state is saved.
    """
    if new_classifier and checkpoint is None:
      raise UserError('--new_classifier is for the network of a --checkpoint; give one.')
    self._check_batch()
    check_same_run(workdir, self.values, base_config().to_dict())
    initial = None
    if not has_checkpoint(workdir):
      initial = read_initial_weights(
        self.network,
        backbone=self.init_backbone,
        checkpoint=checkpoint,
        new_classifier=new_classifier,
      )
    splits = self.open_splits(workdir, ['train', 'val'])
    batches = self.train_batches(splits['train'])
    if is_first_process():
      write_run_files(workdir, self.values, self.description())
    facts = ReportFacts(
      config=self.values,
      protocol=self.protocol,
      images=len(splits['val']),
      step=self.schedule.steps,
      more_scores=self.evaluation.more_scores,
    )

    def report(evaluation: Evaluation) -> None:
      show_evaluation(evaluation, self.dataset, more=facts.more_scores)
      write_evaluation(workdir, evaluation, self.dataset, facts)

    run = TrainingRun(
      name=self.name,
      network=self.network,
      execution=self.execution,
      augment=self.augment,
      step=self.step,
      optimizer=self.optimizer,
      schedule=self.schedule,
      dataset=self.dataset,
      split=splits['train'],
      batches=batches,
      evaluator=self.evaluator(splits['val']),
      report=report,
      mesh=self.mesh,
    )
    ignored = None if initial is not None else checkpoint
    return train_and_evaluate(run, workdir, initial=initial, ignored_checkpoint=ignored)

  def evaluate(self, checkpoint: Path, workdir: Path) -> Evaluation:
    """Evaluates saved weights; prints the scores and writes them to `workdir`.

    Args:
      checkpoint: A .pth file, a converted directory or the workdir of a training run.
      workdir: Gets `metrics.json` and `predictions.png`.

    Raises:
      UserError: If the weights are of another network, or the data is not as it should be.
    """
    description, state = read_weights(checkpoint, align_corners=self.network.align_corners)
    if not description.config.predicts_like(self.network):
      raise UserError(
        f'{checkpoint} holds {description.config}, but the config describes {self.network}; '
        'give its own config, or set config.model and config.data.num_classes to match.'
      )
    split = self.open_splits(workdir, ['val'])['val']
    evaluator = self.evaluator(split)
    weights = evaluator.prepared(state)
    del state  # a file in memory
    evaluation = evaluator(weights)
    released = released_model_of_sha256(description.sha256) if description.sha256 else None
    published = None
    if released is not None:
      published = comparable_miou(released, self.dataset, self.protocol, images=len(split))
    show_evaluation(evaluation, self.dataset, more=self.evaluation.more_scores)
    if published is not None and is_first_process():
      print(published_line(100 * evaluation.scores.mean_iou, published, self.dataset.name))
    facts = ReportFacts(
      config=self.values,
      protocol=self.protocol,
      images=len(split),
      checkpoint=str(checkpoint),
      sha256=description.sha256,
      published=published,
      more_scores=self.evaluation.more_scores,
    )
    write_evaluation(workdir, evaluation, self.dataset, facts)
    return evaluation

  def lower_train_step(self) -> jax.stages.Lowered:
    """The training step for the devices, from shapes only; see `train_step.lower_train_step`.

    Raises:
      UserError: If the devices cannot share a batch.
    """
    self._check_batch()
    _, tx = self.optimizer.make(self.schedule.steps)
    batch = BatchShape(self.schedule.batch_size, self.augment.crop)
    return lower_train_step(
      self.network, self.execution, tx, self.step, batch=batch, mesh=self.mesh
    )

  def lower_network(
    self, batch: int, size: tuple[int, int], precision: str | None = None
  ) -> jax.stages.Lowered:
    """The network as it is evaluated, batch normalization folded, from shapes only.

    Args:
      batch: Number of images, over all devices.
      size: (height, width) of the images, in pixels.
      precision: Of matrix products, see `jax_default_matmul_precision`; None for that of
        `evaluation`.

    Returns:
      A program of the weights and normalized images (batch, *size, in_channels) float32, which
      returns logits at the network's output stride.
    """
    graphdef = nnx.graphdef(NonLocalNet.abstract(self.network, self.eval_execution))

    def logits(state: nnx.State, images: jax.Array) -> jax.Array:
      return nnx.merge(graphdef, state).encode_decode(images)

    over = over_batch(self.mesh)
    jitted = jax.jit(
      logits,
      in_shardings=(replicated(self.mesh), over),
      out_shardings=over,
      compiler_options=compiler_options(platform_of_mesh(self.mesh)),
    )
    images = jax.ShapeDtypeStruct((batch, *size, self.network.in_channels), jnp.float32)
    with jax.default_matmul_precision(precision or self.evaluation.precision):
      return jitted.lower(state_shapes(self.network), images)

  def _check_batch(self) -> None:
    """Checks that the devices can share a batch evenly, which evaluation does not need."""
    size, count, parts = self.schedule.batch_size, self.mesh.size, self.step.accumulate
    if size % (count * parts):
      raise UserError(
        f'config.train.batch_size is {size}, which {count} devices cannot share'
        f'{f" in {parts} parts each" if parts > 1 else ""}; make it a multiple.'
      )

  def description(self) -> ModelDescription:
    """What is saved with the weights of a run."""
    return ModelDescription(
      config=self.network,
      protocol=self.protocol,
      dataset=self.dataset.name,
      classes=self.dataset.classes,
      palette=self.dataset.palette,
      source=f'trained with config {self.name}',
      sha256=None,
      num_batches_tracked=dict.fromkeys(('backbone', 'decode_head', 'auxiliary_head'), 0),
    )

  def evaluator(self, split: PreparedSplit) -> Evaluator:
    """Evaluates weights on a split, on all devices."""
    predictor = Predictor(
      self.network,
      self.protocol,
      execution=self.eval_execution,
      precision=self.evaluation.precision,
      mesh=self.mesh,
    )
    return Evaluator(
      predictor,
      split,
      num_classes=self.dataset.num_classes,
      label_lookup=self.dataset.label_lookup,
      batch_size=self.evaluation.batch_size * self.mesh.size,
      most_shapes=self.evaluation.shapes,
    )

  def open_splits(self, workdir: Path, splits: Sequence[Split]) -> dict[Split, PreparedSplit]:
    """Prepares splits where needed, checks them and says what is odd.

    Args:
      workdir: Gets the demo set, if the dataset is the demo's.
      splits: Which splits.

    Returns:
      The splits by name.

    Raises:
      UserError: If images or labels are missing, broken or outside the classes.
    """
    source_dir, data_dir = self.data.source_dir, self.data.data_dir
    if self.dataset.name == synthetic.DEMO.name and source_dir is None:
      source_dir = str(workdir / 'demo_set')
      synthetic.write_demo_set(workdir / 'demo_set')
    if source_dir is None:
      opened = open_prepared(self.dataset, splits=splits, data_dir=data_dir)
    else:
      opened = prepare(self.dataset, source_dir, splits=splits, data_dir=data_dir)
    for split in opened.values():
      report_split(split, self.dataset)
    return opened

  def train_batches(self, split: PreparedSplit) -> TrainIterator:
    """This process's part of the endless stream of training batches."""
    return train_batches(
      split,
      self.augment,
      batch_size=self.schedule.batch_size,
      seed=self.schedule.seed,
      label_lookup=self.dataset.label_lookup,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_workers=self.data.workers,
    )


def _dataset(config: ConfigDict) -> Dataset:
  """The dataset that a config describes; for a custom one, together with its `dataset.json`.

  Raises:
    UserError: If the name is unknown, or classes, colors and label map do not fit together.
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


def _frozen(value):
  return tuple(value) if isinstance(value, (list, tuple)) else value


def _values(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
  """The config's values, with what the description beside a custom dataset adds."""
  values = config.to_dict()
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


def _attention(
  config: ConfigDict, network: NonLocalNetConfig, mesh: Mesh, *, precision: str, train: bool
) -> Attention:
  """The attention asked for, if the devices can compute it.

  Raises:
    UserError: If they cannot.
  """
  attention, channels = config.model.attention, network.inner_channels
  devices = list(mesh.devices.flat)
  if attention == 'auto':
    if not network.non_local:
      return 'blocks'
    return fastest_attention(channels, devices, precision=precision, train=train)
  try:
    check_attention(attention, channels, devices[0])
  except UserError as error:
    raise UserError(f'config.model.{error}') from error
  return attention


def _check_values(config: ConfigDict) -> None:
  """Checks what no type can: numbers that must be positive, pairs, and labels of eight bits.

  Raises:
    UserError: If a value is out of its range; the message names its key.
  """
  counts = ('train.steps', 'train.batch_size', 'train.log_every', 'eval.every', 'checkpoint.every')
  counts += ('eval.batch_size', 'eval.shapes', 'train.accumulate', 'train.ohem_min_kept')
  pairs = ('train.scale', 'train.crop', 'train.ratio_range', 'eval.scale')
  windows = ('eval.window_crop', 'eval.window_stride')
  for key in (*counts, 'checkpoint.keep'):
    _expect(_value(config, key) >= 1, config, key, 'a number of at least 1')
  _expect(config.model.width >= 2, config, 'model.width', 'a number of at least 2')
  _expect(0 <= config.model.dropout < 1, config, 'model.dropout', 'in [0, 1)')
  depths = ', '.join(map(str, STAGE_BLOCKS))
  _expect(config.model.depth in STAGE_BLOCKS, config, 'model.depth', f'one of {depths}')
  for key in ('train.precision', 'eval.precision'):
    _expect(_value(config, key) in _PRECISIONS, config, key, f'one of {", ".join(_PRECISIONS)}')
  for key in (*pairs, *(key for key in windows if _value(config, key))):
    value = _value(config, key)
    _expect(len(value) == 2 and min(value) > 0, config, key, 'two positive numbers')
  both = all(_value(config, key) for key in windows) or not any(_value(config, k) for k in windows)
  _expect(both, config, 'eval.window_stride', 'given together with config.eval.window_crop')
  choices = {
    'model.attention': ('blocks', 'cudnn', 'flash', 'auto'),
    'model.convolution': ('fast', 'direct'),
    'eval.protocol': ('v0', 'v1'),
    'optimizer.schedule': ('v0', 'v1'),
    'train.batch_norm': ('global', 'per_device', 'frozen'),
    'train.dtype': ('float32', 'bfloat16'),
  }
  for key, values in choices.items():
    _expect(_value(config, key) in values, config, key, ' or '.join(values))
  has_block = config.model.non_local or config.model.attention in ('blocks', 'auto')
  _expect(has_block, config, 'model.attention', 'blocks without the non-local block')
  _expect(0 <= config.train.ema_decay < 1, config, 'train.ema_decay', 'in [0, 1)')
  _expect(config.optimizer.head_multiplier > 0, config, 'optimizer.head_multiplier', 'positive')
  weights = config.train.class_weights
  _expect(all(weight >= 0 for weight in weights), config, 'train.class_weights', 'not negative')
  if config.data.num_classes is not None:
    _expect(2 <= config.data.num_classes <= 255, config, 'data.num_classes', 'from 2 to 255')
  for key in ('data.ignore_labels', 'data.label_map'):
    _expect(all(0 <= x <= 255 for x in _value(config, key)), config, key, 'from 0 to 255 each')


def _value(config: ConfigDict, key: str) -> Any:
  section, name = key.split('.')
  return config[section][name]


def _expect(holds: bool, config: ConfigDict, key: str, expected: str) -> None:
  if not holds:
    raise UserError(f'config.{key} is {_value(config, key)}; it must be {expected}.')
