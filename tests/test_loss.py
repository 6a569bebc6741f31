import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from nonlocal_jax.ops.upsampling import upsampling_factor
from nonlocal_jax.runtime.parallel import data_mesh, over_batch
from nonlocal_jax.training.loss import (
  Ohem,
  dice_losses,
  loss_divisor,
  pixel_accuracy,
  pixel_losses,
  reduced_pixel_losses,
  sum_of_losses,
)
from tests.mmseg_import import mmseg_module

WEIGHTS = (0.5, 2.0, 1.25, 0.8)
ACCEPTED_PIXELS = 40  # of the 2 * 5 * 6 in a batch, the others are ignored


@pytest.fixture
def logits(rng) -> np.ndarray:
  return rng.normal(scale=2, size=(2, 5, 6, 4)).astype(np.float32)


@pytest.fixture
def labels(rng) -> np.ndarray:
  return rng.integers(0, 4, size=(2, 5, 6))


@pytest.fixture
def labels_and_ignored(rng, labels) -> np.ndarray:
  labels.flat[rng.permutation(labels.size)[ACCEPTED_PIXELS:]] = 255
  return labels


def reference(
  logits: np.ndarray, labels: np.ndarray, *, ohem: Ohem | None = None, **options
) -> tuple[float, np.ndarray]:
  """Loss and gradient by mmsegmentation, put together as in its decode heads."""
  module = mmseg_module('mmseg.models.losses').CrossEntropyLoss(**options)
  tensor = torch.as_tensor(logits).permute(0, 3, 1, 2).requires_grad_()
  target = torch.as_tensor(labels)
  weight = None
  if ohem is not None:
    sampler = mmseg_module('mmseg.structures.sampler').OHEMPixelSampler
    context = types.SimpleNamespace(ignore_index=255, loss_decode=module)
    weight = sampler(context, **ohem._asdict()).sample(tensor, target[:, None])
  loss = module(tensor, target, weight=weight, ignore_index=255)
  loss.backward()
  return loss.item(), tensor.grad.permute(0, 2, 3, 1).numpy()


def cross_entropy(logits, labels, *, avg_non_ignore=False, class_weights=None, ohem=None):
  """As a training step puts it together."""
  total = sum_of_losses(
    pixel_losses(logits, labels).losses, labels, class_weights=class_weights, ohem=ohem
  )
  options = {'avg_non_ignore': avg_non_ignore, 'class_weights': class_weights}
  return total / loss_divisor(labels, **options)


def assert_same(logits, labels, *, expected, **options) -> None:
  loss_and_gradient = jax.jit(jax.value_and_grad(lambda x, y: cross_entropy(x, y, **options)))
  loss, gradient = loss_and_gradient(jnp.asarray(logits), jnp.asarray(labels))
  assert loss.dtype == jnp.float32
  assert_allclose(loss, expected[0], rtol=2e-6)
  assert_allclose(gradient, expected[1], atol=1e-7)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(5, 6), (3, 4), (33, 41)])  # fewer rows than parts, and more
