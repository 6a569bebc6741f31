"""Transforms of an image and its label map between the file and the network.

Pure functions on NumPy arrays. Images are RGB uint8 of shape (h, w, 3), or of another
`pixel_formats.PixelFormat`; label maps are uint8 of shape (h, w) with 255 for pixels to ignore. A
random function takes a `np.random.Generator` first and draws in the order of MMSegmentation 1.2.2:
equal draws give equal pixels.
Resizing and color conversion are OpenCV's, because the published models were trained with its
fixed-point arithmetic. Samples are integers until the device normalizes them.
"""

import dataclasses
import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

IGNORE = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
  """How training samples are augmented.

  Attributes:
    crop: (height, width) of the result, in pixels.
    scale: (width, height) of the box that the image is scaled into at ratio 1, see `rescaled_size`;
      None for the image's own size.
    ratio_range: Range of the random factor of `scale`, drawn uniformly; None for no random scaling.
    cat_max_ratio: Share of one class from which on a crop is drawn again, see `random_crop`.
    flip_probability: Of a horizontal flip.
    photometric: Whether to distort brightness, contrast, saturation and hue.
  """

  crop: tuple[int, int]
  scale: tuple[int, int] | None = None
  ratio_range: tuple[float, float] | None = (0.5, 2.0)
  cat_max_ratio: float = 0.75
  flip_probability: float = 0.5
  photometric: bool = True


def train_sample(
  rng: np.random.Generator, image: np.ndarray, label: np.ndarray, augment: AugmentConfig
) -> dict[str, np.ndarray]:
  """Augments one training sample: scale, crop, flip, photometric distortion, pad.

  Order and draws are those of mmseg's training pipelines: `RandomResize`, `RandomCrop`,
  `RandomFlip`, `PhotoMetricDistortion`, then padding to the crop size.

  Args:
    rng: Source of all randomness.
    image: (h, w, c) uint8, or uint16; RGB for photometric distortion.
    label: (h, w) uint8, 255 = ignored.
    augment: The options.

  Returns:
    `image` (crop_h, crop_w, c) and `label` (crop_h, crop_w) uint8, padded at the bottom and
    right with 0 and 255, and `size` (2,) int32, the (h, w) before padding.
  """
  box = image.shape[:2] if augment.scale is None else augment.scale
  if augment.ratio_range is not None:
    box = random_scale(rng, box, augment.ratio_range)
  image, label = resize(image, box), resize_label(label, box)
  image, label = random_crop(rng, image, label, augment.crop, augment.cat_max_ratio)
  image, label = random_flip(rng, image, label, augment.flip_probability)
  if augment.photometric:
    image = photometric_distortion(rng, image)
  size = np.array(image.shape[:2], np.int32)
  image, label = pad(image, label, augment.crop)
  return {'image': image, 'label': label, 'size': size}


def decode_image(data: bytes) -> np.ndarray:
  """Decodes an image file, EXIF orientation applied (mmseg `LoadImageFromFile`, but RGB).

  Args:
    data: Contents of a file that OpenCV reads: JPEG, PNG, BMP, TIFF, ...

  Returns:
    (h, w, 3) uint8, RGB.

  Raises:
    ValueError: If it is not such a file, or broken.
  """
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
  except cv2.error:  # e.g. more pixels than OpenCV allows
    image = None
  if image is None:
    raise ValueError('not an image, or broken')
  return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_label(data: bytes) -> np.ndarray:
  """Decodes a label map, its samples as they are (mmseg `LoadAnnotations`).

  Of a palette file the indices are taken. Samples of 1, 2 and 4 bits are not scaled to 8, as
  Pillow, and so mmseg, does with gray ones.

  Args:
    data: Contents of a PNG file with one channel of at most 8 bits.

  Returns:
    (h, w) uint8, the values as stored.

  Raises:
    ValueError: If it is not such a file, or broken, or has more pixels than Pillow reads.
  """
  try:
    with Image.open(io.BytesIO(data)) as file:
      kind, mode, label = file.format, file.mode, np.asarray(file)
  except Image.DecompressionBombError as error:
    raise ValueError('larger than the 178,956,970 pixels that Pillow reads') from error
  except (OSError, SyntaxError, ValueError) as error:
    raise ValueError('not an image, or broken') from error
  if kind != 'PNG':
    raise ValueError(f'not a PNG file but {kind}, whatever its name')
  if mode not in ('1', 'L', 'P'):
    raise ValueError(f'not a label map of one channel of 8 bits but {mode}')
  label = label.astype(np.uint8)
  if mode == 'L':
    bits = data[24]  # of a sample, in the first chunk
    label //= 255 // (2**bits - 1)
  return label


