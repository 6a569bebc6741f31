"""Small archives of the published datasets, packed as their authors do, at the real addresses."""

import dataclasses
import hashlib
import io
import json
import tarfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.data import datasets, distributions
from nonlocal_jax.data.layouts import Sample
from tests.file_server import FileServer, Served
from tests.image_trees import png_of, turn_into_sbd, write_tree

# Where the archives of which address comes first are on their servers.
PATHS = {
  'ADEChallengeData2016.zip': '/places/ADEchallenge/ADEChallengeData2016.zip',
  'VOCtrainval_11-May-2012.tar': '/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
  'benchmark.tgz': '/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz',
}
# The ids in Cityscapes' label maps, by the ids that networks are trained with.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
COUNTS = {
  'ADEChallengeData2016.zip': (3, 2, 3, 2),
  'VOCtrainval_11-May-2012.tar': (6, 4, 1, 1),
  'benchmark.tgz': (3, 1, 1),
  'gtFine_trainvaltest.zip': (3, 2),
  'leftImg8bit_trainvaltest.zip': (3, 2),
}


@dataclasses.dataclass
class SmallSet:
  """A small dataset.

  Attributes:
    samples: What its folders hold, for each split.
    archives: The bytes of its archives by name.
  """

  samples: dict[str, list[Sample]]
  archives: dict[str, bytes]


def make_set(name: str, folder: Path) -> SmallSet:
  """Writes a dataset of three training and two val images and packs it."""
  make = {'ade20k': _ade20k, 'voc12aug': _voc12aug, 'cityscapes': _cityscapes}[name]
  return make(folder)


def serve(small: SmallSet, server: FileServer) -> None:
  """Serves the archives that need no login under their real paths."""
  for file, data in small.archives.items():
    if file in PATHS:
      server.serve(PATHS[file], data)


def serve_cityscapes(small: SmallSet, server: FileServer) -> types.ModuleType:
  """Serves the site of Cityscapes; returns a stand-in for `cityscapesscripts.download.downloader`.

  The stand-in asks for the same addresses as version 2.3.0 does, and fails in the same ways. The
  real package cannot be installed beside the others of the tests.
  """
  listed = []
  for index, (file, data) in enumerate(small.archives.items()):
    listed.append({'name': file, 'packageID': str(index), 'size': '10KB', 'thirdparty': '0'})
    md5 = f'{hashlib.md5(data).hexdigest()}  {file}\n'
    server.serve(f'/md5-sum/?packageID={index}', md5.encode())
    server.serve(f'/file-handling/?packageID={index}', data)
  server.serve('/downloads/?list', json.dumps(listed).encode())
  server.serve('/login', b'<form>')
  server.files['POST /login'] = Served(location='/')
  module = types.ModuleType('downloader')
  module.download_packages = _download_packages  # type: ignore[attr-defined]
  return module


def _download_packages(*, session, package_names, destination_path, resume=False):
  site = 'https://www.cityscapes-dataset.com'
  packages = session.get(f'{site}/downloads/?list', allow_redirects=False).json()
  ids = {package['name']: package['packageID'] for package in packages}
  for name in package_names:
    path = Path(destination_path) / name
    print(f'Downloading {name}')
    if path.exists() and not resume:
      raise Exception('The file exists.')
    md5 = session.get(f'{site}/md5-sum/?packageID={ids[name]}').text.split()[0]
    with open(path, 'ab' if resume else 'wb') as file:
      headers = {'Range': f'bytes={file.tell()}-'} if resume else {}
      address = f'{site}/file-handling/?packageID={ids[name]}'
      with session.get(address, allow_redirects=False, stream=True, headers=headers) as answer:
        answer.raise_for_status()
        assert answer.status_code in (200, 206)
        file.writelines(answer.iter_content(1024))
    if hashlib.md5(path.read_bytes()).hexdigest() != md5:
      raise Exception('MD5 sum of downloaded file does not match.')


def publish(name: str, small: SmallSet, patch: pytest.MonkeyPatch) -> None:
  """Lets a small dataset stand for the published one: its checksums and numbers of files."""
  published = distributions.DISTRIBUTIONS[name]
  archives = []
  for archive in published.archives:
    counts = dict(zip(archive.contents.files, COUNTS[archive.file], strict=True))
    digests = {
      key: hashlib.new(key, small.archives[archive.file]).hexdigest()
      for key in ('sha256', 'md5')
      if getattr(archive, key)
    }
    contents = dataclasses.replace(archive.contents, files=counts)
    archives.append(dataclasses.replace(archive, contents=contents, size=10_000, **digests))
  patch.setitem(
    distributions.DISTRIBUTIONS, name, dataclasses.replace(published, archives=tuple(archives))
  )
  sizes = {split: len(samples) for split, samples in small.samples.items()}
  patch.setitem(
    datasets.PUBLISHED,
    name,
    dataclasses.replace(datasets.PUBLISHED[name], published_sizes=sizes),
  )


