"""The report of an evaluation as one HTML page, which needs no other file."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation import plots
from nonlocal_jax.evaluation.calibration import Calibration
from nonlocal_jax.evaluation.html import (
  Content,
  Markup,
  data_uri,
  facts_table,
  is_page,
  page,
  swatch,
  table,
  tag,
  tiles,
)
from nonlocal_jax.evaluation.image_results import CERTAIN, ImageResults
from nonlocal_jax.evaluation.metrics import Scores, scores
from nonlocal_jax.evaluation.saved import PER_IMAGE, SavedEvaluation
from nonlocal_jax.evaluation.showcase import EACH, Panels
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.wording import counted

PAGE = 'report.html'

_PAIRS = 12  # of classes that are confused most often
_DOUBTFUL = 20  # images whose labels look wrong, in the table
_MOST_NAMES = 40  # classes that are named below the confusion matrix
_CHIP_SHARE = 0.01  # of an image's pixels, from which on a class is named below it
_BYTES_OF_MARK = 4096


class NotReplacedError(UserError):
  """Raised where a report would replace another file."""


def write_page(path: Path, text: str) -> None:
  """Writes a page atomically; an earlier report is replaced, and nothing else.

  Raises:
    NotReplacedError: If there is another file in its place.
    UserError: If it cannot be written.
  """
  try:
    if path.exists():
      with path.open('rb') as file:
        is_report = is_page(file.read(_BYTES_OF_MARK).decode(errors='replace'))
      if not is_report:
        raise NotReplacedError(f'{path} exists and is no report of nonlocal-jax: move it away.')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}.') from error
  write_whole(path, text)


def report_page(saved: SavedEvaluation) -> str:
  """Returns the report of an evaluation."""
  metrics, found = saved.metrics, scores(saved.confusion)
  title = f'{metrics["dataset"]}: mIoU {percent(found.mean_iou)} %'
  return page(
    title,
    tag('h1', title),
    tag('p', f'{metrics["config"]}, {_weights(metrics)}', class_='soft'),
    tiles(_summary(saved, found)),
    _published(metrics),
    _classes(saved, found),
    _confusion(saved),
    _images(saved, found),
    _calibration(saved.calibration),
    _doubtful(saved),
    tag('h2', 'What was run'),
    facts_table(run_facts(metrics)),
  )


def percent(share: float | None, digits: int = 2) -> str:
  """Returns a share as a number of percent; a dash where it is undefined."""
  return '-' if share is None or np.isnan(share) else f'{100 * share:.{digits}f}'


def run_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns what was run with what, as names and values; unknown ones are left out."""
  values = metrics['config_values']
  versions = ', '.join(f'{name} {version}' for name, version in metrics['versions'].items())
  memory = metrics['peak_memory_gib']
  facts = {
    'weights': _weights(metrics),
    'sha256': metrics['sha256'],
    'config': metrics['config'],
    'dataset': f'{metrics["dataset"]}, {counted(metrics["images"], "image")}',
    'protocol': protocol_words(metrics['protocol']),
    'precision': values.get('eval', {}).get('precision'),
    'attention': values.get('model', {}).get('attention'),
    'device': metrics['devices'],
    'versions': versions,
    'image decoder': metrics['decoder'],
    'command': metrics.get('command'),
    'date': metrics['date'],
    'duration': f'{metrics["seconds"]:.1f} s, '
    f'{metrics["images"] / max(metrics["seconds"], 1e-9):.3g} images per second',
    'peak memory': ', '.join(
      f'{place} {gib} GiB' for place, gib in memory.items() if gib is not None
    ),
  }
  return [(name, str(value)) for name, value in facts.items() if value not in (None, '')]


