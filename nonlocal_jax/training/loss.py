"""Cross-entropy over the pixels of upsampled logits (mmseg `CrossEntropyLoss`)."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, *, ignore_index: int = 255) -> jax.Array:
  """Mean cross-entropy over all pixels, ignored ones included.

  Ignored pixels add nothing to the sum but count in the divisor, `n * h * w`, as in the original.

  Args:
    logits: (n, h, w, c) float32.
    labels: (n, h, w) integers in [0, c) or `ignore_index`.
    ignore_index: Label of the pixels without a class.

  Returns:
    Scalar float32.
  """
  valid = labels != ignore_index
  targets = jnp.where(valid, labels, 0).astype(jnp.int32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(jnp.where(valid, losses, 0.0)) / labels.size


def pixel_accuracy(logits: jax.Array, labels: jax.Array, *, ignore_index: int = 255) -> jax.Array:
  """Share of the pixels that have a class whose largest logit is that class.

  Args:
    logits: (n, h, w, c) float32.
    labels: (n, h, w) integers in [0, c) or `ignore_index`.
    ignore_index: Label of the pixels without a class.

  Returns:
    Scalar float32 in [0, 1]; 0 where no pixel has a class.
  """
  valid = labels != ignore_index
  correct = (jnp.argmax(logits, axis=-1) == labels) & valid
  return jnp.sum(correct) / jnp.maximum(jnp.sum(valid), 1)