def test_pixel_losses_of_upsampled_logits_are_those_of_pytorch(rng, logits, size, align_corners):
  labels = rng.choice([0, 1, 2, 3, 255], size=(2, *size))
  weights = rng.normal(size=labels.shape)  # a loss that is not the plain sum

  def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses, hits, _ = pixel_losses(logits, jnp.asarray(labels), align_corners=align_corners)
    return jnp.sum(losses * weights), (losses, hits)

  gradient, (losses, hits) = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(logits))
  tensor = torch.as_tensor(logits).double().permute(0, 3, 1, 2).requires_grad_()
  upsampled = torch.nn.functional.interpolate(
    tensor, size, mode='bilinear', align_corners=align_corners
  )
  expected = torch.nn.functional.cross_entropy(
    upsampled, torch.as_tensor(labels), ignore_index=255, reduction='none'
  )
  (expected * torch.as_tensor(weights)).sum().backward()
  assert_allclose(losses, expected.detach(), rtol=1e-5, atol=1e-6)
  assert_allclose(gradient, tensor.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
  expected_hits = upsampled.argmax(1).numpy() == labels
  np.testing.assert_array_equal(hits, expected_hits)
  accuracy = pixel_accuracy(hits, jnp.asarray(labels))
  assert_allclose(accuracy, expected_hits.sum() / (labels != 255).sum(), rtol=1e-6)


@pytest.mark.parametrize(
  ('size', 'factor', 'align_corners'),
  [((40, 48), 8, False), ((33, 41), 8, True), ((10, 12), 2, False)],
)
def test_reduced_losses_are_those_of_pytorch(rng, size, factor, align_corners):
  x = rng.normal(scale=3, size=(2, 5, 6, 7))
  labels = rng.integers(0, 7, size=(2, *size))
  labels[rng.random(labels.shape) < 0.2] = 255
  weights = rng.normal(size=labels.shape)
  tensor = torch.as_tensor(x).permute(0, 3, 1, 2).requires_grad_()
  upsampled = torch.nn.functional.interpolate(
    tensor, size, mode='bilinear', align_corners=align_corners
  )
  expected = torch.nn.functional.cross_entropy(
    upsampled, torch.as_tensor(labels), ignore_index=255, reduction='none'
  )
  expected.backward(torch.as_tensor(weights))
  hits = (upsampled.argmax(dim=1).numpy() == labels) & (labels != 255)
  assert upsampling_factor((5, 6), size, align_corners=align_corners) == factor

  def losses(logits):
    found = reduced_pixel_losses(logits, jnp.asarray(labels), factor, align_corners, 255)
    return found.losses, found.hits

  with jax.enable_x64(True):
    found, pull, found_hits = jax.vjp(losses, jnp.asarray(x), has_aux=True)
    (gradient,) = pull(jnp.asarray(weights))
  assert_allclose(found, expected.detach(), atol=1e-12)
  assert_allclose(gradient, tensor.grad.permute(0, 2, 3, 1), atol=1e-12)
  assert (np.asarray(found_hits) == hits).all()


def test_sizes_that_are_no_whole_multiples_have_no_factor():
  assert upsampling_factor((5, 6), (40, 47), align_corners=False) is None
  assert upsampling_factor((5, 6), (40, 48), align_corners=True) is None
  assert upsampling_factor((5, 6), (15, 18), align_corners=False) is None  # no power of two
  assert upsampling_factor((1, 1), (1, 1), align_corners=True) is None


def test_reduced_losses_hold_no_upsampled_logits():
  """The largest arrays have an eighth of the pixels: those of upsampled rows."""
  logits = jax.ShapeDtypeStruct((1, 64, 64, 19), jnp.float32)
  labels = jax.ShapeDtypeStruct((1, 512, 512), jnp.uint8)

  def loss(logits, labels):
    return reduced_pixel_losses(logits, labels, 8, False, 255).losses.sum()

  lowered = jax.jit(jax.grad(loss)).lower(logits, labels)
  assert '1x64x8x64x19xf32' in lowered.as_text()
  assert not re.search(r'x(64x8x64x8|512x512)x19xf', lowered.as_text())
  compiled = lowered.compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512 * 19 * 4


def test_accuracy_is_zero_where_no_pixel_has_a_class():
  assert pixel_accuracy(jnp.zeros((1, 2, 2), bool), jnp.full((1, 2, 2), 255)) == 0


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_loss_with_ignored_pixels_is_that_of_mmseg(logits, labels_and_ignored, avg_non_ignore):
  expected = reference(logits, labels_and_ignored, avg_non_ignore=avg_non_ignore)
  assert_same(logits, labels_and_ignored, expected=expected, avg_non_ignore=avg_non_ignore)


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_loss_with_class_weights_is_that_of_mmseg(logits, labels, avg_non_ignore):
  expected = reference(logits, labels, class_weight=WEIGHTS, avg_non_ignore=avg_non_ignore)
  options = {'class_weights': WEIGHTS, 'avg_non_ignore': avg_non_ignore}
  assert_same(logits, labels, expected=expected, **options)


def test_ignored_pixels_have_no_class_weight(logits, labels_and_ignored):
  """In float64: mmsegmentation fails where both come together."""
  valid = labels_and_ignored != 255
  chosen, targets = logits[valid].astype(np.float64), labels_and_ignored[valid]
  weights = np.asarray(WEIGHTS)[targets]
  probabilities = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
  losses = -np.log(probabilities[np.arange(len(targets)), targets])
  gradient = np.zeros(logits.shape)
  gradient[valid] = (probabilities - np.eye(4)[targets]) * (weights / weights.sum())[:, None]
  expected = (np.average(losses, weights=weights), gradient)
  assert_same(logits, labels_and_ignored, expected=expected, class_weights=WEIGHTS)


@pytest.mark.parametrize('min_kept', [7, 19, 20, 1000])
@pytest.mark.parametrize('thresh', [0.01, 0.3, None])
def test_ohem_is_that_of_mmseg(logits, labels_and_ignored, thresh, min_kept):
  """A batch of two has room for `2 * min_kept`: less than, just about and more than are valid."""
  ohem = Ohem(thresh, min_kept)
  expected = reference(logits, labels_and_ignored, ohem=ohem)
  assert_same(logits, labels_and_ignored, expected=expected, ohem=ohem)
  kept = np.count_nonzero(expected[1].any(-1))
  if thresh != 0.3:
    limit = ACCEPTED_PIXELS - 1 if thresh else ACCEPTED_PIXELS  # mmseg's, the best one stays out
    assert kept == min(2 * min_kept, limit)


@pytest.mark.parametrize('thresh', [0.3, None])
def test_ohem_with_class_weights_is_that_of_mmseg(logits, labels, thresh):
  ohem = Ohem(thresh, min_kept=9)
  expected = reference(logits, labels, ohem=ohem, class_weight=WEIGHTS)
  assert_same(logits, labels, expected=expected, ohem=ohem, class_weights=WEIGHTS)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'avg_non_ignore': True},
    {'class_weights': WEIGHTS},
    {'ohem': Ohem(0.7, 3), 'avg_non_ignore': True},
    {'ohem': Ohem(None, 3), 'avg_non_ignore': True},
  ],
)
def test_loss_and_gradient_are_zero_where_all_pixels_are_ignored(logits, labels, options):
  expected = (0.0, np.zeros_like(logits))
  assert_same(logits, np.full_like(labels, 255), expected=expected, **options)


