"""Converts checkpoints of MMSegmentation to directories, and weights trained here to .pth files.

    nonlocal-jax convert FILE.pth OUT              one file to a directory
    nonlocal-jax convert FOLDER OUT                each .pth of a folder, to OUT/STEM
    nonlocal-jax convert SOURCE --to-pth OUT.pth   for MMSegmentation

FILE.pth may also be the name of a released model, which is downloaded: see `nonlocal-jax models`;
or a safetensors file of `nonlocal-jax export`.
SOURCE is a converted directory or the workdir of a training run: runs/NAME for its newest
checkpoint, runs/NAME/best for the one with the best mIoU.
"""

import argparse
import collections
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from nonlocal_jax.cli.config import Config
from nonlocal_jax.cli.program import Parser, add_ema, path_option, program_name, say_weights
from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.recipes import base_config, get_config
from nonlocal_jax.runtime.files import check_absent
from nonlocal_jax.runtime.progress import progress_bar
from nonlocal_jax.torch_format.writer import write_torch_checkpoint
from nonlocal_jax.weights.checkpoints import DESCRIPTION, read_description, save_weights
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import TorchWeights, read_torch_weights, read_weights
from nonlocal_jax.weights.mmseg_config import PROTOCOL_KEY, protocol_entry
from nonlocal_jax.weights.mmseg_config_text import config_text
from nonlocal_jax.weights.names import find_weights
from nonlocal_jax.weights.released import RELEASED, ReleasedModel
from nonlocal_jax.weights.safetensors_file import is_safetensors
from nonlocal_jax.weights.state_dict import to_state_dict


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax convert`."""
  parser = Parser('nonlocal-jax convert', __doc__)
  parser.add_argument(
    'source', type=path_option, help='a .pth file, a folder of them, or see --to-pth'
  )
  parser.add_argument('out', type=path_option, nargs='?', help='output directory; must not exist')
  parser.add_argument(
    '--to-pth', type=path_option, metavar='OUT.pth', help='write a .pth file instead'
  )
  parser.add_argument(
    '--align-corners',
    action=argparse.BooleanOptionalAction,
    help='corner convention, for files that do not record it; of --to-pth, for the file it writes',
  )
  add_ema(parser)
  options = parser.parse(arguments)
  out, to_pth = options.out, options.to_pth
  if (out is None) == (to_pth is None):
    parser.error('give either OUT or --to-pth OUT.pth')
  if not os.path.isdir(options.source):  # before a model is downloaded
    check_absent(to_pth or out)
  source = find_weights(options.source)
  if to_pth:
    say_weights(source)
    write_pth(source, to_pth, align_corners=options.align_corners, ema=options.ema)
  elif is_safetensors(source):
    description, state = read_weights(source, align_corners=options.align_corners, ema=options.ema)
    save_weights(out, state, description)
    print(f'Written to {out}. To evaluate:\n  {evaluation_command(description, out)}')
  elif not source.is_dir():
    weights = read_torch_weights(source, align_corners=options.align_corners, ema=options.ema)
    save_weights(out, weights.state, weights.description)
    print(summary(weights, out))
  elif (source / DESCRIPTION).exists():
    raise UserError(f'{source} needs no conversion; --to-pth writes a .pth file of it.')
  else:
    convert_folder(source, out, align_corners=options.align_corners, ema=options.ema)


def convert_folder(folder: Path, out: Path, *, align_corners: bool | None, ema: bool) -> None:
  """Converts each .pth file of a folder, and skips files that were converted before.

  Args:
    folder: The folder.
    out: The output folder, for one directory per file, named after the file's stem.
    align_corners: The corner convention; None for the one that the files record.
    ema: Whether to take the moving averages.

  Raises:
    UserError: If there are no files, or some could not be converted; the message lists them.
  """
  files = sorted(folder.glob('*.pth'))
  if not files:
    raise UserError(f'{folder} holds no .pth files and is no converted directory.')
  failures = []
  with progress_bar(len(files), 'Converting', unit='file') as bar:
    for file in files:
      directory = out / file.stem
      try:
        weights = read_torch_weights(file, align_corners=align_corners, ema=ema)
        description = weights.description
        if (directory / DESCRIPTION).exists() and read_description(directory) == description:
          bar.write(f'{directory} is there already\n')
        else:
          save_weights(directory, weights.state, description)
          bar.write(f'{summary(weights, directory)}\n')
      except UserError as error:
        failures.append(f'  {error}')
      bar.update()
  if failures:
    count = f'{len(failures)} of {len(files)} files were not converted'
    raise UserError('\n'.join((f'{count}:', *failures)))


def write_pth(
  source: Path, path: Path, *, align_corners: bool | None = None, ema: bool = False
) -> None:
  """Writes weights as a .pth file that MMSegmentation loads, and prints the test protocol.

  Args:
    source: Anything that `read_weights` reads.
    path: The output file; must not exist.
    align_corners: The corner convention; None for that of the weights.
    ema: See `read_weights`.

  Raises:
    UserError: If there are no weights, or `path` exists or cannot be written.
  """
  description, state = read_weights(source, align_corners=align_corners, ema=ema)
  classes, palette = list(description.classes), list(map(list, description.palette))
  if description.protocol.bits != 8:
    raise UserError(
      f'{source} takes images of {description.protocol.bits} bits, and the config in a .pth file '
      'cannot say so: export it with nonlocal-jax export --format=safetensors.'
    )
  text = config_text(description.config, description.protocol)
  meta = {
    'dataset_meta': {'classes': classes, 'palette': palette},
    'CLASSES': classes,
    'PALETTE': palette,
    'cfg': text,
    PROTOCOL_KEY: protocol_entry(description.protocol, description.assumed),
  }
  arrays = to_state_dict(state, description.num_batches_tracked)
  write_torch_checkpoint(path, arrays, meta)
  print(f'{path}: {len(arrays)} arrays, {description.config}; its config:')
  if not description.config.auxiliary_head:
    print('# There is no auxiliary head: add one to train with MMSegmentation.')
  print(text, end='')


def summary(weights: TorchWeights, directory: Path) -> str:
  """Describes converted weights and how to evaluate them."""
  description, released = weights.description, weights.released
  facts = {
    'file': description.source,
    'sha256': description.sha256,
    'released as': _published(released) if released else 'unknown',
    'network': description.config,
    'dataset': f'{description.dataset}: {_shortened(description.classes)}',
    'protocol': _protocol(description.protocol),
  }
  lines = [f'{name:12} {value}' for name, value in facts.items()]

  rows = collections.defaultdict(lambda: [0, 0, 0])
  for (part, *_), variable in nnx.to_flat_state(weights.state):
    for name in (part, 'total'):
      rows[name][0] += 1
      rows[name][1 if isinstance(variable, nnx.Param) else 2] += variable.size
  rows['total'] = rows.pop('total')
  lines += ['', f'{"":16}{"arrays":>8}{"parameters":>14}{"statistics":>14}']
  lines += [f'{name:16}{a:8,}{p:14,}{s:14,}' for name, (a, p, s) in rows.items()]
  lines += [f'{"skipped":16}{count:8,}  {reason}' for reason, count in weights.skipped.items()]
  lines += [
    '',
    *(f'Note: {note}' for note in weights.notes),
    f'Written to {directory}. To evaluate:',
  ]
  return '\n'.join((*lines, f'  {evaluation_command(description, directory)}'))


def evaluation_command(description: ModelDescription, directory: Path) -> str:
  """Returns the command that evaluates converted weights by the protocol of their description.

  It uses the most similar config and sets the fields that differ.
  """
  protocol = description.protocol
  wanted = {
    'model.depth': description.config.depth,
    'model.width': description.config.width,
    'model.non_local': description.config.non_local,
    'model.align_corners': protocol.align_corners,
    'data.num_classes': description.config.num_classes,
    'eval.scale': '(WIDTH,HEIGHT)' if 'scale' in description.assumed else protocol.scale or (),
    'eval.scale_factor': protocol.scale_factor or (),
    'eval.keep_ratio': protocol.keep_ratio,
    'eval.window_crop': protocol.window_crop or (),
    'eval.window_stride': protocol.window_stride or (),
    'eval.multi_scale_flip': protocol.averages,
  }
  if protocol.window_crop and protocol.pad_windows != (protocol.version == 'v0'):
    wanted['eval.pad_windows'] = protocol.pad_windows
  if protocol.averages or protocol.window_crop:
    wanted['eval.protocol'] = protocol.version
  configs = {'custom': base_config()}
  for model in RELEASED:
    if model.dataset == description.dataset and not model.replaced:
      configs[model.recipe] = get_config(model.recipe)
  if len(configs) > 1:
    del configs['custom']
  differences = {name: _differing(wanted, config) for name, config in configs.items()}
  name = min(differences, key=lambda name: len(differences[name]))
  settings = {'data.source_dir': 'DIR', **differences[name]}
  flags = (
    f'--config.{key}={shlex.quote(str(value).replace(" ", ""))}' for key, value in settings.items()
  )
  where = shlex.quote(str(directory))
  return f'{program_name()} eval --config={name} --checkpoint={where} {" ".join(flags)}'


def _differing(wanted: Mapping[str, Any], config: Config) -> dict[str, Any]:
  values = {key: config[key.split('.')[0]][key.split('.')[1]] for key in wanted}
  return {key: value for key, value in wanted.items() if values[key] != value}


def _published(released: ReleasedModel) -> str:
  multi_scale = released.miou_ms_flip
  suffix = f', {multi_scale} with multi-scale and flip' if multi_scale is not None else ''
  return f'{released.name}, mIoU {released.miou}{suffix}'


def _protocol(protocol: EvalProtocol) -> str:
  scale = protocol.scale
  where = f'in a box of {scale[0]}x{scale[1]}' if scale else 'at their own size'
  how = 'whole images'
  if protocol.window_crop:
    crop, stride = protocol.window_crop, protocol.window_stride
    how = f'windows of {crop} every {stride} pixels of images'
  corners = 'corner-aligned' if protocol.align_corners else 'half-pixel'
  return f'{how} {where}, {corners} logits'


def _shortened(classes: tuple[str, ...]) -> str:
  more = ', ...' if len(classes) > 4 else ''
  return f'{len(classes)} classes ({", ".join(classes[:4])}{more})'
