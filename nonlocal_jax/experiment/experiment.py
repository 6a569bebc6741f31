"""The `Experiment`: everything that a config sets, typed, with methods to train and evaluate."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from nonlocal_jax.data import synthetic
from nonlocal_jax.data.datasets import Dataset, Split
from nonlocal_jax.data.formats.detection import is_divided, read_folder, with_splits
from nonlocal_jax.data.formats.splits import withdrawn_after_errors
from nonlocal_jax.data.label_values import class_shares
from nonlocal_jax.data.layouts import list_samples
from nonlocal_jax.data.loader import TrainIterator, restored_opencv_threads, train_batches
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat
from nonlocal_jax.data.preparation import prepare
from nonlocal_jax.data.prepared import PreparedSplit, open_prepared
from nonlocal_jax.data.samples import Listing
from nonlocal_jax.data.split_checks import report_split
from nonlocal_jax.data.transforms import AugmentConfig
from nonlocal_jax.errors import UserError, explained_by
from nonlocal_jax.evaluation.evaluate import (
  comparable_miou,
  differences_from_published,
  show_evaluation,
  write_evaluation,
)
from nonlocal_jax.evaluation.evaluator import Evaluation, Evaluator
from nonlocal_jax.evaluation.report import ReportFacts, published_line
from nonlocal_jax.experiment.config import (
  DATA_FLAGS,
  ConfigDict,
  DataConfig,
  EvalConfig,
  read_config,
)
from nonlocal_jax.experiment.recorded import protocol_of_evaluation
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.config import chosen_attention
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.recipes import base_config
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.locks import used_alone
from nonlocal_jax.runtime.parallel import (
  is_first_process,
  over_batch,
  platform_of_mesh,
  replicated,
)
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.training.class_matching import check_order
from nonlocal_jax.training.dry_run import dry_run
from nonlocal_jax.training.initial_weights import InitialWeights, read_initial_weights
from nonlocal_jax.training.loop import train_and_evaluate
from nonlocal_jax.training.memory import StepTooLargeError
from nonlocal_jax.training.mlflow_service import MlflowService
from nonlocal_jax.training.optimizer import OptimizerConfig
from nonlocal_jax.training.run import ScheduleConfig, TrainingRun
from nonlocal_jax.training.run_files import (
  check_same_data,
  check_same_run,
  set_aside_stopped_run,
  write_data_identity,
  write_run_files,
)
from nonlocal_jax.training.trackers import Service
from nonlocal_jax.training.train_step import BatchShape, StepConfig, lower_train_step
from nonlocal_jax.training.wandb_service import WandbService
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import read_weights
from nonlocal_jax.weights.names import find_weights
from nonlocal_jax.weights.released import released_model_of_sha256
from nonlocal_jax.weights.run_checkpoints import has_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """A training and evaluation setup.

  The modules that it calls take its parts; none of them knows this type.

  Attributes:
    name: Name of the experiment.
    dataset: Classes, their colors, and how label values are read.
    data: Where images and labels are stored.
    network: Architecture of the network.
    execution: How the network is computed in training.
    eval_execution: How the network is computed in evaluation, with folded batch normalization.
    protocol: How images are evaluated.
    augment: Augmentation of training samples.
    step: What a training step computes, including its loss.
    balance_classes: Whether the class weights of the loss are computed from the training labels.
    optimizer: Optimizer and learning rate.
    schedule: Length of a run, and when it logs, evaluates and saves.
    evaluation: How an evaluation is computed.
    wandb_project: Project of Weights & Biases that gets the log of training; None for none.
    mlflow_experiment: Experiment of MLflow that gets it; None for none.
    init_backbone: A .pth file with the backbone's initial weights, or their name, see
      `names.find_backbone`; None for random ones.
    mesh: Device mesh.
    values: The config as nested dicts of JSON values, saved with a run and in reports.
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
  balance_classes: bool
  optimizer: OptimizerConfig
  schedule: ScheduleConfig
  evaluation: EvalConfig
  wandb_project: str | None
  mlflow_experiment: str | None
  init_backbone: Path | None
  mesh: Mesh
  values: Mapping[str, Any] = dataclasses.field(repr=False)

  @classmethod
  def from_config(cls, config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Self:
    """Checks a config and makes an experiment of it.

    Args:
      config: See `recipes.base_config`.
      devices: The devices to use; they may come from `jax.experimental.topologies`. None for all.

    Raises:
      UserError: If a value is out of range, values do not fit together, or the devices do not
        support an option. The message names the field.
    """
    return cls(**read_config(config, devices))

  def train(
    self,
    workdir: Path,
    *,
    checkpoint: Path | None = None,
    new_classifier: bool = False,
    match_classes: bool = False,
    ema: bool = False,
  ) -> Evaluation:
    """Trains, and evaluates at intervals and at the end.

    Resumes from the newest checkpoint in `workdir`. A new run starts from `checkpoint`, else from
    `init_backbone`, else from random weights.

    Args:
      workdir: Output directory for checkpoints, the weights with the best mIoU (`best`),
        `config.json`, `model.json`, `log.jsonl`, `train.csv`, `eval.csv`, TensorBoard events,
        `curves.png`, `metrics.json` and `predictions.png`. With several processes, it must be
        shared by all.
      checkpoint: Weights of a whole network: a .pth file, a converted directory, a workdir, or the
        name of a released model.
      new_classifier: Whether to initialize the classifiers of both heads at random instead of
        loading them from `checkpoint`.
      match_classes: Whether to initialize at random only what these have for classes whose name
        `checkpoint` does not have, see `class_matching.matched_classes`.
      ema: Whether to take the moving average that the .pth file `checkpoint` holds.

    Returns:
      The last evaluation.

    Raises:
      UserError: If weights or data are missing or invalid, `workdir` holds another run, a training
        step does not fit in memory, the loss is not finite, or checkpoints cannot be written.
      RunStopped: After SIGTERM or SIGINT, once the state is saved.
    """
    options = {'new_classifier': new_classifier, 'match_classes': match_classes, 'ema': ema}
    self._check_training(checkpoint, options)
    with restored_opencv_threads(), contextlib.ExitStack() as stack:
      if is_first_process():
        busy = f'{workdir} is in use by another run; wait for its end, or choose another workdir.'
        stack.enter_context(used_alone(workdir, busy))
      return self._train_alone(workdir, checkpoint, options)

  def _train_alone(
    self, workdir: Path, checkpoint: Path | None, options: Mapping[str, bool]
  ) -> Evaluation:
    """Trains while no other run uses `workdir`."""
    values = check_same_run(workdir, self.values, base_config().to_dict())
    initial = None
    if not has_checkpoint(workdir):
      initial = self._initial_weights(checkpoint, **options)
    splits = self.open_splits(workdir, ['train', 'val'])
    check_same_data(workdir, self.dataset.classes, splits['train'])
    if is_first_process():
      set_aside_stopped_run(workdir)
      write_run_files(workdir, values, self.description())
      write_data_identity(workdir, splits['train'])
    facts = ReportFacts(
      config=values,
      protocol=self.protocol,
      images=len(splits['val']),
      step=self.schedule.steps,
      more_scores=self.evaluation.more_scores,
    )

    def report(evaluation: Evaluation, step: int) -> None:
      write_evaluation(workdir, evaluation, self.dataset, dataclasses.replace(facts, step=step))
      show_evaluation(evaluation, self.dataset, more=facts.more_scores)

    run = self._training_run(splits, report, self._services(workdir, values))
    ignored = None if initial is not None else checkpoint
    with _too_large_explained(resumes=has_checkpoint(workdir)), explained_by(DATA_FLAGS):
      return train_and_evaluate(run, workdir, initial=initial, ignored_checkpoint=ignored)

  def dry_run(
    self,
    workdir: Path,
    *,
    checkpoint: Path | None = None,
    new_classifier: bool = False,
    match_classes: bool = False,
    ema: bool = False,
  ) -> None:
    """Does all that `train` does before the first step, and prints how long the run would take.

    A few steps are taken, which nothing keeps. Data that is not prepared yet is, and weights that
    are named are downloaded.

    Args:
      workdir: The output directory of the run, whose config must not be another run's.
      checkpoint: See `train`.
      new_classifier: See `train`.
      match_classes: See `train`.
      ema: See `train`.

    Raises:
      UserError: As `train`.
    """
    options = {'new_classifier': new_classifier, 'match_classes': match_classes, 'ema': ema}
    self._check_training(checkpoint, options)
    check_same_run(workdir, self.values, base_config().to_dict())
    with restored_opencv_threads():
      initial = self._initial_weights(checkpoint, **options)
      splits = self.open_splits(workdir, ['train', 'val'])
      check_same_data(workdir, self.dataset.classes, splits['train'])
      run = self._training_run(splits, lambda *_: None)
      with _too_large_explained(resumes=has_checkpoint(workdir)), explained_by(DATA_FLAGS):
        dry_run(run, initial=initial)

  def _check_training(self, checkpoint: Path | None, options: Mapping[str, bool]) -> None:
    """Checks options of a training run that need no data."""
    if checkpoint is None and any(options.values()):
      option = next(name for name, is_set in options.items() if is_set)
      raise UserError(f'--{option} is for the network of a --checkpoint; give one.')
    if options['new_classifier'] and options['match_classes']:
      raise UserError(
        '--new_classifier initializes the classifiers of all classes, --match_classes those of new '
        'ones only: give one of the two.'
      )
    self._check_batch()
    pixels = PixelFormat.of_protocol(self.protocol)
    if self.augment.photometric and pixels != RGB:
      raise UserError(
        'config.train.photometric_distortion changes saturation and hue of RGB, and the images '
        f'have {pixels}: set it to False.'
      )
    if is_first_process():
      for kind, name in (
        (WandbService, self.wandb_project),
        (MlflowService, self.mlflow_experiment),
      ):
        if name:
          kind.check()

  def _initial_weights(
    self, checkpoint: Path | None, *, new_classifier: bool, match_classes: bool, ema: bool
  ) -> InitialWeights:
    """Reads the weights that a new run starts from, once its data is known to be there."""
    self.check_data(['train', 'val'])
    return read_initial_weights(
      self.network,
      self.protocol,
      backbone=self.init_backbone,
      checkpoint=checkpoint,
      new_classifier=new_classifier,
      match_classes=self.dataset.classes if match_classes else None,
      classes=self.dataset.classes,
      ema=ema,
    )

  def _services(self, workdir: Path, config: Mapping[str, Any]) -> list[Service]:
    """The services that get the log."""
    wanted = ((WandbService, self.wandb_project), (MlflowService, self.mlflow_experiment))
    return [kind(name, workdir=workdir, config=config) for kind, name in wanted if name]

  def _training_run(
    self,
    splits: Mapping[Split, PreparedSplit],
    report: Callable[[Evaluation, int], None],
    services: Sequence[Service] = (),
  ) -> TrainingRun:
    """Puts the components of a run together."""
    return TrainingRun(
      name=self.name,
      network=self.network,
      execution=self.execution,
      augment=self.augment,
      step=self._step_for(splits['train']),
      optimizer=self.optimizer,
      schedule=self.schedule,
      dataset=self.dataset,
      split=splits['train'],
      batches=self.train_batches(splits['train']),
      evaluator=self.evaluator(splits['val']),
      report=report,
      mesh=self.mesh,
      services=services,
    )

  def evaluate(
    self,
    checkpoint: Path,
    workdir: Path,
    *,
    overrides: Collection[str] = (),
    ema: bool = False,
  ) -> Evaluation:
    """Evaluates saved weights; prints the scores and writes them to `workdir`.

    What is recorded beside the weights and cannot be set in a config, such as the normalization or
    the pairwise function, is taken from there.

    Args:
      checkpoint: A .pth file, a converted directory, the workdir of a training run, or the name of
        a released model.
      workdir: Output directory, see `evaluate.write_evaluation`.
      overrides: Fields of the config, such as 'eval.scale', that may differ from what is recorded
        beside the weights.
      ema: Whether to take the moving average that a .pth file holds beside the weights.

    Returns:
      The evaluation.

    Raises:
      UserError: If the weights belong to another network, they were tested otherwise than the
        config says, or the data is missing or invalid.
    """
    self.check_data(['val'])
    checkpoint = find_weights(checkpoint)
    description, state = read_weights(checkpoint, ema=ema)
    ours, found = self.network, description.config
    if found != dataclasses.replace(
      found,
      stage_blocks=ours.stage_blocks,
      num_classes=ours.num_classes,
      width=ours.width,
      non_local=ours.non_local,
    ):
      raise UserError(
        f'{checkpoint} holds {found}, but the config describes {ours}; set '
        f'--config.model.width={found.width}, --config.model.depth, --config.data.num_classes and '
        '--config.data.channels to match, or give the Python config of its training.'
      )
    check_order(self.dataset.classes, description.classes, source=str(checkpoint))
    protocol = protocol_of_evaluation(
      self.protocol, description, overrides=overrides, source=str(checkpoint)
    )
    network = dataclasses.replace(found, align_corners=protocol.align_corners)
    try:
      chosen_attention(
        self.eval_execution.attention,
        network,
        list(self.mesh.devices.flat),
        precision=self.evaluation.precision,
        train=False,
      )
    except UserError as error:
      raise UserError(f'config.model.{error}') from error
    split = self.open_splits(workdir, ['val'], protocol=protocol)['val']
    evaluator = self.evaluator(split, network=network, protocol=protocol)
    weights = evaluator.prepared(state)
    del state  # frees the host copy of the weights
    with restored_opencv_threads():
      evaluation = evaluator(weights)
    released = released_model_of_sha256(description.sha256) if description.sha256 else None
    published, differences = None, []
    if released is not None:
      test = (released, self.dataset, protocol)
      conditions = {'images': len(split), 'attention': self.eval_execution.attention}
      published = comparable_miou(*test, **conditions)
      differences = differences_from_published(*test, **conditions)
    facts = ReportFacts(
      config=self.values,
      protocol=protocol,
      images=len(split),
      checkpoint=str(checkpoint),
      sha256=description.sha256,
      published=published,
      not_comparable=tuple(differences),
      more_scores=self.evaluation.more_scores,
    )
    write_evaluation(workdir, evaluation, self.dataset, facts)
    show_evaluation(evaluation, self.dataset, more=self.evaluation.more_scores)
    if published is not None and is_first_process():
      print(published_line(100 * evaluation.scores.mean_iou, published, self.dataset.name))
    return evaluation

  def lower_train_step(self) -> jax.stages.Lowered:
    """Lowers the training step for the mesh without data, see `train_step.lower_train_step`.

    Raises:
      UserError: If the batch size is not a multiple of the number of devices.
    """
    self._check_batch()
    _, tx = self.optimizer.make(self.schedule.steps)
    batch = BatchShape(self.schedule.batch_size, self.augment.crop)
    return lower_train_step(
      self.network, self.execution, tx, self._step_for(None), batch=batch, mesh=self.mesh
    )

  def _step_for(self, split: PreparedSplit | None) -> StepConfig:
    """The step, with class weights by the labels of a split, or of 1, if they are balanced."""
    if not self.balance_classes:
      return self.step
    if split is None:
      weights = (1.0,) * self.dataset.num_classes
    else:
      weights = class_shares(split.label_values, self.dataset).balanced_weights()
    loss = dataclasses.replace(self.step.loss, class_weights=weights)
    return dataclasses.replace(self.step, loss=loss)

  def lower_network(
    self, batch: int, size: tuple[int, int], precision: str | None = None
  ) -> jax.stages.Lowered:
    """Lowers the network as evaluation runs it, with folded batch normalization, without data.

    Args:
      batch: Global batch size.
      size: (height, width) of the images, in pixels.
      precision: Matmul precision, see `jax_default_matmul_precision`; None for that of
        `evaluation`.

    Returns:
      A lowered function of the weights and normalized images (batch, *size, in_channels) float32
      that returns logits at the network's output stride.
    """
    graphdef = nnx.graphdef(NonLocalNet.abstract(self.network, self.eval_execution))

    def logits(state: nnx.State, images: jax.Array) -> jax.Array:
      return nnx.merge(graphdef, state).encode_decode(images)

    over = over_batch(self.mesh)
    jitted = jax.jit(
      logits,
      in_shardings=(replicated(self.mesh), over),
      out_shardings=over,
      compiler_options=compiler_options(
        platform_of_mesh(self.mesh), deterministic=self.eval_execution.deterministic
      ),
    )
    images = jax.ShapeDtypeStruct((batch, *size, self.network.in_channels), jnp.float32)
    with jax.default_matmul_precision(precision or self.evaluation.precision):
      return jitted.lower(state_shapes(self.network), images)

  def _check_batch(self) -> None:
    """Checks that the devices can split a training batch evenly; evaluation pads its batches."""
    size, count, parts = self.schedule.batch_size, self.mesh.size, self.step.accumulate
    if size % (count * parts):
      raise UserError(
        f'config.train.batch_size is {size}, which {counted(count, "device")} cannot share'
        f'{f" in {parts} parts each" if parts > 1 else ""}; make it a multiple of {count * parts}.'
      )

  def description(self) -> ModelDescription:
    """Returns the model description that is saved with the weights of a run."""
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

  def evaluator(
    self,
    split: PreparedSplit,
    *,
    network: NonLocalNetConfig | None = None,
    protocol: EvalProtocol | None = None,
  ) -> Evaluator:
    """Returns an evaluator for a split that runs on all devices of the mesh.

    Args:
      split: The images and labels.
      network: Architecture of the network; None for the config's.
      protocol: How images are tested; None for the config's.
    """
    predictor = Predictor(
      network or self.network,
      protocol or self.protocol,
      execution=self.eval_execution,
      precision=self.evaluation.precision,
      mesh=self.mesh,
    )
    return Evaluator(
      predictor,
      split,
      num_classes=self.dataset.num_classes,
      label_lookup=self.dataset.label_lookup,
      images_per_device=self.evaluation.batch_size,
      most_shapes=self.evaluation.shapes,
      details=self.evaluation.report,
    )

  def check_data(self, splits: Sequence[Split]) -> None:
    """Checks that splits are prepared, or that there are images and labels to prepare.

    Reads no images, and so takes little time: before weights are downloaded, and before data is
    prepared, which takes longer.

    Args:
      splits: Names of the splits.

    Raises:
      UserError: If there are none.
    """
    source_dir = self.data.source_dir
    if self.dataset.name == synthetic.DEMO.name and source_dir is None:
      return  # `open_splits` makes it
    with explained_by(DATA_FLAGS):
      if source_dir is None:
        open_prepared(self.dataset, splits=splits, data_dir=self.data.data_dir)
        return
      found = None
      if self.dataset.layout == 'custom':
        found = read_folder(source_dir)
        if isinstance(found.listing, Listing) and not is_divided(source_dir, found):
          if not found.listing.samples:
            raise UserError(next(iter(found.listing.incomplete.values())))
          return  # `prepare` divides them: that reads all label maps
      for split in splits:
        list_samples(self.dataset, source_dir, split, found)

  def open_splits(
    self, workdir: Path, splits: Sequence[Split], *, protocol: EvalProtocol | None = None
  ) -> dict[Split, PreparedSplit]:
    """Prepares splits if needed, checks them and reports unusual labels.

    Args:
      workdir: Directory in which the demo dataset is generated, if that is the dataset.
      splits: Names of the splits.
      protocol: How images are tested, which tells their format; None for the config's.

    Returns:
      The splits by name.

    Raises:
      UserError: If images or labels are missing, unreadable or of another format, or labels are not
        class indices.
    """
    source_dir, data_dir = self.data.source_dir, self.data.data_dir
    if self.dataset.name == synthetic.DEMO.name and source_dir is None:
      source_dir = str(workdir / 'demo_set')
      synthetic.write_demo_set(workdir / 'demo_set')
    with explained_by(DATA_FLAGS):
      found = None
      if source_dir is not None and self.dataset.layout == 'custom':
        found = with_splits(source_dir, read_folder(source_dir))
      with withdrawn_after_errors(found.written if found else ()):
        if source_dir is None:
          opened = open_prepared(self.dataset, splits=splits, data_dir=data_dir)
        else:
          opened = prepare(
            self.dataset,
            source_dir,
            splits=splits,
            data_dir=data_dir,
            skip_bad=self.data.skip_bad,
            found=found,
          )
        pixels = PixelFormat.of_protocol(protocol or self.protocol)
        for split in opened.values():
          report_split(split, self.dataset, pixels=pixels)
    return opened

  def train_batches(self, split: PreparedSplit) -> TrainIterator:
    """Returns an infinite iterator over this process's share of the training batches."""
    return train_batches(
      split,
      self.augment,
      batch_size=self.schedule.batch_size,
      seed=self.schedule.seed,
      label_lookup=self.dataset.label_lookup,
      pixels=PixelFormat.of_protocol(self.protocol),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_workers=self.data.workers,
    )


@contextlib.contextmanager
def _too_large_explained(*, resumes: bool) -> Iterator[None]:
  """Names the flags that make a training step fit."""
  try:
    yield
  except StepTooLargeError as error:
    message = error.message('--config.train.')
    if resumes and error.remedies:
      message = f'{message[:-1]}; of these, a run that resumes can change only rematerialize.'
    raise UserError(message) from error
