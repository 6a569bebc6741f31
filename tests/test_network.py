"""The whole network, forwards and in training, against mmsegmentation."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from nonlocal_jax.errors import UserError
from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.folding import fold_batch_norms
from nonlocal_jax.models.heads import dropout_channels
from nonlocal_jax.models.nonlocal_net import state_shapes
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.training.optimizer import poly_schedule, sgd
from nonlocal_jax.training.train_step import StepConfig, TrainState, make_train_step
from nonlocal_jax.weights.state_dict import from_state_dict, infer_config, to_state_dict
from tests import peer


def jax_logits(model, images: np.ndarray, *, align_corners: bool) -> np.ndarray:
  """Logits of our network with the peer's weights."""
  arrays = peer.state_dict(model)
  config = dataclasses.replace(infer_config(arrays, source='peer'), align_corners=align_corners)
  state = from_state_dict(arrays, config, source='peer')
  graphdef = nnx.graphdef(NonLocalNet.abstract(config))
  return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, images))


@pytest.mark.parametrize(
  ('config', 'align_corners', 'num_classes', 'size'),
  [
    ('nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024', False, 19, (96, 128)),
    ('nonlocal_r50-d8_4xb2-40k_cityscapes-769x769', True, 19, (97, 101)),
    ('nonlocal_r50-d8_4xb4-80k_ade20k-512x512', False, 150, (61, 83)),
    ('nonlocal_r101-d8_4xb4-20k_voc12aug-512x512', False, 21, (64, 80)),
  ],
)
def test_logits_equal_the_original(rng, config, align_corners, num_classes, size):
  model = peer.build(config, width=8)
  images = rng.normal(size=(2, *size, 3)).astype(np.float32)
  expected = peer.logits(model, images)
  actual = jax_logits(model, images, align_corners=align_corners)
  assert actual.shape == (2, *size, num_classes)
  assert np.abs(actual - expected).max() <= 1e-3 * expected.std()
  assert np.mean(actual.argmax(-1) == expected.argmax(-1)) >= 0.9999


def test_folded_batch_norms_are_those_of_the_original(rng, peer_model):
  """In float64, and with nothing of the normalisations left but their offsets."""
  model = copy.deepcopy(peer_model).double()
  images = rng.normal(size=(2, 64, 72, 3))
  expected = peer.logits(model, images)
  arrays = peer.state_dict(model)
  config = infer_config(arrays, source='peer')
  with jax.enable_x64():
    state = jax.tree.map(
      lambda x: x.astype(np.float64), from_state_dict(arrays, config, source='peer')
    )
    execution = Execution.for_platform(batch_norm='folded')
    graphdef = nnx.graphdef(NonLocalNet.abstract(config, execution))
    folded = jax.jit(fold_batch_norms)(graphdef, state)
    for name, array in nnx.to_flat_state(folded):
      if name[-1] in ('scale', 'mean', 'var'):
        array[...] = jnp.full_like(array[...], np.nan)
    actual = np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(folded, images))
  assert np.abs(actual - expected).max() <= 1e-9 * expected.std()


def test_a_missing_block_is_the_original_without_it(rng, peer_model):
  """With the block's last normalisation at zero, as it starts, the block makes no difference."""
  arrays = peer.state_dict(peer_model)
  for leaf in ('weight', 'bias'):
    arrays[f'decode_head.nl_block.conv_out.bn.{leaf}'][:] = 0
  images = jnp.asarray(rng.normal(size=(1, 64, 64, 3)), jnp.float32)
  without = {name: array for name, array in arrays.items() if '.nl_block.' not in name}
  results = []
  for weights in (arrays, without):
    config = infer_config(weights, source='peer')
    state = from_state_dict(weights, config, source='peer')
    graphdef = nnx.graphdef(NonLocalNet.abstract(config))
    results.append(jax.jit(lambda s, g=graphdef: nnx.merge(g, s)(images))(state))
  assert_allclose(*results, atol=1e-5)


