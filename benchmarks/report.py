"""Writes results.md and scaling.png from the results.json of `nonlocal-jax benchmark`.

python benchmarks/report.py DIR
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.benchmark import RESULTS, Record
from nonlocal_jax.cli.program import run_program
from nonlocal_jax.errors import UsageError, UserError
from nonlocal_jax.models import Execution
from nonlocal_jax.runtime.files import whole_file, write_whole

# Peak TFLOP/s of dense matrix products as NVIDIA states them, by a part of the device's name.
PEAK_TFLOPS = {
  'V100': {'float32': 15.7},
  'A100': {'float32': 19.5, 'TF32': 156, 'bfloat16': 312},
  'H100 PCIe': {'float32': 51.2, 'TF32': 378, 'bfloat16': 756},
  'H100 80GB HBM3': {'float32': 66.9, 'TF32': 494.7, 'bfloat16': 989.4},
  'H200': {'float32': 66.9, 'TF32': 494.7, 'bfloat16': 989.4},
}
# Published figures on V100s by depth, and their images (mmseg `configs/nonlocal_net/README.md`):
# images/s by the size of the benchmark's image, and GB per GPU in training by crop and batch.
PUBLISHED_RATES = {
  '512x512': ({50: 21.37, 101: 13.97}, 'ADE20K images, 512 pixels high'),
  '769x769': ({50: 1.52, 101: 1.05}, 'Cityscapes images, each in 8 windows of 769x769'),
  '1024x2048': ({50: 2.72, 101: 1.95}, 'Cityscapes images, whole (the 512x1024 models)'),
}
PUBLISHED_MEMORY = {
  '512x512x4': ({50: 9.1, 101: 12.6}, 'ADE20K'),
  '512x1024x2': ({50: 7.4, 101: 10.9}, 'Cityscapes'),
  '769x769x2': ({50: 8.9, 101: 12.8}, 'Cityscapes'),
}
_TRAINING_PASSES = 3  # a backward pass counts as two forward passes


def main() -> None:
  """Writes the report of the folder that the command line names."""
  if len(sys.argv) != 2:
    raise UsageError('give one folder with results.json: python benchmarks/report.py DIR')
  path = Path(sys.argv[1]) / RESULTS
  if not path.is_file():
    raise UserError(f'There is no {path}: nonlocal-jax benchmark --out={path.parent} writes it.')
  results = json.loads(path.read_text())
  write_report(path.parent, results['machine'], results['settings'], results['measurements'])


def write_report(
  out: Path, machine: Record, settings: Mapping[str, Any], records: Sequence[Record]
) -> None:
  """Writes results.md and scaling.png.

  Args:
    out: The output folder.
    machine: The machine of the measurements.
    settings: The options of the benchmark.
    records: `section`, `label`, `side`, `options` and results of each measurement.
  """
  write_whole(out / 'results.md', as_markdown(machine, settings, records))
  write_scaling(out / 'scaling.png', records)


def as_markdown(machine: Record, settings: Mapping[str, Any], records: Sequence[Record]) -> str:
  """Formats all results as Markdown tables with explanations."""
  parts = [
    '# Benchmarks',
    f'{machine["date"]}: {machine["processor"]}, {machine["cores"]} cores; JAX {machine["jax"]} on '
    f'{machine["device"]}. R-{settings["depth"]}, width {settings["width"]}, '
    f'{settings["classes"]} classes, unless a line says otherwise.',
    'Each measurement runs in its own process; times are medians. Peak GiB is the peak memory of '
    'the process '
    + ('on the device.' if machine['backend'] == 'gpu' else 'on the host, libraries included.'),
  ]
  measured = [record for record in records if 'error' not in record]
  tables = {
    'ceiling': ceiling_table,
    'inference': timed_table,
    'training': timed_table,
    'evaluation': folder_table,
    'folder': folder_table,
    'pipeline': pipeline_table,
    'compile': compile_table,
    'network': network_table,
    'non_local': non_local_table,
  }
  for section, table in tables.items():
    of_section = [record for record in measured if record['section'] == section]
    if of_section:
      lines = table(of_section, measured, machine)
      parts += [f'## {section.replace("_", "-").capitalize()}', NOTES[section]]
      parts += [GPU_NOTES[section]] if machine['backend'] == 'gpu' and section in GPU_NOTES else []
      parts += [lines]
  failed = [record for record in records if 'error' in record]
  if failed:
    rows = [[r['section'], r['label'], r['side'], r['error']] for r in failed]
    parts += ['## Failed', _table(['', '', 'side', 'error'], rows)]
  return '\n\n'.join(parts) + '\n'


NOTES = {
  'ceiling': (
    'What the device reaches: a large matrix product in float32, in the default precision for '
    'float32 and in bfloat16, and a copy of a large array, whose bytes count when read and when '
    'written.'
  ),
  'inference': (
    '`PretrainedModel.predict` on one random uint8 image, whole and at its own size, from the '
    'image to the labels on the host, random weights, by precision. It pads sides by an '
    'eighth at most (769 to 832). MMSegmentation: normalization, `encode_decode`, argmax. '
    '"First result" is from the start of the process, with an empty compilation cache and with a '
    'filled one; peak GiB the same. Ratios are ours / theirs, with the filled cache, medians over '
    'pairs measured one after the other.'
  ),
  'training': (
    'One step of the recipe on random images and labels: normalization, both heads, loss, '
    'gradients, SGD; no data pipeline. MMSegmentation: `model.loss` and a step of '
    '`torch.optim.SGD`. "First step" is from the start of the process, with an empty compilation '
    'cache and with a filled one; "compile" is the step alone, with the empty cache.'
  ),
  'evaluation': (
    '`nonlocal-jax eval` on a folder, from the files to the scores. "Total" is the whole '
    'process: imports, preparing the dataset (checks and packs the val images), loading weights, '
    'compiling or its cache, evaluation; "evaluation" is the last alone, with compiling. '
    'MMSegmentation: its test pipeline and `IoUMetric` at the same scale, with the same weights; '
    'it prepares and compiles nothing. Unless a checkpoint was given, the weights are random, and '
    'mIoU says only whether both compute the same.'
  ),
  'folder': (
    '`nonlocal-jax predict --no-overlays` on the images of a folder at their own sizes, from the '
    'files to the label maps. "Total" is the whole process. MMSegmentation: its test pipeline, '
    'which reads in four processes, and `IoUMetric(format_only=True)`, which writes label maps.'
  ),
  'pipeline': 'Training batches without the network: decoding, augmentation, batching.',
  'compile': (
    'Without a compilation cache. Training: tracing, lowering and compiling of the step. '
    'Inference: the time of the first prediction minus that of a later one. "To the first result" '
    'is from the start of the process.'
  ),
  'network': (
    "FLOPs of a forward pass, from a normalized image to logits at stride 8, by XLA's cost "
    'analysis of plain convolutions. A multiply-add counts as two, products with padding do not '
    "count. Savings of Winograd's algorithm are not subtracted."
  ),
  'non_local': (
    "Temporary memory of the block alone by XLA's memory analysis, compiled and not run. It leaves "
    'out memory that kernel libraries allocate, so on CPUs single figures may be too low. '
    'The slope is the exponent between a row and the one before it: 1 is linear, 2 is quadratic.'
  ),
}

GPU_NOTES = {
  'inference': (
    'TFLOP/s are the FLOPs listed under Network divided by the time, which includes copying images '
    'to the device and labels to the host. Shares are of the peak that NVIDIA states. Published '
    'figures are images/s of a V100, on the images named. MMSegmentation runs in its fastest '
    'setting: `cudnn.benchmark`, channels last, and TF32 where our precision is `default`.'
  ),
  'training': (
    'A step counts as three forward passes without the auxiliary head. Matrix products have '
    "XLA's default precision for the dtype on the device: TF32 for float32 if supported. "
    '"Queued" waits for the last of all steps only, as training does. MMSegmentation runs in its '
    'fastest setting: `cudnn.benchmark`, channels last, TF32, `torch.autocast` for bfloat16. '
    'Published figures are the memory of a V100 in the same training, in float32.'
  ),
}


def _by_label(records: Iterable[Record]) -> dict[str, list[Record]]:
  groups: dict[str, list[Record]] = {}
  for record in records:
    groups.setdefault(record['label'], []).append(record)
  return groups


def timed_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats inference or training, with a row for each size."""
  training = records[0]['section'] == 'training'
  first = 'first step s' if training else 'first result s'
  head = ['size', 'seconds', first, 'with cache', 'peak GiB', 'with cache']
  head += ['compile s'] if training else []
  head += ['theirs: seconds', first, 'peak GiB', 'time ratio', 'memory ratio']
  head += ['queued s', 'theirs', 'ratio'] if training else []
  gpu = machine['backend'] == 'gpu'
  head += ['images/s', 'TFLOP/s', 'share of peak', 'published (V100)'] if gpu else []
  rows = []
  for label, group in _by_label(records).items():
    # A first run is as fast as later ones, once it has compiled.
    ours = 'ours' if any(record['side'] == 'ours' for record in group) else 'first'
    cells = [label, number(median_of(group, ours, 'seconds'))]
    for figure in ('start_seconds', 'peak_gib'):
      cells += [number(median_of(group, side, figure)) for side in ('first', 'ours')]
    cells += [number(median_of(group, 'first', 'compile_seconds'))] if training else []
    cells += [
      number(median_of(group, 'theirs', figure))
      for figure in ('seconds', 'start_seconds', 'peak_gib')
    ]
    cells += [number(median_ratio(group, figure, ours)) for figure in ('seconds', 'peak_gib')]
    if training:
      queued = (median_of(group, side, 'queued_seconds') for side in (ours, 'theirs'))
      cells += [*map(number, queued), number(median_ratio(group, 'queued_seconds', ours))]
    rows.append(cells + (speed_cells(group, measured, machine) if gpu else []))
  return _table(head, rows)


