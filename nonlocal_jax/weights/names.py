"""Weights by name: released models and backbones, downloaded when they are first asked for."""

import difflib
import os
import sys
from pathlib import Path

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.download import download
from nonlocal_jax.runtime.files import cache_folder
from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.weights import released
from nonlocal_jax.weights.released import Released, ReleasedBackbone


def find_weights(given: str | os.PathLike[str]) -> Path:
  """Returns the path of weights that are given by path or by name.

  A name is that of a released model: 'nonlocal_r50-d8_512x512_80k_ade20k', its config's name in
  MMSegmentation 1.x, 'nonlocal_r50-d8_4xb4-80k_ade20k-512x512', or here, 'ade20k_r50:512x512_80k'
  ('ade20k_r50' is the variant with the best mIoU), or the released file's name or address. A path
  that exists goes before a name.

  Args:
    given: The path or name.

  Returns:
    A path that exists.

  Raises:
    UserError: If there is neither such a path nor such a name, what is there is no file or folder,
      or the file cannot be downloaded.
  """
  if not os.fspath(given):
    raise UserError("The path of the weights is empty: give one, or a released model's name.")
  path = Path(given)
  named = named_release(given)
  if os.path.exists(path):  # unlike `Path.exists`, this is for names of any length
    if named is not None and path.name != named.file and is_first_process():
      print(f'{path} is taken, not the released weights of that name.', file=sys.stderr)
    if not os.path.isdir(path) and not os.path.isfile(path):
      raise UserError(f'{path} is a pipe or device, no file: give the file or folder of weights.')
    return path
  if isinstance(named, ReleasedBackbone):
    raise UserError(
      f'{given} is a backbone, and not a whole network: it is for config.init_backbone.'
    )
  if named is None:
    raise UserError(_not_found(path))
  return download_released(named)


def find_release(name: str) -> Released:
  """Returns the released weights of that name, see `find_weights` and `find_backbone`.

  Raises:
    UserError: If there are none.
  """
  found = named_release(name)
  if found is None:
    likely = _nearest(name)
    hint = f'the nearest is {likely}, ' if likely else ''
    raise UserError(f'No released model is called {name!r}; {hint}see nonlocal-jax models.')
  return found


def find_backbone(given: str | os.PathLike[str]) -> Path:
  """Returns the path of a backbone, or of a network that has one, given by path or by name.

  Args:
    given: A path, a name as for `find_weights`, or 'resnet50_v1c' or 'resnet101_v1c'; before these
      'open-mmlab://' may stand.

  Returns:
    A path that exists.

  Raises:
    UserError: See `find_weights`.
  """
  named = named_release(given)
  if isinstance(named, ReleasedBackbone) and not os.path.exists(given):
    return download_released(named)
  return find_weights(given)


def named_release(given: str | os.PathLike[str]) -> Released | None:
  """Returns the released weights that a name stands for, see `find_weights`; None if none."""
  return _by_name().get(str(given))


def weights_folder() -> Path:
  """Returns the folder where released weights are kept: `weights` in the cache folder."""
  return cache_folder() / 'weights'


def released_path(weights: Released) -> Path:
  """Returns where released weights lie once they are downloaded."""
  return weights_folder() / weights.file


def is_downloaded(weights: Released) -> bool:
  """Returns whether the file of released weights is there; it is not read."""
  return os.path.isfile(released_path(weights))  # also where the folder cannot be read


def download_released(weights: Released) -> Path:
  """Returns the path of released weights, which are downloaded if they are not there.

  Raises:
    UserError: If they cannot be downloaded, or the file is another one.
  """
  return download(
    weights.address, folder=weights_folder(), name=weights.file, sha256=weights.sha256_prefix
  )


def _by_name() -> dict[str, Released]:
  found: dict[str, Released] = {}
  for model in released.RELEASED:
    names = [model.file, model.file.removesuffix('.pth'), *_spellings(model.address)]
    if not model.replaced:
      names += [model.name, model.config_name, model.recipe]
      if model == released.best_release(model.dataset, model.depth):
        names.append(model.recipe.partition(':')[0])
    found |= dict.fromkeys(names, model)
  for backbone in released.BACKBONES:
    names = [backbone.file, backbone.file.removesuffix('.pth'), backbone.name]
    names += [*_spellings(backbone.address), *_spellings(f'open-mmlab://{backbone.name}')]
    found |= dict.fromkeys(names, backbone)
  return found


def _spellings(address: str) -> tuple[str, str]:
  """Returns an address as it is, and as a `Path` has it, with one of the two slashes."""
  return address, str(Path(address))


def _nearest(name: str) -> str:
  """Returns the name that is spelt most alike, in upper or lower case; '' if none is."""
  names = {known.lower(): known for known in _by_name()}
  found = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.7)
  return names[found[0]] if found else ''


def _not_found(path: Path) -> str:
  wanted = f'There is no {path}: give a .pth file, a converted directory or the workdir of a run'
  if len(path.parts) != 1 and not path.parts[0].endswith(':'):  # an address may be misspelt, too
    return f'{wanted}.'
  likely = _nearest(str(path))
  hint = f'; the nearest is {likely}, see' if likely else ', see'
  return f"{wanted}, or a released model's name{hint} nonlocal-jax models."