@pytest.mark.slow
def test_training_steps_equal_the_original_in_float64(rng):
  """Ten whole steps in double precision, where rounding cannot hide a difference nor make one.

  The biases of g and phi have gradients that are zero but for rounding: a constant added to all
  values is taken out by the normalisation behind them, one added to all keys by the softmax.
  """
  model = peer.build('nonlocal_r50-d8_4xb4-20k_voc12aug-512x512', width=4, num_classes=5)
  # The original's initial values are better conditioned than random ones; the block must not stay
  # closed.
  model.init_weights()
  model.decode_head.nl_block.conv_out.bn.weight.data.fill_(0.5)
  model.double()
  arrays = peer.state_dict(model)
  batches = [
    {
      'image': rng.integers(0, 256, size=(2, 64, 72, 3), dtype=np.uint8),
      'label': rng.choice([0, 1, 2, 3, 4, 255], size=(2, 64, 72)).astype(np.uint8),
      'size': np.array([[64, 72], [50, 61]], np.int32),
    }
    for _ in range(10)
  ]
  with jax.enable_x64(True):
    config = dataclasses.replace(infer_config(arrays, source='peer'), dropout=0.0)
    variables = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64),
      from_state_dict(arrays, config, source='peer', dtype=np.float64),
    )
    schedule = poly_schedule(
      learning_rate=0.01, min_learning_rate=1e-4, power=0.9, steps=100, version='v1'
    )
    tx = sgd(schedule, momentum=0.9, weight_decay=5e-4)
    state = TrainState.create(variables, tx, seed=0)
    train_step = jax.jit(
      make_train_step(config, Execution.for_platform(), tx, StepConfig(dtype='float64'))
    )
    losses = peer.train(
      model,
      (
        (np.asarray(normalize(b['image'], sizes=b['size']), np.float64), b['label'])
        for b in batches
      ),
      learning_rates=[float(schedule(step)) for step in range(10)],
    )
    for batch, loss in zip(batches, losses, strict=True):
      state, metrics = train_step(state, batch)
      assert_allclose(metrics['loss'], loss, rtol=1e-7)
      updated = to_state_dict(state.variables)
      for name, expected in peer.state_dict(model).items():
        if not name.endswith('num_batches_tracked'):
          difference = np.linalg.norm(updated[name] - expected)
          assert difference <= 1e-6 * np.linalg.norm(expected) + 1e-12, name
  assert int(state.step) == 10


def test_dropout_drops_whole_channels_in_training_only():
  dropout = dropout_channels(0.5)
  x = jnp.ones((4, 3, 3, 64))
  dropped = np.asarray(dropout(x, rngs=nnx.Rngs(dropout=1)))
  assert set(np.unique(dropped)) == {0.0, 2.0}
  assert np.all(dropped == dropped[:, :1, :1])
  assert_allclose(dropout(x, deterministic=True), x)


def test_a_config_is_read_back_from_json():
  config = NonLocalNetConfig.from_depth(
    26, num_classes=7, in_channels=5, stage_strides=(1, 2, 2, 2), mode='gaussian', dropout=0.25
  )
  assert config.output_stride == 32
  assert NonLocalNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  weights_alone = {'stage_blocks': [2, 2, 2, 2], 'width': 64, 'num_classes': 7, 'non_local': True}
  assert NonLocalNetConfig.from_dict(weights_alone) == NonLocalNetConfig.from_depth(
    26, num_classes=7
  )
  with pytest.raises(ValueError, match=r'stage_strides is .* expected four positive numbers'):
    dataclasses.replace(config, stage_strides=(1, 2))


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu', 'other'])
def test_executions_differ_in_how_not_in_what(platform):
  """Weights of a run on one platform are those of the other."""
  config = NonLocalNetConfig.from_depth(14, num_classes=3, width=4)
  shapes = nnx.state(NonLocalNet.abstract(config, Execution.for_platform(platform)))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state_shapes(config))
  with pytest.raises(ValueError, match="attention is 'quick', expected one of blocks, cudnn"):
    Execution.for_platform(platform, attention='quick')


def test_unknown_depth_is_an_error():
  with pytest.raises(UserError, match='depth is 34; it must be one of 14, 26, 50, 101'):
    NonLocalNetConfig.from_depth(34, num_classes=3)
