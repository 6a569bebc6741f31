"""Lists the released models and the backbones they started from, or downloads some.

    nonlocal-jax models                               # names, published scores, what is here
    nonlocal-jax models ade20k_r50                    # address, sha256 and place of one
    nonlocal-jax models --download ade20k_r50 resnet50_v1c

The names can be given wherever a command takes weights: `nonlocal-jax predict --checkpoint=NAME`
downloads them when they are first used. Other names of a model are that of its config in
MMSegmentation 1.x, of its file, and of its config here, such as ade20k_r50:512x512_80k.
"""

from collections.abc import Sequence

from nonlocal_jax.cli.program import Parser
from nonlocal_jax.runtime.download import as_size
from nonlocal_jax.weights import released
from nonlocal_jax.weights.names import (
  download_released,
  find_release,
  is_downloaded,
  released_path,
  weights_folder,
)
from nonlocal_jax.weights.released import Released, ReleasedBackbone

_COLUMNS = ('name', 'dataset', 'crop', 'steps', 'mIoU', 'ms+flip', 'size', 'here')
_TRAINED_ON = 'ImageNet'  # of the backbones


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax models`."""
  parser = Parser('nonlocal-jax models', __doc__)
  parser.add_argument('names', nargs='*', metavar='NAME', help='all, or some; default: list them')
  parser.add_argument('--download', action='store_true', help='download those that are not here')
  options = parser.parse(arguments)
  if options.download and not options.names:
    parser.error('name what to download, or all')
  everything: tuple[Released, ...] = (*released.RELEASED, *released.BACKBONES)
  chosen = everything
  if options.names and 'all' not in options.names:
    chosen = tuple(find_release(name) for name in options.names)
  if options.download:
    for weights in chosen:
      print(download_released(weights))
  elif options.names:
    print('\n\n'.join(describe(weights) for weights in chosen))
  else:
    print(table(everything))


def table(everything: Sequence[Released]) -> str:
  """Formats one line for each of the released weights."""
  rows = [_COLUMNS, *map(_row, everything)]
  widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
  lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
  return '\n'.join((*lines, '', f'Downloaded files are kept in {weights_folder()}.'))


def describe(weights: Released) -> str:
  """Says of one where it is from and where it belongs, for a download by hand as well."""
  path = released_path(weights)
  facts = dict(zip(_COLUMNS, _row(weights), strict=True))
  if not isinstance(weights, ReleasedBackbone):
    facts |= {'config': weights.recipe, 'mmseg 1.x': weights.config_name}
  facts |= {'address': weights.address, 'sha256': f'{weights.sha256_prefix}...'}
  facts |= {'here': str(path) if is_downloaded(weights) else f'no; it belongs to {path}'}
  return '\n'.join(f'{name:10}{value}' for name, value in facts.items() if value)


def _row(weights: Released) -> tuple[str, ...]:
  size = f'~{weights.about_bytes / 10**6:.0f} MB'
  is_here = is_downloaded(weights)
  if is_here:
    size = as_size(released_path(weights).stat().st_size)
  here = 'yes' if is_here else ''
  if isinstance(weights, ReleasedBackbone):
    return weights.name, _TRAINED_ON, '', '', '', '', size, here
  several = weights.miou_ms_flip
  return (
    weights.file.removesuffix('.pth') if weights.replaced else weights.name,
    weights.dataset,
    'x'.join(map(str, weights.crop)),
    f'{weights.steps // 1000}k',
    f'{weights.miou:.2f}',
    '' if several is None else f'{several:.2f}',
    size,
    here,
  )
