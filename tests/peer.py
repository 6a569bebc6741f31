"""mmsegmentation's own NonLocalNet, small and on the CPU: the reference."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from nonlocal_jax.data.layouts import Sample
from tests.mmseg_import import mmseg_module

mmseg = mmseg_module('mmseg')
_config = mmseg_module('mmengine.config')
_dataset = mmseg_module('mmengine.dataset')
_registry = mmseg_module('mmseg.registry')
_structures = mmseg_module('mmseg.structures')
_pixel_data = mmseg_module('mmengine.structures')
with warnings.catch_warnings():
  warnings.simplefilter('ignore')  # those of the imports in it
  mmseg_module('mmseg.utils').register_all_modules(init_default_scope=True)

_SHALLOW = 3 * (1 + 1 + 3 + 1) + 2
_resnet = mmseg_module('mmseg.models.backbones.resnet')
_resnet.ResNet.arch_settings[_SHALLOW] = (_resnet.Bottleneck, (1, 1, 3, 1))

assert mmseg.__file__ is not None
CONFIGS = Path(mmseg.__file__).parent / '.mim/configs/nonlocal_net'


def read_config(name: str) -> Any:
  """One of mmsegmentation's own configs, e.g. 'nonlocal_r50-d8_4xb4-80k_ade20k-512x512'."""
  return _config.Config.fromfile(CONFIGS / f'{name}.py')


def build(
  name: str, *, width: int, num_classes: int | None = None, shallow: bool = False
) -> torch.nn.Module:
  """The network of a config with fewer channels, every array random, dropout off.

  A shallow one has one bottleneck in each stage but the third, which has three.
  """
  config = small_config(name, width=width, num_classes=num_classes, shallow=shallow)
  return randomise(_registry.MODELS.build(config.model))


def build_full(name: str) -> torch.nn.Module:
  """The network of a config as it is, initialised by PyTorch."""
  config = read_config(name)
  config.model.pretrained = None
  config.model.backbone.norm_cfg = config.model.decode_head.norm_cfg = {'type': 'BN'}
  config.model.auxiliary_head.norm_cfg = {'type': 'BN'}
  return _registry.MODELS.build(config.model)


def small_config(
  name: str, *, width: int, num_classes: int | None = None, shallow: bool = False
) -> Any:
  """The config of `build`, whole, to be changed and built by `randomise(build_model(config))`."""
  config = read_config(name)
  model = config.model
  model.pretrained = None
  if shallow:
    model.backbone.depth = _SHALLOW
  for part in (model.backbone, model.decode_head, model.auxiliary_head):
    part.norm_cfg = {'type': 'BN', 'requires_grad': True}  # SyncBN wants a process group
  model.backbone.update(base_channels=width, stem_channels=width)
  model.decode_head.update(in_channels=32 * width, channels=8 * width, dropout_ratio=0)
  model.auxiliary_head.update(in_channels=16 * width, channels=4 * width, dropout_ratio=0)
  if num_classes is not None:
    model.decode_head.num_classes = model.auxiliary_head.num_classes = num_classes
  return config


def parse_config(text: str) -> Any:
  """The config of a text."""
  return _config.Config.fromstring(text, '.py')


def build_model(config: Any) -> torch.nn.Module:
  """The network of a whole config."""
  return _registry.MODELS.build(copy.deepcopy(config.model))


