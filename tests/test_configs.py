"""The 16 published models: each number against mmsegmentation's own configs and model index."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from flax import nnx

from nonlocal_jax.cli.config import read_config
from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.recipes import base_config, demo_config, fields_of
from nonlocal_jax.weights.released import RELEASED, released_model, released_model_of_file
from tests import peer

CONFIGS = Path(__file__).parents[1] / 'configs'
MODELS = [model for model in RELEASED if not model.replaced]
PARAMETERS = {  # depth, classes: trainable parameters of the original
  (50, 19): 50_023_814,
  (50, 21): 50_025_354,
  (50, 150): 50_124_684,
  (101, 19): 69_015_942,
  (101, 21): 69_017_482,
  (101, 150): 69_116_812,
}


def read(name: str, *arguments: str):
  """What `configs/NAME.py` gives."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*arguments)


def config_of(model):
  return read(f'{model.dataset}_r{model.depth}', model.variant)


def peer_name(model) -> str:
  """E.g. 'nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024'."""
  gpus = 'xb2' if model.dataset == 'cityscapes' else 'xb4'
  crop = 'x'.join(map(str, model.crop))
  return f'nonlocal_r{model.depth}-d8_4{gpus}-{model.steps // 1000}k_{model.dataset}-{crop}'


@pytest.fixture(scope='session')
def index():
  """Mmsegmentation's own index of the released models, by config name."""
  models = yaml.safe_load((peer.CONFIGS / 'metafile.yaml').read_text())['Models']
  return {model['Name']: model for model in models}


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model.name)
def test_published_numbers(model, index):
  entry = index[peer_name(model)]
  published = entry['Results']['Metrics']
  config = config_of(model)
  assert config.name == model.name
  assert config.published.checkpoint == entry['Weights'].rsplit('/', 1)[1]
  assert config.published.miou == published['mIoU']
  assert config.published.miou_ms_flip == published.get('mIoU(ms+flip)')


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model.name)
def test_recipe(model):
  ours, theirs = config_of(model), peer.read_config(peer_name(model))
  transforms = {transform['type']: transform for transform in theirs.train_pipeline}
  resize, crop = transforms['RandomResize'], transforms['RandomCrop']
  assert ours.train.scale == resize.scale
  assert ours.train.ratio_range == resize.ratio_range
  assert ours.train.crop == crop.crop_size
  assert ours.train.cat_max_ratio == crop.cat_max_ratio
  assert ours.train.flip_probability == transforms['RandomFlip'].prob
  assert ours.train.photometric_distortion == ('PhotoMetricDistortion' in transforms)
  assert ours.train.batch_size == 4 * theirs.train_dataloader.batch_size
  assert ours.train.steps == theirs.train_cfg.max_iters
  assert ours.eval.every == theirs.train_cfg.val_interval
  assert ours.checkpoint.every == theirs.default_hooks.checkpoint.interval
  assert ours.train.log_every == theirs.default_hooks.logger.interval
  assert ours.train.auxiliary_weight == theirs.model.auxiliary_head.loss_decode.loss_weight

  sgd, (poly,) = theirs.optimizer, theirs.param_scheduler
  assert ours.optimizer.learning_rate == sgd.lr
  assert ours.optimizer.momentum == sgd.momentum
  assert ours.optimizer.weight_decay == sgd.weight_decay
  assert ours.optimizer.power == poly.power
  assert ours.optimizer.min_learning_rate == poly.eta_min
  assert poly.end == theirs.train_cfg.max_iters

  (test_resize,) = (t for t in theirs.test_pipeline if t['type'] == 'Resize')
  assert ours.eval.scale == test_resize.scale
  test, protocol = theirs.model.test_cfg, Experiment.from_config(ours).protocol
  if test.mode == 'whole':
    assert protocol.window_crop is None
  else:
    assert (protocol.window_crop, protocol.window_stride) == (test.crop_size, test.stride)


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model.name)
def test_network(model):
  config, theirs = config_of(model), peer.read_config(peer_name(model)).model
  assert config.model.depth == theirs.backbone.depth
  assert config.model.width == 64
  assert config.model.dropout == theirs.decode_head.dropout_ratio
  assert config.model.align_corners == theirs.decode_head.align_corners
  assert config.data.num_classes == theirs.decode_head.num_classes
  network = Experiment.from_config(config).network
  assert network.align_corners == config.model.align_corners
  params = nnx.split_state(state_shapes(network), nnx.Param, ...)[0]
  count = sum(v.size for _, v in nnx.to_flat_state(params))
  assert count == PARAMETERS[config.model.depth, config.data.num_classes]


