"""SGD with momentum, weight decay and a polynomial learning rate schedule."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """SGD with momentum and a polynomial schedule.

  Attributes:
    learning_rate: Initial learning rate.
    min_learning_rate: Final learning rate.
    power: Exponent of the schedule.
    schedule: Version of the schedule, see `poly_schedule`.
    momentum: See `sgd`.
    weight_decay: See `sgd`.
    decay_norm_and_bias: See `sgd`.
    head_multiplier: Factor of `learning_rate` in both heads.
  """

  learning_rate: float = 0.01
  min_learning_rate: float = 1e-4
  power: float = 0.9
  schedule: Literal['v0', 'v1'] = 'v0'
  momentum: float = 0.9
  weight_decay: float = 5e-4
  decay_norm_and_bias: bool = True
  head_multiplier: float = 1.0

  def make(self, steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Creates the learning rate schedule of the backbone, by 0-based step, and the optimizer.

    Args:
      steps: Number of training steps.
    """

    def schedule(learning_rate: float) -> optax.Schedule:
      return poly_schedule(
        learning_rate=learning_rate,
        min_learning_rate=self.min_learning_rate,
        power=self.power,
        steps=steps,
        version=self.schedule,
      )

    head_schedule = None
    if self.head_multiplier != 1:
      head_schedule = schedule(self.head_multiplier * self.learning_rate)
    tx = sgd(
      schedule(self.learning_rate),
      momentum=self.momentum,
      weight_decay=self.weight_decay,
      decay_norm_and_bias=self.decay_norm_and_bias,
      head_schedule=head_schedule,
    )
    return schedule(self.learning_rate), tx


def poly_schedule(
  *,
  learning_rate: float,
  min_learning_rate: float,
  power: float,
  steps: int,
  version: Literal['v0', 'v1'],
) -> optax.Schedule:
  """Polynomial decay: `min + (lr - min) * (1 - t / last) ** power`.

  >>> schedule = poly_schedule(
  ...   learning_rate=1.0, min_learning_rate=0.0, power=1.0, steps=4, version='v0'
  ... )
  >>> [float(schedule(step)) for step in range(5)]
  [1.0, 0.75, 0.5, 0.25, 0.0]

  Args:
    learning_rate: Value at step 0.
    min_learning_rate: Value from step `last` on.
    power: Exponent.
    steps: Number of training steps.
    version: 'v0': `last` is `steps`, one after the last step (mmcv's `PolyLrUpdaterHook`,
      MMSegmentation 0.x). 'v1': `last` is `steps - 1` (mmengine's `PolyLR`, MMSegmentation 1.x).

  Returns:
    A function from the 0-based step to the learning rate, float32.
  """
  last = {'v0': steps, 'v1': max(steps - 1, 1)}[version]

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    # Subtracts integers: `1 - step / last` can round to below zero, whose power is NaN.
    remaining = jnp.maximum(last - jnp.asarray(step), 0) / last
    return min_learning_rate + (learning_rate - min_learning_rate) * remaining**power

  return schedule


def sgd(
  schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  decay_norm_and_bias: bool = True,
  head_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
  """`torch.optim.SGD`: g += decay * p; v = momentum * v + g; p -= lr * v.

  Args:
    schedule: Learning rate by step.
    momentum: Decay rate of the velocity `v`, in [0, 1).
    weight_decay: Factor of the parameters that is added to the gradients, before momentum.
    decay_norm_and_bias: Whether weight decay also applies to biases and normalization; if not, only
      to arrays of more than one axis, which are the kernels.
    head_schedule: Learning rate by step of the parameters below top-level keys that end in 'head';
      None for `schedule`. mmengine's `lr_mult` under `custom_keys` corresponds to a polynomial
      schedule from `lr_mult * learning_rate` to the same `min_learning_rate`, which is not
      multiplied.

  Returns:
    The gradient transformation.
  """
  decay = optax.add_decayed_weights(weight_decay, None if decay_norm_and_bias else _are_kernels)
  if head_schedule is None:
    return optax.chain(decay, optax.sgd(schedule, momentum=momentum))
  # The masks wrap only the schedules, whose state is a step count: so the state holds arrays only.
  return optax.chain(
    decay,
    optax.trace(momentum),
    optax.masked(optax.scale_by_learning_rate(schedule), _are_outside_heads),
    optax.masked(optax.scale_by_learning_rate(head_schedule), _are_in_heads),
  )


def _are_kernels(params: Any) -> Any:
  return jax.tree.map(lambda array: array.ndim > 1, params)


def _are_in_heads(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: str(path[0].key).endswith('head'), params)


def _are_outside_heads(params: Any) -> Any:
  return jax.tree.map(lambda in_head: not in_head, _are_in_heads(params))
