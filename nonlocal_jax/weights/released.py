"""The 16 released checkpoints with their published scores, and the backbones they started from.

The facts are those of MMSegmentation's `nonlocal_net/README` and `metafile.yaml`.
"""

import dataclasses
import re

from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.protocol import EvalProtocol

_ADDRESS = 'https://download.openmmlab.com'
# Parameters and running statistics without those of the classifiers, by depth.
_VALUES = {50: 50_067_040, 101: 69_111_392}
_BACKBONE_VALUES = {50: 25_629_512, 101: 44_673_864}  # with the ImageNet classifier
_CLASSIFIER_VALUES = 512 + 1 + 256 + 1  # of both heads, for each class


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
  """One released checkpoint.

  Attributes:
    name: Name of the model, e.g. 'nonlocal_r50-d8_512x512_80k_ade20k'.
    file: Name of the released file; its last eight digits begin the file's sha256.
    miou: Published mIoU in percent, single scale.
    miou_ms_flip: Published mIoU in percent with multi-scale and flip, None if there is none.
    replaced: Whether a later file of the same model replaced this one.
  """

  name: str
  file: str
  miou: float
  miou_ms_flip: float | None
  replaced: bool = False

  @property
  def depth(self) -> int:
    """Layers of the backbone."""
    return int(self._parts['depth'])

  @property
  def crop(self) -> tuple[int, int]:
    """(height, width) of the training crop, in pixels."""
    return int(self._parts['height']), int(self._parts['width'])

  @property
  def steps(self) -> int:
    """Training steps."""
    return 1000 * int(self._parts['thousands'])

  @property
  def dataset(self) -> str:
    """'cityscapes', 'ade20k' or 'voc12aug'."""
    return self._parts['dataset']

  @property
  def align_corners(self) -> bool:
    """Whether logits are resized with aligned corners, which only the 769x769 models are."""
    return self.crop == (769, 769)

  @property
  def protocol(self) -> EvalProtocol:
    """How the single-scale mIoU was measured; `scale` is that of training, too."""
    scale = (2048, 512)
    if self.dataset == 'cityscapes':
      scale = (2049, 1025) if self.align_corners else (2048, 1024)
    return EvalProtocol.from_version(
      'v0',
      scale=scale,
      window_crop=self.crop if self.align_corners else None,
      window_stride=(513, 513) if self.align_corners else None,
      align_corners=self.align_corners,
    )

  @property
  def sha256_prefix(self) -> str:
    """First eight hex digits of the file's sha256."""
    return _sha256_prefix(self.file)

  @property
  def address(self) -> str:
    """Where the authors have the file."""
    return f'{_ADDRESS}/mmsegmentation/v0.5/nonlocal_net/{self.name}/{self.file}'

  @property
  def about_bytes(self) -> int:
    """The file's size to some percent: four bytes for each value."""
    return 4 * (_VALUES[self.depth] + _CLASSIFIER_VALUES * PUBLISHED[self.dataset].num_classes)

  @property
  def variant(self) -> str:
    """Crop and schedule, e.g. '769x769_80k'."""
    return f'{self._parts["height"]}x{self._parts["width"]}_{self._parts["thousands"]}k'

  @property
  def config_name(self) -> str:
    """The name of its config in MMSegmentation 1.x."""
    parts, images = self._parts, 2 if self.dataset == 'cityscapes' else 4
    return (
      f'nonlocal_r{parts["depth"]}-d8_4xb{images}-{parts["thousands"]}k_{self.dataset}'
      f'-{parts["height"]}x{parts["width"]}'
    )

  @property
  def recipe(self) -> str:
    """The name of its config here, e.g. 'ade20k_r50:512x512_80k'."""
    return f'{self.dataset}_r{self.depth}:{self.variant}'

  @property
  def _parts(self) -> dict[str, str]:
    pattern = (
      r'nonlocal_r(?P<depth>\d+)-d8_(?P<height>\d+)x(?P<width>\d+)'
      r'_(?P<thousands>\d+)k_(?P<dataset>\w+)'
    )
    match = re.fullmatch(pattern, self.name)
    assert match is not None, self.name
    return match.groupdict()


@dataclasses.dataclass(frozen=True)
class ReleasedBackbone:
  """Weights of a ResNetV1c that were trained on ImageNet, which the released models started from.

  Attributes:
    depth: Layers of the backbone.
    file: Name of the released file; its last eight digits begin the file's sha256.
  """

  depth: int
  file: str

  @property
  def name(self) -> str:
    """E.g. 'resnet50_v1c'."""
    return f'resnet{self.depth}_v1c'

  @property
  def sha256_prefix(self) -> str:
    """First eight hex digits of the file's sha256."""
    return _sha256_prefix(self.file)

  @property
  def address(self) -> str:
    """Where the authors have the file."""
    return f'{_ADDRESS}/pretrain/third_party/{self.file}'

  @property
  def about_bytes(self) -> int:
    """The file's size to some percent: four bytes for each value."""
    return 4 * _BACKBONE_VALUES[self.depth]


