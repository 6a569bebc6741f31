"""Trained networks in Python: `load` to predict, `load_module` to train on or to build with."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.data.pixel_formats import PixelFormat
from nonlocal_jax.errors import UserError
from nonlocal_jax.export.files import Exported, Format, export_network
from nonlocal_jax.inference.attention import AttentionPrograms, ImageAttention, Point
from nonlocal_jax.inference.images import MAX_PIXELS, ImageLike, as_array
from nonlocal_jax.inference.predictor import Predictor
from nonlocal_jax.inference.stream import (
  AnyPrediction,
  Prediction,
  Result,
  prediction_of,
  predictions,
  predictions_of_frames,
)
from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.config import chosen_attention
from nonlocal_jax.models.folding import fold_batch_norms
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.protocol import EvalProtocol, Size
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import data_mesh, platform_of, platform_of_mesh, replicated
from nonlocal_jax.weights.checkpoints import save_weights
from nonlocal_jax.weights.description import ModelDescription
from nonlocal_jax.weights.loading import read_weights
from nonlocal_jax.weights.names import find_weights

Precision = Literal['highest', 'high', 'default']


def load(
  path: str | os.PathLike[str],
  *,
  align_corners: bool | None = None,
  ema: bool = False,
  execution: Execution | None = None,
  precision: Precision = 'highest',
  attention: Attention | Literal['auto'] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> 'PretrainedModel':
  """Loads a trained network to predict with.

  What there is to say about a .pth file, such as settings that it does not record, is logged by the
  logger 'nonlocal_jax.notes' as warnings.

  >>> model = load('tests/data/converted_of_2026_11')
  >>> model.classes[:3]
  ('road', 'sidewalk', 'building')
  >>> model.predict(np.zeros((64, 96, 3), np.uint8)).shape
  (64, 96)

  Args:
    path: A .pth file of MMSegmentation, a converted directory, an exported safetensors file, or the
      workdir of a training run: 'runs/NAME' for its newest checkpoint, 'runs/NAME/best' for the one
      with the best mIoU. Or the name of a released model, such as 'ade20k_r50', which is downloaded
      when it is first used; `nonlocal-jax models` lists them.
    align_corners: The corner convention. None for that of the directory, of the released file with
      this sha256, or of the config recorded in the file; False, MMSegmentation's own default, where
      none is recorded.
    ema: Whether to take the exponential moving average that MMSegmentation 0.x saves beside the
      weights of a .pth file.
    execution: How the network is computed; None for what is fastest on JAX's default backend.
    precision: Precision of matrix products: 'highest' is float32, as for the published scores. On
      recent GPUs 'default' is TF32, several times as fast, and 'high' computes each convolution as
      three TF32 convolutions.
    attention: How attention is computed: 'blocks', on NVIDIA GPUs also 'flash' or 'cudnn', or
      'auto' for the fastest that suits `precision`; None for that of `execution`. 'cudnn' rounds
      queries, keys and values to float16.
    devices: The devices of this process that share the images of a list, e.g.
      `jax.local_devices()`; None for the first one.

  Returns:
    The network, ready to predict.

  Raises:
    UserError: If there are no weights of a NonLocalNet, they cannot be downloaded, or network or
      devices do not support `attention`.
    ValueError: If `precision` is unknown.
  """
  description, state = read_weights(find_weights(path), align_corners=align_corners, ema=ema)
  devices = devices or jax.local_devices()[:1]
  execution = execution or Execution.for_platform(platform_of(devices))
  if attention is not None:
    attention = chosen_attention(
      attention, description.config, devices, precision=precision, train=False
    )
    execution = dataclasses.replace(execution, attention=attention)
  return PretrainedModel(
    description, state, execution=execution, precision=precision, devices=devices
  )


def load_module(
  path: str | os.PathLike[str],
  *,
  align_corners: bool | None = None,
  ema: bool = False,
  execution: Execution | None = None,
) -> NonLocalNet:
  """Loads a trained network as an `nnx.Module`, to fine-tune it or to use its parts.

  >>> module = load_module('tests/data/converted_of_2026_11')
  >>> module.backbone(jnp.zeros((1, 64, 96, 3)))[1].shape  # features of the last stage
  (1, 8, 12, 64)

  Args:
    path: See `load`.
    align_corners: See `load`.
    ema: See `load`.
    execution: How the network is computed; None for what is fastest on JAX's default backend.

  Returns:
    The network with its weights on the default device. By default it supports reverse-mode
    differentiation only; with `execution=Execution()` both modes work, and it is slower.

  Raises:
    UserError: If there are no weights of a NonLocalNet, or they cannot be downloaded.
  """
  description, state = read_weights(find_weights(path), align_corners=align_corners, ema=ema)
  graphdef = nnx.graphdef(NonLocalNet.abstract(description.config, execution))
  return nnx.merge(graphdef, jax.device_put(state, jax.local_devices()[0]))


class PretrainedModel:
  """A network with trained weights. Images of nearly the same size share a compiled program.

  Attributes:
    description: What is known about it: network, classes, colors, test protocol.
  """

  def __init__(
    self,
    description: ModelDescription,
    state: nnx.State,
    *,
    execution: Execution | None = None,
    precision: Precision = 'highest',
    devices: Sequence[jax.Device] | None = None,
  ):
    """Puts the weights on the devices.

    Args:
      description: What the weights are.
      state: Parameters and running statistics.
      execution: How the network is computed; None for what is fastest on JAX's default backend.
      precision: See `load`.
      devices: See `load`.

    Raises:
      ValueError: If `precision` is unknown.
    """
    if precision not in get_args(Precision):
      expected = ', '.join(get_args(Precision))
      raise ValueError(f'precision is {precision!r}, expected one of {expected}')
    self.description = description
    self._mesh = data_mesh(devices or jax.local_devices()[:1])
    platform = platform_of_mesh(self._mesh)
    self._execution = execution or Execution.for_platform(platform)
    self._precision: Precision = precision
    self._state = jax.device_put(state, replicated(self._mesh))
    self._graphdef = nnx.graphdef(NonLocalNet.abstract(description.config, self._execution))
    self._predictor_of = functools.cache(self._make_predictor)

    @jax.default_matmul_precision(precision)
    def logits(state: nnx.State, images: jax.Array) -> jax.Array:
      return nnx.merge(self._graphdef, state)(images)

    self._traced_logits = logits
    options = compiler_options(platform, deterministic=self._execution.deterministic)
    self._logits = jax.jit(logits, compiler_options=options)

  def __repr__(self) -> str:
    """Says which network it is, in one line."""
    config = self.description.config
    return (
      f'PretrainedModel(depth={config.depth}, width={config.width}, '
      f'num_classes={config.num_classes}, dataset={self.description.dataset!r}, '
      f'source={self.description.source!r})'
    )

  @classmethod
  def from_module(
    cls,
    module: NonLocalNet,
    *,
    classes: Sequence[str] = (),
    palette: Sequence[tuple[int, int, int]] = (),
    protocol: EvalProtocol | None = None,
    precision: Precision = 'highest',
  ) -> 'PretrainedModel':
    """Creates a predictor of a network that was trained or changed in Python; `save` writes it.

    Args:
      module: The network; its weights are copied.
      classes: Name of each class; none for 'class 0', 'class 1', ...
      palette: RGB color of each class, in [0, 255]; none for distinct colors.
      protocol: How images are tested; None for whole images at their own size.
      precision: See `load`.

    Raises:
      UserError: If there are not as many names or colors as classes.
      ValueError: If `precision` is unknown, or `protocol` has other corners than the network.
    """
    config = module.config
    if protocol is not None:
      _check_corners(config, protocol)
    dataset = custom_dataset(config.num_classes, classes=classes, palette=palette)
    description = ModelDescription(
      config=config,
      protocol=protocol or EvalProtocol(align_corners=config.align_corners),
      dataset=dataset.name,
      classes=dataset.classes,
      palette=dataset.palette,
      source='a module in Python',
      sha256=None,
      num_batches_tracked={},
      assumed=() if protocol else tuple(f.name for f in dataclasses.fields(EvalProtocol)),
    )
    state = jax.tree.map(jnp.copy, nnx.state(module, (nnx.Param, nnx.BatchStat)))
    execution = module.execution
    if execution.batch_norm == 'folded':
      raise ValueError('module has folded batch norms; give one as it was loaded or trained')
    return cls(description, state, execution=execution, precision=precision)

  @property
  def classes(self) -> tuple[str, ...]:
    """Name of each class."""
    return self.description.classes

  @property
  def palette(self) -> tuple[tuple[int, int, int], ...]:
    """RGB color of each class, in [0, 255]."""
    return self.description.palette

  @property
  def protocol(self) -> EvalProtocol:
    """How images are tested."""
    return self.description.protocol

  @overload
  def predict(
    self,
    image: ImageLike,
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
  ) -> np.ndarray: ...

  @overload
  def predict(
    self,
    image: Sequence[ImageLike],
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
  ) -> list[np.ndarray]: ...

  @overload
  def predict(
    self,
    image: ImageLike,
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    return_confidence: bool = False,
    return_probabilities: bool = False,
  ) -> tuple[np.ndarray, np.ndarray]: ...

  @overload
  def predict(
    self,
    image: Sequence[ImageLike],
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    return_confidence: bool = False,
    return_probabilities: bool = False,
  ) -> list[tuple[np.ndarray, np.ndarray]]: ...

  def predict(
    self,
    image: ImageLike | Sequence[ImageLike],
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    return_confidence: bool = False,
    return_probabilities: bool = False,
  ) -> np.ndarray | tuple[np.ndarray, np.ndarray] | list[Any]:
    """Predicts the class of each pixel by the model's `protocol`.

    Probabilities are the softmax of the logits, resized to the image; with `multi_scale_flip` the
    mean over the sizes and flips. They are computed a few rows at a time. `inference.probabilities`
    has their entropy, the k largest ones, and labels of uncertain pixels as unknown.

    Args:
      image: A path, a PIL image or an array (h, w, 3) uint8 RGB, or a list of them. Files and PIL
        images are turned by their EXIF orientation. Networks of other images (`protocol.mean` has
        a value for each channel, `protocol.bits` are those of a sample) take such files and arrays,
        (h, w, channels) uint8 or uint16.
      multi_scale_flip: Whether to average over six sizes, each mirrored as well: better, and some
        17 times the work. None for what the protocol says.
      max_pixels: Limit of the pixels of a file or PIL image, which bounds the memory that it takes.
      return_confidence: Whether to return the probability of each pixel's class as well.
      return_probabilities: Whether to return the probabilities of all classes as well.

    Returns:
      (h, w) int32 in [0, classes), or a pair of that and the confidence, (h, w) float32, or the
      probabilities, (h, w, classes) float32; for a list a list of them.

    Raises:
      UserError: If a file cannot be read, or has more pixels than `max_pixels`.
      ValueError: If an image has another shape, dtype or mode, or both confidence and probabilities
        are asked for.
      TypeError: If it is none of these.
    """
    result = _result(confidence=return_confidence, probabilities=return_probabilities)

    def returned(prediction: AnyPrediction) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
      _, _, labels, *rest = prediction
      labels = labels.astype(np.int32)
      return (labels, np.require(rest[0], requirements=['C', 'W'])) if rest else labels

    state = self._prediction_state
    predictor = self._predictor_of(multi_scale_flip)
    if isinstance(image, list | tuple):
      several = predictions(image, predictor, state, result=result, max_pixels=max_pixels)
      found = {prediction.index: returned(prediction) for prediction in several}
      return [found[index] for index in range(len(image))]
    pixels = PixelFormat.of_protocol(self.protocol)
    array = as_array(cast(ImageLike, image), pixels=pixels, max_pixels=max_pixels)
    return returned(prediction_of(array, predictor, state, result=result))

  @overload
  def predict_many(
    self,
    images: Sequence[ImageLike],
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    on_error: Callable[[int, UserError], object] | None = None,
  ) -> Iterator[Prediction]: ...

  @overload
  def predict_many(
    self,
    images: Sequence[ImageLike],
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    on_error: Callable[[int, UserError], object] | None = None,
    return_confidence: bool = False,
    return_probabilities: bool = False,
  ) -> Iterator[AnyPrediction]: ...

  def predict_many(
    self,
    images: Sequence[ImageLike],
    *,
    multi_scale_flip: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    on_error: Callable[[int, UserError], object] | None = None,
    return_confidence: bool = False,
    return_probabilities: bool = False,
  ) -> Iterator[AnyPrediction]:
    """Predicts images while others are read; holds a few of them at a time.

    Images of similar size share a compiled program, and on GPUs and TPUs go through it together.

    Args:
      images: See `predict`.
      multi_scale_flip: See `predict`.
      max_pixels: See `predict`.
      on_error: Called with the index of a file that cannot be read and the error, in place of its
        prediction; None to raise the error.
      return_confidence: Whether to yield each as a `ConfidentPrediction`, with the probability of
        each pixel's class.
      return_probabilities: Whether to yield each as a `ProbablePrediction`, with the probabilities
        of all classes.

    Yields:
      The predictions, images of similar size one after another.

    Raises:
      UserError, ValueError, TypeError: See `predict`.
    """
    yield from predictions(
      images,
      self._predictor_of(multi_scale_flip),
      self._prediction_state,
      result=_result(confidence=return_confidence, probabilities=return_probabilities),
      max_pixels=max_pixels,
      on_error=on_error,
    )

  def predict_frames(
    self,
    frames: Iterable[np.ndarray],
    *,
    multi_scale_flip: bool | None = None,
    return_confidence: bool = False,
  ) -> Iterator[AnyPrediction]:
    """Predicts frames of one size, in their order and as they come; holds a few at a time.

    Each as `predict` does an image. On GPUs and TPUs several go through the network together.

    >>> model = load('tests/data/converted_of_2026_11')
    >>> frames = (np.full((64, 96, 3), shade, np.uint8) for shade in range(3))
    >>> [(index, labels.shape) for index, _, labels in model.predict_frames(frames)]
    [(0, (64, 96)), (1, (64, 96)), (2, (64, 96))]

    Args:
      frames: Each (h, w, 3) uint8 RGB, or as the network takes them, see `predict`.
      multi_scale_flip: See `predict`.
      return_confidence: See `predict_many`.

    Yields:
      The predictions.

    Raises:
      ValueError: If a frame has another shape or dtype.
    """
    yield from predictions_of_frames(
      frames,
      self._predictor_of(multi_scale_flip),
      self._prediction_state,
      result=_result(confidence=return_confidence, probabilities=False),
    )

  def attention(
    self, image: ImageLike, point: Point, *, max_pixels: int = MAX_PIXELS
  ) -> np.ndarray:
    """Computes where a pixel looks: its weights over the positions of the non-local block.

    The matrix of all weights is not computed. With sliding windows, the positions are those of the
    window whose center is nearest to the pixel.

    Args:
      image: See `predict`.
      point: (x, y) in pixels of the image as `predict` takes it, (0, 0) at the upper left.
      max_pixels: See `predict`.

    Returns:
      (rows, columns) float32; they sum to 1 in a network whose block has a softmax, as the released
      ones do. See `NonLocalBlock` for the others.

    Raises:
      UserError, ValueError, TypeError: See `predict`; also if the point lies outside the image, or
        the network has no non-local block.
    """
    return self.image_attention(image, max_pixels=max_pixels)(point).weights

  def image_attention(self, image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> ImageAttention:
    """Returns a function from pixels of an image to where they look.

    It keeps the features of the image and says which part of it the positions cover.

    Args:
      image: See `predict`.
      max_pixels: See `predict`.

    Raises:
      UserError, ValueError, TypeError: See `attention`.
    """
    config = self.description.config
    if not config.non_local:
      raise ValueError('this network has no non-local block; load one with it')
    pixels = PixelFormat.of_protocol(self.protocol)
    array = as_array(image, pixels=pixels, max_pixels=max_pixels)
    return ImageAttention(
      array, self.protocol, config, self._attention_programs, self._prediction_state
    )

  def logits(self, images: np.ndarray | jax.Array) -> jax.Array:
    """Computes logits of whole images at their own size.

    Args:
      images: (n, h, w, in_channels) float32, normalized (see `nonlocal_jax.normalize`).

    Returns:
      (n, h, w, classes) float32.

    Raises:
      ValueError: If `images` has another shape, or integers, which cannot be normalized.
    """
    channels, dtype = self.description.config.in_channels, jnp.result_type(images)
    if images.ndim != 4 or images.shape[-1] != channels or not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'images is {images.shape} {dtype}, expected (n, h, w, {channels}) of floats as '
        'nonlocal_jax.normalize returns them'
      )
    # JAX refuses compiler options of a program inside another, such as the caller's own `jax.jit`.
    run = self._traced_logits if isinstance(images, jax.core.Tracer) else self._logits
    return run(self._state, jnp.asarray(images))

  def with_protocol(self, protocol: EvalProtocol) -> 'PretrainedModel':
    """Returns the same network, tested by another protocol.

    E.g. `model.with_protocol(dataclasses.replace(model.protocol, scale=(2048, 512)))`.

    Raises:
      ValueError: If `protocol` has other corners than the network.
    """
    _check_corners(self.description.config, protocol)
    description = dataclasses.replace(self.description, protocol=protocol)
    return PretrainedModel(
      description,
      self._state,
      execution=self._execution,
      precision=self._precision,
      devices=list(self._mesh.devices.flat),
    )

  @functools.cached_property
  def _prediction_state(self) -> nnx.State:
    """The weights that predictors take, a second copy where batch normalization is folded."""
    if self._prediction_execution == self._execution:
      return self._state
    fold = functools.partial(fold_batch_norms, self._graphdef)
    return jax.jit(fold, out_shardings=replicated(self._mesh))(self._state)

  @functools.cached_property
  def _prediction_execution(self) -> Execution:
    """How predictors compute the network: on GPUs and TPUs with folded batch normalization.

    It then needs fewer kernels, which move a fifth less memory. On CPUs the copy of the weights
    would cost more memory than it saves.
    """
    if platform_of_mesh(self._mesh) == 'cpu':
      return self._execution
    return dataclasses.replace(self._execution, batch_norm='folded')

  @functools.cached_property
  def _attention_programs(self) -> AttentionPrograms:
    network = NonLocalNet.abstract(self.description.config, self._prediction_execution)
    return AttentionPrograms(
      nnx.graphdef(network),
      self.protocol,
      precision=self._precision,
      options=compiler_options(
        platform_of_mesh(self._mesh), deterministic=self._execution.deterministic
      ),
    )

  def _make_predictor(self, multi_scale_flip: bool | None) -> Predictor:
    protocol = self.protocol
    if multi_scale_flip is not None:
      protocol = protocol.with_multi_scale_flip(multi_scale_flip)
    return Predictor(
      self.description.config,
      protocol,
      execution=self._prediction_execution,
      precision=self._precision,
      mesh=self._mesh,
    )

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes weights and description to a directory that `load` reads.

    Raises:
      UserError: If `directory` exists.
    """
    save_weights(Path(directory), self._state, self.description)

  def export(
    self,
    path: str | os.PathLike[str],
    *,
    format: Format,
    size: Size | None = None,
    batch: int | None = None,
    confidence: bool = False,
    on_step: Callable[[], object] = lambda: None,
  ) -> Exported:
    """Writes the network to a file that runs without this library, and compares the two.

    Programs take images (n, height, width, channels) uint8, RGB where there are three channels, and
    return 'classes' (n, height, width) uint8. They contain the order of channels, normalization,
    padding, the network and upsampling; resizing of images, sliding windows, several scales and
    flips are left out.

    Args:
      path: The file, for 'browser' the folder; must not exist.
      format: 'onnx' for ONNX Runtime and others; 'jax' for a program of `jax.export`, which runs
        with JAX alone on CPUs, NVIDIA GPUs and TPUs; 'safetensors' for the weights, by the names of
        the released checkpoints, which `load` reads as well; 'browser' for a page that runs the
        network in the browser, as a folder for any web server. Its files of ONNX Runtime Web are
        downloaded when they are first used.
      size: (height, width) of the images; programs need it.
      batch: Number of images; None for any. A page takes one.
      confidence: Whether programs also return 'confidence' (n, height, width) float32, the
        probability of the class. A page shows it anyway.
      on_step: Called after each of the four steps.

    Returns:
      The largest difference of the logits from those of the network, as a share of their standard
      deviation, and what the file takes and returns.

    Raises:
      UserError: If `path` exists or cannot be written, a package of the extra `export` is missing,
        `size` is missing or too large, an option is not for this format, or the file computes
        something else than the network: the difference is above 1e-4, or classes differ. Nothing is
        left at `path` then.
    """
    return export_network(
      self.description,
      self._state,
      Path(path),
      format=format,
      size=size,
      batch=batch,
      confidence=confidence,
      on_step=on_step,
    )


def _result(*, confidence: bool, probabilities: bool) -> Result:
  if confidence and probabilities:
    raise ValueError(
      'return_confidence and return_probabilities are both set; take the confidence from the '
      'probabilities by inference.probabilities.confidence_of'
    )
  return 'probabilities' if probabilities else 'confidence' if confidence else 'labels'


def _check_corners(config: NonLocalNetConfig, protocol: EvalProtocol) -> None:
  if protocol.align_corners != config.align_corners:
    raise ValueError(
      f'protocol.align_corners is {protocol.align_corners}, but the network has '
      f'align_corners={config.align_corners}; use dataclasses.replace on its own protocol'
    )
