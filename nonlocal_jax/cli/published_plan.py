"""What checking published scores needs: weights, data, disk space and time."""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nonlocal_jax.cli.doctor import devices_of_subprocess
from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.errors import UserError, explained_by
from nonlocal_jax.runtime.download import as_size
from nonlocal_jax.runtime.files import cache_folder
from nonlocal_jax.runtime.progress import as_duration
from nonlocal_jax.runtime.wording import counted
from nonlocal_jax.weights.names import download_released, is_downloaded
from nonlocal_jax.weights.released import ReleasedModel

# Pixels of an image in the box that it is resized into, on average.
_PIXELS = {'cityscapes': 2048 * 1024, 'ade20k': 683 * 512, 'voc12aug': 683 * 512}
# Multiplications for each pixel of an image, besides those of the pairs of positions.
_PER_PIXEL = {50: 0.76e6, 101: 1.06e6}
# Multiplications per second of the network on whole images, relative to one product of large
# matrices in the same precision. On one H100 (benchmarks/h100.md and nvidia_h100_80gb_hbm3.md), a
# prediction reaches 0.62 of it in float32 at 1024x2048, the network 0.45 at 512x512, and a
# prediction 0.54 and 0.19 in TF32. On CPUs, Winograd's algorithm saves multiplications.
_EFFICIENCY = {('gpu', True): 0.5, ('gpu', False): 0.3, ('cpu', True): 1.2, ('cpu', False): 1.2}
_UNKNOWN = 0.3  # of other devices
_FLOAT32 = ('highest', 'float32')
# Of each image, besides the network: 500 photographs in 7.3 s on the machine of that H100.
_IMAGE_SECONDS = 0.015
_START_SECONDS = 60  # of a process, with compiling
_RATE = 'from nonlocal_jax.cli import published_plan as p; p.print_rate({!r})'
_BASIS = {
  'cpu': 'and from how the network compares with it on two CPU cores, which other work slows down',
  'gpu': 'and from how the network compares with it on one H100; no evaluation was timed on a GPU '
  'yet, so it may take half or twice as long',
}


