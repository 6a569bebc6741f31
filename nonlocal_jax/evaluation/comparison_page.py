"""Two evaluations on the same classes side by side: as text, and as an HTML page."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.html import Content, Markup, page, table, tag, tiles
from nonlocal_jax.evaluation.metrics import scores
from nonlocal_jax.evaluation.report_page import class_name, names_of, percent, run_facts
from nonlocal_jax.evaluation.saved import SavedEvaluation

_IMAGES = 12  # whose mIoU differs most
_NOT_COMPARED = ('date', 'duration', 'peak memory', 'command')  # differ between any two runs


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two evaluations on the same classes.

  Attributes:
    first: The one that differences are relative to.
    second: The other one.
    iou: (2, classes) float64 in [0, 1], NaN where undefined.
  """

  first: SavedEvaluation
  second: SavedEvaluation
  iou: np.ndarray

  @property
  def gain(self) -> np.ndarray:
    """Returns the IoU of the second minus that of the first, (classes,) float64."""
    return self.iou[1] - self.iou[0]

  @property
  def order(self) -> list[int]:
    """Returns the classes by `gain`, the largest loss first and undefined ones last."""
    return np.argsort(self.gain, kind='stable').tolist()


def compared(first: SavedEvaluation, second: SavedEvaluation) -> Comparison:
  """Compares two evaluations.

  Raises:
    UserError: If they are not on the same classes.
  """
  if first.classes != second.classes:
    raise UserError(
      f'{first.folder} and {second.folder} were evaluated on different classes '
      f'({_differences(first.classes, second.classes)}): compare runs with the same ones.'
    )
  iou = np.stack([scores(first.confusion).iou, scores(second.confusion).iou])
  return Comparison(first, second, iou)


def comparison_table(comparison: Comparison) -> str:
  """Returns a text table of the IoU of each class in percent, and of the means."""
  names = ['class', *comparison.first.classes, *_means(comparison)]
  width = max(map(len, names))
  lines = [f'{"class":<{width}}  {"A":>6}  {"B":>6}  {"B - A":>6}']
  rows = zip(comparison.first.classes, comparison.iou.T, strict=True)
  for name, (first, second) in [*rows, *_means(comparison).items()]:
    gain = signed(second - first)
    lines.append(f'{name:<{width}}  {percent(first):>6}  {percent(second):>6}  {gain:>6}')
  return '\n'.join(lines)


def comparison_page(comparison: Comparison) -> str:
  """Returns the comparison as a page."""
  first, second = comparison.first, comparison.second
  means = _means(comparison)
  before, after = means['mIoU']
  title = f'{first.metrics["dataset"]}: mIoU {percent(before)} % and {percent(after)} %'
  rows = [
    [f'{name}, %', percent(a), percent(b), _colored(b - a, is_better_when_less=name == 'ECE')]
    for name, (a, b) in means.items()
  ]
  return page(
    title,
    tag('h1', title),
    tag('p', _swatch('fill'), ' A: ', str(first.folder), class_='soft'),
    tag('p', _swatch('fill other'), ' B: ', str(second.folder), class_='soft'),
    tiles(
      [
        ('mIoU, B - A', signed(after - before)),
        ('classes better in B', str(int((comparison.gain > 0).sum()))),
        ('classes worse in B', str(int((comparison.gain < 0).sum()))),
      ]
    ),
    table(['', 'A', 'B', 'B - A'], rows, numbers=(1, 2, 3)),
    tag('h2', 'Classes'),
    tag('p', 'IoU in percent, the largest loss first.', class_='soft'),
    tag('div', [_class_row(comparison, c) for c in comparison.order], class_='bars'),
    _images(comparison),
    tag('h2', 'What was run'),
    _facts(first.metrics, second.metrics),
  )


def signed(share: float) -> str:
  """Returns a difference in points of percent, with its sign."""
  return '-' if np.isnan(share) else f'{100 * share:+.2f}'


def _means(comparison: Comparison) -> dict[str, tuple[float, float]]:
  pair = (comparison.first, comparison.second)
  found = [scores(saved.confusion) for saved in pair]
  means = {
    'mIoU': (found[0].mean_iou, found[1].mean_iou),
    'aAcc': (found[0].all_accuracy, found[1].all_accuracy),
    'mAcc': (found[0].mean_accuracy, found[1].mean_accuracy),
  }
  errors = [saved.calibration.error for saved in pair if saved.calibration is not None]
  return {**means, 'ECE': (errors[0], errors[1])} if len(errors) == 2 else means


