"""SGD with momentum, weight decay and the poly schedule: the published recipe and its variants."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """SGD with momentum under the poly schedule.

  Attributes:
    learning_rate: At the first step.
    min_learning_rate: At the end.
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
    """The learning rate of the backbone by 0-based step, and the optimizer.

    Args:
      steps: Length of the training.
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
    min_learning_rate: Value at step `last` and after.
    power: Exponent.
    steps: Length of the training.
    version: 'v0': `last` is `steps`, which no step of the training reaches (mmcv's
      `PolyLrUpdaterHook`, mmsegmentation 0.x). 'v1': `last` is `steps - 1` (mmengine's `PolyLR`,
      mmsegmentation 1.x).

  Returns:
    A function from the 0-based step to the learning rate, float32.
  """
  last = {'v0': steps, 'v1': max(steps - 1, 1)}[version]

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    # The difference is taken in integers: `1 - step / last` can end below zero, and its power is
    # NaN.
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
    momentum: Factor of the running sum, in [0, 1).
    weight_decay: Factor of the parameters added to their gradients, before the momentum.
    decay_norm_and_bias: Whether biases and norms decay, too; else only arrays of more than one
      axis, which are the kernels.
    head_schedule: Learning rate by step of what lies below a top-level key that ends in 'head',
      None for `schedule`. A head that learns `mult` times as fast (mmengine's `lr_mult` under
      `custom_keys`) has a poly schedule of its own from `mult * learning_rate` down to the same
      `min_learning_rate`; the floor is not multiplied.

  Returns:
    A transformation of trees like the parameters, with a state of arrays.
  """
  decay = optax.add_decayed_weights(weight_decay, None if decay_norm_and_bias else _are_kernels)
  if head_schedule is None:
    return optax.chain(decay, optax.sgd(schedule, momentum=momentum))
  # Only steps are counted below the masks, so that no placeholder gets into the state.
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
