"""Medians, ratios and speeds of what benchmark.py measured."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

# Dense products in TFLOP/s as the makers state them: TF32 where the device has it, else float32.
PEAK_TFLOPS = {
  'V100-SXM2': ('float32', 15.7),
  'A100': ('TF32', 156),
  'H100 80GB HBM3': ('TF32', 495),
  'H200': ('TF32', 495),
}
# Images/s on a V100 (mmseg `nonlocal_net/README`) of, and what an image is there.
PUBLISHED_RATES = {
  '512x512': ({50: 21.37, 101: 13.97}, 'ADE20K images, 512 pixels high'),
  '769x769': ({50: 1.52, 101: 1.05}, 'Cityscapes images, each in 8 windows of 769x769'),
  '1024x2048': ({50: 2.72, 101: 1.95}, 'Cityscapes images, whole (the 512x1024 models)'),
}
_TRAINING_PASSES = 3  # a backward pass is taken for two forward passes


def median_ratio(records: Sequence[Record], figure: str) -> float | None:
  """Median of ours / theirs over pairs that were measured one after the other."""
  ours, theirs = (
    [record[figure] for record in records if record['side'] == side] for side in ('ours', 'theirs')
  )
  ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
  return statistics.median(ratios) if ratios else None


def median_of(records: Iterable[Record], side: str, figure: str) -> float | None:
  """Median of a figure on one side, None if it was not measured."""
  values = [r[figure] for r in records if r['side'] == side and figure in r]
  return statistics.median(values) if values else None


def speed_cells(group: Sequence[Record], measured: Sequence[Record], machine: Record) -> list[str]:
  """Images/s, TFLOP/s, share of the device's peak and what was published."""
  seconds, options = median_of(group, 'ours', 'seconds'), group[0]['options']
  network = next((record for record in measured if record['section'] == 'network'), None)
  if seconds is None or network is None:
    return [''] * 4
  batch, size = options.get('batch', 1), 'x'.join(map(str, options['size']))
  passes = _TRAINING_PASSES if group[0]['section'] == 'training' else 1
  teraflops = passes * batch * network['flops'][size] / seconds / 1e12
  peaks = [peak for kind, peak in PEAK_TFLOPS.items() if kind in machine['device']]
  share = [f'{teraflops / peak:.1%} of {peak} ({name})' for name, peak in peaks]
  rates, of_what = PUBLISHED_RATES.get(size, ({}, ''))
  rate = rates.get(options['depth']) if passes == 1 else None
  published = '' if rate is None else f'{rate} {of_what}'
  return [number(batch / seconds), number(teraflops), ''.join(share), published]


def number(value: float | None) -> str:
  """Three significant digits; nothing for None."""
  return '' if value is None else f'{value:.3g}' if value < 1000 else f'{value:,.0f}'
