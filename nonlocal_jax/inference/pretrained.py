"""Trained networks in Python: `model = nonlocal_jax.load(PATH)`, `model.predict(image)`."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.data.transforms import resize_to
from nonlocal_jax.inference.buckets import PaddedShape
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.views import views_of
from nonlocal_jax.models import Execution, NonLocalNet
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import platform_of
from nonlocal_jax.weights.checkpoints import save_weights
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import read_weights

Precision = Literal['highest', 'default']


def load(
  path: str | os.PathLike[str],
  *,
  align_corners: bool | None = None,
  execution: Execution | None = None,
  precision: Precision = 'highest',
) -> 'PretrainedModel':
  """Loads a trained network; depth, width and classes are read off the weights.

  Args:
    path: A .pth file of mmsegmentation, a converted directory, or the workdir of a training run
      (its newest checkpoint).
    align_corners: The corner convention. By default that of the directory, or what the name of a
      released file says, or else False, mmsegmentation's own default.
    execution: How the network is computed; None for what is fastest on JAX's default backend.
    precision: Of matrix products: 'highest' for float32 everywhere, as the published scores were
      measured, 'default' for what JAX chooses, on recent GPUs the several times faster TF32.

  Returns:
    The network, ready to predict.

  Raises:
    UserError: If there are no weights of a NonLocalNet.
    ValueError: If `precision` is unknown.
  """
  weights = read_weights(Path(path), align_corners=align_corners)
  return PretrainedModel(*weights, execution=execution, precision=precision)


class PretrainedModel:
  """A network with trained weights. Images of nearly the same size share a compiled program.

  Attributes:
    description: What is known about it: network, classes, colours, test protocol.
  """

  def __init__(
    self,
    description: ModelDescription,
    state: nnx.State,
    *,
    execution: Execution | None = None,
    precision: Precision = 'highest',
  ):
    """Puts the weights on the default device.

    Args:
      description: What the weights are.
      state: Parameters and running statistics.
      execution: How the network is computed; None for what is fastest on JAX's default backend.
      precision: See `load`.

    Raises:
      ValueError: If `precision` is unknown.
    """
    self.description = description
    device = jax.local_devices()[0]
    platform = platform_of([device])
    self._execution = execution or Execution.for_platform(platform)
    self._precision: Precision = precision
    self._state = jax.device_put(state, device)
    self._graphdef = nnx.graphdef(NonLocalNet.abstract(description.config, self._execution))
    self._predictor_of = functools.cache(self._make_predictor)

    @jax.default_matmul_precision(precision)
    def logits(state: nnx.State, images: jax.Array) -> jax.Array:
      return nnx.merge(self._graphdef, state)(images)

    self._traced_logits = logits
    self._logits = jax.jit(logits, compiler_options=compiler_options(platform))

  @property
  def classes(self) -> tuple[str, ...]:
    """Name of each class."""
    return self.description.classes

  @property
  def palette(self) -> tuple[tuple[int, int, int], ...]:
    """RGB colour of each class, in [0, 255]."""
    return self.description.palette

  @property
  def protocol(self) -> EvalProtocol:
    """How images are tested."""
    return self.description.protocol

  def predict(self, image: np.ndarray, *, multi_scale_flip: bool | None = None) -> np.ndarray:
    """Predicts the class of each pixel by the model's `protocol`.

    Args:
      image: (h, w, 3) uint8 RGB.
      multi_scale_flip: Whether to average over six sizes, each mirrored as well: better, and some
        17 times the work. None for what the protocol says.

    Returns:
      (h, w) int32 in [0, classes).

    Raises:
      ValueError: If `image` is of another shape or dtype.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
      raise ValueError(f'image is {image.shape} {image.dtype}, expected (h, w, 3) uint8 RGB')
    size = image.shape[:2]
    predictor = self._predictor_of(multi_scale_flip)
    protocol = predictor.protocol
    views = [resize_to(image, view.size) for view in views_of(protocol, size)]
    shape = PaddedShape.from_image(size, protocol).with_room(networks=protocol.window_crop is None)
    labels = predictor(self._state, shape, [views], [size])
    return np.asarray(labels)[0, : size[0], : size[1]].astype(np.int32)

  def logits(self, images: np.ndarray | jax.Array) -> jax.Array:
    """Logits of whole images at their own size.

    Args:
      images: (n, h, w, 3) float32, normalised RGB (see `nonlocal_jax.models.normalize`).

    Returns:
      (n, h, w, classes) float32.
    """
    # JAX refuses compiler options of a program inside another, such as the caller's own `jax.jit`.
    run = self._traced_logits if isinstance(images, jax.core.Tracer) else self._logits
    return run(self._state, jnp.asarray(images))

  def with_protocol(self, protocol: EvalProtocol) -> 'PretrainedModel':
    """The same network, tested by another protocol.

    E.g. `model.with_protocol(dataclasses.replace(model.protocol, scale=(2048, 512)))`.
    """
    description = dataclasses.replace(self.description, protocol=protocol)
    return PretrainedModel(
      description, self._state, execution=self._execution, precision=self._precision
    )

  def _make_predictor(self, multi_scale_flip: bool | None) -> Predictor:
    protocol = self.protocol
    if multi_scale_flip is not None:
      protocol = protocol.with_multi_scale_flip(multi_scale_flip)
    return Predictor(
      self.description.config, protocol, execution=self._execution, precision=self._precision
    )

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes weights and description to a directory that `load` reads.

    Raises:
      UserError: If `directory` exists.
    """
    save_weights(Path(directory), self._state, self.description)
