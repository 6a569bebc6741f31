"""Why a score is not the published one: what a report shows, and the usual causes by their size."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_MOST_OF_ALL = 0.9  # share of pixels that no class has in the published val sets


def likely_causes(report: Mapping[str, Any], difference: float) -> list[str]:
  """Lists what may explain a difference from the published mIoU, the likeliest first.

  What the report shows comes first, then what usually makes a difference of this size, and last
  what usually makes a smaller one.

  Args:
    report: The `metrics.json` of the evaluation.
    difference: Measured minus published mIoU, in percentage points.

  Returns:
    Sentences.
  """
  usual = sorted(_usual(report), key=lambda cause: (cause[0] < abs(difference), cause[0]))
  return [*_shown(report), *(sentence for _, sentence in usual)]


def _shown(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields what the report itself shows to be different."""
  for reason in report['not_comparable']:
    yield f'The test differs from the published one: {reason}.'
  confusion = np.array(report['confusion'])  # rows by label, columns by prediction
  right = np.trace(confusion)
  for shift, what in ((1, 'one class after'), (-1, 'one class before')):
    if np.trace(confusion, offset=shift) > right:
      yield (
        f'Most predictions are {what} the label: the label maps count from another number than '
        'those of the authors.'
      )
  names = list(report['classes'])
  predicted, labeled = confusion.sum(axis=0), confusion.sum(axis=1)
  if predicted.max(initial=0) > _MOST_OF_ALL * confusion.sum():
    yield (
      f'{predicted.max() / confusion.sum():.0%} of the pixels are predicted as '
      f'{names[int(predicted.argmax())]}: the images are of another kind than those of training.'
    )
  absent = [name for name, count in zip(names, labeled, strict=True) if count == 0]
  if absent:
    yield (
      f'{len(absent)} of {len(names)} classes are in no label map, such as {absent[0]}: in the '
      'published val sets all of them are.'
    )
  precision = report['config_values']['eval']['precision']
  if report['platform'] != 'cpu' and precision not in ('highest', 'float32'):
    yield (
      f'Matrix products had precision {precision}; the published scores are of float32 '
      '(--config.eval.precision=highest).'
    )


def _usual(report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
  """Yields causes that no report shows, with the largest difference that they usually make."""
  yield (
    100.0,
    "Images or label maps are not the authors': compare the number of images and the label "
    'histogram with those of another copy.',
  )
  yield (
    10.0,
    'Label maps were converted or resized, which the checks of `nonlocal-jax prepare` cannot see.',
  )
  if report['protocol']['window_crop'] and report['protocol']['flip']:
    yield (
      0.3,
      'Windows that are larger than the image: versions of MMSegmentation after August 2020 do not '
      'pad them (--config.eval.pad_windows=False).',
    )
  yield (
    0.1,
    'The released weights were trained and tested with code of before the first public version: '
    "MMSegmentation's own retests differ by up to 0.1.",
  )
  if report['dataset'] in ('ade20k', 'voc12aug'):
    yield (
      0.02,
      f'JPEG files were decoded by {report["decoder"]}; other versions give some pixels another '
      'gray level.',
    )
  yield 0.01, 'Sums in another order, as on another kind of device.'
