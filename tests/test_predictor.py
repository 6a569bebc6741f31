"""Prediction in padded shapes against mmsegmentation's own on each image by itself."""

import dataclasses
import warnings

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.inference import predictor as predicting
from nonlocal_jax.inference.buckets import PaddedShape, shapes_for
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.views import axis_matrix, views_of
from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import RATIOS, EvalProtocol
from nonlocal_jax.runtime.parallel import data_mesh, replicated
from nonlocal_jax.weights.state_dict import from_state_dict, infer_config
from tests import peer
from tests.mmseg_import import mmseg_module

SIZES = [(70, 97), (49, 50), (40, 100), (65, 49), (49, 49), (33, 41)]
WINDOWS = {'window_crop': (49, 49), 'window_stride': (33, 33)}


@pytest.fixture(autouse=True)
def _several_blocks_of_columns(monkeypatch):
  """Images as narrow as those here are made of several, too."""
  monkeypatch.setattr(predicting, '_COLUMNS_AT_ONCE', 16)


def ours_of(model, *, align_corners):
  """Config and weights of our network."""
  arrays = peer.state_dict(model)
  config = infer_config(arrays, source='peer')
  config = dataclasses.replace(config, align_corners=align_corners)
  return config, from_state_dict(arrays, config, source='peer')


@pytest.fixture(scope='module')
def half_pixel():
  """The peer and ours, half-pixel corners."""
  model = peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024', width=8, shallow=True)
  return model, *ours_of(model, align_corners=False)


@pytest.fixture(scope='module')
def aligned():
  """The peer and ours with aligned corners."""
  model = peer.build('nonlocal_r50-d8_4xb2-40k_cityscapes-769x769', width=8, shallow=True)
  return model, *ours_of(model, align_corners=True)