def zip_of(folder: Path) -> bytes:
  """Packs a folder with entries for its folders, deflated."""
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as file:
    for path in _below(folder):
      file.write(path, path.relative_to(folder))
  return packed.getvalue()


def tar_of(folder: Path, *, compressed: bool = False) -> bytes:
  """Packs a folder with entries for its folders."""
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode='w:gz' if compressed else 'w') as file:
    for path in _below(folder):
      file.add(path, path.relative_to(folder), recursive=False)
  return packed.getvalue()


def _below(folder: Path) -> Iterator[Path]:
  return iter(sorted(folder.rglob('*')))


def _write(folder: Path, **texts: str) -> None:
  for name, text in texts.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _ade20k(folder: Path) -> SmallSet:
  root = folder / 'ADEChallengeData2016'
  samples = write_tree('ade20k', root)
  _write(root, **{'sceneCategories.txt': 'ADE_1 street', 'objectInfo150.txt': 'Idx Ratio'})
  return SmallSet(samples, {'ADEChallengeData2016.zip': zip_of(folder)})


def _voc12aug(folder: Path) -> SmallSet:
  root = folder / 'voc/VOCdevkit/VOC2012'
  samples = write_tree('voc12aug', root)
  originals = folder / 'labels'  # of the training images, before they become .mat files
  originals.mkdir()
  for index, sample in enumerate(samples['train']):
    copy = originals / sample.label.name
    copy.write_bytes(sample.label.read_bytes())
    samples['train'][index] = sample._replace(label=copy)
  turn_into_sbd(root)
  (folder / 'sbd').mkdir()
  sbd = (root.parent / 'benchmark_RELEASE').rename(folder / 'sbd/benchmark_RELEASE')
  more = root / 'JPEGImages/2009_000001.jpg'  # only for detection
  more.write_bytes(samples['train'][0].image.read_bytes())
  _write(root, **{'ImageSets/Main/train.txt': '2009_000001 1\n', 'Annotations/a.xml': '<x/>'})
  _write(root, **{'ImageSets/Segmentation/trainval.txt': 'a\nb\n2007_000032\n2007_000039\n'})
  (root / 'SegmentationObject').mkdir()
  (root / 'SegmentationObject/a.png').write_bytes(png_of(np.ones((4, 4), np.uint8)))
  # SBD labels images of VOC's lists as well.
  for name in ('2007_000032', 'a'):
    (sbd / f'dataset/cls/{name}.mat').write_bytes(
      (sbd / 'dataset/cls/2008_000002.mat').read_bytes()
    )
  _write(sbd, **{'benchmark_code_RELEASE/README.txt': 'code', 'dataset/img/a.jpg': '-'})
  (sbd / 'benchmark_code_RELEASE/link').symlink_to('README.txt')  # where nothing is wanted
  archives = {
    'VOCtrainval_11-May-2012.tar': tar_of(folder / 'voc'),
    'benchmark.tgz': tar_of(folder / 'sbd', compressed=True),
  }
  return SmallSet(samples, archives)


def _cityscapes(folder: Path) -> SmallSet:
  samples = write_tree('cityscapes', folder / 'trained')
  to_ids = np.zeros(256, np.uint8)
  to_ids[:19] = CITYSCAPES_IDS
  archives = {}
  for kind in ('gtFine', 'leftImg8bit'):
    packed = folder / kind
    _write(packed, **{'README': 'about', 'license.txt': 'terms'})
    for split, listed in {**samples, 'test': samples['val'][:1]}.items():
      for sample in listed:
        city = packed / kind / split / sample.id.partition('/')[0]
        city.mkdir(parents=True, exist_ok=True)
        if kind == 'leftImg8bit':
          (city / sample.image.name).write_bytes(sample.image.read_bytes())
          continue
        ids = to_ids[np.asarray(Image.open(sample.label))]
        stem = sample.label.name.removesuffix('labelTrainIds.png')
        for ending in ('labelIds.png', 'instanceIds.png', 'color.png'):
          (city / f'{stem}{ending}').write_bytes(png_of(ids))
        (city / f'{stem}polygons.json').write_text(json.dumps({'objects': []}))
    archives[f'{kind}_trainvaltest.zip'] = zip_of(packed)
  return SmallSet(samples, archives)
