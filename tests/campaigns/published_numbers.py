"""Unpacks and prepares archives of the published datasets with all of their files, each tiny.

    python -m tests.campaigns.published_numbers --datasets ade20k voc12aug cityscapes

The archives are served on loopback under their real paths, with the published numbers of files and
lists: no number is changed, only checksums and sizes. Prints a table of files, seconds, memory, and
the numbers of images that were prepared; exits with 1 if one of them is not the published one.
"""

import argparse
import dataclasses
import hashlib
import io
import os
import resource
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import scipy.io

from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.data.distributions import DISTRIBUTIONS
from nonlocal_jax.data.downloads import fetch_dataset
from nonlocal_jax.data.preparation import prepare
from nonlocal_jax.runtime import addresses
from tests.dataset_archives import PATHS
from tests.file_server import file_server

IMAGE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
JPEG, PNG = (cv2.imencode(suffix, IMAGE)[1].tobytes() for suffix in ('.jpg', '.png'))
LABEL = cv2.imencode('.png', np.full((6, 8), 7, np.uint8))[1].tobytes()
TRAIN, VAL, SBD, PHOTOS = 1_464, 1_449, 11_355, 17_125
NEW = 9_118  # SBD's images that are in neither of VOC's lists


def files_of(archive: str) -> Iterator[tuple[str, bytes]]:
  """Names and contents of the files of an archive."""
  if archive == 'ADEChallengeData2016.zip':
    for split, count in (('training', 20_210), ('validation', 2_000)):
      for index in range(count):
        stem = f'{split}/ADE_{split}_{index:08d}'
        yield f'ADEChallengeData2016/images/{stem}.jpg', JPEG
        yield f'ADEChallengeData2016/annotations/{stem}.png', LABEL
  elif archive == 'VOCtrainval_11-May-2012.tar':
    root = 'VOCdevkit/VOC2012'
    lists = {'train': range(TRAIN), 'val': range(TRAIN, TRAIN + VAL)}
    for index in range(PHOTOS):
      yield f'{root}/Annotations/{index}.xml', b'<annotation/>'
      yield f'{root}/JPEGImages/{index}.jpg', JPEG
      if index < TRAIN + VAL:
        yield f'{root}/SegmentationClass/{index}.png', LABEL
        yield f'{root}/SegmentationObject/{index}.png', LABEL
    for name, indices in lists.items():
      yield f'{root}/ImageSets/Segmentation/{name}.txt', ''.join(f'{i}\n' for i in indices).encode()
  elif archive == 'benchmark.tgz':
    root, mat = 'benchmark_RELEASE/dataset', io.BytesIO()
    fields = {'Segmentation': np.full((6, 8), 7, np.uint8)}
    scipy.io.savemat(mat, {'GTcls': fields}, do_compression=True)
    first = TRAIN + VAL - (SBD - NEW)
    names = [f'{index}' for index in range(first, first + SBD)]
    for name in names:
      yield f'{root}/img/{name}.jpg', JPEG
      yield f'{root}/cls/{name}.mat', mat.getvalue()
      yield f'{root}/inst/{name}.mat', mat.getvalue()
    yield f'{root}/train.txt', '\n'.join(names[:8_498]).encode()
    yield f'{root}/val.txt', '\n'.join(names[8_498:]).encode()
  else:
    kind = archive.partition('_')[0]
    for split, count in (('train', 2_975), ('val', 500), ('test', 1_525)):
      for index in range(count):
        stem = f'{kind}/{split}/city{index % 18}/{index}_{kind}'
        if kind == 'leftImg8bit':
          yield f'{stem}.png', PNG
        else:
          for ending in ('color.png', 'instanceIds.png', 'labelIds.png', 'polygons.json'):
            yield f'{stem}_{ending}', LABEL


def pack(archive: str, path: Path) -> int:
  """Writes an archive; returns the number of its files."""
  count = 0
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
      for name, data in files_of(archive):
        packed.writestr(name, data)
        count += 1
    return count
  with tarfile.open(path, 'w:gz' if path.suffix == '.tgz' else 'w') as packed:
    for name, data in files_of(archive):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      packed.addfile(info, io.BytesIO(data))
      count += 1
  return count


def seconds_of(work: Callable[[], object]) -> float:
  """How long a call takes."""
  started = time.monotonic()
  work()
  return time.monotonic() - started


def try_one(name: str, folder: Path) -> bool:
  """Fetches and prepares a dataset; prints a row and returns whether its numbers are right."""
  served, files, changed = folder / 'served', 0, []
  with file_server() as server:
    for archive in DISTRIBUTIONS[name].archives:
      # Those behind a login are put into the folder, as a user may do.
      path = (served if archive.addresses else folder / 'new') / archive.file
      path.parent.mkdir(parents=True, exist_ok=True)
      files += pack(archive.file, path)
      data = path.read_bytes()
      if archive.addresses:
        server.serve(PATHS[archive.file], data)
      digests = {
        key: hashlib.new(key, data).hexdigest()
        for key in ('sha256', 'md5')
        if getattr(archive, key)
      }
      changed.append(dataclasses.replace(archive, size=len(data), **digests))
    distribution = dataclasses.replace(DISTRIBUTIONS[name], archives=tuple(changed))
    DISTRIBUTIONS[name] = distribution
    os.environ[addresses.MIRROR] = server.address
    fetching = seconds_of(lambda: fetch_dataset(name, folder / 'new'))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  again = seconds_of(lambda: fetch_dataset(name, folder / 'new'))
  splits = prepare(PUBLISHED[name], folder / 'new', data_dir=folder / 'tfds')
  images = {split: len(prepared) for split, prepared in splits.items()}
  right = images == PUBLISHED[name].published_sizes
  print(
    f'| {name} | {files:,} | {fetching:.1f} | {again:.1f} | {peak:,.0f} | '
    f'{images["train"]:,} + {images["val"]:,} | {"yes" if right else "NO"} |'
  )
  return right


def main() -> None:
  """Tries all."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--datasets', nargs='+', default=list(DISTRIBUTIONS), choices=DISTRIBUTIONS)
  options = parser.parse_args()
  print('| dataset | files packed | seconds | seconds again | peak MiB | images | as published |')
  print('|---|---|---|---|---|---|---|')
  with tempfile.TemporaryDirectory() as folder:
    right = [try_one(name, Path(folder) / name) for name in options.datasets]
  sys.exit(not all(right))


if __name__ == '__main__':
  main()
