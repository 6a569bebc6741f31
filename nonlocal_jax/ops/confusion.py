"""The confusion matrix of label maps (mmseg `IoUMetric`)."""

import jax
import jax.numpy as jnp


def confusion_matrix(
  predictions: jax.Array, labels: jax.Array, *, num_classes: int, ignore_index: int = 255
) -> jax.Array:
  """Counts pixels by label and predicted class.

  >>> labels, predictions = jnp.array([0, 0, 1, 255]), jnp.array([0, 1, 1, 0])
  >>> confusion_matrix(predictions, labels, num_classes=2).tolist()
  [[1, 1], [0, 1]]

  Args:
    predictions: Integers in [0, num_classes), any shape.
    labels: Integers in [0, num_classes) or `ignore_index`, the same shape; at most 2**31 - 1
      pixels.
    num_classes: Number of classes.
    ignore_index: Label of pixels that are not counted.

  Returns:
    (num_classes, num_classes) int32, rows by label, columns by prediction.
  """
  valid = labels != ignore_index
  cells = labels.astype(jnp.int32) * num_classes + predictions.astype(jnp.int32)
  cells = jnp.where(valid, cells, num_classes**2)
  counts = jnp.bincount(cells.ravel(), length=num_classes**2 + 1)
  return counts[:-1].astype(jnp.int32).reshape(num_classes, num_classes)


def confusion_matrices(
  predictions: jax.Array,
  labels: jax.Array,
  groups: jax.Array,
  *,
  num_groups: int,
  num_classes: int,
  ignore_index: int = 255,
) -> jax.Array:
  """Counts the pixels of each image by group, label and predicted class.

  >>> labels, predictions = jnp.array([[[0, 0, 1]], [[1, 1, 255]]]), jnp.array([[[0, 1, 1]]] * 2)
  >>> found = confusion_matrices(predictions, labels, predictions, num_groups=2, num_classes=2)
  >>> found.tolist()
  [[[[1, 0], [0, 0]], [[0, 1], [0, 1]]], [[[0, 0], [1, 0]], [[0, 0], [0, 1]]]]

  Args:
    predictions: (n, h, w) integers in [0, num_classes).
    labels: (n, h, w) integers in [0, num_classes) or `ignore_index`.
    groups: (n, h, w) integers in [0, num_groups), or bool.
    num_groups: Number of groups.
    num_classes: Number of classes.
    ignore_index: Label of pixels that are not counted.

  Returns:
    (n, num_groups, num_classes, num_classes) int32, rows by label, columns by prediction.
  """
  n = len(labels)
  image = jax.lax.broadcasted_iota(jnp.int32, labels.shape, 0)
  cells = image * num_groups + groups.astype(jnp.int32)
  for part in (labels, predictions):
    cells = cells * num_classes + part.astype(jnp.int32)
  length = n * num_groups * num_classes**2
  cells = jnp.where(labels != ignore_index, cells, length)
  counts = jnp.bincount(cells.ravel(), length=length + 1)[:-1]
  return counts.astype(jnp.int32).reshape(n, num_groups, num_classes, num_classes)