@dataclasses.dataclass(frozen=True)
class Check:
  """A published score to reproduce.

  Attributes:
    model: The released checkpoint.
    multi_scale_flip: Whether the score was measured with multi-scale and flips.
    published: The published mIoU in percent.
  """

  model: ReleasedModel
  multi_scale_flip: bool
  published: float

  @property
  def name(self) -> str:
    """The name of the results folder, e.g. 'nonlocal_r50-d8_..._ade20k-5ae0aa33_ms_flip'."""
    suffix = '_ms_flip' if self.multi_scale_flip else ''
    return f'{self.model.name}-{self.model.sha256_prefix}{suffix}'

  @property
  def images(self) -> int:
    """Number of images."""
    return PUBLISHED[self.model.dataset].published_sizes['val']

  @property
  def multiplications(self) -> float:
    """About how many multiplications it takes."""
    protocol = self.model.protocol.with_multi_scale_flip(self.multi_scale_flip)
    total = 0.0
    for ratio in protocol.ratios:
      pixels, count = _PIXELS[self.model.dataset] * ratio**2, 1
      if protocol.window_crop and protocol.window_stride:
        (height, width), stride = protocol.window_crop, protocol.window_stride[0]
        sides = (1025 * ratio, 2049 * ratio)
        rows, columns = (max(1, -int(-(side - height) // stride) + 1) for side in sides)
        pixels, count = height * width, rows * columns
      pairs = (pixels / 64) ** 2  # the network's output stride is 8
      total += count * (pixels * _PER_PIXEL[self.model.depth] + 512 * pairs)
    return self.images * protocol.flips * total


@dataclasses.dataclass(frozen=True)
class Places:
  """Where weights and data are, or come from.

  Attributes:
    found: Released checkpoints in a folder of the user, by the first digits of their sha256.
    data: The folder of the datasets; None for the copies that were prepared before, or for what is
      downloaded.
    data_dir: Where prepared data is kept; None for the default.
    may_download: Whether what is missing is downloaded.
    username: Login for Cityscapes.
  """

  found: Mapping[str, Path]
  data: Path | None = None
  data_dir: str | None = None
  may_download: bool = False
  username: str = ''

  def has(self, model: ReleasedModel) -> bool:
    """Returns whether a model's weights are here, or may be downloaded."""
    return self.may_download or model.sha256_prefix in self.found or is_downloaded(model)

  def weights(self, model: ReleasedModel) -> Path:
    """Returns the file of a released model that `has` is true of.

    Raises:
      UserError: If it cannot be downloaded, or is another file.
    """
    found = self.found.get(model.sha256_prefix)
    return found or download_released(model)  # checks a file that is there

  def source_of(self, dataset: str) -> Path | None:
    """Returns the folder of a dataset; None to open the copy that was prepared before.

    Raises:
      UserError: If it is to be downloaded and cannot be, or is not here.
    """
    from nonlocal_jax.data.downloads import fetch_dataset
    from nonlocal_jax.data.prepared import check_data_dir, open_prepared

    if not self.may_download:
      if self.data is None:
        with explained_by({'source_dir': '--data=DIR, or --download'}):
          open_prepared(PUBLISHED[dataset], splits=('val',), data_dir=self.data_dir)
      return self.data
    if self._is_prepared(dataset):
      return None
    check_data_dir(self.data_dir)
    return fetch_dataset(dataset, self.data, splits=('val',), username=self.username)

  def missing(self, checks: Sequence[Check]) -> dict[str, int]:
    """Returns what is to be downloaded, with the bytes that it takes at most."""
    if not self.may_download:
      return {}
    from nonlocal_jax.data.distributions import DISTRIBUTIONS

    models = {check.model.file: check.model for check in checks}
    sizes = {
      file: model.about_bytes
      for file, model in models.items()
      if model.sha256_prefix not in self.found and not is_downloaded(model)
    }
    for name in sorted({check.model.dataset for check in checks}):
      archives = [a for a in DISTRIBUTIONS[name].archives if 'val' in a.splits]
      folder = self.data or cache_folder() / 'datasets'
      absent = [a for a in archives if not (folder / a.folder).exists()]
      if absent and not self._is_prepared(name):
        sizes[f'{name} with its unpacked files'] = 2 * sum(archive.size for archive in absent)
    return sizes

  def _is_prepared(self, dataset: str) -> bool:
    from nonlocal_jax.data.prepared import published_copies

    try:
      return bool(published_copies(PUBLISHED[dataset], splits=('val',), data_dir=self.data_dir))
    except UserError:  # damaged: prepared anew
      return False


def say_plan(checks: Sequence[Check], places: Places, *, precision: str = 'highest') -> None:
  """Prints on stderr what is to be done, the disk space and about how long it takes.

  Args:
    checks: What is to be done.
    places: Where weights and data are.
    precision: Matmul precision of the network, see `jax_default_matmul_precision`.
  """
  sizes = places.missing(checks)
  models = len({check.model.file for check in checks})
  lines = [f'{counted(len(checks), "score")} of {counted(models, "model")} to measure.']
  if sizes:
    folder = next(path for path in (cache_folder(), *cache_folder().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    lines.append(f'To download, in {cache_folder()}, where {as_size(free)} are free:')
    lines += [f'  {name}: about {as_size(size)}' for name, size in sizes.items()]
    lines.append(f'  in all about {as_size(sum(sizes.values()))}')
  devices, said = devices_of_subprocess((sys.executable, '-c', _RATE.format(precision)))
  if devices:
    rate = sum(device['products_per_second'] for device in devices)
    platform = devices[0]['platform']
    rate *= _EFFICIENCY.get((platform, precision in _FLOAT32), _UNKNOWN)
    seconds = sum(
      _START_SECONDS + max(check.multiplications / rate, check.images * _IMAGE_SECONDS)
      for check in checks
    )
    basis = _BASIS.get(platform, 'on a kind of device where the network was never timed')
    lines.append(
      f'On {len(devices)} x {devices[0]["kind"]} it takes about {as_duration(seconds)}: reckoned '
      f'from the speed of matrix products, measured just now, {basis}.'
    )
  else:
    lines.append(said)
  print('\n'.join(lines), file=sys.stderr)


def print_rate(precision: str) -> None:
  """Prints kind, platform and multiplications per second of each device, as JSON.

  Args:
    precision: Of the product, see `jax_default_matmul_precision`.
  """
  import jax
  import jax.numpy as jnp

  size = 1024 if jax.default_backend() == 'cpu' else 8192
  found = []
  for device in jax.local_devices():
    matrix = jax.device_put(jnp.ones((size, size)), device)

    @jax.jit
    def square(matrix):
      return jnp.matmul(matrix, matrix, precision=precision) / matrix.shape[0]

    square(matrix).block_until_ready()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.5:
      square(matrix).block_until_ready()
      count += 1
    rate = count * size**3 / (time.perf_counter() - started)
    facts = {'kind': device.device_kind, 'platform': device.platform}
    found.append({**facts, 'products_per_second': rate})
  print(json.dumps(found))