def ceiling_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats what the device reaches."""
  head = ['float32 TFLOP/s', 'default', 'bfloat16', 'copy TB/s']
  figures = ('highest', 'default', 'bfloat16', 'copy_tb')
  return _table(head, [[number(record[figure]) for figure in figures] for record in records])


def folder_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats evaluation or folders, by precision a row for each side and one for the ratios."""
  head = ['', '', 'images', 'total s', 'images/s', 'without the start s', 'images/s', 'peak GiB']
  head += ['mIoU']
  names = {'first': 'empty cache', 'ours': 'filled cache', 'theirs': 'MMSegmentation'}
  rows = []
  for label, group in _by_label(records).items():
    for side, name in names.items():
      of_side = [record for record in group if record['side'] == side]
      if not of_side:
        continue
      total, alone = (median_of(group, side, key) for key in ('total_seconds', 'seconds'))
      images = of_side[0]['images']
      rates = (total, images / total, alone, alone and images / alone)
      more = (median_of(group, side, 'peak_gib'), of_side[0].get('mIoU'))
      rows.append([label, name, str(images), *map(number, (*rates, *more))])
    total, alone, peak = (
      median_ratio(group, key) for key in ('total_seconds', 'seconds', 'peak_gib')
    )
    if total is not None:
      cells = [number(total), '', number(alone), '', number(peak), '']
      rows.append([label, 'ratio', '', *cells])
  return _table(head, rows)