def test_bfloat16_logits_are_computed_with_in_float32(logits, labels_and_ignored):
  rounded = jnp.asarray(logits, jnp.bfloat16)
  expected, gradient = reference(np.asarray(rounded, np.float32), labels_and_ignored)
  labels = jnp.asarray(labels_and_ignored)
  loss, actual = jax.jit(jax.value_and_grad(cross_entropy))(rounded, labels)
  assert loss.dtype == jnp.float32
  assert_allclose(loss, expected, rtol=2e-6)
  assert actual.dtype == jnp.bfloat16
  assert_allclose(actual.astype(np.float32), gradient, rtol=2**-8, atol=1e-7)


def test_sum_and_divisor_of_uint8_labels(logits, labels_and_ignored):
  """As labels come from a loader; a part of a batch is divided by the divisor of the whole."""
  labels = jnp.asarray(labels_and_ignored, jnp.uint8)
  expected, _ = reference(logits, labels_and_ignored, avg_non_ignore=True)
  divisor = loss_divisor(labels, avg_non_ignore=True)
  assert divisor == ACCEPTED_PIXELS
  assert loss_divisor(labels) == labels.size
  losses = pixel_losses(jnp.asarray(logits), labels).losses
  parts = [sum_of_losses(losses[i : i + 1], labels[i : i + 1]) / divisor for i in range(2)]
  assert_allclose(sum(parts), expected, rtol=2e-6)


