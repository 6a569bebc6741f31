"""What can be told from class probabilities: how sure a network is, and what else it may be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.data.transforms import IGNORE

UNKNOWN = IGNORE  # the label of pixels whose class is not certain enough


def entropy(probabilities: np.ndarray | jax.Array) -> np.ndarray:
  """Computes the entropy in nats: -sum p log p, from 0 (certain) to log(classes).

  Divide it by log(2) for bits.

  >>> entropy(np.array([[1, 0], [0.5, 0.5]], np.float32)).round(4).tolist()
  [0.0, 0.6930999755859375]

  Args:
    probabilities: (..., classes) floats in [0, 1], such as those of `PretrainedModel.predict`.

  Returns:
    (...) float32.
  """
  return np.asarray(_entropy(probabilities))


def top_k(probabilities: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds the k most likely classes, the likeliest first; of equal ones the first class first.

  >>> classes, likely = top_k(np.array([0.25, 0.125, 0.625], np.float32), 2)
  >>> classes.tolist(), likely.tolist()
  ([2, 0], [0.625, 0.25])

  Args:
    probabilities: (..., classes) floats in [0, 1].
    k: From 1 to the number of classes.

  Returns:
    The classes, (..., k) int32, and their probabilities, (..., k) of the dtype of `probabilities`.

  Raises:
    ValueError: If `k` is out of range.
  """
  if not 1 <= k <= probabilities.shape[-1]:
    raise ValueError(f'k is {k}, expected 1 to {probabilities.shape[-1]}, the number of classes')
  likely, classes = _top_k(probabilities, k=k)
  return np.asarray(classes), np.asarray(likely)


def confidence_of(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the probabilities of labels.

  Args:
    probabilities: (..., classes) floats.
    labels: (...) integers, a class of each pixel.

  Returns:
    (...) of the dtype of `probabilities`.
  """
  places = labels[..., None].astype(np.int64)
  return np.take_along_axis(probabilities, places, axis=-1)[..., 0]


def with_unknown(labels: np.ndarray, confidence: np.ndarray, *, below: float) -> np.ndarray:
  """Returns labels in which pixels that are not certain enough are 255, `UNKNOWN`.

  >>> with_unknown(np.array([3, 7]), np.array([0.9, 0.4]), below=0.5).tolist()
  [3, 255]

  Args:
    labels: Integers of any shape, in [0, 255).
    confidence: The probability of each label, the same shape.
    below: Labels whose probability is smaller become unknown.
  """
  return np.where(confidence < below, labels.dtype.type(UNKNOWN), labels)


@jax.jit
def _entropy(probabilities: jax.Array) -> jax.Array:
  return jax.scipy.special.entr(probabilities.astype(jnp.float32)).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=['k'])
def _top_k(probabilities: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
  return tuple(jax.lax.top_k(probabilities, k))
