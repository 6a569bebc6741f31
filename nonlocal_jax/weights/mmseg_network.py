"""Reads the backbone and the head in a recorded config of MMSegmentation."""

from collections.abc import Mapping
from typing import Any

from nonlocal_jax.weights.config_section import Section

DEFAULT_THRESHOLD = 0.3  # of a network with one output channel

_NORMS = ('BN', 'BN2d', 'SyncBN', 'MMSyncBN')


class NetworkReader:
  """Takes what a network is from the section `model` of a recorded config."""

  def __init__(self, model: Section):
    """Stores the section, which is left without what was read."""
    self._model = model
    self._fields: dict[str, Any] = {}

  def read(self) -> dict[str, Any]:
    """Reads the sections `backbone` and `decode_head`.

    Returns:
      Fields of `NonLocalNetConfig` by name, without those that are not recorded.

    Raises:
      UserError: If a setting can change predictions and is not supported, or is not known.
    """
    model = self._model
    model.expect('type', 'EncoderDecoder', needs='another way from features to labels')
    model.expect('neck', None, needs='a neck between backbone and head')
    self._decode_head(self._backbone())
    model.ignore('pretrained', 'init_cfg', 'train_cfg', 'auxiliary_head')
    return self._fields

  def _backbone(self) -> float:
    """Reads the backbone; returns the epsilon of its batch norms."""
    if not self._model.has('backbone'):
      return 1e-5
    section = self._model.part('backbone')
    typed = section.has_type
    kind = section.kind('ResNetV1c')
    if kind not in ('ResNetV1c', 'ResNet'):
      section.refuse('type', kind, 'which needs another backbone than ResNetV1c')
    section.expect('deep_stem', True, default=kind != 'ResNet', needs='a stem of one convolution')
    section.expect('avg_down', False, needs='shortcuts that pool before they project')
    section.expect(
      'style', 'pytorch', needs='bottlenecks with the stride in their first convolution'
    )
    section.expect('num_stages', 4, needs='another number of stages')
    section.expect('out_indices', (0, 1, 2, 3), needs='features of other stages')
    section.expect('multi_grid', None, needs='dilations of their own for the blocks of stage 4')
    section.expect('plugins', None, (), needs='plugins in the bottlenecks')
    section.expect('dcn', None, needs='deformable convolutions')
    _plain_convolutions(section)
    self._fields |= {
      'stage_strides': section.whole_numbers('strides', 4, (1, 2, 2, 2) if typed else (1, 2, 1, 1)),
      'stage_dilations': section.whole_numbers(
        'dilations', 4, (1, 1, 1, 1) if typed else (1, 1, 2, 4)
      ),
      'contract_dilation': section.is_on('contract_dilation', default=not typed),
    }
    epsilon = _batch_norm_epsilon(section, default={'type': 'BN'})
    self._fields['batch_norm_epsilon'] = epsilon
    # In the shapes of the arrays: depth, channels. Of training only: the others.
    section.ignore('depth', 'in_channels', 'base_channels', 'stem_channels')
    section.ignore('frozen_stages', 'norm_eval', 'with_cp', 'zero_init_residual')
    section.ignore('stage_with_dcn', 'pretrained', 'init_cfg')
    section.close()
    return epsilon

  def _decode_head(self, epsilon: float) -> None:
    if not self._model.has('decode_head'):
      return
    section = self._model.part('decode_head')
    typed = section.has_type
    kind = section.kind('NLHead')
    if kind not in ('NLHead', 'FCNHead'):
      section.refuse('type', kind, 'which needs another head than NLHead')
    if typed:
      self._fields['non_local'] = kind == 'NLHead'
    if kind == 'NLHead':
      modes = ('embedded_gaussian', 'gaussian', 'dot_product', 'concatenation')
      mode = section.take('mode', modes[0])
      if mode not in modes:
        section.refuse('mode', mode, f'which is none of {", ".join(modes)}')
      self._fields |= {
        'mode': mode,
        'use_scale': section.is_on('use_scale', default=True),
        'reduction': section.number('reduction', 2),
      }
    section.expect('num_convs', 2, needs='another number of convolutions in the head')
    section.expect('kernel_size', 3, needs='other kernels in the head')
    section.expect('dilation', 1, needs='dilated convolutions in the head')
    section.expect('concat_input', True, needs='a head without the convolution over its input')
    section.expect('in_index', 3, -1, needs='a head on the features of another stage')
    section.expect('input_transform', None, needs='a head on the features of several stages')
    _plain_convolutions(section)
    activation = section.take('act_cfg', {'type': 'ReLU'})
    if not isinstance(activation, dict) or activation.keys() - {'type', 'inplace'}:
      section.refuse('act_cfg', activation, 'which needs another activation than ReLU')
    if activation.get('type') != 'ReLU':
      section.refuse('act_cfg', activation, 'which needs another activation than ReLU')
    found = _batch_norm_epsilon(section, default=None if typed else {'type': 'BN'})
    if found != epsilon:
      section.refuse('norm_cfg.eps', found, f'which needs another epsilon than the {epsilon} below')
    self._threshold(section)
    if typed or section.has('align_corners'):
      self._fields['align_corners'] = section.is_on('align_corners', default=False)
    section.ignore('in_channels', 'channels', 'dropout_ratio', 'loss_decode')
    section.ignore('ignore_index', 'sampler', 'init_cfg')
    section.close()

  def _threshold(self, section: Section) -> None:
    """Reads how many channels the classifier has, and for a single one its threshold."""
    classes, outputs = section.take('num_classes'), section.take('out_channels')
    outputs = classes if outputs is None else outputs
    threshold = section.take('threshold')
    if outputs != 1:
      if outputs != classes:
        section.refuse('out_channels', outputs, 'which is neither 1 nor the number of classes')
      return
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    if type(threshold) not in (int, float) or not 0 < threshold < 1:
      section.refuse('threshold', threshold, 'which is no number between 0 and 1')
    self._fields['threshold'] = float(threshold)


def _batch_norm_epsilon(section: Section, default: Mapping[str, Any] | None) -> float:
  """Reads `norm_cfg` of a section."""
  settings = section.take('norm_cfg', default)
  if settings is None:
    section.refuse('norm_cfg', None, 'which needs convolutions without normalization')
  norm = Section(settings, f'{section.name}.norm_cfg', section.source)
  kind = norm.kind('BN')
  if kind not in _NORMS:
    norm.refuse('type', kind, 'which needs another normalization than BN')
  norm.expect('affine', True, needs='normalization without scales')
  norm.expect('track_running_stats', True, needs='normalization without running statistics')
  epsilon = norm.take('eps', 1e-5)
  if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
    norm.refuse('eps', epsilon, 'which is no small number')
  norm.ignore('requires_grad', 'momentum')
  norm.close()
  return float(epsilon)


def _plain_convolutions(section: Section) -> None:
  plain = (None, {'type': 'Conv2d'}, {'type': 'Conv'})
  section.expect('conv_cfg', *plain, needs='another kind of convolution')