def label_lookup(
  *,
  reduce_zero_label: bool = False,
  ignore_labels: Sequence[int] = (),
  label_map: Sequence[int] = (),
) -> np.ndarray:
  """Makes the table that turns the values in label files into class indices: `lookup[label]`.

  Args:
    reduce_zero_label: Whether 0 becomes 255 and k becomes k - 1 (mmseg `reduce_zero_label`).
    ignore_labels: Further values that become 255, as they stand in the files.
    label_map: If not empty, class k of what the others make becomes `label_map[k]`, and classes
      beyond its end become 255 (mmseg 1.x `label_map`): subsets, mergers and other orders.

  Returns:
    (256,) uint8. 255 stays 255.
  """
  lookup = np.arange(256, dtype=np.uint8)
  if reduce_zero_label:
    lookup[0] = IGNORE
    lookup[1:255] -= 1
  lookup[np.isin(np.arange(256), list(ignore_labels))] = IGNORE
  if label_map:
    renamed = np.full(256, IGNORE, np.uint8)
    renamed[: len(label_map)] = label_map
    renamed[IGNORE] = IGNORE
    lookup = renamed[lookup]
  return lookup


def rescaled_size(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
  """Computes the largest size of the same aspect ratio inside a box (mmcv `rescale_size`).

  The longer side fits the box's longer side and the shorter its shorter, however either lies:
  `factor = min(max(box) / max(size), min(box) / min(size))`.

  Args:
    size: (h, w) of the image.
    box: Two sides in either order.

  Returns:
    (h, w), each `int(side * factor + 0.5)`, but at least 1, where mmcv fails.
  """
  h, w = size
  factor = min(max(box) / max(h, w), min(box) / min(h, w))
  return max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)


def resize(image: np.ndarray, scale: tuple[int, int], *, keep_ratio: bool = True) -> np.ndarray:
  """Resizes an image bilinearly, as the published models were trained (mmcv `Resize`).

  >>> image = np.zeros((300, 400, 3), np.uint8)
  >>> resize(image, (2048, 512)).shape
  (512, 683, 3)
  >>> resize(image, (2048, 512), keep_ratio=False).shape
  (512, 2048, 3)

  Args:
    image: (h, w, c) uint8 or uint16.
    scale: (width, height) in pixels.
    keep_ratio: Whether the aspect ratio is kept and `scale` is a box that the image is fitted into,
      long side to long side, see `rescaled_size`.

  Returns:
    (h', w', c) of the same dtype.

  Raises:
    ValueError: If `image` has another shape or dtype, or `scale` is not positive.
  """
  image = np.asarray(image)
  if image.ndim != 3 or image.dtype not in (np.uint8, np.uint16):
    raise ValueError(f'image is {image.shape} {image.dtype}, expected (h, w, c) uint8')
  if min(scale) < 1:
    raise ValueError(f'scale is {scale}, expected a positive width and height')
  size = rescaled_size(image.shape[:2], scale) if keep_ratio else (scale[1], scale[0])
  return resize_to(image, size)


def resize_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes an image, bilinearly (mmcv `imresize`).

  Args:
    image: (h, w, c) uint8 or uint16.
    size: (h', w').

  Returns:
    (h', w', c) of the same dtype.
  """
  resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
  return resized.reshape(*size, image.shape[-1])  # OpenCV drops the axis of a single channel


def resize_label(label: np.ndarray, box: tuple[int, int]) -> np.ndarray:
  """Scales a label map into a box, by nearest neighbor (mmcv `imrescale`).

  Args:
    label: (h, w) uint8.
    box: See `rescaled_size`.

  Returns:
    (h', w') uint8.
  """
  h, w = rescaled_size(label.shape, box)
  return cv2.resize(label, (w, h), interpolation=cv2.INTER_NEAREST)


def random_scale(
  rng: np.random.Generator, scale: tuple[int, int], ratio_range: tuple[float, float]
) -> tuple[int, int]:
  """Draws a box: `scale` times a uniform ratio, truncated to integers (mmcv `RandomResize`).

  Args:
    rng: One uniform number is drawn.
    scale: The box at ratio 1.
    ratio_range: Smallest and largest ratio.

  Returns:
    The box, in the order of `scale`.
  """
  low, high = ratio_range
  ratio = rng.random() * (high - low) + low
  return int(scale[0] * ratio), int(scale[1] * ratio)


def random_crop(
  rng: np.random.Generator,
  image: np.ndarray,
  label: np.ndarray,
  crop_size: tuple[int, int],
  cat_max_ratio: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts out a random window that shows more than one class (mmseg `RandomCrop`).

  A window is accepted if it has at least two classes and the commonest covers less than
  `cat_max_ratio` of the labeled pixels. After ten rejections the eleventh is taken as it is.

  Args:
    rng: Two integers are drawn per window.
    image: (h, w, c).
    label: (h, w) uint8.
    crop_size: (crop_h, crop_w); a smaller image is left smaller.
    cat_max_ratio: See above; 1 or more accepts every window.

  Returns:
    The windows of image and label, views of at most crop_h x crop_w pixels.
  """
  window = _random_window(rng, label.shape, crop_size)
  if cat_max_ratio < 1:
    for _ in range(10):
      if _is_varied(label[window], cat_max_ratio):
        break
      window = _random_window(rng, label.shape, crop_size)
  return image[window], label[window]