def image_of(size, seed=0):
  rng = np.random.default_rng((seed, *size))
  coarse = rng.integers(256, size=(size[0] // 6, size[1] // 6, 3), dtype=np.uint8)
  return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def predict(predictor, state, shape, images, batch_size=None):
  """Label maps of images that share a shape."""
  protocol = predictor.protocol
  views = [[resize_to(x, view.size) for view in views_of(protocol, x.shape[:2])] for x in images]
  sizes = [x.shape[:2] for x in images]
  logits = predictor.logits(state, shape, views, sizes, batch_size=batch_size)
  whole = np.asarray(predictor.labels(logits))
  return [whole[i, : x.shape[0], : x.shape[1]] for i, x in enumerate(images)]


def predictor_of(ours, protocol, **options):
  _, config, _ = ours
  corners = config.align_corners
  return Predictor(config, dataclasses.replace(protocol, align_corners=corners), **options)


def agreement(ours, theirs):
  """Share of equal pixels over several label maps."""
  equal = [np.mean(our == their) for our, their in zip(ours, theirs, strict=True)]
  return float(np.mean(equal))


@pytest.mark.parametrize(
  ('starts', 'crop', 'size', 'band'),
  [((0,), 512, 512, 8), ((0, 171, 255), 257, 512, 64)],
  ids=['whole', 'slide'],
)
def test_bands_are_all_that_matrices_hold(starts, crop, size, band):
  geometry = {'crop': crop, 'network': crop, 'size': size, 'out_size': 500}
  matrix = axis_matrix(starts, **geometry, align_corners=False).toarray().astype(np.float32)
  starts_of_bands, bands = predicting._bands(np.stack([matrix, matrix[::-1]])[None], whole=False)
  assert bands.shape == (1, 2, 32, 16, band)
  found = np.zeros((1, 2, 512, matrix.shape[1]), np.float32)
  for place in np.ndindex(1, 2, 32):
    rows = slice(16 * place[2], 16 * place[2] + 16)
    start = starts_of_bands[place]
    found[(*place[:2], rows, slice(start, start + band))] = bands[place]
  np.testing.assert_array_equal(found[0, :, :500], np.stack([matrix, matrix[::-1]]))
  assert not found[:, :, 500:].any()


def test_the_first_of_the_largest_scores():
  """Where no score is a number there is a class all the same."""
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 4, size=(5, 9, 7)).astype(np.float32)
  found = np.asarray(predicting._first_of_largest(jnp.asarray(scores), axis=-2))
  np.testing.assert_array_equal(found, scores.argmax(axis=1))
  assert found.dtype == np.uint8
  scores[:] = np.nan
  assert np.asarray(predicting._first_of_largest(jnp.asarray(scores), axis=-2)).max() < 9


def test_padding_has_no_influence_on_the_network(half_pixel):
  """Logits in one padded program, garbage in the padding, and those of each image by itself."""
  model, config, state = half_pixel
  graphdef = nnx.graphdef(NonLocalNet.abstract(config))
  rng = np.random.default_rng(0)
  padded = rng.normal(size=(len(SIZES), 80, 104, 3)).astype(np.float32) * 100
  images = [np.asarray(normalize(image_of(size)[None])) for size in SIZES]
  for place, image in zip(padded, images, strict=True):
    place[: image.shape[1], : image.shape[2]] = image[0]

  @jax.jit
  def logits(images, sizes):
    return nnx.merge(graphdef, state).encode_decode(images, sizes=sizes)

  found = np.asarray(logits(padded, np.array(SIZES, np.int32)))
  model.eval()
  for size, image, whole in zip(SIZES, images, found, strict=True):
    with torch.no_grad():
      tensor = torch.tensor(image.transpose(0, 3, 1, 2))
      expected = model.decode_head(model.backbone(tensor))[0].permute(1, 2, 0).numpy()
    ours = whole[: -(-size[0] // 8), : -(-size[1] // 8)]
    assert np.abs(ours - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize('convention', ['half_pixel', 'aligned'])
@pytest.mark.parametrize('windows', [{}, WINDOWS], ids=['whole', 'slide'])
def test_single_scale_is_the_originals(convention, windows, request):
  """Images lower and narrower than a window, of its size, one pixel larger, and larger."""
  ours = request.getfixturevalue(convention)
  model, _, state = ours
  protocol = EvalProtocol.from_version('v1', scale=(90, 70), **windows)
  predictor = predictor_of(ours, protocol)
  shapes = shapes_for(SIZES, protocol, most=1)
  images = [image_of(size) for size in SIZES]
  found = [predict(predictor, state, shapes[x.shape[:2]], [x])[0] for x in images]
  if windows:
    model.test_cfg.update(
      mode='slide', crop_size=protocol.window_crop, stride=protocol.window_stride
    )
  else:
    model.test_cfg['mode'] = 'whole'
  expected = []
  for image in images:
    (view,) = views_of(protocol, image.shape[:2])
    resized = np.asarray(normalize(resize_to(image, view.size)[None]))[0]
    expected.append(peer.final_logits(model, resized, image.shape[:2]).argmax(-1))
  assert agreement(found, expected) > 0.9995  # up to ties at rounding


@pytest.mark.slow
def test_multi_scale_flip_v1_is_the_originals(half_pixel, tmp_path):
  """Through mmsegmentation's own pipeline and `SegTTAModel`, from files to label maps."""
  model, _, state = half_pixel
  model.test_cfg['mode'] = 'whole'
  sizes = SIZES[:2]
  protocol = EvalProtocol.from_version('v1', scale=(90, 70), multi_scale_flip=True)
  predictor = predictor_of(half_pixel, protocol)
  shapes = shapes_for(sizes, protocol, most=1)
  images = [image_of(size) for size in sizes]
  found = [predict(predictor, state, shapes[x.shape[:2]], [x])[0] for x in images]
  samples = [peer_test_time_augmented(model, image, tmp_path)[0] for image in images]
  expected = [sample.pred_sem_seg.data[0].numpy() for sample in samples]
  assert agreement(found, expected) > 0.9995  # up to ties at rounding


def peer_test_time_augmented(model, image, folder):
  """The original's merged sample of an image, and those of its sizes and flips."""
  path = folder / 'image.png'
  cv2.imwrite(str(path), image[..., ::-1])
  config = peer.read_config('nonlocal_r50-d8_4xb4-80k_ade20k-512x512')
  pipeline = mmseg_module('mmengine.dataset').Compose(
    [
      {**step, 'transforms': [t for t in step['transforms'] if t[0]['type'] != 'LoadAnnotations']}
      if step['type'] == 'TestTimeAug'
      else step
      for step in config.tta_pipeline
    ]
  )
  item = mmseg_module('mmengine.dataset').pseudo_collate([pipeline({'img_path': str(path)})])
  runner = mmseg_module('mmseg.models').SegTTAModel(module=model.eval())
  merge, parts = runner.merge_preds, []
  runner.merge_preds = lambda samples: parts.extend(samples[0]) or merge(samples)
  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of a shape that it extends itself
    return runner.test_step(item)[0], parts


@pytest.mark.slow
@pytest.mark.parametrize('windows', [{}, WINDOWS], ids=['whole', 'slide'])
def test_multi_scale_flip_v0_is_the_sum_of_its_parts(windows, aligned, monkeypatch):
  """Written from its description, in float64, on the original's logits of each window.

  Boxes are multiples of the test scale; small windows are padded with zeros; class scores are made
  at the image's size, their softmax is mirrored back; the mean of the twelve decides.
  """
  monkeypatch.setattr(predicting, '_PIXELS_AT_ONCE', 3 * 49 * 49)  # several chunks of windows
  model, _, state = aligned
  protocol = EvalProtocol.from_version('v0', scale=(90, 70), **windows, multi_scale_flip=True)
  sizes = [(60, 97), (70, 40)]
  predictor = predictor_of(aligned, protocol)
  images = [image_of(size) for size in sizes]
  shape = shapes_for(sizes, protocol, most=1)[sizes[0]]
  found = predict(predictor, state, shape, images)
  expected = [by_hand(model, image, (90, 70), windows).argmax(-1) for image in images]
  assert agreement(found, expected) > 0.9995  # up to ties at rounding


def by_hand(model, image, scale, windows):
  """Probabilities (h, w, c) float64."""
  model.eval()
  height, width = image.shape[:2]
  total = 0.0
  for ratio in RATIOS:
    box = int(scale[0] * ratio), int(scale[1] * ratio)
    factor = min(max(box) / max(height, width), min(box) / min(height, width))
    size = int(height * factor + 0.5), int(width * factor + 0.5)
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    for flip in (False, True):
      x = resized[:, ::-1] if flip else resized
      x = np.asarray(normalize(np.ascontiguousarray(x)[None]))[0]
      scores = _window_mean(model, x, windows)
      scores = _interpolated(scores, (height, width))
      scores = np.exp(scores - scores.max(-1, keepdims=True))
      probabilities = scores / scores.sum(-1, keepdims=True)
      total = total + (probabilities[:, ::-1] if flip else probabilities)
  return total / (2 * len(RATIOS))


def _window_mean(model, x, windows):
  """Scores (h, w, c) float64: the mean over windows, small ones padded."""
  if not windows:
    return _scores(model, x)
  (height, width), (crop_h, crop_w) = x.shape[:2], windows['window_crop']
  stride_h, stride_w = windows['window_stride']
  total, count = 0.0, np.zeros((height, width, 1))
  total = np.zeros((height, width, 19))
  for i in range(max(height - crop_h + stride_h - 1, 0) // stride_h + 1):
    for j in range(max(width - crop_w + stride_w - 1, 0) // stride_w + 1):
      bottom = min(i * stride_h + crop_h, height)
      right = min(j * stride_w + crop_w, width)
      top, left = max(bottom - crop_h, 0), max(right - crop_w, 0)
      window = np.zeros((crop_h, crop_w, 3), np.float32)
      window[: bottom - top, : right - left] = x[top:bottom, left:right]
      scores = _scores(model, window)[: bottom - top, : right - left]
      total[top:bottom, left:right] += scores
      count[top:bottom, left:right] += 1
  return total / count


@torch.no_grad()
def _scores(model, x):
  logits = model.decode_head(model.backbone(torch.tensor(x.transpose(2, 0, 1))[None]))
  return _interpolated(logits[0].permute(1, 2, 0).numpy(), x.shape[:2])


def _interpolated(scores, size):
  tensor = torch.as_tensor(scores.transpose(2, 0, 1).astype(np.float64))[None]
  resized = torch.nn.functional.interpolate(tensor, size, mode='bilinear', align_corners=True)
  return resized[0].permute(1, 2, 0).numpy()


def test_a_batch_on_several_devices_is_what_its_images_are(half_pixel):
  """Four devices, a batch that is not full, and scores in blocks of a few rows."""
  _, _, state = half_pixel
  protocol = EvalProtocol(scale=(90, 70))
  images = [image_of(size) for size in SIZES[:3]]
  shape = shapes_for(SIZES[:3], protocol, most=1)[SIZES[0]]
  mesh = data_mesh(jax.devices()[:4])
  alone, together = (
    predictor_of(half_pixel, protocol),
    predictor_of(half_pixel, protocol, mesh=mesh),
  )
  found = predict(together, jax.device_put(state, replicated(mesh)), shape, images, batch_size=4)
  assert agreement(found, predict(alone, state, shape, images)) > 0.9999


def test_processes_have_one_program_whatever_their_images_are(half_pixel, monkeypatch):
  """Views of a narrow and of a wide image, whose logits lie closer and farther apart."""
  _, _, state = half_pixel
  protocol = EvalProtocol(scale=(240, 90))
  images = [image_of((90, 240)), image_of((30, 80))]
  shape = shapes_for([x.shape[:2] for x in images], protocol, most=1)[(90, 240)]
  found, kinds = [], []
  for shared in (False, True):
    monkeypatch.setattr(predicting, 'is_shared_by_processes', lambda _, shared=shared: shared)
    predictor = predictor_of(half_pixel, protocol)
    run = predictor._predict

    def keep_shapes(*arrays, run=run, **static):
      kinds[-1].add(str(jax.tree.map(np.shape, arrays)))
      return run(*arrays, **static)

    predictor._predict = keep_shapes
    kinds.append(set())
    found.append([predict(predictor, state, shape, [x])[0] for x in images])
  assert [len(k) for k in kinds] == [2, 1]
  assert agreement(*found) > 0.9999


def test_images_of_one_size_share_matrices(half_pixel):
  """Other sizes have their own, of which few are kept."""
  _, _, state = half_pixel
  protocol = EvalProtocol(scale=(90, 70), flip=True)
  predictor = predictor_of(half_pixel, protocol)
  shape = shapes_for(SIZES, protocol, most=1)[SIZES[0]]
  images = [image_of(size, seed) for size in SIZES[:2] for seed in range(3)]
  found = [predict(predictor, state, shape, [image])[0] for image in images]
  cache = predictor._matrices_on_devices.cache_info()
  assert (cache.misses, cache.hits) == (2, 4)
  assert 6 <= cache.maxsize <= 16
  fresh = [
    predict(predictor_of(half_pixel, protocol), state, shape, [image])[0] for image in images[2:4]
  ]
  for ours, expected in zip(found[2:4], fresh, strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_scores_are_held_for_a_few_rows_only(half_pixel):
  _, _, state = half_pixel
  protocol = EvalProtocol(scale=(90, 70), flip=True)
  image = image_of(SIZES[0])
  shape = PaddedShape.from_image(image.shape[:2], protocol)
  whole = predict(predictor_of(half_pixel, protocol), state, shape, [image])
  execution = Execution.for_platform(scores_at_once=2 * 19 * 112 * 9)  # nine rows of 70
  predictor = predictor_of(half_pixel, protocol, execution=execution)
  blocks = predict(predictor, state, shape, [image])
  np.testing.assert_array_equal(blocks, whole)


def test_channel_order_mean_and_std_are_those_of_the_protocol(half_pixel):
  """The same network input from images in another order and of half the values."""
  _, _, state = half_pixel
  protocol = EvalProtocol(scale=(90, 70))
  other = dataclasses.replace(
    protocol,
    channel_order='bgr',
    mean=tuple(x / 2 for x in protocol.mean),
    std=tuple(x / 2 for x in protocol.std),
  )
  half = image_of((70, 90)) // 2
  shape = PaddedShape.from_image((70, 90), protocol)
  found = predict(predictor_of(half_pixel, other), state, shape, [half[..., ::-1]])
  expected = predict(predictor_of(half_pixel, protocol), state, shape, [2 * half])
  assert agreement(found, expected) > 0.9995
  assert agreement(predict(predictor_of(half_pixel, other), state, shape, [half]), expected) < 0.99


@pytest.mark.slow
def test_other_strides_dilations_and_channels_of_the_input(rng):
  """Predicted classes are those of the network's own upsampled logits."""
  config = NonLocalNetConfig(
    stage_blocks=(1, 1, 2, 1),
    num_classes=5,
    width=4,
    in_channels=2,
    stage_strides=(1, 2, 2, 1),
    stage_dilations=(1, 1, 1, 2),
    zero_init=False,
  )
  protocol = EvalProtocol(mean=(100.0, 120.0), std=(50.0, 60.0))
  graphdef, state = nnx.split(NonLocalNet(config, rngs=nnx.Rngs(0)))
  image = rng.integers(256, size=(70, 90, 2), dtype=np.uint8)
  shape = PaddedShape.from_image((70, 90), protocol)
  predictor = Predictor(config, protocol)
  found = predictor.labels(predictor.logits(state, shape, [[image]], [(70, 90)]))
  images = normalize(jnp.asarray(image[None]), mean=protocol.mean, std=protocol.std)
  logits = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, images)
  assert agreement(np.asarray(found), np.asarray(logits).argmax(axis=-1)) > 0.999