def protocol_words(fields: Mapping[str, Any]) -> str:
  """Says how images were tested."""
  protocol = EvalProtocol.from_dict(fields)
  if protocol.scale:
    size = f'fitted into {protocol.scale[0]}x{protocol.scale[1]}'
    size = size if protocol.keep_ratio else f'resized to {protocol.scale[0]}x{protocol.scale[1]}'
  elif protocol.scale_factor:
    size = f'resized by {protocol.scale_factor}'
  else:
    size = 'at their own size'
  parts = [f'images {size}']
  if protocol.window_crop and protocol.window_stride:
    crop, stride = protocol.window_crop, protocol.window_stride
    parts.append(f'windows of {crop[0]}x{crop[1]} every {stride[0]}x{stride[1]} pixels')
  else:
    parts.append('whole')
  if len(protocol.ratios) > 1:
    parts.append(f'averaged over the ratios {", ".join(f"{x:g}" for x in protocol.ratios)}')
  if protocol.flip:
    parts.append('and their mirror images')
  parts.append(f'rules of MMSegmentation {"1.x" if protocol.version == "v1" else "0.x"}')
  parts.append('aligned corners' if protocol.align_corners else 'half-pixel corners')
  return ', '.join(parts)


def _weights(metrics: Mapping[str, Any]) -> str:
  if metrics['checkpoint']:
    return str(metrics['checkpoint'])
  return 'weights of this run' + (f', step {metrics["step"]:,}' if metrics['step'] else '')


def _summary(saved: SavedEvaluation, found: Scores) -> list[tuple[str, str]]:
  facts = [
    ('mIoU, %', percent(found.mean_iou)),
    ('pixels right (aAcc), %', percent(found.all_accuracy)),
    ('mean accuracy of classes (mAcc), %', percent(found.mean_accuracy)),
  ]
  if saved.images is not None:
    facts.append(('mean mIoU of single images, %', percent(_mean(saved.images.mean_iou))))
  if saved.calibration is not None:
    facts.append(('calibration error (ECE), %', percent(saved.calibration.error)))
  return [*facts, ('images', f'{saved.metrics["images"]:,}')]


def _published(metrics: Mapping[str, Any]) -> Content:
  published = metrics['published']
  if published is not None and published['difference'] is not None:
    return tag(
      'p', f'Published mIoU: {published["mIoU"]:.2f}, difference {published["difference"]:+.2f}.'
    )
  if metrics['not_comparable']:
    listed = '; '.join(metrics['not_comparable'])
    return tag('p', f'The published mIoU cannot be compared: {listed}.')
  return None


def _classes(saved: SavedEvaluation, found: Scores) -> Content:
  labeled = saved.confusion.sum(axis=1)
  shares = labeled / max(int(labeled.sum()), 1)
  of_images = None if saved.images is None else saved.images.mean_iou_of_classes
  order = sorted(range(len(saved.classes)), key=lambda c: (-np.nan_to_num(found.iou[c], nan=-1), c))
  rows = []
  for c in order:
    marks = []
    if not np.isnan(found.iou[c]):
      marks.append(_part('fill', found.iou[c], width=True))
    if of_images is not None and not np.isnan(of_images[c]):
      marks.append(_part('mark', of_images[c]))
    rows.append(
      tag(
        'div',
        class_name(saved, c),
        tag('div', marks, class_='track'),
        tag(
          'div',
          tag('span', f'IoU {percent(found.iou[c])}'),
          tag('span', f'Acc {percent(found.accuracy[c])}'),
          tag('span', f'{percent(shares[c], 1)} % of pixels', class_='soft'),
          class_='numbers',
        ),
        class_='row',
      )
    )
  explained = 'Bars show the IoU over all images in percent'
  if of_images is not None:
    explained += '; black marks the mean of the IoUs of single images that the class is in'
  undefined = saved.metrics.get('undefined') or {}
  return [
    tag('h2', 'Classes'),
    tag('p', f'{explained}.', class_='soft'),
    tag('div', rows, class_='bars'),
    [tag('p', f'{name}: {reason}', class_='soft') for name, reason in undefined.items()],
  ]


def class_name(saved: SavedEvaluation, index: int) -> Markup:
  """Returns the color, number and name of a class."""
  number = tag('span', str(index), class_='soft')
  return tag(
    'div', swatch(saved.palette[index]), number, tag('span', saved.classes[index]), class_='name'
  )


def _part(kind: str, share: float, *, width: bool = False) -> Markup:
  style = f'{"width" if width else "left"}:{100 * float(share):.3f}%'
  return tag('div', class_=kind, style=style)


