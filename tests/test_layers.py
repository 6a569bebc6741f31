"""Layers against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose

from nonlocal_jax.models.layers import BatchNorm, batch_statistics, conv
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.ops.resize import resize_bilinear
from nonlocal_jax.protocol import IMAGENET_MEAN, IMAGENET_STD


def to_torch(x: np.ndarray) -> torch.Tensor:
  return torch.as_tensor(x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(56, 72), (13, 5), (3, 4), (1, 1), (7, 9)])
def test_resize_bilinear_is_interpolate(rng, size, align_corners):
  x = rng.normal(size=(2, 7, 9, 3)).astype(np.float32)
  expected = torch.nn.functional.interpolate(
    to_torch(x), size, mode='bilinear', align_corners=align_corners
  )
  actual = resize_bilinear(jnp.asarray(x), size, align_corners=align_corners)
  assert_allclose(actual, expected.permute(0, 2, 3, 1), atol=2e-6)


@pytest.mark.parametrize(
  ('kernel', 'stride', 'dilation', 'height'),
  [(3, 2, 1, 8), (3, 2, 1, 9), (3, 1, 4, 8), (1, 2, 1, 7)],
)
def test_conv_pads_as_torch(rng, kernel, stride, dilation, height):
  layer = conv(3, 5, kernel, stride=stride, dilation=dilation, use_bias=True, rngs=nnx.Rngs(0))
  layer.bias[...] = jnp.asarray(rng.normal(size=5), jnp.float32)
  x = rng.normal(size=(2, height, 10, 3)).astype(np.float32)
  expected = torch.nn.functional.conv2d(
    to_torch(x),
    torch.as_tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1).copy()),
    torch.as_tensor(np.array(layer.bias[...])),
    stride,
    dilation * (kernel // 2),
    dilation,
  )
  assert_allclose(layer(jnp.asarray(x)), expected.permute(0, 2, 3, 1), atol=1e-5)


def test_batch_norm_in_training_and_after(rng):
  theirs = torch.nn.BatchNorm2d(4)
  ours = BatchNorm(4)
  weight, bias = rng.normal(size=(2, 4)).astype(np.float32)
  with torch.no_grad():
    theirs.weight.copy_(torch.as_tensor(weight))
    theirs.bias.copy_(torch.as_tensor(bias))
  ours.scale[...], ours.bias[...] = jnp.asarray(weight), jnp.asarray(bias)
  for _ in range(3):
    x = rng.normal(3, 2, size=(2, 3, 2, 4)).astype(np.float32)
    expected = theirs(to_torch(x)).detach().permute(0, 2, 3, 1)
    assert_allclose(ours(jnp.asarray(x), train=True), expected, atol=1e-5)
  assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-6)
  assert_allclose(ours.var[...], theirs.running_var, rtol=1e-6)
  theirs.eval()
  expected = theirs(to_torch(x)).detach().permute(0, 2, 3, 1)
  assert_allclose(ours(jnp.asarray(x)), expected, atol=1e-5)


def test_normalize_gives_exact_zeros_where_padded(rng):
  images = rng.integers(0, 256, size=(2, 4, 5, 3), dtype=np.uint8)
  sizes = np.array([[4, 3], [2, 5]])
  normalized = np.asarray(normalize(jnp.asarray(images), sizes=jnp.asarray(sizes)))
  expected = (images.astype(np.float64) - IMAGENET_MEAN) / IMAGENET_STD
  assert_allclose(normalized[0, :, :3], expected[0, :, :3], rtol=1e-6, atol=1e-6)
  assert_allclose(normalized[1, :2], expected[1, :2], rtol=1e-6, atol=1e-6)
  assert not normalized[0, :, 3:].any()
  assert not normalized[1, 2:].any()


def test_normalize_takes_any_number_of_channels(rng):
  images = rng.integers(0, 4096, size=(2, 3, 4, 5), dtype=np.uint16)
  mean, std = rng.uniform(1, 2000, 5), rng.uniform(1, 900, 5)
  found = np.asarray(normalize(images, mean=mean.tolist(), std=std.tolist()))
  np.testing.assert_allclose(found, (images - mean) / std, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match='images have 5 channels, but mean has 3 values and std 3'):
    normalize(images)


@pytest.mark.parametrize('groups', [1, 2])
def test_batch_statistics_of_large_means_and_small_variances(rng, groups):
  """As exact in float32 as the data allow: their rounding is 6e-5 of the standard deviation."""
  x = np.float32(rng.normal(1e3, 1, size=(4, 9, 8, 3)) * [1, 0.01, 1] + [0, 0, -1e3])
  exact = x.astype(np.float64).reshape(groups, -1, 3)
  mean, var = batch_statistics(jnp.asarray(x), groups)
  assert_allclose(mean, exact.mean(axis=1), rtol=1e-6, atol=1e-6)
  assert_allclose(var, exact.var(axis=1), rtol=1e-5)


def test_derivatives_of_batch_statistics(rng):
  with jax.enable_x64(True):
    x, direction = (jnp.asarray(rng.normal(2, 3, size=(4, 3, 5, 2))) for _ in range(2))
    cotangents = tuple(jnp.asarray(rng.normal(size=(2, 2))) for _ in range(2))
    statistics = functools.partial(batch_statistics, groups=2)
    plain = lambda x: (  # noqa: E731
      x.reshape(2, -1, 2).mean(axis=1),
      x.reshape(2, -1, 2).var(axis=1),
    )
    for ours, expected in zip(
      jax.jvp(statistics, (x,), (direction,))[1] + jax.vjp(statistics, x)[1](cotangents),
      jax.jvp(plain, (x,), (direction,))[1] + jax.vjp(plain, x)[1](cotangents),
      strict=True,
    ):
      assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)
