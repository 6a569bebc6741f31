"""The programs of the published models for CUDA: built whole from shapes, looked at, never run."""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from nonlocal_jax.experiment import Experiment
from nonlocal_jax.inference import predictor as predicting
from nonlocal_jax.inference.buckets import shapes_for
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.views import views_of
from nonlocal_jax.models import Execution, NonLocalNetConfig
from nonlocal_jax.models.config import STAGE_BLOCKS
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.recipes import published_config
from nonlocal_jax.training.train_step import BatchShape, TrainState, lower_train_step
from nonlocal_jax.weights.released import RELEASED

GPUS = 4  # of the published recipes
# Those that differ in more than the number of steps.
MODELS = {
  (model.dataset, model.depth, model.crop): model for model in RELEASED if not model.replaced
}
CLASSES = {'cityscapes': 19, 'ade20k': 150, 'voc12aug': 21}
# Convolutions with a stride: of the stem, the first block of the second stage and its shortcut.
STRIDED = 3
# Sizes of images as they are in the sets.
SIZES = {
  'cityscapes': [(1024, 2048)],
  'ade20k': [(512, 683), (768, 512)],
  'voc12aug': [(375, 500), (500, 333)],
}


class Programs:
  """Stands in for `jax.jit`: builds programs for CUDA in place of compiling and running them.

  Attributes:
    texts: Their text in StableHLO, by the function's name, one for all calls with equal shapes.
    options: What `jax.jit` was called with, by the function's name.
  """

  def __init__(self, jit):
    self._jit = jit
    self.texts: dict[str, str] = {}
    self.options: dict[str, Mapping] = {}

  def __call__(self, function, **options):
    name, jitted = function.__name__, self._jit(function, **options)
    self.options[name] = options

    @functools.cache
    def build(treedef, shapes):
      arrays = [x if isinstance(x, int) else jax.ShapeDtypeStruct(*x) for x in shapes]
      arguments, keywords = jax.tree.unflatten(treedef, arrays)
      traced = jitted.trace(*arguments, **keywords)
      assert name not in self.texts, f'{name} is built for more than one shape'
      self.texts[name] = traced.lower(lowering_platforms=('cuda',)).as_text()
      return traced.out_info

    def call(*arguments, **keywords):
      leaves, treedef = jax.tree.flatten((arguments, keywords))
      shapes = [x if isinstance(x, int) else (x.shape, x.dtype) for x in leaves]
      return build(treedef, tuple(shapes))

    return call


def decode_convolutions(depth: int) -> int:
  """Of the stem, of each bottleneck, of four shortcuts and of the decode head."""
  return 3 + 3 * sum(STAGE_BLOCKS[depth]) + 4 + 8


def experiment_of(model, **chosen) -> Experiment:
  """The share of one of the GPUs."""
  config = published_config(model.dataset, model.depth, model.variant)
  config.train.batch_size //= GPUS
  return on_gpu(Experiment.from_config(config, jax.devices()[:1]), **chosen)


def on_gpu(experiment: Experiment, **chosen) -> Experiment:
  """The same experiment, computed as on a GPU."""
  train = Execution.for_platform('gpu', **chosen)
  evaluation = dataclasses.replace(train, batch_norm='folded')
  return dataclasses.replace(experiment, execution=train, eval_execution=evaluation)


def training_program(experiment: Experiment) -> tuple[str, TrainState]:
  """The step on one device, and the shapes of its state."""
  _, tx = experiment.optimizer.make(experiment.schedule.steps)
  create = functools.partial(TrainState.create, tx=tx, seed=0)
  state = jax.eval_shape(create, state_shapes(experiment.network))
  lowered = lower_train_step(
    experiment.network,
    experiment.execution,
    tx,
    experiment.step,
    batch=BatchShape(experiment.schedule.batch_size, experiment.augment.crop),
    mesh=experiment.mesh,
    platform='gpu',
  )
  return lowered.as_text(), state