def _confusion(saved: SavedEvaluation) -> Content:
  wrong = saved.confusion.copy()
  np.fill_diagonal(wrong, 0)
  labeled = np.maximum(saved.confusion.sum(axis=1), 1)
  largest = np.argsort(-wrong, axis=None, kind='stable')[:_PAIRS]
  rows = []
  for label, prediction in np.stack(np.unravel_index(largest, wrong.shape), axis=1).tolist():
    count = int(wrong[label, prediction])
    if count:
      rows.append(
        [
          _named(saved, label),
          _named(saved, prediction),
          percent(count / labeled[label], 1),
          percent(count / wrong.sum(), 1),
        ]
      )
  pairs: Content = tag('p', 'No pixel is wrong.')
  if rows:
    head = ['labeled', 'predicted', '% of label', '% of errors']
    pairs = table(head, rows, numbers=(2, 3))
  names = None
  if len(saved.classes) <= _MOST_NAMES:
    chips = [tag('span', f'{c} {name}') for c, name in enumerate(saved.classes)]
    names = tag('div', chips, class_='chips soft')
  return [
    tag('h2', 'Confusion'),
    tag(
      'p',
      'Each row shows what the pixels of a class are predicted as, from white for none to dark '
      'blue for all, by the square root of the share; gray rows have no labeled pixel.',
      class_='soft',
    ),
    tag(
      'div',
      tag('div', plots.heat_map(saved.confusion), names),
      tag('div', tag('h3', 'Most confused'), pairs),
      class_='plots',
    ),
  ]


def _named(saved: SavedEvaluation, index: int) -> Markup:
  return tag('span', swatch(saved.palette[index]), ' ', saved.classes[index])


def _images(saved: SavedEvaluation, found: Scores) -> Content:
  images, heading = saved.images, tag('h2', 'Images')
  if images is None:
    missing = f'The results of single images ({PER_IMAGE}) are not there.'
    return [heading, tag('p', missing, class_='soft')]
  values = images.mean_iou
  defined = values[~np.isnan(values)]
  if not defined.size:
    return [heading, tag('p', 'No image has a labeled pixel.')]
  mean = _mean(values)
  low, middle, high = np.quantile(defined, (0.1, 0.5, 0.9))
  marks = [(found.mean_iou, '#d9822b', ''), (mean, '#1d2733', '5 4')]
  shown = [index for index in np.argsort(values, kind='stable').tolist() if index in saved.pictures]
  shown = [index for index in shown if not np.isnan(values[index])]
  worst = shown[:EACH]
  best = [index for index in shown[::-1] if index not in worst][:EACH]
  return [
    heading,
    tag(
      'div',
      plots.histogram(values, marks=marks, x_name='mIoU of an image', y_name='images'),
      tag(
        'div',
        tag(
          'p',
          f'The mIoU of the data set is {percent(found.mean_iou)} % (orange line): pixels of all '
          'images are counted together. The mean over images of their own mIoU is '
          f'{percent(mean)} % (dashed line): each image counts the same, with the classes in it.',
        ),
        tag(
          'p',
          f'A tenth of the images are below {percent(low)} %, half below {percent(middle)} %, a '
          f'tenth above {percent(high)} %. {PER_IMAGE} beside this page has all of them.',
        ),
      ),
      class_='plots',
    ),
    tag('h3', 'Worst') if worst else None,
    [_example(saved, images, index, 'confidence') for index in worst],
    tag('h3', 'Best') if best else None,
    [_example(saved, images, index, 'confidence') for index in best],
  ]


def _example(saved: SavedEvaluation, images: ImageResults, index: int, last: str) -> Markup:
  """The panels of an image, the last one 'confidence' or 'contradicted'."""
  panels = saved.pictures[index]
  captions = {
    'image': 'image',
    'truth': 'truth, black is ignored',
    'prediction': 'prediction',
    'confidence': 'confidence, white is certain',
    'contradicted': 'contradicted pixels',
  }
  figures = []
  for name in ('image', 'truth', 'prediction', last):
    file = next((file for file in panels if file.startswith(f'{name}.')), None)
    if file is not None:
      kind = 'image/png' if file.endswith('.png') else 'image/jpeg'
      picture = tag('img', src=data_uri(panels[file], kind), alt=captions[name])
      figures.append(tag('figure', picture, tag('figcaption', captions[name])))
  facts = [
    f'mIoU {percent(images.mean_iou[index])} %',
    f'{percent(images.accuracy[index], 1)} % of pixels right',
    f'mean confidence {percent(images.confidence[index], 1)} %',
  ]
  if last == 'contradicted':
    facts = [_contradiction(saved, images, index), facts[0]]
  return tag(
    'div',
    tag('div', tag('b', images.names[index]), f': {", ".join(facts)}'),
    tag('div', figures, class_='panels'),
    _chips(saved, panels),
    class_='example',
  )


