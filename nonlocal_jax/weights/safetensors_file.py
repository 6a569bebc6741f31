"""Weights and their description as a safetensors file, under the names of released checkpoints."""

import json
from pathlib import Path

import numpy as np
from flax import nnx

from nonlocal_jax.errors import UserError, needs_packages
from nonlocal_jax.runtime.files import write_whole
from nonlocal_jax.weights.arrays import checksum
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.state_dict import from_state_dict, infer_config, to_state_dict

_DESCRIPTION = 'nonlocal_jax'  # keys of the metadata, which holds text only
_CHECKSUM = 'crc32'


def is_safetensors(path: Path) -> bool:
  """Whether a path is that of a safetensors file, by its name."""
  return path.suffix == '.safetensors' and not path.is_dir()


def write_safetensors(path: Path, state: nnx.State, description: ModelDescription) -> None:
  """Writes weights to a file that `read_safetensors` reads.

  Arrays have the names and layouts of the released checkpoints (kernels are (out, in, h, w)
  float32); the metadata holds the description as JSON under 'nonlocal_jax'.

  Args:
    path: The file, which is replaced if it is there.
    state: Parameters and running statistics of the network.
    description: What they are.

  Raises:
    UserError: If the package safetensors is not installed, or the file cannot be written.
  """
  with needs_packages('safetensors files', extra='export'):
    import safetensors.numpy
  arrays = _sorted(to_state_dict(state))
  metadata = {_DESCRIPTION: description.to_json(), _CHECKSUM: json.dumps(checksum(arrays))}
  write_whole(path, safetensors.numpy.save(arrays, metadata))


def read_safetensors(path: Path) -> tuple[ModelDescription, nnx.State]:
  """Reads what `write_safetensors` wrote.

  Returns:
    The description, and parameters and running statistics as float32 host arrays.

  Raises:
    UserError: If the package safetensors is not installed, the file cannot be read, is of another
      origin, or is damaged.
  """
  with needs_packages('safetensors files', extra='export'):
    import safetensors
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      names = file.keys()
      arrays = {name: file.get_tensor(name) for name in names}
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f'{path} is no safetensors file that can be read: {error}.') from error
  if _DESCRIPTION not in metadata:
    raise UserError(
      f'{path} does not say which network it is: give a file that nonlocal-jax export wrote.'
    )
  description = ModelDescription.from_json(metadata[_DESCRIPTION], source=str(path))
  if metadata.get(_CHECKSUM) != json.dumps(checksum(_sorted(arrays))):
    raise UserError(f'{path} is damaged (the checksum of its weights differs): export it again.')
  config, found = description.config, infer_config(arrays, source=str(path))
  for name in ('stage_blocks', 'width', 'num_classes', 'in_channels'):  # what costs time to build
    if getattr(config, name) != getattr(found, name):
      raise UserError(
        f'{path} describes a network with {name}={getattr(config, name)}, and its weights have '
        f'{getattr(found, name)}: export it again.'
      )
  return description, from_state_dict(arrays, description.config, source=str(path))


def _sorted(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
