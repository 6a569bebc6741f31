"""Measures MMSegmentation for compare.py.

    python benchmarks/peer.py NAME JSON

NAME is a key of MEASURES below, and JSON holds the keyword arguments of its function. The last line
of stdout is a JSON object of the results, with the peak memory of the process. JAX is not imported.
On a GPU it runs in its fastest setting for a precision: cuDNN's benchmark mode, channels last,
TF32 unless the precision is higher, and `torch.autocast` for bfloat16.
"""

import importlib
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

Figures = dict[str, Any]


class _NoCompiledOperators(types.ModuleType):
  """Stands in for mmcv.ops, which mmcv-lite lacks; NonLocalNet imports it but uses none of it."""

  __path__ = ()

  def __getattr__(self, name: str):
    if name.startswith('__'):
      raise AttributeError(name)
    return MagicMock()


def main() -> None:
  """Runs the measurement that the command line names."""
  name, arguments = sys.argv[1:]
  torch.set_num_threads(os.cpu_count() or 1)
  torch.backends.cudnn.benchmark = True  # as in MMSegmentation's own default_runtime.py
  given = json.loads(arguments)
  tf32 = given.get('precision', 'default') == 'default'
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
  if importlib.util.find_spec('mmcv._ext') is None:
    sys.modules['mmcv.ops'] = _NoCompiledOperators('mmcv.ops')
  importlib.import_module('mmseg.utils').register_all_modules(init_default_scope=True)
  figures = MEASURES[name](**given)
  print(json.dumps({**peak_memory(), **figures}))


