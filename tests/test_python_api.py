"""Networks in Python: what is refused by name, and forward-mode differentiation."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nonlocal_jax
from nonlocal_jax import EvalProtocol, NonLocalBlock, normalize, resize
from nonlocal_jax.inference.pretrained import PretrainedModel
from nonlocal_jax.models import Execution, NonLocalNetConfig

WEIGHTS = Path(__file__).parent / 'data' / 'converted_of_2026_11'
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def model():
  return nonlocal_jax.load(WEIGHTS)


@pytest.fixture(scope='module')
def module():
  return nonlocal_jax.load_module(WEIGHTS)


def test_images_that_the_network_cannot_take_are_refused(model, module):
  images = normalize(IMAGE[None])
  for network in (module, module.encode_decode, model.logits):
    with pytest.raises(ValueError, match=r'uint8, expected .*floats.* nonlocal_jax\.normalize'):
      network(jnp.asarray(IMAGE[None]))
    with pytest.raises(ValueError, match=r'\(32, 48, 3\).*, expected \(n, h, w, 3\)'):
      network(images[0])
    with pytest.raises(ValueError, match=r'\(1, 32, 48, 2\).*, expected \(n, h, w, 3\)'):
      network(images[..., :2])
  with pytest.raises(ValueError, match=r'\(32, 48, 3\), expected \(n, h, w, c\)'):
    normalize(IMAGE)


def test_features_that_the_block_cannot_take_are_refused():
  block = NonLocalBlock(8, rngs=nnx.Rngs(0))
  for shape, dtype in (((2, 3, 8), float), ((1, 2, 3, 4), float), ((1, 2, 3, 8), int)):
    with pytest.raises(ValueError, match=r'expected \(n, h, w, 8\) of a floating dtype'):
      block(jnp.zeros(shape, dtype))


def test_arrays_of_jax_are_predicted_and_resized(model):
  np.testing.assert_array_equal(model.predict(jnp.asarray(IMAGE)), model.predict(IMAGE))
  np.testing.assert_array_equal(resize(jnp.asarray(IMAGE), (96, 64)), resize(IMAGE, (96, 64)))
  with pytest.raises(ValueError, match='expected a positive width and height'):
    resize(IMAGE, (0, 64))
  with pytest.raises(TypeError, match='NoneType, expected a path, a PIL image or an array'):
    model.predict(None)


def test_corners_of_protocol_and_network_are_the_same(model, module):
  other = dataclasses.replace(model.protocol, align_corners=not model.protocol.align_corners)
  for call in (
    lambda: model.with_protocol(other),
    lambda: PretrainedModel.from_module(module, protocol=other),
  ):
    with pytest.raises(ValueError, match='but the network has align_corners='):
      call()
  same = EvalProtocol(align_corners=module.config.align_corners, scale=(96, 64))
  assert model.with_protocol(same).protocol == same


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'attention': 'foo'}, "attention is 'foo', expected one of blocks, cudnn, flash, auto"),
    ({'precision': 'foo'}, "precision is 'foo', expected one of highest, high, default"),
  ],
)
def test_unknown_choices_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    nonlocal_jax.load(WEIGHTS, **options)


@pytest.mark.parametrize(
  'field',
  [{'num_classes': 0}, {'width': 1}, {'in_channels': 0}, {'reduction': 0}, {'dropout': 1.0}],
)
def test_configs_out_of_range_are_refused(field):
  (name,) = field
  with pytest.raises(ValueError, match=f'{name} is {field[name]}, expected a number'):
    NonLocalNetConfig.from_depth(14, **{'num_classes': 3, **field})
  with pytest.raises(ValueError, match="mode is 'x', expected one of embedded_gaussian"):
    NonLocalNetConfig.from_depth(14, num_classes=3, mode='x')


def test_folded_networks_are_not_trained():
  folded = nonlocal_jax.load_module(WEIGHTS, execution=Execution(batch_norm='folded'))
  with pytest.raises(ValueError, match="batch_norm is 'folded', which is for prediction only"):
    folded.training_logits(normalize(IMAGE[None]), rngs=nnx.Rngs(0))


def test_forward_mode_of_the_whole_network():
  """With `Execution()`; against central differences in float64."""
  with jax.enable_x64(True):
    graphdef, state = nnx.split(nonlocal_jax.load_module(WEIGHTS, execution=Execution()))
    state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
    images = normalize(IMAGE[None]).astype(jnp.float64)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(images.shape))

    @jax.jit
    def along(t):
      return nnx.merge(graphdef, state)(images + t * direction)

    _, tangent = jax.jvp(along, (0.0,), (1.0,))
    step = 1e-6
    difference = (along(step) - along(-step)) / (2 * step)
  np.testing.assert_allclose(tangent, difference, rtol=1e-5, atol=1e-5 * np.abs(tangent).max())


def test_a_model_is_shown_in_one_line(peer_checkpoint):
  shown = repr(nonlocal_jax.load(peer_checkpoint))
  assert shown.startswith("PretrainedModel(depth=50, width=8, num_classes=19, dataset='custom'")
  assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
  ('image', 'what'),
  [
    (np.full((8, 9, 3), np.nan), r'\(8, 9, 3\) float64'),
    (np.zeros((8, 9, 3), np.int64), r'\(8, 9, 3\) int64'),
    (np.zeros((8, 9, 4), np.uint8), r'\(8, 9, 4\) uint8'),
    (np.zeros((3, 8, 9), np.uint8), r'\(3, 8, 9\) uint8'),
    (np.zeros((1, 8, 9, 3), np.uint8), r'\(1, 8, 9, 3\) uint8'),
    (np.zeros((0, 9, 3), np.uint8), r'\(0, 9, 3\) uint8'),
  ],
)
def test_arrays_that_are_no_images_are_refused(image, what, peer_checkpoint):
  model = nonlocal_jax.load(peer_checkpoint)
  for given in (image, [image]):
    with pytest.raises(ValueError, match=rf'image is {what}, expected \(h, w, 3\) uint8 RGB'):
      model.predict(given)


@pytest.mark.parametrize(
  'images',
  [np.zeros((8, 9, 3), np.float32), np.zeros((1, 8, 9, 3), np.uint8), np.ones((1, 3, 8, 9))],
)
def test_images_that_are_not_normalized_are_refused(images, peer_checkpoint):
  with pytest.raises(
    ValueError, match=r'expected \(n, h, w, 3\) of floats as nonlocal_jax.normalize'
  ):
    nonlocal_jax.load(peer_checkpoint).logits(images)


def test_numbers_of_numpy_become_those_of_python():
  """JSON cannot hold others."""
  protocol = EvalProtocol(
    scale=tuple(np.array([512, 256])),
    pad_multiple=np.int32(32),
    ratios=np.array([0.5, 1.0]),
    mean=tuple(np.float32([1.5, 2, 3])),
  )
  plain = EvalProtocol(scale=(512, 256), pad_multiple=32, ratios=(0.5, 1.0), mean=(1.5, 2.0, 3.0))
  assert protocol.to_json() == plain.to_json()
  assert EvalProtocol.from_json(protocol.to_json()) == protocol
  config = NonLocalNetConfig(
    stage_blocks=tuple(np.array([1, 1, 1, 1])), num_classes=np.int64(3), width=np.uint8(4)
  )
  assert json.loads(json.dumps(config.to_dict()))['width'] == 4
  assert config == NonLocalNetConfig(stage_blocks=(1, 1, 1, 1), num_classes=3, width=4)


@pytest.mark.parametrize(
  'fields',
  [{'width': 4.5}, {'num_classes': True}, {'stage_strides': (1, 2, 1, 1.5)}, {'reduction': '2'}],
)
def test_numbers_of_a_network_are_whole(fields):
  with pytest.raises(ValueError, match=f'{next(iter(fields))} is '):
    NonLocalNetConfig(**{'stage_blocks': (1, 1, 1, 1), 'num_classes': 3, **fields})