@pytest.mark.parametrize('thresh', [0.3, None])
def test_ohem_chooses_among_the_pixels_of_all_devices(rng, thresh):
  logits = rng.normal(scale=2, size=(4, 3, 4, 5)).astype(np.float32)
  logits[0] *= 0.1  # the hard pixels are not spread evenly
  labels = rng.choice([0, 1, 2, 3, 4, 255], size=(4, 3, 4))
  ohem = Ohem(thresh, min_kept=5)
  expected = reference(logits, labels, ohem=ohem)
  assert jax.device_count() == 4
  sharded = jax.device_put((logits, labels), over_batch(data_mesh()))
  assert_same(*sharded, expected=expected, ohem=ohem)


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_the_focal_loss_is_its_formula(logits, labels_and_ignored, gamma):
  """By PyTorch's derivatives in float64: mmsegmentation's has a sigmoid in place of the softmax."""
  tensor = torch.as_tensor(logits, dtype=torch.float64).requires_grad_()
  target = torch.as_tensor(labels_and_ignored)
  valid = target != 255
  p = tensor.softmax(-1)[valid].gather(1, target[valid][:, None])[:, 0]
  weights = torch.as_tensor(WEIGHTS, dtype=torch.float64)[target[valid]]
  expected = (-weights * (1 - p) ** gamma * p.log()).sum()
  expected.backward()
  labels = jnp.asarray(labels_and_ignored)

  def loss(logits):
    losses = pixel_losses(logits, labels).losses
    return sum_of_losses(losses, labels, class_weights=WEIGHTS, focal_gamma=gamma)

  found, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
  assert_allclose(found, expected.item(), rtol=2e-6)
  assert_allclose(gradient, tensor.grad, atol=1e-5)


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_pixels_that_are_right_or_ignored_have_no_focal_loss(gamma):
  logits = jnp.array([[[[0.0, 200.0], [3.0, 1.0]]]])
  labels = jnp.array([[[1, 255]]])

  def loss(logits):
    return sum_of_losses(pixel_losses(logits, labels).losses, labels, focal_gamma=gamma)

  found, gradient = jax.value_and_grad(loss)(logits)
  assert found == 0
  assert not gradient.any()


@pytest.mark.parametrize('method', ['row_blocks', 'reductions'])
@pytest.mark.parametrize('align_corners', [False, True])
def test_the_dice_loss_is_that_of_mmseg(rng, method, align_corners):
  x = rng.normal(scale=2, size=(2, 5, 6, 4))
  size = (33, 41) if align_corners else (40, 48)
  assert upsampling_factor((5, 6), size, align_corners=align_corners) == 8
  labels = rng.choice([0, 1, 2, 3, 255], size=(2, *size))
  module = mmseg_module('mmseg.models.losses').DiceLoss(use_sigmoid=False, reduction='none')
  tensor = torch.as_tensor(x).permute(0, 3, 1, 2).requires_grad_()
  upsampled = torch.nn.functional.interpolate(
    tensor, size, mode='bilinear', align_corners=align_corners
  )
  weights = rng.normal(size=2)
  expected = module(upsampled, torch.as_tensor(labels))
  (expected * torch.as_tensor(weights)).sum().backward()

  def losses(logits):
    pixels = pixel_losses(
      logits,
      jnp.asarray(labels),
      method=method,
      align_corners=align_corners,
      with_squares=True,
    )
    return dice_losses(pixels, jnp.asarray(labels))

  with jax.enable_x64(True):
    found, pull = jax.vjp(losses, jnp.asarray(x))
    (gradient,) = pull(jnp.asarray(weights))
  assert_allclose(found, expected.detach(), rtol=1e-7)  # mmseg counts labels in float32
  assert_allclose(gradient, tensor.grad.permute(0, 2, 3, 1), rtol=1e-6, atol=1e-9)
