"""Writes the config of a network for MMSegmentation 1.x."""

from typing import Any

from nonlocal_jax.models.config import NonLocalNetConfig
from nonlocal_jax.protocol import EvalProtocol


def config_text(network: NonLocalNetConfig, protocol: EvalProtocol) -> str:
  """The config of a network for MMSegmentation 1.x, without multi-scale testing and flips.

  `mmseg_config.recorded_settings` reads it, as people do.
  """
  width, corners = network.width, network.align_corners
  norm = {'type': 'SyncBN', 'eps': network.batch_norm_epsilon, 'requires_grad': True}
  preprocessor: dict[str, Any] = {
    'type': 'SegDataPreProcessor',
    'mean': list(protocol.mean),
    'std': list(protocol.std),
    'bgr_to_rgb': protocol.channel_order == 'rgb',
    'pad_val': 0,
    'seg_pad_val': 255,
  }
  padding = {
    'size_divisor': protocol.pad_multiple,
    'size': protocol.window_crop if protocol.pad_windows else protocol.pad_size,
  }
  padding = {key: value for key, value in padding.items() if value}
  if padding:
    preprocessor['test_cfg'] = padding
  head: dict[str, Any] = {
    'num_classes': network.num_classes,
    'norm_cfg': norm,
    'align_corners': corners,
    'dropout_ratio': network.dropout,
  }
  block = {'mode': network.mode, 'use_scale': network.use_scale, 'reduction': network.reduction}
  test_cfg: dict[str, Any] = {'mode': 'whole'}
  if protocol.window_crop:
    crop, stride = protocol.window_crop, protocol.window_stride
    test_cfg = {'mode': 'slide', 'crop_size': crop, 'stride': stride}
  model = {
    'type': 'EncoderDecoder',
    'data_preprocessor': preprocessor,
    'backbone': {
      'type': 'ResNetV1c',
      'depth': network.depth,
      'in_channels': network.in_channels,
      'base_channels': width,
      'stem_channels': width,
      'strides': network.stage_strides,
      'dilations': network.stage_dilations,
      'contract_dilation': network.contract_dilation,
      'norm_cfg': norm,
    },
    'decode_head': {
      'type': 'NLHead' if network.non_local else 'FCNHead',
      'in_channels': 32 * width,
      'in_index': 3,
      'channels': 8 * width,
      **head,
      **(block if network.non_local else {}),
    },
  }
  if network.auxiliary_head:
    model['auxiliary_head'] = {
      'type': 'FCNHead',
      'in_channels': 16 * width,
      'in_index': 2,
      'channels': 4 * width,
      'num_convs': 1,
      'concat_input': False,
      **head,
      'loss_decode': {'type': 'CrossEntropyLoss', 'loss_weight': 0.4},
    }
  model |= {'train_cfg': {}, 'test_cfg': test_cfg}
  pipeline: list[dict[str, Any]] = [{'type': 'LoadImageFromFile'}]
  size = {'scale': protocol.scale, 'scale_factor': protocol.scale_factor}
  size = {key: value for key, value in size.items() if value}
  if size:
    pipeline.append({'type': 'Resize', **size, 'keep_ratio': protocol.keep_ratio})
  pipeline.append({'type': 'PackSegInputs'})
  return f'model = {_literal(model)}\ntest_pipeline = {_literal(pipeline)}\n'


def _literal(value: Any, indent: str = '') -> str:
  """Formats a value as configs are written, a key per line."""
  more = f'{indent}  '
  if isinstance(value, dict):
    if not any(isinstance(item, dict | list) for item in value.values()):
      return f'dict({", ".join(f"{key}={item!r}" for key, item in value.items())})'
    lines = ''.join(f'{more}{key}={_literal(item, more)},\n' for key, item in value.items())
    return f'dict(\n{lines}{indent})'
  if isinstance(value, list) and any(isinstance(item, dict) for item in value):
    return f'[\n{"".join(f"{more}{_literal(item, more)},{chr(10)}" for item in value)}{indent}]'
  return repr(value)