def pipeline_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats batches and images per second of the data pipeline."""
  rows = [
    [
      'x'.join(map(str, record['crop'])),
      str(record['batch']),
      number(1 / record['seconds']),
      number(record['batch'] / record['seconds']),
    ]
    for record in records
  ]
  return _table(['crop', 'batch', 'batches/s', 'images/s'], rows)


def compile_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats compilation times, and their ratios to the first depth."""
  rows, before = [], {}
  for record in records:
    seconds = record.get('compile_seconds')
    if seconds is None:
      seconds = record['first_call_seconds'] - record['seconds']
    kind = record['label'].split()[0]
    size = 'x'.join(map(str, [*record['options']['size'], record['options'].get('batch', 1)]))
    ratio = seconds / before[kind] if kind in before else None
    before.setdefault(kind, seconds)
    numbers = map(number, (seconds, ratio, record['start_seconds']))
    rows.append([record['label'], size, *numbers])
  head = ['', 'size and batch', 'compile s', 'ratio to the first', 'to the first result s']
  return _table(head, rows)


def network_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats the number of parameters, and the FLOPs at each size."""
  (record,) = records
  rows = [[size, number(flops / 1e9)] for size, flops in record['flops'].items()]
  sentence = f'{record["parameters"]:,} parameters, those of the auxiliary head included.'
  return f'{sentence}\n\n{_table(["size", "GFLOP"], rows)}'


def non_local_table(records: Sequence[Record], measured: Sequence[Record], machine: Record) -> str:
  """Formats memory and its slope for each number of positions."""
  (record,) = records
  rows = []
  for index, positions in enumerate(record['positions']):
    cells = [f'{positions:,}']
    for name in ('forward', 'gradient'):
      values = record[name]
      slope = None
      if index:
        longer = positions / record['positions'][index - 1]
        slope = math.log(values[index] / values[index - 1]) / math.log(longer)
      cells += [number(values[index] / 2**20), number(slope)]
    rows.append(cells)
  table = _table(['positions', 'forward MiB', 'slope', 'with gradient MiB', 'slope'], rows)
  most = Execution.for_platform(machine['backend']).pairwise_weights
  first = sum(count**2 <= most for count in record['positions'])
  if len(record['positions']) - first < 2:
    return table
  logarithms = [np.log(record[key][first:]) for key in ('positions', 'forward', 'gradient')]
  forward, gradient = (np.polyfit(logarithms[0], y, 1)[0] for y in logarithms[1:])
  return (
    f'{table}\n\nFrom {record["positions"][first]:,} positions on, where queries are '
    f'processed in blocks, the fitted exponent is {forward:.2f} forward and {gradient:.2f} with '
    'gradient.'
  )


def write_scaling(path: Path, records: Iterable[Record]) -> None:
  """Plots time and peak memory of inference against the image's area, if they were measured."""
  inference = [r for r in records if r['section'] == 'inference' and 'error' not in r]
  if not any(record['side'] == 'ours' for record in inference):
    return
  figure = Figure(figsize=(9, 4), layout='constrained')
  canvas = FigureCanvasAgg(figure)
  titles = {'seconds': 'seconds', 'peak_gib': 'peak GiB'}
  for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
    for side, who in (('ours', 'nonlocal_jax'), ('theirs', 'MMSegmentation')):
      points = sorted(
        (math.prod(group[0]['options']['size']) / 1e6, value)
        for group in _by_label(inference).values()
        if (value := median_of(group, side, name)) is not None
      )
      if points:
        axes.plot(*zip(*points, strict=True), marker='o', label=who)
        axes.legend()
    axes.set_xlabel('megapixels')
    axes.set_ylabel(title)
    axes.set_xlim(0, 1.1 * axes.dataLim.x1)
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.grid(alpha=0.3)
  with whole_file(path) as partial:
    canvas.print_figure(partial, format='png', dpi=110)