@torch.no_grad()
def predict_file(config: Any, model: torch.nn.Module, path: Path) -> np.ndarray:
  """Labels (h, w) of an image file by the config's own test pipeline and preprocessor."""
  steps = [step for step in config.test_pipeline if step['type'] != 'LoadAnnotations']
  item = _dataset.Compose(steps)({'img_path': str(path)})
  (sample,) = model.eval().test_step(_dataset.pseudo_collate([item]))
  return sample.pred_sem_seg.data[0].numpy()


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Fills every array so that a swapped one shows, and activations keep their scale."""
  generator = torch.Generator().manual_seed(seed)
  for name, array in module.state_dict().items():
    if array.ndim > 1:
      fan_in = array[0].numel()
      array.copy_(torch.randn(array.shape, generator=generator) * (2 / fan_in) ** 0.5)
    elif array.is_floating_point():
      low = 0.5 if name.endswith(('running_var', '.weight')) else -0.3
      array.copy_(torch.rand(array.shape, generator=generator) * 0.6 + low)
  return module


def state_dict(module: torch.nn.Module) -> dict[str, np.ndarray]:
  """Copies of the arrays by name."""
  return {name: array.numpy().copy() for name, array in module.state_dict().items()}


@torch.no_grad()
def logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
  """Logits (n, h, w, c) of normalised images (n, h, w, 3) at their own size."""
  model.eval()
  tensor = torch.as_tensor(images.transpose(0, 3, 1, 2))
  metas = [{'img_shape': tuple(tensor.shape[2:])}] * len(tensor)
  return model.encode_decode(tensor, metas).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def final_logits(model: torch.nn.Module, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Logits (*size, c) of one normalised image (h, w, 3) by the model's own inference mode."""
  model.eval()
  tensor = torch.tensor(image.transpose(2, 0, 1))[None]
  shape = tuple(tensor.shape[2:])
  meta = {
    'img_shape': shape,
    'ori_shape': size,
    'pad_shape': shape,
    'padding_size': [0, 0, 0, 0],
    'flip': False,
  }
  sample = _structures.SegDataSample(metainfo=meta)
  return model.predict(tensor, [sample])[0].seg_logits.data.permute(1, 2, 0).numpy()


def train(
  model: torch.nn.Module,
  batches: Iterable[tuple[np.ndarray, np.ndarray]],
  *,
  learning_rates: Iterable[float],
) -> Iterator[float]:
  """Takes a step of SGD for each batch (normalised images, labels); yields the losses."""
  model.train()
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
  for (images, labels), learning_rate in zip(batches, learning_rates, strict=False):
    optimizer.param_groups[0]['lr'] = learning_rate
    samples = [
      _structures.SegDataSample(
        gt_sem_seg=_pixel_data.PixelData(data=torch.as_tensor(label)[None].long()),
        metainfo={'img_shape': label.shape},
      )
      for label in labels
    ]
    losses = model.loss(torch.as_tensor(images.transpose(0, 3, 1, 2)), samples)
    total = sum(value for name, value in losses.items() if 'loss' in name)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    yield float(total.detach())


def confusion_scores(
  predictions: list[np.ndarray], labels: list[np.ndarray], num_classes: int
) -> dict[str, np.ndarray]:
  """AAcc and each class's IoU and Acc, shares, by mmsegmentation's IoUMetric."""
  metric = mmseg_module('mmseg.evaluation').IoUMetric
  totals = [
    sum(parts)
    for parts in zip(
      *(
        metric.intersect_and_union(torch.as_tensor(p), torch.as_tensor(t), num_classes, 255)
        for p, t in zip(predictions, labels, strict=True)
      ),
      strict=True,
    )
  ]
  return metric.total_area_to_metrics(*totals, ['mIoU'])


def scores_of_files(
  model: torch.nn.Module,
  samples: Iterable[Sample],
  *,
  box: tuple[int, int],
  num_classes: int,
  label_of: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
  """AAcc, mIoU and mAcc in percent, of images resized into `box`; `label_of` gives classes."""
  predictions, labels = [], []
  for sample in samples:
    image = cv2.imread(str(sample.image))
    label = label_of(np.array(Image.open(sample.label)))
    factor = min(max(box) / max(label.shape), min(box) / min(label.shape))
    height, width = (int(side * factor + 0.5) for side in label.shape)
    resized = cv2.resize(image, (width, height))[..., ::-1].astype(np.float32)
    normalized = (resized - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    logits = final_logits(model, normalized.astype(np.float32), label.shape)
    predictions.append(logits.argmax(-1))
    labels.append(label)
  found = confusion_scores(predictions, labels, num_classes)
  means = {
    'aAcc': found['aAcc'],
    'mIoU': np.nanmean(found['IoU']),
    'mAcc': np.nanmean(found['Acc']),
  }
  return {name: 100 * float(value) for name, value in means.items()}
