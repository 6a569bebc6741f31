"""Writes a network to a file that runs without this library, and compares the two.

    nonlocal-jax export --checkpoint=WEIGHTS --format=onnx --size=512,1024 --out=network.onnx
    nonlocal-jax export --checkpoint=WEIGHTS --format=jax --size=512,1024 --out=network.jax
    nonlocal-jax export --checkpoint=WEIGHTS --format=safetensors --out=weights.safetensors
    nonlocal-jax export --checkpoint=WEIGHTS --format=browser --size=512,512 --out=page

onnx is for ONNX Runtime and others, jax for JAX alone (jax.export.deserialize), on CPUs, NVIDIA
GPUs and TPUs. Both take images (n, height, width, 3) uint8 RGB of one size and return the class of
each pixel. Normalization, padding and upsampling are inside; resizing, sliding windows, several
scales and flips are not. safetensors holds the weights alone, by the names of the released
checkpoints, and can be given as --checkpoint again. browser makes a folder for any web server: a
page that runs the network in the browser, where images stay on the visitor's machine. Its files of
ONNX Runtime Web are downloaded when they are first used.

The file is compared with the network before it is there. Needs the extra: pip install '.[export]'
"""

import re
import shlex
from collections.abc import Sequence
from typing import get_args

import nonlocal_jax
from nonlocal_jax.cli.program import Parser, add_ema, path_option, say_weights
from nonlocal_jax.errors import UsageError, explained_by
from nonlocal_jax.export.files import STEPS, Exported, Format
from nonlocal_jax.protocol import Size
from nonlocal_jax.runtime.files import check_absent
from nonlocal_jax.runtime.progress import progress_bar

_FLAGS = {
  'size': '--size=HEIGHT,WIDTH',
  'batch': '--batch=COUNT',
  'confidence': '--confidence',
}


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax export`."""
  parser = Parser('nonlocal-jax export', __doc__)
  parser.add_argument(
    '--checkpoint',
    required=True,
    type=path_option,
    help='a .pth or safetensors file, a converted directory, the workdir of a training run, or the '
    'name of a released model, which is downloaded: see nonlocal-jax models',
  )
  parser.add_argument('--format', required=True, choices=get_args(Format), help='kind of the file')
  parser.add_argument(
    '--out',
    required=True,
    type=path_option,
    help='the file, for browser the folder; must not exist',
  )
  parser.add_argument(
    '--size', type=parse_size, metavar='HEIGHT,WIDTH', help='of the images that go in, in pixels'
  )
  parser.add_argument(
    '--batch', type=_count, metavar='COUNT', help='number of images; default: any number'
  )
  parser.add_argument(
    '--confidence',
    action='store_true',
    help="return the probability of each pixel's class as well, float32",
  )
  add_ema(parser)
  options = parser.parse(arguments)
  check_absent(options.out)
  say_weights(options.checkpoint)
  model = nonlocal_jax.load(options.checkpoint, ema=options.ema)
  with progress_bar(STEPS, 'Exporting and comparing', unit='step') as bar, explained_by(_FLAGS):
    exported = model.export(
      options.out,
      format=options.format,
      size=options.size,
      batch=options.batch,
      confidence=options.confidence,
      on_step=bar.update,
    )
  print(summary(exported))


def summary(exported: Exported) -> str:
  """Describes a file that was written."""
  interface = exported.interface
  facts = {'file': f'{exported.path}, {exported.length / 1e6:.1f} MB'}
  if interface is None:
    facts['difference'] = f'{exported.difference:.1e}, the largest of an array that was read back'
  else:
    facts |= {
      'program': interface.takes(),
      'inside': interface.inside(),
      'not inside': interface.not_inside(),
      'difference': f"{exported.difference:.1e} of the logits' standard deviation, the largest",
    }
  if exported.path.is_dir():
    folder = shlex.quote(str(exported.path))
    facts['inside'] = f'fitting images into the size, {facts["inside"]}'
    facts['not inside'] = 'sliding windows, several scales and flips'
    facts['to see it'] = (
      f'python3 -m http.server --bind 127.0.0.1 --directory {folder} 8000, at http://127.0.0.1:8000'
    )
  return '\n'.join(f'{name:12} {value}' for name, value in facts.items())


def parse_size(text: str) -> Size:
  """Parses HEIGHT,WIDTH, e.g. '512,1024'."""
  match = re.fullmatch(r'\(?\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)?', text)
  if match is None:
    raise UsageError(f'--size is {text!r}; give height and width in pixels, e.g. --size=512,1024.')
  return int(match[1]), int(match[2])


def _count(text: str) -> int:
  if re.fullmatch(r'\d{1,9}', text) is None:
    raise UsageError(f'--batch is {text!r}; give a number of images, e.g. --batch=1.')
  return int(text)