Released = ReleasedModel | ReleasedBackbone


def _sha256_prefix(file: str) -> str:
  return file.removesuffix('.pth').rsplit('-', 1)[1]


def _released(
  name: str, stamp: str, miou: float, miou_ms_flip: float | None = None, *, replaced: bool = False
) -> ReleasedModel:
  return ReleasedModel(name, f'{name}_{stamp}.pth', miou, miou_ms_flip, replaced)


RELEASED = (
  _released('nonlocal_r50-d8_512x1024_40k_cityscapes', '20200605_210748-c75e81e3', 78.24),
  _released('nonlocal_r101-d8_512x1024_40k_cityscapes', '20200605_210748-d63729fa', 78.66),
  _released('nonlocal_r50-d8_769x769_40k_cityscapes', '20200530_045243-82ef6749', 78.33, 79.92),
  _released('nonlocal_r101-d8_769x769_40k_cityscapes', '20200530_045348-8fe9a9dc', 78.57, 80.29),
  _released('nonlocal_r50-d8_512x1024_80k_cityscapes', '20200607_193518-d6839fae', 78.01),
  _released('nonlocal_r101-d8_512x1024_80k_cityscapes', '20200607_183411-32700183', 78.93),
  _released('nonlocal_r50-d8_769x769_80k_cityscapes', '20200607_193506-1f9792f6', 79.05, 80.68),
  _released('nonlocal_r101-d8_769x769_80k_cityscapes', '20200607_183428-0e1fa4f9', 79.40, 80.85),
  _released('nonlocal_r50-d8_512x512_80k_ade20k', '20200615_015801-5ae0aa33', 40.75, 42.05),
  _released('nonlocal_r101-d8_512x512_80k_ade20k', '20200615_015758-24105919', 42.90, 44.27),
  _released('nonlocal_r50-d8_512x512_160k_ade20k', '20200616_005410-baef45e3', 42.03, 43.04),
  _released('nonlocal_r101-d8_512x512_160k_ade20k', '20210827_221502-7881aa1a', 44.63, 45.79),
  _released(
    'nonlocal_r101-d8_512x512_160k_ade20k', '20200616_003422-affd0f8d', 43.36, 44.83, replaced=True
  ),
  _released('nonlocal_r50-d8_512x512_20k_voc12aug', '20200617_222613-07f2a57c', 76.20, 77.12),
  _released('nonlocal_r101-d8_512x512_20k_voc12aug', '20200617_222615-948c68ab', 78.15, 78.86),
  _released('nonlocal_r50-d8_512x512_40k_voc12aug', '20200614_000028-0139d4a9', 76.65, 77.47),
  _released('nonlocal_r101-d8_512x512_40k_voc12aug', '20200614_000028-7e5ff470', 78.27, 79.12),
)

BACKBONES = (
  ReleasedBackbone(50, 'resnet50_v1c-2cccc1ad.pth'),
  ReleasedBackbone(101, 'resnet101_v1c-e67eebb6.pth'),
)


def released_backbone(depth: int) -> ReleasedBackbone:
  """The released backbone with that number of layers, 50 or 101."""
  return next(backbone for backbone in BACKBONES if backbone.depth == depth)


def released_variants(dataset: str, depth: int) -> dict[str, ReleasedModel]:
  """The current releases for a dataset and backbone by their `variant`."""
  return {
    model.variant: model
    for model in RELEASED
    if (model.dataset, model.depth) == (dataset, depth) and not model.replaced
  }


def best_release(dataset: str, depth: int) -> ReleasedModel:
  """The current release for a dataset and backbone with the best mIoU."""
  return max(released_variants(dataset, depth).values(), key=lambda model: model.miou)


def released_model(name: str) -> ReleasedModel:
  """The current release under `name`.

  Args:
    name: A model's name, e.g. 'nonlocal_r50-d8_512x512_80k_ade20k'.

  Raises:
    KeyError: If none has this name.
  """
  return {model.name: model for model in RELEASED if not model.replaced}[name]


def released_model_of_file(file_name: str) -> ReleasedModel | None:
  """The release whose file has the name `file_name` (no folders), or None."""
  return next((model for model in RELEASED if model.file == file_name), None)


def released_model_of_sha256(sha256: str) -> ReleasedModel | None:
  """The release whose file has this sha256 (hex digits), or None."""
  return next((model for model in RELEASED if model.sha256_prefix == sha256[:8]), None)