def _class_row(comparison: Comparison, index: int) -> Markup:
  first, second = comparison.iou[:, index]
  bars = [
    tag('div', class_=kind, style=f'width:{100 * share:.3f}%')
    for kind, share in (('fill', first), ('fill other', second))
    if not np.isnan(share)
  ]
  return tag(
    'div',
    class_name(comparison.first, index),
    tag('div', bars, class_='track two'),
    tag(
      'div',
      tag('span', f'A {percent(first)}'),
      tag('span', f'B {percent(second)}'),
      _colored(second - first),
      class_='numbers',
    ),
    class_='row',
  )


def _colored(gain: float, *, is_better_when_less: bool = False) -> Markup:
  better = -gain if is_better_when_less else gain
  kind = 'good' if better > 0 else 'bad' if better < 0 else None
  return tag('b', signed(gain), class_=kind)


def _swatch(kind: str) -> Markup:
  color = 'var(--other)' if 'other' in kind else 'var(--bar)'
  return tag('span', class_='swatch', style=f'background:{color}')


def _images(comparison: Comparison) -> Content:
  """Lists the images whose mIoU differs most, of those that both evaluations have."""
  first, second = comparison.first.images, comparison.second.images
  if first is None or second is None:
    return None
  values = dict(zip(second.names, second.mean_iou.tolist(), strict=True))
  both = [
    (name, value, values[name])
    for name, value in zip(first.names, first.mean_iou.tolist(), strict=True)
    if not np.isnan(value) and not np.isnan(values.get(name, np.nan))
  ]
  if not both:
    return [tag('h2', 'Images'), tag('p', 'The two have no image in common.')]
  gains = np.array([after - before for _, before, after in both])
  largest = np.argsort(-np.abs(gains), kind='stable')[:_IMAGES].tolist()
  rows = [
    [both[i][0], percent(both[i][1]), percent(both[i][2]), _colored(gains[i])] for i in largest
  ]
  return [
    tag('h2', 'Images'),
    tag(
      'p',
      f'Of {len(both):,} images in both, {int((gains > 0).sum()):,} have a larger mIoU in B and '
      f'{int((gains < 0).sum()):,} a smaller one. These differ most:',
    ),
    table(['image', 'A', 'B', 'B - A'], rows, numbers=(1, 2, 3)),
  ]


def _facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> Content:
  """Lists what was run, what differs first."""
  ours, theirs = dict(run_facts(first)), dict(run_facts(second))
  rows = []
  for name in {**ours, **theirs}:
    a, b = ours.get(name, '-'), theirs.get(name, '-')
    differs = a != b and name not in _NOT_COMPARED
    rows.append((not differs, [tag('b' if differs else 'span', name), a, b]))
  rows.sort(key=lambda row: row[0])
  settings = _settings(first['config_values'], second['config_values'])
  return [
    tag('p', 'What differs is bold and comes first.', class_='soft'),
    tag('div', table(['', 'A', 'B'], [row for _, row in rows]), class_='sides'),
    [
      tag('h3', 'Other fields of the config that differ'),
      table(['field', 'A', 'B'], settings),
    ]
    if settings
    else None,
  ]


def _settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[list[str]]:
  ours, theirs = _flat(first), _flat(second)
  return [
    [name, str(ours.get(name, '-')), str(theirs.get(name, '-'))]
    for name in sorted({**ours, **theirs})
    if ours.get(name) != theirs.get(name)
  ]


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  found = {}
  for name, value in values.items():
    key = f'{prefix}{name}'
    found |= _flat(value, f'{key}.') if isinstance(value, Mapping) else {key: value}
  return found


def _differences(first: tuple[str, ...], second: tuple[str, ...]) -> str:
  if set(first) == set(second):
    return 'the same names in another order'
  only = [name for name in first if name not in second]
  others = [name for name in second if name not in first]
  parts = [f'only the first has {names_of(only)}'] if only else []
  parts += [f'only the second has {names_of(others)}'] if others else []
  return ', '.join(parts)