def peak_memory() -> Figures:
  """Returns the peak memory in GiB: on the GPU if the process uses one, and on the host."""
  host = int(re.findall(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[0]) / 2**20
  device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_initialized() else host
  return {'peak_gib': round(device, 3), 'peak_host_gib': round(host, 3)}


def measure_inference(
  *,
  size: Sequence[int],
  classes: int,
  width: int,
  depth: int,
  stage_blocks: Sequence[int],
  precision: str,
  repeats: int,
  device: str,
  started: float,
  compiled: bool = False,
) -> Figures:
  """Times predictions (`encode_decode`, then argmax) of images of one size, one image at a time.

  Args:
    size: (height, width) of the images.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of the backbone.
    stage_blocks: Residual blocks in each stage of the backbone.
    precision: Of matrix products, which `main` sets: 'default' allows TF32.
    repeats: Number of timed predictions, after a first one.
    device: 'cpu' or 'cuda'.
    started: `time.time()` at the start of the process.
    compiled: Whether `torch.compile` compiles the network.

  Returns:
    `seconds`, the median time of a prediction; `start_seconds`, from the start of the process to
    the first result.
  """
  model = build(classes=classes, width=width, depth=depth, stage_blocks=stage_blocks)
  del precision
  randomize(model)
  on_device(model, device).eval()
  rng = np.random.default_rng(0)

  @torch.no_grad()
  def labels_of(image: np.ndarray) -> np.ndarray:
    data = {'inputs': [torch.from_numpy(image).permute(2, 0, 1)]}
    inputs = model.data_preprocessor(data, False)['inputs']
    return classes_of(inputs.contiguous(memory_format=layout_of(device))).cpu().numpy()

  def classes_of(inputs: torch.Tensor) -> torch.Tensor:
    return model.encode_decode(inputs, [{'img_shape': tuple(size)}]).argmax(dim=1)

  if compiled:
    classes_of = torch.compile(classes_of)

  def predict() -> float:
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return seconds_of(lambda: labels_of(image))

  predict()
  start = time.time() - started
  later = [predict() for _ in range(repeats)]
  return {'seconds': statistics.median(later), 'start_seconds': start}


def measure_training(
  *,
  size: Sequence[int],
  batch: int,
  dtype: str,
  classes: int,
  width: int,
  depth: int,
  stage_blocks: Sequence[int],
  repeats: int,
  device: str,
  started: float,
  compiled: bool = False,
) -> Figures:
  """Times SGD steps on the model's own loss.

  Args:
    size: (height, width) of the crops.
    batch: Crops in a batch.
    dtype: The dtype of matrix products; 'bfloat16' through `torch.autocast`.
    classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of the backbone.
    stage_blocks: Residual blocks in each stage of the backbone.
    repeats: Number of timed steps, after a first one.
    device: 'cpu' or 'cuda'.
    started: `time.time()` at the start of the process.
    compiled: Whether `torch.compile` compiles the loss.

  Returns:
    `seconds`, the median time of a step that is waited for; `queued_seconds`, the time of a step
    where only the last of all is waited for; `start_seconds`, from the start of the process to the
    end of the first step.
  """
  model = build(classes=classes, width=width, depth=depth, stage_blocks=stage_blocks)
  model.data_preprocessor.size = tuple(size)
  on_device(model, device).train()
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
  sample_of = importlib.import_module('mmseg.structures').SegDataSample
  pixels_of = importlib.import_module('mmengine.structures').PixelData
  generator = torch.Generator().manual_seed(0)
  loss_of = torch.compile(model.loss) if compiled else model.loss

  def batch_of_images() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    return images, torch.randint(classes, (batch, 1, *size), generator=generator)

  def take(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    samples = [
      sample_of(gt_sem_seg=pixels_of(data=label), metainfo={'img_shape': tuple(size)})
      for label in labels
    ]
    data = model.data_preprocessor({'inputs': list(images), 'data_samples': samples}, True)
    inputs = data['inputs'].contiguous(memory_format=layout_of(device))
    with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
      losses = loss_of(inputs, data['data_samples'])
    total = sum(value for name, value in losses.items() if 'loss' in name)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total.detach()

  def step() -> float:
    given = batch_of_images()
    return seconds_of(lambda: float(take(*given)))  # float waits for the device

  step()
  start = time.time() - started
  later = [step() for _ in range(repeats)]
  several = [batch_of_images() for _ in range(repeats)]
  queued = seconds_of(lambda: float([take(*given) for given in several][-1])) / repeats
  return {
    'seconds': statistics.median(later),
    'queued_seconds': queued,
    'start_seconds': start,
  }


def measure_evaluation(
  *,
  data: str,
  checkpoint: str,
  scale: Sequence[int],
  num_classes: int,
  ignore_labels: Sequence[int],
  width: int,
  depth: int,
  stage_blocks: Sequence[int],
  precision: str,
  device: str,
  started: float,
) -> Figures:
  """Times the evaluation of weights on the val images of a folder.

  Args:
    data: The folder, with images/val and labels/val.
    checkpoint: A .pth file.
    scale: (width, height) of the box that images are resized into.
    num_classes: Number of classes.
    ignore_labels: Ignored label values, besides 255.
    width: Base channels of the network.
    depth: Layers of the backbone.
    stage_blocks: Residual blocks in each stage of the backbone.
    precision: Of matrix products, which `main` sets: 'default' allows TF32.
    device: 'cpu' or 'cuda'.
    started: `time.time()` at the start of the process.

  Returns:
    `total_seconds`, from the start of the process to the scores; `seconds`, of the evaluation
    alone; the number of `images`; and `mIoU` in percent.
  """
  del precision
  model = build(classes=num_classes, width=width, depth=depth, stage_blocks=stage_blocks)
  dataset, seconds, scores = run_test(
    with_weights(model, checkpoint, device),
    Path(data),
    num_classes=num_classes,
    pipeline=[
      {'type': 'LoadImageFromFile'},
      {'type': 'Resize', 'scale': tuple(scale), 'keep_ratio': True},
      {'type': 'LoadAnnotations'},
      {'type': 'PackSegInputs'},
    ],
    ignore_labels=ignore_labels,
    metric={},
  )
  return {
    'seconds': seconds,
    'total_seconds': time.time() - started,
    'images': len(dataset),
    'mIoU': float(scores['mIoU']),
  }


def measure_folder(
  *,
  data: str,
  checkpoint: str,
  num_classes: int,
  width: int,
  depth: int,
  stage_blocks: Sequence[int],
  precision: str,
  device: str,
  started: float,
) -> Figures:
  """Times the prediction of the val images of a folder, written as label maps.

  Args:
    data: The folder, with images/val.
    checkpoint: A .pth file.
    num_classes: Number of classes.
    width: Base channels of the network.
    depth: Layers of the backbone.
    stage_blocks: Residual blocks in each stage of the backbone.
    precision: Of matrix products, which `main` sets: 'default' allows TF32.
    device: 'cpu' or 'cuda'.
    started: `time.time()` at the start of the process.

  Returns:
    `total_seconds`, from the start of the process to the last file; `seconds`, without the start;
    and the number of `images`.
  """
  del precision
  model = build(classes=num_classes, width=width, depth=depth, stage_blocks=stage_blocks)
  with tempfile.TemporaryDirectory() as folder:
    dataset, seconds, _ = run_test(
      with_weights(model, checkpoint, device),
      Path(data),
      num_classes=num_classes,
      pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'PackSegInputs'}],
      ignore_labels=(),
      metric={'output_dir': folder, 'format_only': True},
    )
  return {'seconds': seconds, 'total_seconds': time.time() - started, 'images': len(dataset)}