def evaluation_programs(experiment: Experiment, monkeypatch) -> Programs:
  """Those that the first image of the set is evaluated with."""
  programs, protocol = Programs(jax.jit), experiment.protocol
  with monkeypatch.context() as patched:
    patched.setattr(jax, 'jit', programs)
    patched.setattr(predicting, 'platform_of_mesh', lambda _: 'gpu')
    predictor = Predictor(
      experiment.network,
      protocol,
      execution=experiment.eval_execution,
      precision=experiment.evaluation.precision,
      mesh=experiment.mesh,
    )
  sizes = SIZES[experiment.dataset.name]
  shape = shapes_for(sizes, protocol, most=1)[sizes[0]]
  assert shape.padded == (len(sizes) > 1)
  views = [np.zeros((*view.size[:2], 3), np.uint8) for view in views_of(protocol, sizes[0])]
  logits = predictor.logits(state_shapes(experiment.network), shape, [views], [sizes[0]])
  predictor.labels(logits)
  predictor.confident_labels(logits)
  return programs


def precisions(program: str) -> set[str]:
  """Of all convolutions and matrix products."""
  pattern = r'stablehlo\.(?:convolution|dot_general).* precision(?:_config)? = \[(.*?)\]'
  return {name for pair in re.findall(pattern, program) for name in re.findall(r'[A-Z]+', pair)}


def check_no_convolution_is_dilated(program: str, convolutions: int) -> None:
  """CuDNN is slow at these: a kernel's gradient has the dilation as its window's stride."""
  kinds = collections.Counter()
  for line in re.findall(r'stablehlo\.convolution.*', program):
    (dimensions,) = re.findall(r'dim_numbers = (\S+ \S+ \S+ \S+)', line.replace(', ', ' '))
    of_kernel = dimensions.startswith('[f')
    (window,) = re.findall(r'window = \{(.*?)\}', line)
    found = {
      key: re.search(rf'{key} = \[(\d+), (\d+)\]', window)
      for key in ('stride', 'lhs_dilate', 'rhs_dilate')
    }
    values = {key: match and max(int(x) for x in match.groups()) for key, match in found.items()}
    kinds[of_kernel, *((values[key] or 1) for key in found)] += 1
  plain = convolutions - STRIDED
  assert kinds == {
    (False, 1, 1, 1): plain + plain,  # forwards, and gradients of inputs
    (False, 2, 1, 1): STRIDED,
    (False, 1, 2, 1): STRIDED - 1,  # but for that of the images
    (True, 1, 1, 1): plain,
    (True, 1, 1, 2): STRIDED,
  }


def check_attention_is_in_blocks(program: str, n: int, sides: tuple[int, int]) -> None:
  """Some array holds weights of queries over all keys, and none of all queries over them."""
  positions = sides[0] * sides[1]
  assert f'{positions}x{positions}' not in program
  counts = set(map(int, re.findall(rf'tensor<{n}x(\d+)x{positions}xf32>', program)))
  block = -(
    -positions
    // -(-positions // (Execution.for_platform('gpu').pairwise_weights // (n * positions)))
  )
  assert counts == {256, block}  # inner channels of the transposed keys, and queries


