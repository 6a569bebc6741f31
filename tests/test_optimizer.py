import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from nonlocal_jax.training.optimizer import poly_schedule, sgd
from tests.mmseg_import import mmseg_module

PUBLISHED = {'learning_rate': 0.01, 'min_learning_rate': 1e-4, 'power': 0.9}
STEPS = 3
SHAPES = {
  'backbone.conv.kernel': (3, 3, 2, 4),
  'backbone.norm.scale': (4,),
  'backbone.norm.bias': (4,),
  'decode_head.conv_seg.kernel': (1, 1, 4, 3),
  'decode_head.conv_seg.bias': (3,),
  'auxiliary_head.conv.kernel': (1, 1, 4, 2),
  'auxiliary_head.norm.scale': (2,),
}


def reference_rates(learning_rates: list[float], steps: int) -> np.ndarray:
  """Learning rate of each group at each step, (steps, groups), by mmengine's PolyLR."""
  groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr': rate} for rate in learning_rates]
  optimizer = torch.optim.SGD(groups)
  poly = mmseg_module('mmengine.optim').PolyLR(
    optimizer, eta_min=1e-4, power=0.9, begin=0, end=steps, by_epoch=False
  )
  rates = []
  for _ in range(steps):
    rates.append([group['lr'] for group in optimizer.param_groups])
    optimizer.step()
    poly.step()
  return np.asarray(rates)


@pytest.mark.parametrize(
  ('steps', 'step', 'v0', 'v1'),
  [
    (40_000, 0, 0.01, 0.01),
    (40_000, 1, 0.0099997772, 0.0099997772),
    (40_000, 10_000, 0.0077417061, 0.0077416488),
    (40_000, 20_000, 0.0054052786, 0.0054051593),
    (40_000, 30_000, 0.0029430284, 0.0029428365),
    (40_000, 39_999, 0.0001007141, 1e-4),
    (20_000, 19_999, 0.0001013326, 1e-4),
    (80_000, 79_999, 0.0001003827, 1e-4),
    (160_000, 159_999, 0.0001002051, 1e-4),
  ],
)
def test_poly_schedule_has_the_golden_values(steps, step, v0, v1):
  for version, expected in {'v0': v0, 'v1': v1}.items():
    schedule = poly_schedule(**PUBLISHED, steps=steps, version=version)
    assert_allclose(schedule(step), expected, rtol=1e-6)


@pytest.mark.parametrize('steps', [1, 2, 300, 1500, 20_000, 40_000, 80_000, 160_000])
@pytest.mark.parametrize('version', ['v0', 'v1'])
def test_compiled_poly_schedule_ends_at_its_minimum(version, steps):
  schedule = poly_schedule(**PUBLISHED, steps=steps, version=version)
  at = np.array([steps - 1, steps, 2 * steps], np.int32)
  last = steps if version == 'v0' else max(steps - 1, 1)
  expected = 1e-4 + 0.0099 * np.maximum(1 - at / last, 0) ** 0.9
  assert_allclose(jax.jit(schedule)(at), expected, rtol=1e-6)


def test_v1_is_the_schedule_of_mmengine_for_backbone_and_head():
  steps = 50
  expected = reference_rates([0.01, 0.1], steps)
  for group, learning_rate in enumerate((0.01, 0.1)):
    schedule = poly_schedule(
      **{**PUBLISHED, 'learning_rate': learning_rate}, steps=steps, version='v1'
    )
    assert_allclose(schedule(np.arange(steps)), expected[:, group], rtol=1e-5)


def test_unknown_version_of_the_schedule_is_an_error():
  with pytest.raises(KeyError, match='v2'):
    poly_schedule(**PUBLISHED, steps=10, version='v2')


def random_arrays(rng) -> dict[str, np.ndarray]:
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def as_state(arrays: dict[str, np.ndarray]) -> nnx.State:
  return nnx.from_flat_state(
    {tuple(name.split('.')): nnx.Param(jnp.asarray(array)) for name, array in arrays.items()}
  )


def as_arrays(state: nnx.State) -> dict[str, np.ndarray]:
  return {'.'.join(path): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


def transformation(decay_norm_and_bias: bool, head_factor: float | None):
  """Our optimizer; its learning rates are those of a run of `STEPS` steps."""
  poly = {**PUBLISHED, 'steps': STEPS, 'version': 'v1'}
  head_schedule = None
  if head_factor is not None:
    head_schedule = poly_schedule(**{**poly, 'learning_rate': 0.01 * head_factor})
  return sgd(
    poly_schedule(**poly),
    momentum=0.9,
    weight_decay=0.05,
    decay_norm_and_bias=decay_norm_and_bias,
    head_schedule=head_schedule,
  )


@pytest.mark.parametrize('head_factor', [None, 10])
@pytest.mark.parametrize('decay_norm_and_bias', [True, False])
def test_sgd_is_torch_sgd_with_groups(rng, decay_norm_and_bias, head_factor):
  start = random_arrays(rng)
  gradients = [random_arrays(rng) for _ in range(STEPS)]

  theirs = {name: torch.nn.Parameter(torch.as_tensor(a.copy())) for name, a in start.items()}
  decays = [decay_norm_and_bias or name.endswith('kernel') for name in theirs]
  groups = [
    {'params': [array], 'weight_decay': 0.05 * decay}
    for array, decay in zip(theirs.values(), decays, strict=True)
  ]
  optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
  rates = reference_rates([0.01, 0.01 * (head_factor or 1)], STEPS)

  tx = transformation(decay_norm_and_bias, head_factor)
  params = as_state(start)
  opt_state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  for (rate, head_rate), arrays in zip(rates, gradients, strict=True):
    for group, (name, array) in zip(optimizer.param_groups, theirs.items(), strict=True):
      group['lr'] = head_rate if '_head.' in name else rate
      array.grad = torch.as_tensor(arrays[name])
    optimizer.step()
    updates, opt_state = update(as_state(arrays), opt_state, params)
    params = optax.apply_updates(params, updates)
  for name, array in as_arrays(params).items():
    assert_allclose(array, theirs[name].detach(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('head_factor', [None, 10])
@pytest.mark.parametrize('decay_norm_and_bias', [True, False])
def test_state_survives_a_checkpoint(rng, tmp_path, decay_norm_and_bias, head_factor):
  tx = transformation(decay_norm_and_bias, head_factor)
  params = as_state(random_arrays(rng))
  _, opt_state = tx.update(as_state(random_arrays(rng)), tx.init(params), params)
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, opt_state)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', opt_state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', target)
  assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
  assert len(jax.tree.leaves(opt_state)) >= len(SHAPES) + 1
  jax.tree.map(assert_array_equal, restored, opt_state)
  tx.update(as_state(random_arrays(rng)), restored, params)
