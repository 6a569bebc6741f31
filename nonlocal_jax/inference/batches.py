"""Groups images of one padded shape into batches of a size that suits the devices."""

import dataclasses
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from nonlocal_jax.inference.buckets import PaddedShape
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.parallel import is_shared_by_processes, platform_of_mesh

# Pixels per device that keep a GPU busy: twelve images of 512x683.
_PIXELS = 2**22
# Bytes of a device's memory for each pixel: a batch needs a quarter of it at most.
_MEMORY = 2**12
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


def images_at_once(shape: PaddedShape, protocol: EvalProtocol, mesh: Mesh) -> int:
  """Returns the number of images of a padded shape that a device predicts fastest together.

  Args:
    shape: Padded shape of the images.
    protocol: How they are tested.
    mesh: The devices; their memory limits the number.

  Returns:
    1 on CPUs, which gain nothing and whose caches are small, and for several processes, which would
    have to agree; otherwise at least 1.
  """
  if platform_of_mesh(mesh) == 'cpu' or is_shared_by_processes(mesh):
    return 1
  (height, width), flips = shape.result, protocol.flips
  of_views = (v.network[0] * v.network[1] * v.windows[0] * v.windows[1] for v in shape.views)
  pixels = max(max(of_views) * flips, height * width // _RESULT_PIXELS)
  memory = (mesh.devices.flat[0].memory_stats() or {}).get('bytes_limit', _PIXELS * _MEMORY)
  return max(min(_PIXELS, memory // _MEMORY) // pixels, 1)
