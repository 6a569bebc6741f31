"""Confusion matrix and scores against mmsegmentation's IoUMetric and values computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from nonlocal_jax.evaluation.metrics import distinct_names, scores, undefined_reasons, without_hits
from nonlocal_jax.ops.confusion import confusion_matrix
from tests import peer
from tests.mmseg_import import mmseg_module


def test_golden_values():
  labels = jnp.array([[0, 0, 1], [1, 2, 255]])
  predictions = jnp.array([[0, 1, 1], [1, 0, 2]])
  confusion = np.asarray(confusion_matrix(predictions, labels, num_classes=4))
  assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  found = scores(confusion)
  assert_allclose(found.iou, [1 / 3, 2 / 3, 0, np.nan])
  assert_allclose(found.accuracy, [0.5, 1, 0, np.nan])
  assert_allclose(found.dice, [1 / 2, 4 / 5, 0, np.nan])
  assert_allclose(found.f_score, [1 / 2, 4 / 5, np.nan, np.nan])
  assert_allclose(found.precision, [1 / 2, 2 / 3, np.nan, np.nan])
  assert_allclose(found.recall, [1 / 2, 1, 0, np.nan])
  summary = {name: round(value, 2) for name, value in found.summary().items()}
  assert summary == {'aAcc': 60.0, 'mIoU': 33.33, 'mAcc': 50.0}
  all_means = {name: round(value, 2) for name, value in found.summary(more=True).items()}
  assert all_means == summary | {
    'mDice': 43.33,
    'mFscore': 65.0,
    'mPrecision': 58.33,
    'mRecall': 50.0,
  }


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


def original_scores(predictions, labels, num_classes):
  """IoUMetric on a list of label maps: means in percent to two decimals, and shares by class."""
  names = ['mIoU', 'mDice', 'mFscore']
  metric = mmseg_module('mmseg.evaluation').IoUMetric(iou_metrics=names)
  metric.dataset_meta = {'classes': [f'class {index}' for index in range(num_classes)]}
  samples = [
    {'pred_sem_seg': {'data': torch.as_tensor(p)}, 'gt_sem_seg': {'data': torch.as_tensor(t)}}
    for p, t in zip(predictions, labels, strict=True)
  ]
  metric.process({}, samples)
  totals = [sum(parts) for parts in zip(*metric.results, strict=True)]
  return metric.compute_metrics(metric.results), metric.total_area_to_metrics(*totals, names)


@pytest.mark.parametrize('seed', range(5))
def test_all_scores_equal_the_original(seed):
  rng = np.random.default_rng(seed)
  # 3 is never labeled, 4 never predicted, 5 both but nowhere at once, 6 and 7 are absent.
  labels, predictions = [], []
  for size in [(20, 30), (17, 9), (1, 40)]:
    label = rng.choice([0, 1, 2, 4, 5, 255], size=size, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    prediction = np.where(rng.random(size) < 0.6, label, rng.choice([0, 1, 2, 3, 5], size=size))
    prediction[np.isin(label, [4, 5, 255])] = rng.choice([0, 2, 3])
    labels.append(label)
    predictions.append(prediction)
  labels[0][0, :2], predictions[0][0, :2] = [0, 1], 5
  confusion = sum(
    np.asarray(confusion_matrix(jnp.asarray(p), jnp.asarray(t), num_classes=8), np.int64)
    for p, t in zip(predictions, labels, strict=True)
  )
  means, by_class = original_scores(predictions, labels, num_classes=8)
  found = scores(confusion)
  assert {name: float(value) for name, value in means.items()} == pytest.approx(
    found.summary(more=True), abs=0.0051
  )
  assert list(found.by_class(more=True)) == [name for name in by_class if name != 'aAcc']
  for name, values in found.by_class(more=True).items():
    assert_allclose(values, by_class[name], rtol=1e-6, err_msg=name)
  undefined = {
    name: np.flatnonzero(np.isnan(values)).tolist()
    for name, values in found.by_class(more=True).items()
  }
  assert undefined == {
    'IoU': [6, 7],
    'Acc': [3, 6, 7],
    'Dice': [6, 7],
    'Fscore': [3, 4, 5, 6, 7],
    'Precision': [4, 6, 7],
    'Recall': [3, 6, 7],
  }


def test_sums_of_int32_counts_do_not_overflow():
  most = np.iinfo(np.int32).max
  found = scores(np.full((2, 2), most, np.int32))
  assert_allclose(found.iou, [1 / 3, 1 / 3])
  assert_allclose(found.dice, [1 / 2, 1 / 2])


def test_nothing_labeled_gives_nan_without_a_warning():
  found = scores(np.zeros((3, 3), np.int64))
  assert np.isnan(list(found.summary(more=True).values())).all()


def test_table_names_each_class():
  table = scores(np.array([[3, 1], [0, 4]])).table(['sky', 'tree'])
  assert table.splitlines() == [
    'class     IoU     Acc',
    'sky     75.00   75.00',
    'tree    80.00  100.00',
    'aAcc 87.50  mIoU 77.50  mAcc 87.50',
  ]


def test_table_of_all_scores():
  confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
  table = scores(confusion).table(['sky', 'tree', 'tree'], more=True)
  assert table.splitlines() == [
    'class        IoU     Acc    Dice  Fscore  Precision  Recall',
    'sky        75.00   75.00   85.71   85.71     100.00   75.00',
    'tree (1)   80.00  100.00   88.89   88.89      80.00  100.00',
    'tree (2)     nan     nan     nan     nan        nan     nan',
    'aAcc 87.50  mIoU 77.50  mAcc 87.50  mDice 87.30  mFscore 87.30  mPrecision 90.00  '
    'mRecall 87.50',
  ]


def test_each_undefined_score_has_a_reason():
  confusion = np.zeros((6, 6), np.int64)
  confusion[0, [0, 1, 2]] = 5, 3, 1  # 1 is predicted only
  confusion[2, 0] = 2  # 2 is both, but nowhere at once
  confusion[3, 0] = 7  # 3 is labeled only
  classes = ['sky', 'tree', 'road', 'lake', 'sand', 'sand']
  absent = 'Absent from labels and predictions: '
  assert undefined_reasons(confusion, classes) == {
    'tree': 'Absent from the labels, predicted in 3 pixels: Acc is undefined and left out of mAcc; '
    'IoU is 0 and counts in mIoU.',
    'sand (4)': f'{absent}IoU and Acc are undefined and left out of mIoU and mAcc.',
    'sand (5)': f'{absent}IoU and Acc are undefined and left out of mIoU and mAcc.',
  }
  reasons = undefined_reasons(confusion, classes, more=True)
  assert list(reasons) == ['tree', 'road', 'lake', 'sand (4)', 'sand (5)']
  assert reasons['road'] == (
    'Labeled in 2 and predicted in 1 pixels, none of them the same: Fscore is undefined and left '
    'out of mFscore; IoU, Acc, Dice, Precision and Recall are 0 and count in mIoU, mAcc, mDice, '
    'mPrecision and mRecall.'
  )
  assert reasons['lake'].startswith(
    'Labeled in 7 pixels, never predicted: Fscore and Precision are undefined'
  )


def test_what_the_reasons_say_of_the_means_is_so(rng):
  confusion = rng.integers(0, 4, size=(9, 9))
  confusion[[2, 5]], confusion[:, [4, 5]], confusion[7, 7] = 0, 0, 0
  names = [f'class {index}' for index in range(9)]
  reasons = undefined_reasons(confusion, names, more=True)
  for score, values in scores(confusion).by_class(more=True).items():
    for name, value in zip(names, values, strict=True):
      undefined, _, zero = reasons.get(name, '').partition(';')
      assert (f'm{score}' in undefined) == bool(np.isnan(value))
      if not np.isnan(value) and name in reasons:
        assert f'm{score}' in zero
        assert value == 0


def test_no_reason_where_all_is_defined():
  assert undefined_reasons(np.ones((2, 2), np.int64), ['a', 'b'], more=True) == {}


def test_why_an_iou_is_0():
  confusion = np.array([[5, 2, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
  assert without_hits(confusion, ['sky', 'apple', 'pear', 'plum']) == (
    'No labeled pixel is right of apple (2 predicted pixels), pear (never predicted): their IoU of '
    '0 counts in mIoU.'
  )
  assert without_hits(confusion[:1, :1], ['sky']) == ''
  many = without_hits(np.eye(12, k=1, dtype=np.int64), [f'c{index}' for index in range(12)])
  assert many.startswith(
    'No labeled pixel is right of c0 (never predicted), c1 (1 predicted pixel)'
  )
  assert 'c9 (1 predicted pixel) and 1 more: their' in many


def test_distinct_names():
  assert distinct_names(['a', 'b']) == ['a', 'b']
  assert distinct_names(['a', 'b', 'a']) == ['a (0)', 'b', 'a (2)']
  assert distinct_names(['a', 'a', 'a (1)']) == ['a (0)', 'a (1) (1)', 'a (1) (2)']


@pytest.mark.parametrize('pixels', [2**24 + 3])
def test_counts_are_exact_beyond_float32(pixels):
  labels = jnp.zeros((pixels,), jnp.uint8)
  assert int(confusion_matrix(labels, labels, num_classes=2)[0, 0]) == pixels
