"""Plans what the command `benchmark` measures."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nonlocal_jax.cli.benchmark_process import Child
from nonlocal_jax.data.synthetic import DEMO, write_demo_set
from nonlocal_jax.errors import UserError
from nonlocal_jax.models.config import STAGE_BLOCKS, NonLocalNetConfig
from nonlocal_jax.torch_format.writer import write_torch_checkpoint
from nonlocal_jax.weights.state_dict import to_state_dict

_ON_FOLDERS = ('evaluation', 'folder', 'pipeline')
_PIPELINE_BATCHES = 20
# Products and copies that fill the device, and are done in a second.
_CEILING = {False: {'side': 2048, 'gib': 0.25}, True: {'side': 8192, 'gib': 2.0}}


def planned(
  options: argparse.Namespace, folder: Path, *, gpu: bool, peer: Path | None = None
) -> list[Child]:
  """Lists the measurements in order.

  Args:
    options: See `make_parser`.
    folder: A folder for the images and weights to evaluate.
    gpu: Whether JAX runs on a GPU. If so, the FLOPs of the network are counted as well, to compare
      with the peak of the GPU.
    peer: See `run`; it is measured `options.rounds` times.
  """
  network = {'width': options.width, 'depth': options.depth, 'classes': options.classes}
  wanted = set(options.only)
  if gpu and wanted & {'inference', 'training'}:
    wanted.add('network')
  data = {}
  if wanted.intersection(_ON_FOLDERS):
    data = evaluated_folder(options, folder)
    data |= {'width': options.width, 'depth': options.depth}
  children = []
  if 'ceiling' in wanted:
    children.append(Child('ceiling', '', 'ceiling', _CEILING[gpu]))
  if 'network' in wanted:
    sizes = [*options.sizes, *(size[:2] for size in options.train_sizes)]
    children.append(Child('network', '', 'network', {**network, 'sizes': sizes}))
  for label, measure, given in timed_calls(options, network, data):
    if measure not in wanted:
      continue
    ours = Child(measure, label, measure, given, cached=True)
    children.append(dataclasses.replace(ours, side='first'))
    if peer is None:
      children.append(ours)
      continue
    of_peer = {'stage_blocks': STAGE_BLOCKS[options.depth], 'device': 'cuda' if gpu else 'cpu'}
    if measure == 'folder':  # we read these from the checkpoint
      of_peer |= {name: data[name] for name in ('num_classes', 'width', 'depth')}
    theirs = Child(
      measure, label, measure, {**given, **of_peer}, side='theirs', program=(str(peer),)
    )
    children += [ours, theirs] * options.rounds
  if 'pipeline' in wanted:
    batches = {name: data[name] for name in ('data', 'num_classes', 'ignore_labels')}
    batches['batches'] = _PIPELINE_BATCHES
    children.append(Child('pipeline', '', 'pipeline', batches))
  if 'compile' in wanted:
    for depth in options.compile_depths:
      once = {**network, 'depth': depth, 'repeats': 1}
      *size, batch = options.train_sizes[0]
      training = {**once, 'size': size, 'batch': batch, 'dtype': options.dtypes[0]}
      children.append(Child('compile', f'training R-{depth}', 'training', training))
      inference = {**once, 'size': options.sizes[0], 'precision': options.precisions[0]}
      children.append(Child('compile', f'inference R-{depth}', 'inference', inference))
  if 'non_local' in wanted:
    block = {'channels': 8 * options.width, 'positions': options.positions}
    children.append(Child('non_local', '', 'non_local', block))
  return children


def evaluated_folder(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
  """Prepares images and weights to evaluate; returns arguments for the measurements."""
  from nonlocal_jax.cli.measurements import random_state

  source, num_classes = options.data, options.num_classes
  if source is None:
    source, num_classes = folder / 'synthetic', DEMO.num_classes
    write_demo_set(source, train=options.limit, val=options.limit)
  linked = folder / 'data'
  for split in ('train', 'val'):
    link_first(source, linked, split, options.limit)
  checkpoint = options.checkpoint
  if checkpoint is None:
    checkpoint = folder / 'random.pth'
    config = NonLocalNetConfig.from_depth(
      options.depth, width=options.width, num_classes=num_classes
    )
    arrays = to_state_dict(random_state(config), num_batches_tracked={})
    write_torch_checkpoint(checkpoint, arrays, meta={})
  return {
    'data': str(linked),
    'checkpoint': str(checkpoint.absolute()),
    'num_classes': num_classes,
    'ignore_labels': list(options.ignore_label),
  }


def link_first(source: Path, linked: Path, split: str, limit: int) -> None:
  """Creates a folder of links to the first images of a split and their labels.

  Raises:
    UserError: If there are no images with labels.
  """
  labels = {path.stem: path for path in (source / 'labels' / split).glob('*.png')}
  images = sorted(path for path in (source / 'images' / split).glob('*') if path.stem in labels)
  if not images:
    raise UserError(f'{source} has no images/{split} with labels/{split} of the same stems.')
  for kind in ('images', 'labels'):
    (linked / kind / split).mkdir(parents=True)
  for image in images[:limit]:
    label = labels[image.stem]
    (linked / 'images' / split / image.name).symlink_to(image.absolute())
    (linked / 'labels' / split / label.name).symlink_to(label.absolute())


def timed_calls(
  options: argparse.Namespace, network: dict[str, Any], data: dict[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """Yields label, name and options of the measurements that both sides run."""
  repeated = {**network, 'repeats': options.repeats}
  for size in options.sizes:
    for precision in options.precisions:
      label = f'{size[0]}x{size[1]}, {precision}'
      yield label, 'inference', {**repeated, 'size': size, 'precision': precision}
  for *size, batch in options.train_sizes:
    for dtype in options.dtypes:
      label = f'{size[0]}x{size[1]}, batch {batch}, {dtype}'
      yield label, 'training', {**repeated, 'size': size, 'batch': batch, 'dtype': dtype}
  if data:
    for precision in options.precisions:
      yield precision, 'evaluation', {**data, 'scale': options.eval_scale, 'precision': precision}
      folder = {'data': data['data'], 'checkpoint': data['checkpoint'], 'precision': precision}
      yield precision, 'folder', folder