@pytest.mark.parametrize(
  'model',
  [
    pytest.param(model, id=model.name, marks=[pytest.mark.slow] if model.depth > 50 else [])
    for model in MODELS.values()
  ],
)
def test_training_step(model, monkeypatch):
  made, jit = [], jax.jit

  def keep_options(function, **options):
    made.append(options)
    return jit(function, **options)

  experiment = experiment_of(model)
  with monkeypatch.context() as patched:
    patched.setattr(jax, 'jit', keep_options)
    program, state = training_program(experiment)
  (options,) = made
  assert options['compiler_options'] == {}
  assert 'scatter' not in program
  # Each forwards and both gradients, but for that of the images: none by Winograd or as a product.
  convolutions = decode_convolutions(model.depth) + 2
  assert program.count('stablehlo.convolution') == 3 * convolutions - 1
  check_no_convolution_is_dilated(program, convolutions)
  n, (height, width) = experiment.schedule.batch_size, model.crop
  assert n == {'cityscapes': 2, 'ade20k': 4, 'voc12aug': 4}[model.dataset]
  assert f': tensor<{n}x{height}x{width}x3xui8>' in program
  assert program.count('tf.aliasing_output') == len(jax.tree.leaves(state))
  sides = -(-height // 8), -(-width // 8)
  check_attention_is_in_blocks(program, n, sides)
  classes = CLASSES[model.dataset]
  logits = rf'stablehlo\.convolution.*-> tensor<{n}x{sides[0]}x{sides[1]}x{classes}xf32>'
  assert len(re.findall(logits, program)) == 2  # of both heads


@pytest.mark.parametrize('model', MODELS.values(), ids=lambda model: model.name)
def test_evaluation(model, monkeypatch):
  programs = evaluation_programs(experiment_of(model), monkeypatch)
  assert all(options['compiler_options'] == {} for options in programs.options.values())
  network = programs.texts['window_logits']
  assert network.count('stablehlo.convolution') == decode_convolutions(model.depth)
  assert precisions(network) == {'HIGHEST'}  # no TF32
  images = {
    'cityscapes': (3, 769, 769) if model.protocol.window_crop else (1, 1024, 2048),
    'ade20k': (1, 768, 683),
    'voc12aug': (1, 769, 683),
  }[model.dataset]
  n, height, width = images
  assert f': tensor<1x{n}x{height}x{width}x3xui8>' in network
  sides, classes = (-(-height // 8), -(-width // 8)), CLASSES[model.dataset]
  check_attention_is_in_blocks(network, n, sides)
  assert f'-> (tensor<1x{n}x{sides[0]}x{sides[1]}x{classes}xf32>' in network
  assert re.search(r'@main\(.*-> \(tensor<1x\d+x\d+xui8>[^,]*\) \{', programs.texts['predict'])
  confident = programs.texts['predict_confidence']
  assert re.search(r'@main\(.*-> \(tensor<1x\d+x\d+xui8> .*, tensor<1x\d+x\d+xf32> ', confident)


def test_attention_through_cudnn_reaches_training_and_evaluation(monkeypatch):
  for name, answer in {'check_cudnn_version': 91000, 'check_compute_capability': True}.items():
    monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)
  model = next(model for model in MODELS.values() if model.crop == (769, 769))
  experiment = experiment_of(model, attention='cudnn')
  network = NonLocalNetConfig.from_depth(14, num_classes=19, width=16, align_corners=True)
  experiment = dataclasses.replace(experiment, network=network)
  program, _ = training_program(experiment)
  calls = ['fmhaSoftmax', 'fmhaSoftmaxBackward']
  assert sorted(re.findall(r'@__cudnn\$(\w+)\(', program)) == calls
  assert not re.search(r'(9409|9410)x(9409|9410)', program)
  network = evaluation_programs(experiment, monkeypatch).texts['window_logits']
  assert re.findall(r'@__cudnn\$(\w+)\(', network) == calls[:1]


@pytest.mark.parametrize(
  'options',
  [
    {'accumulate': 2},
    {'rematerialize': True},
    {'dtype': 'bfloat16'},
    {'batch_norm': 'per_device'},
    {'batch_norm': 'frozen', 'ema_decay': 0.9},
    {'ohem': True, 'class_weights': (1.0,) * 19, 'avg_non_ignore': True},
  ],
  ids=lambda options: next(iter(options)),
)
def test_deterministic_training(options, monkeypatch):
  """Gradients are not scattered, which a GPU does in any order, and XLA is told to keep it so."""
  config = published_config('cityscapes', 50, '769x769_40k')
  config.model.depth, config.model.width = 14, 8
  config.train.batch_size, config.train.crop, config.train.deterministic = 2, (65, 65), True
  config.train.update(options)
  experiment = Experiment.from_config(config, jax.devices()[:1])
  names = ('batch_norm', 'rematerialize', 'deterministic')
  experiment = on_gpu(experiment, **{name: getattr(experiment.execution, name) for name in names})
  made, jit = [], jax.jit

  def keep_options(function, **options):
    made.append(options)
    return jit(function, **options)

  with monkeypatch.context() as patched:
    patched.setattr(jax, 'jit', keep_options)
    program, _ = training_program(experiment)
  assert 'scatter' not in program
  deterministic = {'xla_gpu_deterministic_ops': True, 'xla_gpu_exclude_nondeterministic_ops': True}
  assert [options['compiler_options'] for options in made] == [deterministic]
  programs = evaluation_programs(experiment, monkeypatch)
  assert [x['compiler_options'] for x in programs.options.values()] == [deterministic] * 4
  scattering = dataclasses.replace(experiment.execution, max_pool='scatter')
  program, _ = training_program(dataclasses.replace(experiment, execution=scattering))
  assert program.count('select_and_scatter') > 0
