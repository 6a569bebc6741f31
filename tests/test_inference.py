"""Whole and sliding-window inference against mmsegmentation's own."""

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from nonlocal_jax.evaluation.inference import Windows, logits_at_size, window_starts
from nonlocal_jax.models.segmentor import normalize
from nonlocal_jax.weights.torch_names import from_state_dict, infer_architecture
from tests import peer


@pytest.fixture(scope='module')
def corner_model():
  """The peer with aligned corners and sliding windows, and ours with its weights."""
  model = peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-769x769', width=8)
  arrays = peer.state_dict(model)
  architecture = infer_architecture(arrays, source='peer')
  graphdef = nnx.graphdef(architecture.abstract(align_corners=True))
  return model, graphdef, from_state_dict(arrays, architecture, source='peer')


@pytest.mark.parametrize(
  ('shape', 'size', 'crop', 'stride'),
  [
    ((70, 97), (64, 90), (49, 49), (32, 32)),  # windows overlap, the last is shifted back
    ((40, 100), (81, 203), (49, 49), (33, 33)),  # lower than a window
    ((49, 50), (49, 50), (49, 49), (49, 49)),  # one pixel wider than a window
  ],
)
def test_slide_equals_the_original(rng, corner_model, shape, size, crop, stride):
  model, graphdef, state = corner_model
  model.test_cfg.update(mode='slide', crop_size=crop, stride=stride)
  image = rng.integers(0, 256, size=(*shape, 3), dtype=np.uint8)
  expected = peer.final_logits(model, np.asarray(normalize(image[None]))[0], size)

  @jax.jit
  def logits(state, images):
    return logits_at_size(
      nnx.merge(graphdef, state), images, size=size, windows=Windows(crop, stride)
    )

  actual = np.asarray(logits(state, image[None]))[0]
  assert_allclose(actual, expected, atol=1e-3 * expected.std())
  assert np.mean(actual.argmax(-1) == expected.argmax(-1)) >= 0.9999


def test_whole_equals_the_original(rng, peer_model):
  """Two resizes in one matrix, the second of which shrinks."""
  arrays = peer.state_dict(peer_model)
  architecture = infer_architecture(arrays, source='peer')
  graphdef = nnx.graphdef(architecture.abstract())
  state = from_state_dict(arrays, architecture, source='peer')
  image = rng.integers(0, 256, size=(90, 119, 3), dtype=np.uint8)
  expected = peer.final_logits(peer_model, np.asarray(normalize(image[None]))[0], (60, 83))
  logits = jax.jit(lambda s, x: logits_at_size(nnx.merge(graphdef, s), x, size=(60, 83)))
  actual = np.asarray(logits(state, image[None]))[0]
  assert_allclose(actual, expected, atol=1e-3 * expected.std())


@pytest.mark.parametrize(
  ('size', 'crop', 'stride', 'expected'),
  [
    (1025, 769, 513, [0, 256]),
    (2049, 769, 513, [0, 513, 1026, 1280]),
    (769, 769, 513, [0]),
    (770, 769, 513, [0, 1]),
    (512, 769, 513, [0]),
  ],
)
def test_window_starts(size, crop, stride, expected):
  assert window_starts(size, crop, stride) == expected
