"""Sizes, windows and matrices of testing, and the shapes that images share."""

import numpy as np
import pytest
import torch

from nonlocal_jax.inference.buckets import Shape, shapes_for
from nonlocal_jax.inference.views import axis_matrix, feature_size, views_of, window_starts
from nonlocal_jax.protocol import Protocol, Windows


@pytest.mark.parametrize(
  ('size', 'crop', 'stride', 'expected'),
  [
    (1025, 769, 513, (0, 256)),
    (2049, 769, 513, (0, 513, 1026, 1280)),
    (769, 769, 513, (0,)),
    (770, 769, 513, (0, 1)),
    (512, 512, 513, (0,)),
  ],
)
def test_window_starts(size, crop, stride, expected):
  assert window_starts(size, crop, stride) == expected


@pytest.mark.parametrize(
  ('version', 'scale', 'image', 'expected'),
  [
    ('v0', (2048, 512), (375, 500), [341, 512, 683, 853, 1024, 1195]),
    ('v1', (2048, 512), (375, 500), [250, 375, 500, 625, 750, 875]),
    ('v0', (2049, 1025), (1024, 2048), [1024, 1536, 2049, 2561, 3073, 3585]),
    ('v1', (2049, 1025), (1024, 2048), [1024, 1536, 2048, 2560, 3072, 3584]),
  ],
)
def test_widths_of_multi_scale_testing(version, scale, image, expected):
  """Those that both versions of mmsegmentation resize to."""
  protocol = Protocol.of_version(version, scale=scale, multi_scale_flip=True)
  assert [view.size[1] for view in views_of(protocol, image)] == expected
  assert protocol.flips == 2


def test_published_windows():
  """2 x 4 windows on a Cityscapes image at single scale, 62 over all scales."""
  windows = Windows((769, 769), (513, 513))
  single = Protocol.of_version('v0', scale=(2049, 1025), windows=windows)
  (view,) = views_of(single, (1024, 2048))
  assert (view.size, len(view.tops), len(view.lefts)) == ((1025, 2049), 2, 4)
  several = Protocol.of_version('v0', scale=(2049, 1025), windows=windows, multi_scale_flip=True)
  views = views_of(several, (1024, 2048))
  assert sum(len(view.tops) * len(view.lefts) for view in views) == 62
  assert [view.crop[0] for view in views[:3]] == [512, 768, 769]
  assert {view.network for view in views} == {(769, 769)}
  unpadded = Protocol.of_version('v1', scale=(2049, 1025), windows=windows, multi_scale_flip=True)
  assert [view.network[0] for view in views_of(unpadded, (1024, 2048))[:3]] == [512, 768, 769]


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(
  ('size', 'out_size', 'crop', 'network', 'stride'),
  [(97, 90, 49, 49, 33), (97, 203, 97, 97, 97), (40, 81, 40, 49, 33), (50, 50, 49, 49, 49)],
)
def test_axis_matrix_is_resize_cut_average_resize(
  size, out_size, crop, network, stride, align_corners
):
  """Each step by PyTorch in float64."""
  rng = np.random.default_rng(0)
  starts = window_starts(size, crop, stride)
  logits = rng.normal(size=(len(starts), feature_size(network)))

  def resized(x, length):
    tensor = torch.as_tensor(x)[None, None]
    options = {'mode': 'linear', 'align_corners': align_corners}
    return torch.nn.functional.interpolate(tensor, length, **options)[0, 0].numpy()

  total, count = np.zeros(size), np.zeros(size)
  for start, window in zip(starts, logits, strict=True):
    total[start : start + crop] += resized(window, network)[:crop]
    count[start : start + crop] += 1
  expected = resized(total / count, out_size)
  matrix = axis_matrix(
    starts,
    crop=crop,
    network=network,
    size=size,
    out_size=out_size,
    align_corners=align_corners,
  )
  np.testing.assert_allclose(matrix @ logits.ravel(), expected, atol=2e-5)
  np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


def random_sizes(count, rng):
  return [(int(h), int(w)) for h, w in rng.integers(200, 900, size=(count, 2))]


@pytest.mark.parametrize('multi_scale_flip', [False, True])
@pytest.mark.parametrize('count', [1, 7, 400])
def test_few_shapes_have_room_for_all(count, multi_scale_flip):
  sizes = random_sizes(count, np.random.default_rng(count))
  protocol = Protocol.of_version('v0', scale=(2048, 512), multi_scale_flip=multi_scale_flip)
  shapes = shapes_for(sizes, protocol, most=4)
  assert len(set(shapes.values())) == min(count, 4)
  assert len({view.network for shape in shapes.values() for view in shape.views}) <= 8
  for size in sizes:
    need, room = Shape.of_image(size, protocol), shapes[size]
    assert np.all(np.array(need.result) <= room.result)
    for view, place in zip(need.views, room.views, strict=True):
      assert np.all(np.array([*view.network, *view.windows]) <= [*place.network, *place.windows])


def test_images_of_one_size_have_a_shape_of_their_own():
  protocol = Protocol(scale=(2048, 1024))
  shapes = shapes_for([(1024, 2048)] * 500, protocol, most=4)
  assert shapes == {(1024, 2048): Shape.of_image((1024, 2048), protocol)}
  assert not shapes[1024, 2048].padded


def test_little_is_padded():
  """Sizes as in ADE20K, short sides alike: four shapes pad less than a quarter."""
  rng = np.random.default_rng(0)
  longer = np.clip(rng.normal(683, 90, size=500), 512, 1200).astype(int)
  sizes = [(512, int(x)) if i % 4 else (int(x), 512) for i, x in enumerate(longer)]
  protocol = Protocol(scale=(2048, 512))
  shapes = shapes_for(sizes, protocol, most=4)
  pixels = sum(np.prod(shapes[size].views[0].network) for size in sizes)
  assert pixels < 1.25 * sum(h * w for h, w in sizes)
