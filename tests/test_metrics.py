"""Confusion matrix and scores against mmsegmentation's IoUMetric and values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from nonlocal_jax.evaluation.metrics import confusion_matrix, scores
from tests import peer


def test_golden_values():
  labels = jnp.array([[0, 0, 1], [1, 2, 255]])
  predictions = jnp.array([[0, 1, 1], [1, 0, 2]])
  confusion = np.asarray(confusion_matrix(predictions, labels, num_classes=4))
  assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  found = scores(confusion)
  assert_allclose(found.iou, [1 / 3, 2 / 3, 0, np.nan])
  assert_allclose(found.accuracy, [0.5, 1, 0, np.nan])
  summary = {name: round(value, 2) for name, value in found.summary().items()}
  assert summary == {'aAcc': 60.0, 'mIoU': 33.33, 'mAcc': 50.0}


def test_equals_the_original(rng):
  labels = [rng.choice([0, 1, 2, 4, 255], size=(20, 30)) for _ in range(3)]
  predictions = [rng.integers(0, 5, size=(20, 30)) for _ in range(3)]
  confusion = sum(
    np.asarray(confusion_matrix(jnp.asarray(p), jnp.asarray(t), num_classes=6), np.int64)
    for p, t in zip(predictions, labels, strict=True)
  )
  found = scores(confusion)
  expected = peer.confusion_scores(predictions, labels, num_classes=6)
  assert_allclose(found.iou, expected['IoU'], rtol=1e-6)
  assert_allclose(found.accuracy, expected['Acc'], rtol=1e-6)
  assert_allclose(found.all_accuracy, expected['aAcc'], rtol=1e-6)
  assert np.isnan(found.iou[5])
  assert found.iou[3] == 0
  assert np.isnan(found.accuracy[3])


def test_nothing_labelled_gives_nan_without_a_warning():
  found = scores(np.zeros((3, 3), np.int64))
  assert np.isnan(list(found.summary().values())).all()


def test_table_names_each_class():
  table = scores(np.array([[3, 1], [0, 4]])).table(['sky', 'tree'])
  assert table.splitlines() == [
    'class     IoU     Acc',
    'sky     75.00   75.00',
    'tree    80.00  100.00',
    'aAcc 87.50  mIoU 77.50  mAcc 87.50',
  ]


@pytest.mark.parametrize('pixels', [2**24 + 3])
def test_counts_are_exact_beyond_float32(pixels):
  labels = jnp.zeros((pixels,), jnp.uint8)
  assert int(confusion_matrix(labels, labels, num_classes=2)[0, 0]) == pixels