def run_test(
  model: torch.nn.Module,
  data: Path,
  *,
  num_classes: int,
  pipeline: Sequence[dict[str, Any]],
  ignore_labels: Sequence[int],
  metric: dict[str, Any],
) -> tuple[Any, float, dict[str, Any]]:
  """Runs a network on the val images of a folder, as MMSegmentation's tools/test.py does.

  Args:
    model: The network.
    data: The folder, with images/val and labels/val.
    num_classes: Number of classes.
    pipeline: Transforms of a sample.
    ignore_labels: Ignored label values, besides 255.
    metric: Options of `IoUMetric`.

  Returns:
    The dataset, the duration in seconds, and the scores.
  """
  images = next((data / 'images/val').iterdir())
  dataset = importlib.import_module('mmseg.datasets').BaseSegDataset(
    data_root=str(data),
    data_prefix={'img_path': 'images/val', 'seg_map_path': 'labels/val'},
    img_suffix=images.suffix,
    seg_map_suffix='.png',
    metainfo={'classes': tuple(f'class {index}' for index in range(num_classes))},
    pipeline=pipeline,
    test_mode=True,
    lazy_init=True,
  )
  dataset.label_map = dict.fromkeys(ignore_labels, 255)
  dataset.full_init()
  loader = importlib.import_module('mmengine.runner').Runner.build_dataloader(
    {
      'dataset': dataset,
      'batch_size': 1,
      'num_workers': min(4, os.cpu_count() or 1),
      'sampler': {'type': 'DefaultSampler', 'shuffle': False},
    }
  )
  iou = importlib.import_module('mmseg.evaluation').IoUMetric(**metric)
  iou.dataset_meta = dataset.metainfo
  begun = time.perf_counter()
  with torch.no_grad():
    for batch in loader:
      iou.process(batch, [sample.to_dict() for sample in model.test_step(batch)])
  scores = iou.evaluate(len(dataset))
  return dataset, time.perf_counter() - begun, scores


MEASURES: dict[str, Callable[..., Figures]] = {
  'inference': measure_inference,
  'training': measure_training,
  'evaluation': measure_evaluation,
  'folder': measure_folder,
}


def layout_of(device: str) -> torch.memory_format:
  """Returns the fastest memory format of images and kernels on a device."""
  return torch.channels_last if device == 'cuda' else torch.contiguous_format


def with_weights(model: torch.nn.Module, checkpoint: str, device: str) -> torch.nn.Module:
  """Loads weights into a network, on a device and ready to test."""
  model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
  return on_device(model, device).eval()


def on_device(model: torch.nn.Module, device: str) -> torch.nn.Module:
  """Moves a network to a device, in its fastest memory format."""
  return model.to(device=device, memory_format=layout_of(device))


def build(*, classes: int, width: int, depth: int, stage_blocks: Sequence[int]) -> Any:
  """Builds the network of MMSegmentation's own config with the given sizes."""
  backbones = importlib.import_module('mmseg.models.backbones')
  bottleneck, _ = backbones.ResNet.arch_settings[50]
  backbones.ResNet.arch_settings[depth] = (bottleneck, tuple(stage_blocks))
  folder = Path(importlib.import_module('mmseg').__file__).parent / '.mim/configs/nonlocal_net'
  config = importlib.import_module('mmengine.config').Config.fromfile(
    folder / 'nonlocal_r50-d8_4xb4-80k_ade20k-512x512.py'
  )
  model = config.model
  model.pretrained = None
  for part in (model.backbone, model.decode_head, model.auxiliary_head):
    part.norm_cfg = {'type': 'BN', 'requires_grad': True}  # SyncBN needs a process group
  model.backbone.update(depth=depth, base_channels=width, stem_channels=width)
  model.decode_head.update(in_channels=32 * width, channels=8 * width, num_classes=classes)
  model.auxiliary_head.update(in_channels=16 * width, channels=4 * width, num_classes=classes)
  return importlib.import_module('mmseg.registry').MODELS.build(model)


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
  """Fills every array with random nonzero values that keep the scale of activations."""
  generator = torch.Generator().manual_seed(0)
  for name, array in model.state_dict().items():
    if array.ndim > 1:
      fan_in = array[0].numel()
      array.copy_(torch.randn(array.shape, generator=generator) * (2 / fan_in) ** 0.5)
    elif array.is_floating_point():
      low = 0.5 if name.endswith('running_var') else 0.2 if name.endswith('.weight') else -0.3
      array.copy_(torch.rand(array.shape, generator=generator) * 0.6 + low)


def seconds_of(action: Callable[[], object]) -> float:
  """Returns the wall-clock time of a call."""
  started = time.perf_counter()
  action()
  return time.perf_counter() - started


if __name__ == '__main__':
  main()
