"""Draws augmented training samples and counts the pixels of each class.

    nonlocal-jax browse --config=custom --config.data.source_dir=DIR --out=OUT

Takes every --config.FIELD=VALUE that `nonlocal-jax train` takes.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nonlocal_jax.cli.config import read_config
from nonlocal_jax.cli.program import Parser, path_option
from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.data.label_values import class_shares
from nonlocal_jax.data.pixel_formats import displayable
from nonlocal_jax.errors import UserError
from nonlocal_jax.recipes import base_config, config_names, fields_of
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.runtime.progress import progress_bar

if TYPE_CHECKING:
  from nonlocal_jax.data.prepared import PreparedSplit

LABELS = 'labels.json'
_PER_PICTURE = 4


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax browse`."""
  parser = Parser('nonlocal-jax browse', __doc__)
  parser.add_argument(
    '--config',
    default='demo',
    metavar='NAME',
    help=f'one of {", ".join(config_names())}, or a file; default: demo',
  )
  parser.add_argument('--out', required=True, type=path_option, help='output folder')
  parser.add_argument('--count', type=int, default=16, help='number of samples; default: 16')
  options, rest = parser.parse_with_config(arguments, fields_of(base_config()))
  if options.count < 1:
    raise UserError(f'--count is {options.count}; it must be at least 1.')
  config = read_config([f'--config={options.config}', *rest])

  from nonlocal_jax.evaluation.pictures import write_samples
  from nonlocal_jax.experiment import Experiment

  experiment = Experiment.from_config(config)
  dataset = experiment.dataset
  out = options.out
  if not (out / LABELS).exists() and any(out.glob('*.png')):
    raise UserError(f'{out} holds PNG files of another origin: give another --out.')
  split = experiment.open_splits(out, ['train'])['train']
  shares = write_audit(out / LABELS, split, dataset)

  batches = experiment.train_batches(split)
  samples = (
    (str(split[index]['id']), displayable(image[:h, :w]), label[:h, :w])
    for batch in batches
    for index, (h, w), image, label in zip(
      *(batch[key] for key in ('index', 'size', 'image', 'label')), strict=True
    )
  )
  with progress_bar(options.count, 'Drawing', unit='img') as bar:
    for start in range(0, options.count, _PER_PICTURE):
      rows = list(itertools.islice(samples, min(_PER_PICTURE, options.count - start)))
      picture = out / f'{start // _PER_PICTURE:03d}.png'
      write_samples(picture, rows, classes=dataset.classes, palette=dataset.palette)
      bar.update(len(rows))
  batches.close()
  print(shares)
  print(f'Pictures are in {out}, the shares in {out / LABELS}.')


def write_audit(path: Path, split: 'PreparedSplit', dataset: Dataset) -> str:
  """Writes the number of pixels of each class to a JSON file; returns their shares as text."""
  shares = class_shares(split.label_values, dataset)
  classes = [
    {'class': name, 'pixels': pixels}
    for name, pixels in zip(dataset.classes, shares.pixels.tolist(), strict=True)
  ]
  counts = {'classes': classes, 'ignored': shares.ignored}
  write_whole(path, json.dumps(counts, indent=2) + '\n')
  return shares.table(dataset)