def random_flip(
  rng: np.random.Generator, image: np.ndarray, label: np.ndarray, prob: float
) -> tuple[np.ndarray, np.ndarray]:
  """Mirrors image and label left to right with a probability (mmcv `RandomFlip`).

  Args:
    rng: One uniform number is drawn.
    image: (h, w, c).
    label: (h, w) uint8.
    prob: Probability of the flip.

  Returns:
    Image and label.
  """
  if rng.random() < prob:
    return image[:, ::-1], label[:, ::-1]
  return image, label


def photometric_distortion(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
  """Distorts brightness, contrast, saturation and hue (mmseg `PhotoMetricDistortion`).

  Each happens with probability 1/2: brightness shifts by up to 32, contrast and saturation scale by
  0.5 to 1.5, hue shifts by -18 to 17 of OpenCV's 180 steps. Contrast comes second or last, with
  equal probability. Every step truncates to uint8.

  Args:
    rng: Source of the draws.
    image: (h, w, 3) uint8.

  Returns:
    (h, w, 3) uint8.
  """
  if rng.integers(2):
    image = cv2.LUT(image, _linear_table(1, rng.uniform(-32, 32)))
  contrast_second = rng.integers(2)
  if contrast_second:
    image = _random_contrast(rng, image)
  if rng.integers(2):
    image = _map_hsv(image, saturation=_linear_table(rng.uniform(0.5, 1.5), 0))
  if rng.integers(2):
    image = _map_hsv(image, hue=_hue_table(int(rng.integers(-18, 18))))
  if not contrast_second:
    image = _random_contrast(rng, image)
  return image


def pad(
  image: np.ndarray, label: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Pads at the bottom and right: the image with 0, the label with 255 (mmseg `stack_batch`).

  Args:
    image: (h, w, c).
    label: (h, w) uint8.
    size: (H, W) to pad to, at least (h, w).

  Returns:
    New arrays of shapes (H, W, c) and (H, W).
  """
  h, w = label.shape
  padded_image = np.zeros((*size, image.shape[2]), image.dtype)
  padded_label = np.full(size, IGNORE, np.uint8)
  padded_image[:h, :w] = image
  padded_label[:h, :w] = label
  return padded_image, padded_label


def _random_window(
  rng: np.random.Generator, size: tuple[int, int], crop_size: tuple[int, int]
) -> tuple[slice, slice]:
  top, left = (
    rng.integers(max(side - crop, 0) + 1) for side, crop in zip(size, crop_size, strict=True)
  )
  return slice(top, top + crop_size[0]), slice(left, left + crop_size[1])


def _is_varied(label: np.ndarray, cat_max_ratio: float) -> bool:
  counts = np.bincount(label.ravel(), minlength=256)[:IGNORE]
  return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)


def _random_contrast(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
  return cv2.LUT(image, _linear_table(rng.uniform(0.5, 1.5), 0)) if rng.integers(2) else image


def _linear_table(alpha: float, beta: float) -> np.ndarray:
  values = np.arange(256, dtype=np.float32) * alpha + beta
  return np.clip(values, 0, 255).astype(np.uint8)


def _hue_table(shift: int) -> np.ndarray:
  return ((np.arange(256) + shift) % 180).astype(np.uint8)


def _map_hsv(
  image: np.ndarray, hue: np.ndarray | None = None, saturation: np.ndarray | None = None
) -> np.ndarray:
  same = np.arange(256, dtype=np.uint8)
  tables = [same if table is None else table for table in (hue, saturation, same)]
  hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), np.stack(tables, axis=-1)[None])
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
