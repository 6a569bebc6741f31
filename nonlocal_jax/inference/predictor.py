"""Predicts images of any size with a few compiled programs (mmseg `EncoderDecoder`).

Each window of an image goes through the network padded to a shape that many images share; the
padding is masked. Everything after the network (upsampling, cropping, averaging over windows,
resizing) is linear along each axis and is applied as one matrix per axis. The matrices are inputs
of the program, so that programs do not depend on the size of an image; only the width of the bands
that column matrices are stored as is static, and there are few widths. Class scores at image size
are computed a few rows at a time.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nonlocal_jax.data.pixel_formats import PixelFormat
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.buckets import PaddedShape, ViewShape
from nonlocal_jax.inference.views import View, axis_matrix, feature_size, views_of
from nonlocal_jax.models import Execution, NonLocalNet, NonLocalNetConfig
from nonlocal_jax.ops.blocks import map_blocks
from nonlocal_jax.ops.normalization import normalize
from nonlocal_jax.protocol import EvalProtocol, Size
from nonlocal_jax.runtime.compilation import compiler_options
from nonlocal_jax.runtime.parallel import (
  data_mesh,
  is_shared_by_processes,
  platform_of_mesh,
  shard_batch,
)
from nonlocal_jax.runtime.pipeline import one_behind

_PIXELS_AT_ONCE = 2**21  # per device and call of the network: one Cityscapes image
_CACHED_MATRICES = 8  # of views: images of one size follow one another, at six scales or one
_COLUMNS_AT_ONCE = 128  # of the label map in one block, computed from a band of logits
# Class probabilities that leave the devices in one piece (16 MB), of at least so many rows.
_PROBABILITIES_AT_ONCE = 2**22
_ROWS_AT_ONCE = 16


class Predictor:
  """Predicts the classes of images, and how likely they are, as a protocol says.

  Attributes:
    graphdef: Static part of the network.
    protocol: How images are tested.
    mesh: The devices that share a batch.
  """

  def __init__(
    self,
    config: NonLocalNetConfig,
    protocol: EvalProtocol,
    *,
    execution: Execution | None = None,
    precision: str = 'highest',
    mesh: Mesh | None = None,
  ):
    """Prepares the programs; they are compiled when first called.

    Args:
      config: The network.
      protocol: How images are tested.
      execution: How the network is computed; None for what is fastest on the devices of `mesh`.
      precision: Of matrix products in the network, see `jax_default_matmul_precision`.
      mesh: The devices that share a batch; by default the first one of this process.

    Raises:
      ValueError: If the protocol normalizes another number of channels than the network has.
      UserError: If the protocol averages probabilities, and the network's threshold is not 1/2.
    """
    if protocol.averages and config.threshold not in (None, 0.5):
      raise UserError(
        f'The network has one output channel and the threshold {config.threshold}, whose averages '
        'over several sizes and flips are not supported; predict without multi_scale_flip.'
      )
    if len(protocol.mean) != config.in_channels:
      raise ValueError(
        f'protocol.mean has {len(protocol.mean)} values, but the network has {config.in_channels} '
        'input channels; give mean and std one value for each'
      )
    self.protocol = protocol
    self._output_stride = config.output_stride
    self.mesh = mesh or data_mesh(jax.local_devices()[:1])
    platform = platform_of_mesh(self.mesh)
    execution = execution or Execution.for_platform(platform)
    graphdef = self.graphdef = nnx.graphdef(NonLocalNet.abstract(config, execution))

    @jax.default_matmul_precision(precision)
    def window_logits(
      state: nnx.State, windows: dict[str, jax.Array], *, padded: bool
    ) -> jax.Array:
      model = nnx.merge(graphdef, state)
      n, count = windows['images'].shape[:2]
      flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in windows.items()}
      normalized = normalized_windows(flat['images'], flat['sizes'], protocol)
      logits = model.encode_decode(normalized, sizes=flat['extents'] if padded else None)
      return logits.reshape(n, count, *logits.shape[1:])

    most_likely = functools.partial(
      _most_likely,
      averages=protocol.averages,
      log_odds=_log_odds(config.threshold),
      scores_at_once=execution.scores_at_once,
    )

    def predict(
      views: Sequence[_LogitsOfView], *, windows: Sequence[Size], result: Size
    ) -> jax.Array:
      return _cropped(most_likely(views, windows, confident=False)[0], result)

    def predict_confidence(
      views: Sequence[_LogitsOfView], *, windows: Sequence[Size], result: Size
    ) -> tuple[jax.Array, jax.Array]:
      return _cropped(most_likely(views, windows, confident=True), result)

    def predict_rows(
      views: Sequence[_LogitsOfView],
      first: jax.Array,
      *,
      windows: Sequence[Size],
      rows: int,
      width: int,
    ) -> jax.Array:
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=rows)
      probabilities = _probabilities(
        [view._replace(rows=take(view.rows, axis=1)) for view in views],
        windows,
        averages=protocol.averages,
        log_odds=_log_odds(config.threshold),
        scores_at_once=execution.scores_at_once,
      )
      return probabilities[:, :, :width]

    self._matrices_on_devices = functools.lru_cache(maxsize=_CACHED_MATRICES)(self._matrices)
    jit = functools.partial(
      jax.jit,
      compiler_options=compiler_options(platform, deterministic=execution.deterministic),
    )
    self._window_logits = jit(window_logits, static_argnames=['padded'])
    self._predict = jit(predict, static_argnames=['windows', 'result'])
    self._predict_confidence = jit(predict_confidence, static_argnames=['windows', 'result'])
    self._predict_rows = jit(predict_rows, static_argnames=['windows', 'rows', 'width'])

  def logits(
    self,
    state: nnx.State,
    shape: PaddedShape,
    views: Sequence[Sequence[np.ndarray]],
    sizes: Sequence[Size],
    *,
    batch_size: int | None = None,
  ) -> 'BatchLogits':
    """Computes the logits of images that share a padded shape.

    Like the methods that take them, it returns before the devices are done.

    Args:
      state: Parameters and running statistics, on the mesh.
      shape: The padded shape, see `buckets.shapes_for`.
      views: Each image (h, w, channels) uint8 or uint16, resized to every size of `views_of`.
      sizes: (height, width) of each image and of its label map.
      batch_size: Batch size of this process, to which fewer images are padded; None for the
        number of images.

    Returns:
      The logits, at the output stride of the network.
    """
    n = batch_size or len(views)
    geometries = [views_of(self.protocol, size) for size in sizes]
    logits_of_views = []
    for ratio, view_shape in enumerate(shape.views):
      view_images = [images[ratio] for images in views]
      geometry = [views_of_image[ratio] for views_of_image in geometries]
      logits = tuple(
        self._window_logits(state, self._shard(chunk), padded=shape.padded)
        for chunk in self._chunks(view_shape, view_images, geometry, n)
      )
      matrices = self._matrices_on_devices(
        view_shape, shape.result, tuple(geometry), tuple(sizes), n
      )
      logits_of_views.append(_LogitsOfView(logits, **matrices))
    return BatchLogits(shape, tuple(logits_of_views))

  def labels(self, batch: 'BatchLogits') -> jax.Array:
    """Returns the most likely class of each pixel.

    Returns:
      Labels of the whole batch, over all processes: (n, *shape.result) uint8 on the devices,
      sharded along the first axis; undefined in the padding.
    """
    return self._predict(batch.views, windows=batch.windows, result=batch.shape.result)

  def confident_labels(self, batch: 'BatchLogits') -> tuple[jax.Array, jax.Array]:
    """Returns the most likely class of each pixel and its probability, the confidence.

    Returns:
      The result of `labels`, and the confidence as (n, *shape.result) float32 in [0, 1], on the
      devices in the same way.
    """
    return self._predict_confidence(batch.views, windows=batch.windows, result=batch.shape.result)

  def probabilities(self, batch: 'BatchLogits') -> Iterator[tuple[int, np.ndarray]]:
    """Yields the probabilities of the classes, a few rows at a time.

    The softmax of the resized logits; with several sizes or flips the mean of theirs. No device
    holds the probabilities of all rows.

    Yields:
      The number of the first row and (n, rows, width, classes) float32 of the whole batch, on the
      host; undefined in the padding. The last rows may repeat some of those before.
    """
    height, width = batch.shape.result
    n, *_, num_classes = batch.views[0].logits[0].shape
    rows = min(max(_PROBABILITIES_AT_ONCE // (n * width * num_classes), _ROWS_AT_ONCE), height)

    def dispatch(start: int) -> tuple[int, jax.Array]:
      first = min(start, height - rows)
      found = self._predict_rows(
        batch.views, np.int32(first), windows=batch.windows, rows=rows, width=width
      )
      found.copy_to_host_async()
      return first, found

    for first, found in one_behind(map(dispatch, range(0, height, rows))):
      yield first, np.asarray(found)

  def _shard(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return shard_batch(arrays, self.mesh)

  def _chunks(
    self, shape: ViewShape, images: Sequence[np.ndarray], geometry: Sequence[View], n: int
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields the windows of a view in chunks, the mirrored ones last."""
    rows, columns = shape.windows
    count = self.protocol.flips * rows * columns
    pixels = PixelFormat.of_protocol(self.protocol)
    at_once = min(max(_PIXELS_AT_ONCE // (shape.network[0] * shape.network[1]), 1), count)
    for start in range(0, count, at_once):
      chunk = np.zeros((n, at_once, *shape.network, pixels.channels), pixels.dtype)
      sizes = np.ones((n, at_once, 2), np.int32)
      extents = np.ones((n, at_once, 2), np.int32)
      for number, (image, view) in enumerate(zip(images, geometry, strict=True)):
        for place in range(at_once):
          flipped, window = divmod(start + place, rows * columns)
          row, column = divmod(window, columns)
          if flipped >= self.protocol.flips or row >= len(view.tops) or column >= len(view.lefts):
            continue
          top, left = view.tops[row], view.lefts[column]
          whole = image[:, ::-1] if flipped else image
          height, width = view.crop
          chunk[number, place, :height, :width] = whole[top : top + height, left : left + width]
          sizes[number, place] = view.crop
          extents[number, place] = view.network
      yield {'images': chunk, 'sizes': sizes, 'extents': extents}

  def _matrices(
    self,
    shape: ViewShape,
    result: Size,
    geometry: tuple[View, ...],
    sizes: tuple[Size, ...],
    n: int,
  ) -> dict[str, jax.Array]:
    """The matrices of both axes of a view, on the devices; columns also for mirrored windows."""
    flips = self.protocol.flips
    features = [feature_size(side, self._output_stride) for side in shape.network]
    rows = np.zeros((n, result[0], shape.windows[0], features[0]), np.float32)
    columns = np.zeros((n, flips, result[1], shape.windows[1], features[1]), np.float32)
    for number, (view, size) in enumerate(zip(geometry, sizes, strict=True)):
      of_rows, of_columns = (
        axis_matrix(
          starts,
          crop=view.crop[axis],
          network=view.network[axis],
          size=view.size[axis],
          out_size=size[axis],
          align_corners=self.protocol.align_corners,
          output_stride=self._output_stride,
        )
        for axis, starts in enumerate((view.tops, view.lefts))
      )
      of_rows = of_rows.toarray().reshape(size[0], len(view.tops), -1)
      of_columns = of_columns.toarray().reshape(size[1], len(view.lefts), -1)
      rows[number, : size[0], : of_rows.shape[1], : of_rows.shape[2]] = of_rows
      for flipped in range(flips):  # scores of mirrored windows are mirrored back
        place = columns[number, flipped, : size[1], : of_columns.shape[1], : of_columns.shape[2]]
        place[:] = of_columns[::-1] if flipped else of_columns
    starts, bands = _bands(
      columns.reshape(n, flips, result[1], -1), whole=is_shared_by_processes(self.mesh)
    )
    return self._shard({'rows': rows.reshape(n, result[0], -1), 'starts': starts, 'bands': bands})


def normalized_windows(
  images: jax.typing.ArrayLike, sizes: jax.typing.ArrayLike, protocol: EvalProtocol
) -> jax.Array:
  """Converts padded windows to the network's input.

  Args:
    images: (n, h, w, channels) uint8 or uint16, RGB where there are three channels.
    sizes: (n, 2) int32, height and width of the part of the image in each.
    protocol: Says the order of the channels, and their means and standard deviations.

  Returns:
    (n, h, w, channels) float32; 0 in the padding.
  """
  images = jnp.asarray(images)
  images = images[..., ::-1] if protocol.channel_order == 'bgr' else images
  return normalize(images, mean=protocol.mean, std=protocol.std, sizes=sizes)


def _bands(matrices: np.ndarray, *, whole: bool) -> tuple[np.ndarray, np.ndarray]:
  """Stores matrices as bands: for each block of rows, the columns that are not zero.

  Args:
    matrices: (..., rows, columns) float32.
    whole: Whether to keep all columns. Processes that run one program together need equal shapes
      and do not see each other's matrices.

  Returns:
    The first column of each band, (..., blocks) int32, and the bands, (..., blocks, block rows,
    width) float32, the last block padded. The width is a power of two and at least a quarter of a
    block's rows, so that there are few widths; with `whole` it is that of the matrices.
  """
  *batch, rows, width = matrices.shape
  num_blocks = -(-rows // _COLUMNS_AT_ONCE)
  padding = [(0, 0)] * len(batch) + [(0, num_blocks * _COLUMNS_AT_ONCE - rows), (0, 0)]
  blocks = np.pad(matrices, padding).reshape(*batch, num_blocks, _COLUMNS_AT_ONCE, width)
  used = np.asarray(blocks.any(axis=-2))  # (..., blocks, columns)
  first = used.argmax(axis=-1)
  after = np.where(used.any(axis=-1), width - used[..., ::-1].argmax(axis=-1), 0)
  needed = max(int((after - first).max()), _COLUMNS_AT_ONCE // 4)
  band = width if whole else min(1 << (needed - 1).bit_length(), width)
  starts = np.minimum(first, width - band)
  places = starts[..., None, None] + np.arange(band)
  return starts.astype(np.int32), np.take_along_axis(blocks, places, axis=-1)


class _LogitsOfView(NamedTuple):
  """Logits of all windows of a view, in chunks, and the matrices applied to them."""

  logits: tuple[jax.Array, ...]  # each (n, windows, h, w, c)
  rows: jax.Array  # (n, result_h, windows * h)
  starts: jax.Array  # (n, flips, blocks), see `_bands`
  bands: jax.Array  # (n, flips, blocks, columns of a block, width)


class BatchLogits(NamedTuple):
  """Logits of a batch of images that share a padded shape, see `Predictor.logits`."""

  shape: PaddedShape
  views: tuple[_LogitsOfView, ...]

  @property
  def windows(self) -> tuple[Size, ...]:
    """The number of windows of each view (vertically, horizontally)."""
    return tuple(view_shape.windows for view_shape in self.shape.views)


def _cropped(results: Any, size: Size) -> Any:
  """Cuts arrays (n, h, w) to (n, *size)."""
  return jax.tree.map(lambda x: x[:, : size[0], : size[1]], results)


def _log_odds(threshold: float | None) -> float:
  """The score of the first of two classes that come from one output channel, see `as_two_classes`.

  Without it, the softmax of both is the sigmoid of the channel.
  """
  return 0.0 if threshold is None else math.log(threshold / (1 - threshold))


def _most_likely(
  views: Sequence[_LogitsOfView],
  windows: Sequence[Size],
  *,
  averages: bool,
  log_odds: float,
  scores_at_once: int,
  confident: bool,
) -> tuple[jax.Array, ...]:
  """The most likely class of each pixel, (n, result_h, at least result_w) uint8.

  Where `confident`, its probability as well, float32.
  """

  def of_scores(scores: jax.Array, passes: int) -> tuple[jax.Array, ...]:
    labels = _first_of_largest(scores, axis=-2)
    if not confident:
      return (labels,)
    highest = scores.max(axis=-2)
    if averages:
      return labels, highest / passes
    scores = _without_log_odds(scores, log_odds)
    if log_odds:
      highest = jnp.where(labels == 0, scores[..., 0, :], scores[..., 1, :])
    # Relative to the score of the label: exact where it is the largest, and finite where not.
    return labels, 1 / jnp.exp(scores - highest[..., None, :]).sum(axis=-2)

  return _map_rows(of_scores, views, windows, averages=averages, scores_at_once=scores_at_once)


def _probabilities(
  views: Sequence[_LogitsOfView],
  windows: Sequence[Size],
  *,
  averages: bool,
  log_odds: float,
  scores_at_once: int,
) -> jax.Array:
  """The probabilities of the classes, (n, rows, at least result_w, c) float32."""

  def of_scores(scores: jax.Array, passes: int) -> jax.Array:
    if averages:
      shares = scores / passes
    else:
      shares = jax.nn.softmax(_without_log_odds(scores, log_odds), axis=-2)
    return jnp.moveaxis(shares, -2, -1)

  return _map_rows(of_scores, views, windows, averages=averages, scores_at_once=scores_at_once)


def _without_log_odds(scores: jax.Array, log_odds: float) -> jax.Array:
  """Subtracts `_log_odds` from the scores (..., c, columns) of the first class."""
  return scores.at[..., 0, :].add(-log_odds) if log_odds else scores


def _map_rows(
  function: Callable[[jax.Array, int], Any],
  views: Sequence[_LogitsOfView],
  windows: Sequence[Size],
  *,
  averages: bool,
  scores_at_once: int,
) -> Any:
  """Applies a function to the class scores at image size, of a few rows at a time.

  Args:
    function: From scores (n, blocks of columns, rows, c, columns) and the number of passes whose
      sum they are, to a pytree of arrays (n, blocks, rows, columns, ...). Scores are logits, or
      probabilities where the protocol averages.
    views: The logits.
    windows: Number of windows of each view.
    averages: Whether to sum the softmax of each pass.
    scores_at_once: See `Execution`.

  Returns:
    A pytree of arrays (n, rows, at least result_w, ...).
  """
  # Each (n, h, flips, w, c).
  mosaics = [_mosaic(view, counts) for view, counts in zip(views, windows, strict=True)]
  n, _, flips, _, num_classes = mosaics[0].shape
  column_blocks, columns = views[0].bands.shape[2:4]
  scores_of_row = n * flips * column_blocks * columns * num_classes
  highest = jax.lax.Precision.HIGHEST

  def neighbors(scores: jax.Array, view: _LogitsOfView) -> jax.Array:
    """Slices each block's band: (n, h, flips, w, c) -> (n, flips, blocks, h, width, c)."""
    width = view.bands.shape[-1]
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=width, axis=1)
    of_blocks = jax.vmap(take, in_axes=(None, 0))
    of_flips = jax.vmap(of_blocks, in_axes=(1, 0))
    return jax.vmap(of_flips)(scores, view.starts)

  def joined(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 1, 2)  # (n, rows, blocks, columns, ...)
    return x.reshape(*x.shape[:2], column_blocks * columns, *x.shape[4:])

  def of_rows(rows_of_views: tuple[jax.Array, ...]) -> Any:
    totals = []
    for rows, mosaic, view in zip(rows_of_views, mosaics, views, strict=True):
      scores = jnp.einsum('nor,nrfwc->nofwc', rows, mosaic, precision=highest)
      scores = neighbors(scores, view)
      scores = jnp.einsum('nfbpw,nfbowc->nfbocp', view.bands, scores, precision=highest)
      totals.append((jax.nn.softmax(scores, axis=-2) if averages else scores).sum(axis=1))
    total = sum(totals[1:], start=totals[0])
    return jax.tree.map(joined, function(total, flips * len(views)))

  rows_of_views = tuple(view.rows for view in views)
  return map_blocks(of_rows, rows_of_views, max(scores_at_once // scores_of_row, 1))


def _first_of_largest(scores: jax.Array, *, axis: int) -> jax.Array:
  """`jnp.argmax` as uint8, by two reductions that XLA vectorizes on CPUs.

  Where a score is NaN the result is some valid class.
  """
  places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim + axis)
  smaller = scores < scores.max(axis=axis, keepdims=True)
  return jnp.where(smaller, scores.shape[axis], places).min(axis=axis).astype(jnp.uint8)


def _mosaic(view: _LogitsOfView, windows: Size) -> jax.Array:
  """Tiles windows: (n, flips * rows * columns, h, w, c) -> (n, rows * h, flips, columns * w, c)."""
  logits = jnp.concatenate(view.logits, axis=1)
  n, flips = view.bands.shape[:2]
  height, width, classes = logits.shape[2:]
  rows, columns = windows
  logits = logits[:, : flips * rows * columns]
  logits = logits.reshape(n, flips, rows, columns, height, width, classes)
  logits = logits.transpose(0, 2, 4, 1, 3, 5, 6)
  return logits.reshape(n, rows * height, flips, columns * width, classes)
