"""Writes a network to a file that runs elsewhere, after comparing the file with the network."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.export
import numpy as np
from flax import nnx

from nonlocal_jax.errors import UserError, needs_packages
from nonlocal_jax.export.checking import check_outputs, difference, reference
from nonlocal_jax.export.interface import Interface
from nonlocal_jax.export.jax_program import export_program, jax_program
from nonlocal_jax.export.page import NETWORK, check_channels, write_page
from nonlocal_jax.protocol import Size
from nonlocal_jax.runtime.files import check_absent, whole_file, whole_folder
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.safetensors_file import read_safetensors, write_safetensors
from nonlocal_jax.weights.state_dict import to_state_dict

Format = Literal['onnx', 'jax', 'safetensors', 'browser']
STEPS = 4  # of `export_network`, as it reports them

_MOST_BYTES = 2**31 - 2**26  # of weights: Protocol Buffers and FlatBuffers end at 2 GiB


@dataclasses.dataclass(frozen=True)
class Exported:
  """A file that was written.

  Attributes:
    path: The file, or the folder of a page.
    length: Its number of bytes.
    interface: What its program takes and returns; None for weights alone.
    difference: The largest difference of its logits from those of the network, as a share of their
      standard deviation; of weights alone, the largest difference of an array.
  """

  path: Path
  length: int
  interface: Interface | None
  difference: float


def export_network(
  description: ModelDescription,
  state: nnx.State,
  path: Path,
  *,
  format: Format,
  size: Size | None = None,
  batch: int | None = None,
  confidence: bool = False,
  on_step: Callable[[], object] = lambda: None,
) -> Exported:
  """Writes a network to a file, see `PretrainedModel.export`.

  Args:
    description: What the network is.
    state: Its parameters and running statistics.
    path: The file or folder; must not exist.
    format: See `PretrainedModel.export`.
    size: See there.
    batch: See there.
    confidence: See there.
    on_step: Called after each of `STEPS` steps.

  Raises:
    UserError: See `PretrainedModel.export`.
  """
  if format not in get_args(Format):
    raise UserError(f'format is {format!r}; it must be one of {", ".join(get_args(Format))}.')
  check_absent(path)
  if format == 'safetensors':
    if size is not None or batch is not None or confidence:
      raise UserError(f'size, batch and confidence are for programs; {format} holds weights alone.')
    return _export_weights(description, state, path, on_step=on_step)
  if size is None:
    raise UserError(f'size is missing, which {format} needs: give height and width of the images.')
  if format == 'browser':
    if batch is not None or confidence:
      raise UserError('The page has batch and confidence of its own: leave them out.')
    return _export_page(description, state, path, size=size, on_step=on_step)
  interface = Interface.of(description, size=size, batch=batch, confidence=confidence)
  write = _onnx_file if format == 'onnx' else _jax_file
  found = _export_program(description, state, path, interface, write, on_step=on_step)
  return Exported(path, path.stat().st_size, interface, found)


Outputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _File:
  """A program that was written, and ways to run it on images (n, h, w, channels) uint8."""

  run: Callable[[np.ndarray], Outputs]  # the file
  with_logits: Callable[[np.ndarray], Outputs]  # the same program with another output, 'logits'


def _export_program(
  description: ModelDescription,
  state: nnx.State,
  path: Path,
  interface: Interface,
  write: Callable[[ModelDescription, nnx.State, Interface, Path], _File],
  *,
  on_step: Callable[[], object],
) -> float:
  """Writes a program, compares it with the network and returns the largest difference."""
  length = sum(array.nbytes for array in jax.tree.leaves(state))
  if length > _MOST_BYTES:
    raise UserError(
      f'The weights have {length / 2**30:.1f} GiB, and a file of a program holds 2 GiB; use '
      'safetensors.'
    )
  with whole_file(path) as partial:
    file = write(description, state, interface, partial)
    on_step()
    expected = reference(state, interface)
    on_step()
    found = difference(expected, file.with_logits(expected.images))
    on_step()
    check_outputs(expected, file.run(expected.images), found, what=str(path))
    on_step()
  return found


def _export_page(
  description: ModelDescription,
  state: nnx.State,
  path: Path,
  *,
  size: Size,
  on_step: Callable[[], object],
) -> Exported:
  check_channels(description)
  has_confidence = description.config.threshold in (None, 0.5)
  interface = Interface.of(description, size=size, batch=1, confidence=has_confidence)
  with whole_folder(path) as partial:
    write_page(partial, description, interface)
    network = partial / NETWORK
    found = _export_program(description, state, network, interface, _onnx_file, on_step=on_step)
  length = sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
  return Exported(path, length, interface, found)


def _onnx_file(
  description: ModelDescription, state: nnx.State, interface: Interface, path: Path
) -> _File:
  with needs_packages('ONNX files', extra='export'):
    import onnxruntime

    from nonlocal_jax.export.onnx_network import onnx_model

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors
  arrays = to_state_dict(state)

  def run(model: str | bytes, images: np.ndarray) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {'images': images}), strict=True))

  def run_with_logits(images: np.ndarray) -> Outputs:
    model = onnx_model(description, arrays, interface, with_logits=True)
    outputs = run(model.SerializeToString(), images)
    return {**outputs, 'logits': outputs['logits'].transpose(0, 2, 3, 1)}

  path.write_bytes(onnx_model(description, arrays, interface).SerializeToString())
  return _File(lambda images: run(str(path), images), run_with_logits)


def _jax_file(
  description: ModelDescription, state: nnx.State, interface: Interface, path: Path
) -> _File:
  del description
  state = jax.device_get(state)

  def run(data: bytes | bytearray, images: np.ndarray) -> Outputs:
    program = jax.jit(jax.export.deserialize(bytearray(data)).call)
    return jax.device_get(program(images))

  def run_with_logits(images: np.ndarray) -> Outputs:
    return run(export_program(jax_program(state, interface, with_logits=True), interface), images)

  path.write_bytes(export_program(jax_program(state, interface), interface))
  return _File(lambda images: run(path.read_bytes(), images), run_with_logits)


def _export_weights(
  description: ModelDescription, state: nnx.State, path: Path, *, on_step: Callable[[], object]
) -> Exported:
  with whole_file(path) as partial:
    write_safetensors(partial, state, description)
    on_step()
    read, found = read_safetensors(partial)
    on_step()
    largest = max(
      jax.tree.leaves(
        jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), state, found)
      )
    )
    on_step()
    if largest or read != description:
      raise UserError(
        f'{path} was not written: what was read back differs from the network by {largest:.1e}; '
        'please report this with the weights.'
      )
    on_step()
  return Exported(path, path.stat().st_size, None, largest)
