"""Weights from wherever they are: a released .pth file, a converted directory, a training run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from nonlocal_jax.data.datasets import PUBLISHED, custom_dataset
from nonlocal_jax.weights.checkpoints import load_weights
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.released import released_model_of_file
from nonlocal_jax.weights.torch_file import read_torch_checkpoint
from nonlocal_jax.weights.torch_names import Architecture, from_state_dict, infer_architecture


def read_weights(
  path: Path, *, align_corners: bool | None = None
) -> tuple[ModelDescription, nnx.State]:
  """Reads weights and what is known about them.

  Args:
    path: A .pth file, a converted directory or the workdir of a training run.
    align_corners: The corner convention, in place of what the directory or the name of a released
      file says; for other files the default is False, mmsegmentation's own.

  Returns:
    The description, and parameters and running statistics as float32 host arrays.

  Raises:
    UserError: If there are no weights of a NonLocalNet.
  """
  if path.is_dir():
    description, state = load_weights(path)
  else:
    checkpoint = read_torch_checkpoint(path)
    architecture = infer_architecture(checkpoint.state_dict, source=str(path))
    state = from_state_dict(checkpoint.state_dict, architecture, source=str(path))
    description = _describe(path, architecture, checkpoint.meta)
  if align_corners is not None:
    description = dataclasses.replace(description, align_corners=align_corners)
  return description, state


def _describe(path: Path, architecture: Architecture, meta: Mapping[str, Any]) -> ModelDescription:
  """What a .pth file's name, shapes and meta tell."""
  released = released_model_of_file(path.name)
  dataset = PUBLISHED[released.dataset] if released else custom_dataset(architecture.num_classes)
  dataset_meta = meta.get('dataset_meta') or {}
  classes = meta.get('CLASSES') or dataset_meta.get('classes') or dataset.classes
  palette = meta.get('PALETTE') or dataset_meta.get('palette') or dataset.palette
  align_corners = released is not None and released.align_corners
  return ModelDescription(
    architecture=architecture,
    align_corners=align_corners,
    classes=tuple(map(str, classes)),
    palette=tuple((int(r), int(g), int(b)) for r, g, b in palette),
    test_scale=released.test_scale if released else None,
    window_crop=released.window_crop if released else None,
    window_stride=released.window_stride if released else None,
    source=str(path),
  )
