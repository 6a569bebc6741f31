"""Where pixels look: rows of the full matrix of mmsegmentation's network, and where they lie."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose
from PIL import Image

import nonlocal_jax
from nonlocal_jax import EvalProtocol, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.cli import attention as command
from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.evaluation.attention_picture import attention_picture
from nonlocal_jax.inference.attention import AttentionMap, Window
from nonlocal_jax.inference.views import views_of
from nonlocal_jax.ops.normalization import normalize

# Scores of random weights are some hundreds, and float32 rounds them by up to 1e-3 of a weight.
# With moderate scores `test_non_local.py` holds rows to 1e-6.
ROUNDING = 1e-5
WHOLE = EvalProtocol(scale=(120, 72))
WINDOWS = EvalProtocol(scale=(120, 72), window_crop=(49, 49), window_stride=(33, 33))


@pytest.fixture(scope='module')
def model(peer_checkpoint):
  """Ours with the weights of `peer_model`."""
  return nonlocal_jax.load(peer_checkpoint, align_corners=False)


@pytest.fixture(scope='module')
def image():
  return np.random.default_rng(0).integers(256, size=(61, 90, 3), dtype=np.uint8)


@torch.no_grad()
def matrix_of(peer_model, window: np.ndarray) -> np.ndarray:
  """(rows, columns, rows, columns) float64: all pairwise weights of a resized part of an image."""
  network = peer_model.double().eval()
  try:
    tensor = torch.tensor(np.asarray(normalize(window[None])), dtype=torch.float64)
    features = network.backbone(tensor.permute(0, 3, 1, 2))[3]
    head = network.decode_head
    x = head.convs[0](features)
    block = head.nl_block
    theta, phi = block.theta(x).flatten(2).mT, block.phi(x).flatten(2)
    weights = block.embedded_gaussian(theta, phi)[0].numpy()
    return weights.reshape(*x.shape[2:], *x.shape[2:])
  finally:
    peer_model.float()


@pytest.mark.parametrize('point', [(0, 0), (89, 60), (41.5, 17)])
def test_whole_images(model, peer_model, image, point):
  (view,) = views_of(WHOLE, image.shape[:2])
  matrix = matrix_of(peer_model, resize_to(image, view.size))
  found = model.with_protocol(WHOLE).image_attention(image)(point)
  assert found.weights.dtype == np.float32
  assert found.weights.shape == matrix.shape[:2] == found.window.features
  assert_allclose(found.weights, matrix[found.position], atol=ROUNDING)
  assert found.weights.sum() == pytest.approx(1, abs=1e-5)
  np.testing.assert_array_equal(model.with_protocol(WHOLE).attention(image, point), found.weights)


def test_windows(model, peer_model, image):
  """The window whose center is nearest: the last one begins at the right and lower end."""
  (view,) = views_of(WINDOWS, image.shape[:2])
  assert view.size == (72, 106)
  assert (view.tops, view.lefts) == ((0, 23), (0, 33, 57))
  resized = resize_to(image, view.size)
  look = model.with_protocol(WINDOWS).image_attention(image)
  for point, top, left in [((3, 3), 0, 0), ((45, 30), 0, 33), ((88, 58), 23, 57)]:
    matrix = matrix_of(peer_model, resized[top : top + 49, left : left + 49])
    found = look(point)
    assert (found.window.top, found.window.left) == (top, left)
    assert_allclose(found.weights, matrix[found.position], atol=ROUNDING)
    over = found.window.over_image(found.weights)
    outside = np.ones((72, 106), bool)
    outside[top : top + 49, left : left + 49] = False
    # Two pixels from the window, where the resized one has no share in it.
    rows, columns = np.mgrid[:61, :90]
    y, x = (rows + 0.5) * 72 / 61 - 0.5, (columns + 0.5) * 106 / 90 - 0.5
    far = (y < top - 2) | (y > top + 51) | (x < left - 2) | (x > left + 51)
    assert not over[far].any()
    assert over[~far].any()


def test_multi_scale_protocols_are_asked_at_their_own_scale(model, image):
  several = WHOLE.with_multi_scale_flip()
  one, other = (
    model.with_protocol(protocol).attention(image, (5, 6)) for protocol in (WHOLE, several)
  )
  np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('protocol', [WHOLE, WINDOWS], ids=['whole', 'slide'])
def test_positions_lie_where_their_features_are(align_corners, protocol):
  """A weight of one position, interpolated as torch does, is largest at that position's pixel."""
  protocol = dataclasses.replace(protocol, align_corners=align_corners)
  for point in [(0, 0), (44, 31), (89, 60)]:
    window = Window.around(point, (61, 90), protocol, output_stride=8)
    position = window.position_of(point)
    weights = np.zeros(window.features, np.float32)
    weights[position] = 1
    y, x = np.unravel_index(window.over_image(weights).argmax(), (61, 90))
    center = window.point_of(position)
    assert max(abs(center[0] - x), abs(center[1] - y)) <= 4.5
    assert max(abs(center[0] - point[0]), abs(center[1] - point[1])) <= 4.5
    assert window.position_of(center) == position
  height, width = window.view.crop
  upsampled = torch.nn.functional.interpolate(
    torch.as_tensor(weights)[None, None],
    window.view.network,
    mode='bilinear',
    align_corners=align_corners,
  )[0, 0, :height, :width].numpy()
  whole = np.zeros(window.view.size, np.float32)
  whole[window.top :, window.left :][:height, :width] = upsampled
  expected = resize_to(whole[..., None], (61, 90))[..., 0]
  assert_allclose(window.over_image(weights), expected, atol=1e-6)