def median_ratio(records: Sequence[Record], figure: str, side: str = 'ours') -> float | None:
  """Returns the median of ours / theirs over pairs that were measured one after the other.

  Args:
    records: Measurements of one thing.
    figure: What is compared.
    side: Which of our measurements are compared.
  """
  ours, theirs = (
    [record[figure] for record in records if record['side'] == each and figure in record]
    for each in (side, 'theirs')
  )
  ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
  return statistics.median(ratios) if ratios else None


def median_of(records: Iterable[Record], side: str, figure: str) -> float | None:
  """Returns the median of a figure on one side, None if it was not measured."""
  values = [r[figure] for r in records if r['side'] == side and figure in r]
  return statistics.median(values) if values else None


def speed_cells(group: Sequence[Record], measured: Sequence[Record], machine: Record) -> list[str]:
  """Formats images/s, TFLOP/s, the share of the device's peak, and published figures of V100s."""
  options = group[0]['options']
  seconds = median_of(group, 'ours', 'seconds') or median_of(group, 'first', 'seconds')
  network = next((record for record in measured if record['section'] == 'network'), None)
  if seconds is None or network is None:
    return [''] * 4
  training, batch = group[0]['section'] == 'training', options.get('batch', 1)
  size = 'x'.join(map(str, options['size']))
  passes = _TRAINING_PASSES if training else 1
  teraflops = passes * batch * network['flops'][size] / seconds / 1e12
  peak = peak_of(machine['device'], options['dtype' if training else 'precision'])
  share = peak and f'{teraflops / peak[0]:.1%} of {peak[0]} ({peak[1]})'
  published, unit = PUBLISHED_RATES.get(size), ''
  if training:
    published, unit = PUBLISHED_MEMORY.get(f'{size}x{batch}'), ' GB'
  values, of_what = published or ({}, '')
  value = values.get(options['depth'])
  known = '' if value is None else f'{value}{unit} ({of_what})'
  return [number(batch / seconds), number(teraflops), share or '', known]


def peak_of(device: str, arithmetic: str) -> tuple[float, str] | None:
  """Returns the peak of a device in TFLOP/s and its arithmetic; None if it is not known.

  Args:
    device: The device kind that JAX reports.
    arithmetic: A precision (see `jax_default_matmul_precision`), or the dtype of activations at the
      default precision, where XLA uses TF32 for float32 if the device supports it.
  """
  peaks = next((peaks for part, peaks in PEAK_TFLOPS.items() if part in device), {})
  default = 'TF32' if 'TF32' in peaks else 'float32'
  names = {'highest': 'float32', 'default': default, 'float32': default}
  name = names.get(arithmetic, arithmetic)
  return (peaks[name], name) if name in peaks else None


def number(value: float | None) -> str:
  """Formats three significant digits; an empty string for None."""
  return '' if value is None else f'{value:.3g}' if value < 1000 else f'{value:,.0f}'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Formats a Markdown table without its empty columns."""
  columns = [
    column for column in zip(head, *rows, strict=True) if column[0] == '' or any(column[1:])
  ]
  lines = [f'| {" | ".join(cells)} |' for cells in zip(*columns, strict=True)]
  return '\n'.join([lines[0], '|' + '---|' * len(columns), *lines[1:]])


if __name__ == '__main__':
  run_program(main)
