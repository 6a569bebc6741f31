"""Sizes, windows and matrices of testing, and the shapes that images share."""

import dataclasses

import numpy as np
import pytest
import torch

from nonlocal_jax.inference.buckets import PaddedShape, shapes_for
from nonlocal_jax.inference.views import axis_matrix, feature_size, views_of, window_starts
from nonlocal_jax.protocol import EvalProtocol


def test_json_holds_every_field():
  protocol = EvalProtocol(
    scale=(9, 8),
    keep_ratio=False,
    window_crop=(5, 4),
    window_stride=(3, 2),
    pad_windows=False,
    version='v1',
    ratios=(0.5, 2.0),
    flip=True,
    align_corners=True,
    channel_order='bgr',
    mean=(1.0, 2.0, 3.0, 4.0),
    std=(5.0, 6.0, 7.0, 8.0),
    bits=16,
  )
  defaults = EvalProtocol()
  # These exclude others.
  whole = EvalProtocol(scale_factor=(0.5, 2.0), pad_multiple=32, pad_size=(4, 5))
  names = {field.name for field in dataclasses.fields(EvalProtocol)}
  for one in (protocol, whole):
    names -= {name for name in names if getattr(one, name) != getattr(defaults, name)}
    assert EvalProtocol.from_json(one.to_json()) == one
  assert not names
  assert EvalProtocol.from_dict({}) == defaults


@pytest.mark.parametrize(
  ('fields', 'sentence'),
  [
    ({'scale': [0, 8]}, r'scale is \(0, 8\), expected two positive integers or None'),
    ({'scale_factor': [1.0, 0.0]}, r'scale_factor is \(1.0, 0.0\), expected two positive numbers'),
    ({'scale': [8, 8], 'scale_factor': [1.0, 2.0]}, 'scale and scale_factor are both given'),
    ({'pad_multiple': 0}, 'pad_multiple is 0, expected a positive integer'),
    (
      {'window_crop': [8, 8], 'window_stride': [8, 8], 'pad_size': [9, 9]},
      'pad_multiple and pad_size are for whole images',
    ),
    ({'window_crop': [8, 8]}, 'window_crop and window_stride must be given together'),
    (
      {'window_crop': [8, 8], 'window_stride': [8, 9]},
      r'window_stride is \(8, 9\), which leaves gaps between windows of \(8, 8\)',
    ),
    ({'version': 'v2'}, "version is 'v2', expected 'v0' or 'v1'"),
    ({'ratios': []}, r'ratios is \(\), expected one or more positive numbers'),
    ({'channel_order': 'hsv'}, "channel_order is 'hsv', expected 'rgb' or 'bgr'"),
    ({'mean': [1.0]}, 'mean has 1 values and std 3, expected one per channel'),
    ({'std': [1.0, 0.0, 1.0]}, 'std is .* expected positive numbers'),
    ({'crop': 3}, 'unknown fields of an EvalProtocol: crop'),
  ],
)
def test_wrong_fields_are_errors(fields, sentence):
  with pytest.raises(ValueError, match=sentence):
    EvalProtocol.from_dict(fields)


@pytest.mark.parametrize(
  ('version', 'expected'),
  [('v0', [(40, 60), (80, 120), (160, 240)]), ('v1', [(25, 17), (50, 33), (100, 66)])],
)
def test_sizes_without_the_aspect_ratio(version, expected):
  protocol = EvalProtocol(
    scale=(120, 80), keep_ratio=False, version=version, ratios=(0.5, 1.0, 2.0)
  )
  assert [view.size for view in views_of(protocol, (50, 33))] == expected
  (view,) = views_of(dataclasses.replace(protocol, ratios=(1.0,)), (50, 33))
  assert view.size == (80, 120)


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
  protocol = EvalProtocol.from_version(version, scale=scale, multi_scale_flip=True)
  assert [view.size[1] for view in views_of(protocol, image)] == expected
  assert protocol.flips == 2


def test_published_windows():
  """2 x 4 windows on a Cityscapes image at single scale, 62 over all scales."""
  windows = {'window_crop': (769, 769), 'window_stride': (513, 513)}
  single = EvalProtocol.from_version('v0', scale=(2049, 1025), **windows)
  (view,) = views_of(single, (1024, 2048))
  assert (view.size, len(view.tops), len(view.lefts)) == ((1025, 2049), 2, 4)
  several = EvalProtocol.from_version('v0', scale=(2049, 1025), **windows, multi_scale_flip=True)
  views = views_of(several, (1024, 2048))
  assert sum(len(view.tops) * len(view.lefts) for view in views) == 62
  assert [view.crop[0] for view in views[:3]] == [512, 768, 769]
  assert {view.network for view in views} == {(769, 769)}
  unpadded = EvalProtocol.from_version('v1', scale=(2049, 1025), **windows, multi_scale_flip=True)
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
  protocol = EvalProtocol.from_version('v0', scale=(2048, 512), multi_scale_flip=multi_scale_flip)
  shapes = shapes_for(sizes, protocol, most=4)
  assert len(set(shapes.values())) == min(count, 4)
  assert len({view.network for shape in shapes.values() for view in shape.views}) <= 8
  for size in sizes:
    need, room = PaddedShape.from_image(size, protocol), shapes[size]
    assert np.all(np.array(need.result) <= room.result)
    for view, place in zip(need.views, room.views, strict=True):
      assert np.all(np.array([*view.network, *view.windows]) <= [*place.network, *place.windows])


def test_images_of_one_size_have_a_shape_of_their_own():
  protocol = EvalProtocol(scale=(2048, 1024))
  shapes = shapes_for([(1024, 2048)] * 500, protocol, most=4)
  assert shapes == {(1024, 2048): PaddedShape.from_image((1024, 2048), protocol)}
  assert not shapes[1024, 2048].padded


def test_little_is_padded():
  """Sizes as in ADE20K, short sides alike: four shapes pad less than a quarter."""
  rng = np.random.default_rng(0)
  longer = np.clip(rng.normal(683, 90, size=500), 512, 1200).astype(int)
  sizes = [(512, int(x)) if i % 4 else (int(x), 512) for i, x in enumerate(longer)]
  protocol = EvalProtocol(scale=(2048, 512))
  shapes = shapes_for(sizes, protocol, most=4)
  pixels = sum(np.prod(shapes[size].views[0].network) for size in sizes)
  assert pixels < 1.25 * sum(h * w for h, w in sizes)