def _chips(saved: SavedEvaluation, panels: Panels) -> Content:
  """Names the classes that take up some of an image, the most frequent first."""
  counts = np.zeros(256, np.int64)
  for name in ('truth.png', 'prediction.png'):
    if name in panels:
      with Image.open(io.BytesIO(panels[name])) as picture:
        counts += np.bincount(np.asarray(picture).ravel(), minlength=256)
  counts = counts[: len(saved.classes)]
  order = np.argsort(-counts, kind='stable').tolist()
  present = [c for c in order if counts[c] >= _CHIP_SHARE * max(int(counts.sum()), 1)]
  return tag('div', [_named(saved, c) for c in present], class_='chips')


def _contradiction(saved: SavedEvaluation, images: ImageResults, index: int) -> str:
  label, prediction = images.pairs[index].tolist()
  return (
    f'{percent(images.contradicted_share[index])} % of pixels, most of them '
    f'{saved.classes[label]} predicted as {saved.classes[prediction]}'
  )


def _calibration(calibration: Calibration | None) -> Content:
  heading = tag('h2', 'Calibration')
  if calibration is None:
    return [heading, tag('p', 'The confidence of predictions is not known.', class_='soft')]
  bias = calibration.bias
  kind = 'over' if bias > 0 else 'under'
  return [
    heading,
    tag(
      'p',
      f'The expected calibration error (ECE) is {percent(calibration.error)} %: by so much '
      f'accuracy differs from confidence, on average over pixels in '
      f'{len(calibration.pixels)} bins. The mean confidence is {percent(abs(bias))} points '
      f'{"above" if bias > 0 else "below"} the accuracy ({kind}confident).'
      if not np.isnan(bias)
      else 'No pixel is labeled.',
    ),
    tag(
      'div',
      tag(
        'div',
        tag('h3', 'Accuracy by confidence'),
        plots.reliability(calibration),
        tag(
          'p',
          'Blue: the share of pixels that are right, in percent; up to the mean confidence of the '
          'bin, orange where that is higher, green where it is lower. On the dashed line both are '
          'equal.',
          class_='soft',
        ),
      ),
      tag('div', tag('h3', 'Pixels by confidence'), plots.confidence_shares(calibration)),
      class_='plots',
    ),
  ]


def _doubtful(saved: SavedEvaluation) -> Content:
  images, heading = saved.images, tag('h2', 'Labels that look wrong')
  if images is None:
    return None
  shares = images.contradicted_share
  order = [c for c in np.argsort(-shares, kind='stable').tolist() if shares[c] > 0][:_DOUBTFUL]
  level = f'{100 * CERTAIN:.0f} %'
  if not order:
    return [heading, tag('p', f'No prediction of {level} confidence contradicts its label.')]
  rows = [
    [
      images.names[index],
      percent(shares[index]),
      *(_named(saved, c) for c in images.pairs[index].tolist()),
    ]
    for index in order
  ]
  shown = [index for index in order if index in saved.pictures][:EACH]
  head = ['image', '% of pixels', 'most often labeled', 'and predicted']
  return [
    heading,
    tag(
      'p',
      f'Images with the largest share of pixels whose prediction has at least {level} confidence '
      'and is not the label. Either the label is wrong or the network is, and sure of it.',
      class_='soft',
    ),
    [_example(saved, images, index, 'contradicted') for index in shown],
    table(head, rows, numbers=(1,)),
  ]


def _mean(values: np.ndarray) -> float:
  defined = values[~np.isnan(values)]
  return float(defined.mean()) if defined.size else float('nan')


def names_of(items: Iterable[str], most: int = 3) -> str:
  """Returns the first items of a list, and that there are more."""
  listed: Sequence[str] = list(items)
  return ', '.join(listed[:most]) + (', ...' if len(listed) > most else '')