@pytest.mark.parametrize('name', PUBLISHED)
def test_dataset(name):
  config = read(f'{name}_r50')
  dataset = Experiment.from_config(config).dataset
  assert dataset.num_classes == config.data.num_classes
  assert dataset.reduce_zero_label == config.data.reduce_zero_label == (name == 'ade20k')


def test_other_classes_for_a_published_set():
  config = read('cityscapes_r50')
  config.data.label_map = (0, 0, 1)
  config.data.ignore_labels = (2,)
  dataset = Experiment.from_config(config).dataset
  assert dataset.classes == ('road/sidewalk', 'building')
  assert dataset.label_lookup[[0, 1, 2, 3]].tolist() == [0, 0, 255, 255]
  assert Experiment.from_config(config).network.num_classes == 2
  config.data.classes = ('ground', 'house')
  assert Experiment.from_config(config).dataset.classes == ('ground', 'house')
  config.data.num_classes = 3
  with pytest.raises(UserError, match='num_classes is 3, but cityscapes has 2 classes'):
    Experiment.from_config(config)


def test_custom_set_is_described_beside_its_images_and_by_the_config(tmp_path):
  config = read('custom')
  config.data.source_dir = str(tmp_path)
  description = {'classes': ['sky', 'sea', 'ship'], 'ignore_labels': [7], 'reduce_zero_label': True}
  (tmp_path / 'dataset.json').write_text(json.dumps(description))
  assert Experiment.from_config(config).network.num_classes == 3
  dataset = Experiment.from_config(config).dataset
  assert dataset.classes == ('sky', 'sea', 'ship')
  assert dataset.label_lookup[[0, 1, 7, 8]].tolist() == [255, 0, 255, 7]
  config.data.reduce_zero_label = False  # what the config says goes first
  config.data.ignore_labels = (8,)
  assert Experiment.from_config(config).dataset.label_lookup[[0, 1, 7, 8]].tolist() == [
    0,
    1,
    7,
    255,
  ]


def test_there_are_sixteen_and_the_replaced_one():
  assert len(MODELS) == 16
  assert len({model.name for model in MODELS}) == 16
  assert len({model.sha256_prefix for model in RELEASED}) == 17
  assert all(re.fullmatch('[0-9a-f]{8}', model.sha256_prefix) for model in RELEASED)


def test_without_a_variant_the_best_published_is_taken():
  assert read('cityscapes_r50').name == 'nonlocal_r50-d8_769x769_80k_cityscapes'
  assert read('ade20k_r101').name == 'nonlocal_r101-d8_512x512_160k_ade20k'
  assert read('voc12aug_r50').name == 'nonlocal_r50-d8_512x512_40k_voc12aug'


def test_unknown_variant_is_an_error():
  with pytest.raises(UserError, match=r"no variant '20k' .* give one of 512x512_80k, 512x512_160k"):
    read('ade20k_r50', '20k')


def test_released_models_by_file_name():
  corner = released_model('nonlocal_r50-d8_769x769_40k_cityscapes')
  assert released_model_of_file(corner.file) is corner
  assert corner.align_corners
  assert corner.protocol.scale == (2049, 1025)
  assert released_model_of_file(f'{corner.name}.pth') is None
  replaced = 'nonlocal_r101-d8_512x512_160k_ade20k_20200616_003422-affd0f8d.pth'
  found = released_model_of_file(replaced)
  assert found is not None
  assert found.replaced
  assert released_model_of_file('my_model.pth') is None


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('import json\ndef get_config():\n  return json.x', 'fails in line 3: AttributeError: module'),
    ('def get_config():\n  retrun 5', 'fails in line 2: SyntaxError: invalid syntax.'),
    ('import no_such_module', "fails in line 1: ModuleNotFoundError: No module named 'no_such"),
    ('x = 1', r'has no get_config\(\); begin with a file in configs/.'),
    ('def get_config():\n  return None', 'returns no config; begin with that of a file'),
  ],
)
def test_errors_in_a_config_file_are_said_with_their_line(text, said, tmp_path, monkeypatch):
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # of a test before
  path = tmp_path / 'config.py'
  path.write_text(text)
  with pytest.raises(UserError, match=f'{path} {said}'):
    read_config([f'--config={path}'])


