"""Class probabilities against the float64 softmax of the original's logits."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

import nonlocal_jax
from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.inference import predictor as predicting
from nonlocal_jax.inference.buckets import shapes_for
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.pretrained import PretrainedModel
from nonlocal_jax.inference.probabilities import confidence_of, entropy, top_k, with_unknown
from nonlocal_jax.inference.views import views_of
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.foreign_arrays import as_two_classes
from nonlocal_jax.weights.state_dict import from_state_dict, infer_config
from tests import peer
from tests.test_predictor import WINDOWS, by_hand, image_of, ours_of, peer_test_time_augmented

TOLERANCE = 2e-5  # of probabilities in float32, whose logits differ by some 1e-5 of their size


@pytest.fixture(autouse=True)
def _several_blocks_and_pieces(monkeypatch):
  """Images as small as those here are made of several, too."""
  monkeypatch.setattr(predicting, '_COLUMNS_AT_ONCE', 16)
  monkeypatch.setattr(predicting, '_PROBABILITIES_AT_ONCE', 19 * 128 * 20)


@pytest.fixture(scope='module')
def half_pixel():
  """The peer and ours, half-pixel corners."""
  network = peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024', width=8, shallow=True)
  return network, *ours_of(network, align_corners=False)


def model_of(config, state, protocol):
  """A network that is tested by a protocol."""
  description = ModelDescription(
    config=config,
    protocol=dataclasses.replace(protocol, align_corners=config.align_corners),
    dataset='custom',
    classes=tuple(f'c{i}' for i in range(config.num_classes)),
    palette=((0, 0, 0),) * config.num_classes,
    source='peer',
    sha256=None,
    num_batches_tracked={},
  )
  return PretrainedModel(description, state)


def check(model, image, expected):
  """Compares labels, confidence and probabilities, as a model gives them together."""
  labels = model.predict(image)
  of_confidence, confidence = model.predict(image, return_confidence=True)
  of_all, probabilities = model.predict(image, return_probabilities=True)
  assert probabilities.shape == expected.shape == (*image.shape[:2], 19)
  assert probabilities.dtype == confidence.dtype == np.float32
  np.testing.assert_array_equal(of_all, labels)
  np.testing.assert_array_equal(of_confidence, labels)
  assert np.abs(probabilities - expected).max() < TOLERANCE
  assert np.abs(confidence - expected.max(axis=-1)).max() < TOLERANCE
  np.testing.assert_array_equal(confidence_of(probabilities, labels), probabilities.max(axis=-1))
  assert np.mean(expected.argmax(axis=-1) == labels) > 0.9995  # up to ties at rounding
  assert expected.max(axis=-1).std() > 0.05  # there is something to compare


@pytest.mark.parametrize('windows', [{}, WINDOWS], ids=['whole', 'slide'])
def test_single_scale_is_the_softmax_of_the_originals_logits(windows, half_pixel):
  network, config, state = half_pixel
  protocol = EvalProtocol.from_version('v1', scale=(90, 70), **windows)
  if windows:
    network.test_cfg.update(
      mode='slide', crop_size=protocol.window_crop, stride=protocol.window_stride
    )
  else:
    network.test_cfg['mode'] = 'whole'
  image = image_of((70, 97))
  (view,) = views_of(protocol, image.shape[:2])
  resized = np.asarray(normalize(resize_to(image, view.size)[None]))[0]
  logits = peer.final_logits(network, resized, image.shape[:2]).astype(np.float64)
  check(model_of(config, state, protocol), image, scipy.special.softmax(logits, axis=-1))


@pytest.mark.slow
def test_multi_scale_flip_v1_is_the_originals_mean(half_pixel, tmp_path):
  """Of the class scores that mmsegmentation's own pipeline and `SegTTAModel` merge."""
  network, config, state = half_pixel
  network.test_cfg['mode'] = 'whole'
  protocol = EvalProtocol.from_version('v1', scale=(90, 70), multi_scale_flip=True)
  image = image_of((70, 97))
  _, parts = peer_test_time_augmented(network, image, tmp_path)
  assert len(parts) == 12
  logits = [part.seg_logits.data.permute(1, 2, 0).double().numpy() for part in parts]
  expected = np.mean([scipy.special.softmax(scores, axis=-1) for scores in logits], axis=0)
  check(model_of(config, state, protocol), image, expected)


@pytest.mark.slow
def test_multi_scale_flip_v0_is_the_mean_of_its_parts():
  network = peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-769x769', width=8, shallow=True)
  config, state = ours_of(network, align_corners=True)
  protocol = EvalProtocol.from_version('v0', scale=(90, 70), **WINDOWS, multi_scale_flip=True)
  image = image_of((60, 97))
  expected = by_hand(network, image, (90, 70), WINDOWS)
  check(model_of(config, state, protocol), image, expected)


