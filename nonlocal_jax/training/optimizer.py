"""SGD with momentum, weight decay on everything and the poly schedule: the published recipe."""

import jax
import jax.numpy as jnp
import optax


def poly_schedule(
  *, learning_rate: float, min_learning_rate: float, power: float, steps: int
) -> optax.Schedule:
  """`min + (lr - min) * (1 - t / (steps - 1)) ** power` (mmengine `PolyLR`).

  Args:
    learning_rate: Value at step 0.
    min_learning_rate: Value at step `steps - 1` and after.
    power: Exponent.
    steps: Length of the training.

  Returns:
    A function from the 0-based step to the learning rate, float32.
  """
  last = max(steps - 1, 1)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    # The difference is taken in integers: `1 - step / last` can end below zero, and its power is
    # NaN.
    remaining = jnp.maximum(last - jnp.asarray(step), 0) / last
    return min_learning_rate + (learning_rate - min_learning_rate) * remaining**power

  return schedule


def sgd(
  schedule: optax.Schedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """`torch.optim.SGD`: g += decay * p; v = momentum * v + g; p -= lr * v.

  Args:
    schedule: Learning rate by step.
    momentum: Factor of the running sum, in [0, 1).
    weight_decay: Factor of the parameters added to their gradients, before the momentum; biases and
      norms included.
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
  )
