"""Where the published datasets are, and what is in their archives.

Where addresses and checksums are from:

    ADEChallengeData2016.zip
      address   download_ADE20K.sh in the authors' CSAILVision/semantic-segmentation-pytorch
      md5       torchbench/datasets/ade20k.py in paperswithcode/torchbench
    VOCtrainval_11-May-2012.tar
      address   public code, beside www.robots.ox.ac.uk/~vgg/projects/pascal/VOC/voc2012;
                the second one from MMSegmentation's guide to datasets
      sha256    url_checksums/voc.txt in TFDS, and torchvision's prototype/datasets/_builtin/voc.py
    benchmark.tgz (SBD)
      address   torchvision's sbd.py, which links home.bharathh.info/pubs/codes/SBD/download.html
      sha256    torchvision's prototype/datasets/_builtin/sbd.py
    gtFine_trainvaltest.zip, leftImg8bit_trainvaltest.zip
      address   www.cityscapes-dataset.com/downloads, after a login
      md5       the same site tells it, and cityscapesscripts compares it

None but the last is a checksum that the authors publish.

The numbers of files are those of the published splits. VOC 2012 has 17,125 photographs, of which
2,913 have label maps; SBD has 11,355 label maps.
"""

import dataclasses

from nonlocal_jax.data.archives import Contents
from nonlocal_jax.data.datasets import Split


@dataclasses.dataclass(frozen=True)
class Archive:
  """A file of a published dataset.

  Attributes:
    file: Its name.
    addresses: Where it is, tried in this order; () if a login is needed.
    size: About how many bytes it has, and its wanted files have.
    folder: Where its files go, below the folder of the datasets.
    contents: What it holds.
    sha256: Its sha256; '' if unknown.
    md5: Its md5; '' if unknown.
    splits: For which splits it is needed.
  """

  file: str
  addresses: tuple[str, ...]
  size: int
  folder: str
  contents: Contents
  sha256: str = ''
  md5: str = ''
  splits: tuple[Split, ...] = ('train', 'val')


@dataclasses.dataclass(frozen=True)
class Distribution:
  """A published dataset, as its authors distribute it.

  Attributes:
    terms: A sentence on its terms of use, with links.
    archives: Its archives.
  """

  terms: str
  archives: tuple[Archive, ...]


DISTRIBUTIONS = {
  'ade20k': Distribution(
    terms=(
      'The images of ADE20K may be used for non-commercial research and education only; its '
      'annotations are under the BSD 3-clause license. Terms of use: '
      'https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/'
    ),
    archives=(
      Archive(
        file='ADEChallengeData2016.zip',
        addresses=('http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',),
        size=970_000_000,
        md5='7328b3957e407ddae1d3cbf487f149ef',
        folder='ADEChallengeData2016',
        contents=Contents(
          inside='ADEChallengeData2016',
          files={
            'images/training/*.jpg': 20_210,
            'images/validation/*.jpg': 2_000,
            'annotations/training/*.png': 20_210,
            'annotations/validation/*.png': 2_000,
          },
          most_members=60_000,
          most_bytes=4 * 10**9,
        ),
      ),
    ),
  ),
  'voc12aug': Distribution(
    terms=(
      'The images of Pascal VOC 2012 and of SBD are from flickr, whose terms of use hold for them. '
      'Database rights: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/#rights and, of SBD, '
      'http://home.bharathh.info/pubs/codes/SBD/download.html'
    ),
    archives=(
      Archive(
        file='VOCtrainval_11-May-2012.tar',
        addresses=(
          'https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
          'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar',
        ),
        size=1_999_639_040,
        sha256='e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb',
        folder='VOCdevkit/VOC2012',
        contents=Contents(
          inside='VOCdevkit/VOC2012',
          files={
            'JPEGImages/*.jpg': 17_125,
            'SegmentationClass/*.png': 2_913,
            'ImageSets/Segmentation/train.txt': 1,
            'ImageSets/Segmentation/val.txt': 1,
          },
          most_members=60_000,
          most_bytes=4 * 10**9,
        ),
      ),
      Archive(
        file='benchmark.tgz',
        addresses=(
          'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/'
          'benchmark.tgz',
        ),
        size=1_419_539_633,
        sha256='6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53',
        folder='VOCdevkit/VOCaug/dataset',
        contents=Contents(
          inside='benchmark_RELEASE/dataset',
          files={'cls/*.mat': 11_355, 'train.txt': 1, 'val.txt': 1},
          most_members=60_000,
          most_bytes=10 * 10**9,
        ),
        splits=('train',),
      ),
    ),
  ),
  'cityscapes': Distribution(
    terms=(
      'Cityscapes may be used for non-commercial purposes only. License agreement: '
      'https://www.cityscapes-dataset.com/license/'
    ),
    archives=(
      Archive(
        file='gtFine_trainvaltest.zip',
        addresses=(),
        size=253_000_000,
        folder='cityscapes/gtFine',
        contents=Contents(
          inside='gtFine',
          files={'train/*/*_gtFine_labelIds.png': 2_975, 'val/*/*_gtFine_labelIds.png': 500},
          most_members=40_000,
          most_bytes=5 * 10**9,
        ),
      ),
      Archive(
        file='leftImg8bit_trainvaltest.zip',
        addresses=(),
        size=11_600_000_000,
        folder='cityscapes/leftImg8bit',
        contents=Contents(
          inside='leftImg8bit',
          files={'train/*/*_leftImg8bit.png': 2_975, 'val/*/*_leftImg8bit.png': 500},
          most_members=20_000,
          most_bytes=25 * 10**9,
        ),
      ),
    ),
  ),
}
