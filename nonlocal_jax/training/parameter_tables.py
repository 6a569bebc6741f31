"""Tables of parameters, by stage and head or by array."""

import dataclasses
from typing import Any

import jax
from clu import parameter_overview
from flax import nnx

PARAMETERS = 'parameters.txt'  # file in the workdir with the table of all arrays


@dataclasses.dataclass(frozen=True)
class _Row:
  module: str
  arrays: int
  parameters: int


def all_parameters(params: nnx.State) -> str:
  """Returns clu's overview: name, shape, dtype and size of each array, and the total.

  Args:
    params: Arrays, or `jax.ShapeDtypeStruct`, by path.
  """
  arrays: dict[str, Any] = {
    '/'.join(map(str, path)): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    for path, variable in nnx.to_flat_state(params)
  }
  return parameter_overview.get_parameter_overview(arrays, include_stats=False)


def parameters_by_module(params: nnx.State) -> str:
  """Returns a table of the number of parameters of each head and each stage of the backbone.

  Args:
    params: Arrays, or `jax.ShapeDtypeStruct`, by path.
  """
  rows: dict[str, _Row] = {}
  for (part, child, *_), variable in nnx.to_flat_state(params):
    module = f'{part}/{child}' if part == 'backbone' else str(part)
    for name in (module, 'total'):
      row = rows.get(name, _Row(name, 0, 0))
      rows[name] = _Row(name, row.arrays + 1, row.parameters + variable.size)
  names = sorted(rows, key=lambda name: (name == 'total', not name.startswith('backbone'), name))
  return parameter_overview.make_table([rows[name] for name in names])