@pytest.mark.parametrize(
  ('setting', 'said'),
  [
    ('train.class_weights=("a","b")', 'numbers that are finite and not negative'),
    ('train.crop=("a","b")', 'two positive numbers'),
    ('train.crop=(64.5,64)', 'whole numbers'),
    ('data.ignore_labels=("a",)', 'whole numbers from 0 to 255'),
    ('model.width=1', 'a number of at least 2'),
    ('train.precision=hihgest', 'one of default, high'),
    ('seed=-1', 'a number of at least 0'),
    ('train.steps=2147483648', 'below 2'),
    ('train.ratio_range=(0.5,float("nan"))', 'two positive numbers'),
    ('train.class_weights=(1,1e999)', 'numbers that are finite and not negative'),
    ('data.classes=("a",3)', 'names'),
    ('data.palette=((1,2,3),(1,2,256))', r'\(red, green, blue\) of each class'),
    ('train.flip_probability=1.01', r'a number in \[0, 1\]'),
    ('optimizer.momentum=1', r'a number in \[0, 1\)'),
  ],
)
def test_values_of_a_wrong_kind_are_refused(setting, said):
  config = read_config(['--config=demo', f'--config.{setting}'])
  with pytest.raises(
    UserError, match=rf'^config\.{setting.split("=")[0]} is .*; it must be {said}'
  ):
    Experiment.from_config(config)


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf', '-1'])
def test_every_float_must_be_finite_and_in_range(value):
  fields = [
    name for name in fields_of(base_config()) if isinstance(field_of(base_config(), name), float)
  ]
  assert len(fields) > 10
  for name in fields:
    config = read_config(['--config=demo', f'--config.{name}={value}'])
    with pytest.raises(UserError, match=rf'^config\.{name} is {float(value)}; it must be a '):
      Experiment.from_config(config)


def field_of(config, name):
  """A field of a config by its full name."""
  for part in name.split('.'):
    config = config[part]
  return config


@pytest.mark.parametrize(
  ('setting', 'sentence'),
  [
    ('train.steps=abc', "config.train.steps is 'abc'; it must be a whole number."),
    ('model.width=3.5', "config.model.width is '3.5'; it must be a whole number."),
    ('optimizer.power=x', "config.optimizer.power is 'x'; it must be a number."),
    ('eval.keep_ratio=maybe', "config.eval.keep_ratio is 'maybe'; it must be True or False."),
    ('trian.steps=3', 'there is no field config.trian.steps; the nearest is config.train.steps.'),
    ('steps=3', 'there is no field config.steps; the nearest is config.train.steps.'),
    ('zyx=3', 'there is no field config.zyx, see --print-config.'),
    ('train=3', 'config.train is a section; set its fields, such as config.train.accumulate.'),
  ],
)
def test_errors_of_flags_name_the_full_field(setting, sentence):
  with pytest.raises(UserError) as error:
    read_config(['--config=demo', f'--config.{setting}'])
  assert str(error.value) == sentence


def test_a_misspelt_field_in_a_file_is_refused():
  config = demo_config()
  config.train.stepz = 5
  with pytest.raises(
    UserError, match=r'no field config\.train\.stepz; the nearest is config\.train\.steps'
  ):
    Experiment.from_config(config)


@pytest.mark.parametrize('arguments', [['={}'], ['', '{}']])
@pytest.mark.parametrize('value', ['balanced', "('balanced',)"])
def test_class_weights_may_be_balanced(arguments, value):
  """A field of numbers that may be one word."""
  start, *rest = (argument.format(value) for argument in arguments)
  config = read_config(['--config=demo', f'--config.train.class_weights{start}', *rest])
  experiment = Experiment.from_config(config)
  assert experiment.balance_classes
  assert experiment.step.loss.class_weights is None


@pytest.mark.parametrize('value', ["('balance',)", "('balanced',1.0)", "('balanced','balanced')"])
def test_other_words_are_no_class_weights(value):
  config = read_config(['--config=demo', f'--config.train.class_weights={value}'])
  with pytest.raises(UserError, match='finite and not negative, or balanced'):
    Experiment.from_config(config)
