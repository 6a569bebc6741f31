"""Groups images of one padded shape into batches of a size that suits the devices."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from nonlocal_jax.inference.buckets import PaddedShape
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.parallel import platform_of

# Pixels per device that keep a GPU busy: twelve images of 512x683.
_PIXELS = 2**22
# Upper bound of the memory that a pixel needs: some 0.5 KiB in R-50 with float32.
_BYTES_OF_PIXEL = 2**11
# Pixels of a label map, and of the image in host memory, that weigh as much as one of the network.
_RESULT_PIXELS = 8


@dataclasses.dataclass(frozen=True)
class Batch:
  """Images that are predicted together.

  Attributes:
    shape: Padded shape of the images.
    indices: Which images.
    size: Batch size, to which fewer images are padded; a multiple of the number of devices.
  """

  shape: PaddedShape
  indices: tuple[int, ...]
  size: int


def batches_of(
  shapes: Sequence[PaddedShape],
  *,
  most: Callable[[PaddedShape], int],
  num_devices: int,
) -> list[Batch]:
  """Groups images by padded shape, in batches of nearly equal size.

  Args:
    shapes: Padded shape of each image.
    most: Maximum number of images per device and batch, for each padded shape.
    num_devices: Number of devices that share a batch.

  Returns:
    The batches, by the first image of each shape. Batches of one shape have one size, so that they
    share compiled programs.
  """
  members: dict[PaddedShape, list[int]] = {}
  for index, shape in enumerate(shapes):
    members.setdefault(shape, []).append(index)
  batches = []
  for shape, indices in members.items():
    count = -(-len(indices) // (most(shape) * num_devices))
    per_device = -(-len(indices) // (count * num_devices))
    size = per_device * num_devices
    batches += [
      Batch(shape, tuple(indices[start : start + size]), size)
      for start in range(0, len(indices), size)
    ]
  return batches


def images_at_once(shape: PaddedShape, protocol: EvalProtocol, device: jax.Device) -> int:
  """Returns the number of images of a padded shape that a device predicts fastest together.

  Args:
    shape: Padded shape of the images.
    protocol: How they are tested.
    device: Where; its memory limits the number.

  Returns:
    1 on CPUs, which gain nothing and whose caches are small; otherwise at least 1.
  """
  if platform_of([device]) == 'cpu':
    return 1
  (height, width), flips = shape.result, protocol.flips
  of_views = (v.network[0] * v.network[1] * v.windows[0] * v.windows[1] for v in shape.views)
  pixels = max(max(of_views) * flips, height * width // _RESULT_PIXELS)
  memory = (device.memory_stats() or {}).get('bytes_limit', _PIXELS * _BYTES_OF_PIXEL)
  return max(min(_PIXELS, memory // _BYTES_OF_PIXEL) // pixels, 1)