@pytest.mark.slow
def test_images_of_several_sizes_and_devices_are_as_each_alone(half_pixel):
  _, config, state = half_pixel
  protocol = EvalProtocol(scale=(90, 70))
  images = [image_of(size) for size in [(70, 97), (49, 50), (65, 49)]]
  alone = model_of(config, state, protocol)
  together = PretrainedModel(alone.description, state, devices=jax.devices()[:4])
  of_all = together.predict(images, return_probabilities=True)
  confident = {x.index: x for x in together.predict_many(images, return_confidence=True)}
  for index, (image, (labels, probabilities)) in enumerate(zip(images, of_all, strict=True)):
    np.testing.assert_array_equal(labels, alone.predict(image))
    _, expected = alone.predict(image, return_probabilities=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(confident[index].labels, labels)
    np.testing.assert_allclose(confident[index].confidence, expected.max(-1), atol=1e-5)
    assert probabilities.flags.writeable
  with pytest.raises(ValueError, match='return_confidence and return_probabilities are both set'):
    alone.predict(images[0], return_confidence=True, return_probabilities=True)


def test_no_device_holds_the_probabilities_of_all_rows(half_pixel):
  """The largest arrays of a program are those of its rows, which all images of a shape share."""
  _, config, state = half_pixel
  protocol = EvalProtocol()
  predictor = Predictor(config, protocol)
  image = image_of((512, 256))
  shape = shapes_for([(512, 256)], protocol, most=1)[512, 256]
  batch = predictor.logits(state, shape, [[image]], [(512, 256)])
  pieces = dict(predictor.probabilities(batch))
  assert [array.shape for array in pieces.values()] == [(1, 16, 256, 19)] * 32
  assert sorted(pieces) == list(range(0, 512, 16))
  static = {'windows': batch.windows, 'rows': 16, 'width': 256}
  compiled = predictor._predict_rows.lower(batch.views, np.int32(0), **static).compile()
  memory = compiled.memory_analysis()
  whole = 512 * 256 * 19 * 4  # bytes
  assert memory.output_size_in_bytes == whole // 32
  assert memory.temp_size_in_bytes < whole // 2
  static = {'windows': batch.windows, 'result': shape.result}
  compiled = predictor._predict_confidence.lower(batch.views, **static).compile()
  memory = compiled.memory_analysis()
  assert memory.output_size_in_bytes < 512 * 256 * 5 + 100  # a label and a float32


@pytest.mark.parametrize('threshold', [0.5, 0.3])
def test_of_one_output_channel_it_is_the_sigmoid(threshold):
  """Whatever threshold decides: the less likely class may be the predicted one."""
  network = peer.build(
    'nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024', width=4, num_classes=2, shallow=True
  )
  arrays = peer.state_dict(network)
  for head in ('decode_head', 'auxiliary_head'):
    for part in ('weight', 'bias'):
      arrays[f'{head}.conv_seg.{part}'] = arrays[f'{head}.conv_seg.{part}'][:1]
  arrays, _ = as_two_classes(arrays, threshold)
  config = dataclasses.replace(infer_config(arrays, source='peer'), threshold=threshold)
  model = model_of(config, from_state_dict(arrays, config, source='peer'), EvalProtocol())
  image = image_of((64, 72))
  logits = np.asarray(model.logits(nonlocal_jax.normalize(image[None])))[0].astype(np.float64)
  expected = scipy.special.expit(logits[..., 1])
  labels, probabilities = model.predict(image, return_probabilities=True)
  assert np.abs(probabilities[..., 1] - expected).max() < TOLERANCE
  np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
  assert np.mean(labels == (expected > threshold)) > 0.999
  _, confidence = model.predict(image, return_confidence=True)
  np.testing.assert_allclose(confidence, confidence_of(probabilities, labels), atol=1e-6)
  assert (confidence.min() < 0.49) == (threshold != 0.5)


def test_entropy_and_the_likeliest_classes(rng):
  logits = rng.normal(size=(5, 7, 19)) * 4
  probabilities = scipy.special.softmax(logits, axis=-1)
  probabilities[0, 0] = np.eye(19)[3]
  found = entropy(probabilities.astype(np.float32))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, scipy.stats.entropy(probabilities, axis=-1), atol=1e-5)
  assert found[0, 0] == 0
  assert entropy(np.full(8, 1 / 8, np.float16)) == pytest.approx(math.log(8))
  for dtype in (np.float32, np.float16):
    given = probabilities.astype(dtype)
    classes, likely = top_k(given, 3)
    expected = np.argsort(-given, axis=-1, kind='stable')[..., :3]
    np.testing.assert_array_equal(classes, expected)
    np.testing.assert_array_equal(likely, np.take_along_axis(given, expected, axis=-1))
    assert (classes.dtype, likely.dtype) == (np.int32, dtype)
  for k in (0, 20):
    with pytest.raises(ValueError, match=f'k is {k}, expected 1 to 19, the number of classes'):
      top_k(probabilities, k)


def test_pixels_below_the_threshold_are_unknown(rng):
  labels = rng.integers(0, 19, (9, 8)).astype(np.uint8)
  confidence = rng.random((9, 8), np.float32)
  found = with_unknown(labels, confidence, below=0.4)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found == 255, confidence < 0.4)
  np.testing.assert_array_equal(found[confidence >= 0.4], labels[confidence >= 0.4])