def test_picture_marks_the_query_and_the_largest_weights(image):
  (view,) = views_of(EvalProtocol(), (61, 90))
  window = Window(image=(61, 90), view=view, top=0, left=0, align_corners=False, output_stride=8)
  weights = np.full(window.features, 1e-3, np.float32)
  weights[6, 9] = 1
  picture = attention_picture(
    image, AttentionMap(weights, (1, 2), window), caption='a pixel of a long name'
  )
  assert picture.shape[1:] == (90, 3)
  assert picture.shape[0] > 61
  x, y = map(round, window.point_of((6, 9)))
  assert (picture[y, x] == 255).all()  # the end of a link
  x, y = map(round, window.point_of((1, 2)))
  ring = picture[y, x - 5].astype(int)
  assert ring[1] > ring[0] + 60  # turquoise


def test_points_outside_and_networks_without_the_block_are_refused(model, image):
  for point in [(90, 5), (5, 61), (-1, 5)]:
    with pytest.raises(ValueError, match='outside the image of 90x61 pixels'):
      model.attention(image, point)
  config = NonLocalNetConfig.from_depth(14, num_classes=3, width=4, non_local=False)
  network = NonLocalNet(config, rngs=nnx.Rngs(0))
  without = nonlocal_jax.PretrainedModel.from_module(network)
  with pytest.raises(ValueError, match='has no non-local block'):
    without.attention(image, (1, 1))


def test_command(script, peer_checkpoint, tmp_path, image):
  photo, out = tmp_path / 'photo.png', tmp_path / 'out'
  Image.fromarray(image).save(photo)
  arguments = [photo, f'--checkpoint={peer_checkpoint}', f'--out={out}']
  assert script(command, *arguments, '--point=0,0', '--point=89,60') == (None, '')
  assert sorted(path.name for path in out.iterdir()) == [
    'photo_attention_0_0.png',
    'photo_attention_89_60.png',
  ]
  with Image.open(out / 'photo_attention_89_60.png') as picture:
    assert picture.width == 90
    assert picture.height > 61


@pytest.mark.parametrize(
  ('point', 'message'),
  [
    ('90,5', r'--point=90,5 lies outside \S+photo.png, which has 90x61 pixels'),
    ('a', "--point is 'a'; give a pixel as X,Y, e.g. --point=320,240"),
  ],
)
def test_bad_points_of_the_command(script, peer_checkpoint, tmp_path, image, point, message):
  photo, out = tmp_path / 'photo.png', tmp_path / 'out'
  Image.fromarray(image).save(photo)
  arguments = [photo, f'--checkpoint={peer_checkpoint}', f'--out={out}', f'--point={point}']
  status, said = script(command, *arguments)
  assert status not in (None, 0)
  assert re.search(message, said)
  assert not out.exists()
