"""Reads the settings in the config that MMSegmentation saves with its weights, 0.x and 1.x.

A setting that can change a prediction is honored, or refused by name if the network or the test
here has nothing for it. So is a key that is not known.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import EvalProtocol, Version
from nonlocal_jax.weights.config_literals import MAX_CHARACTERS, read_assignments
from nonlocal_jax.weights.config_section import Section

# Key of `meta` in files that this package wrote: JSON of the protocol and what of it was assumed.
PROTOCOL_KEY = 'nonlocal_jax'

DEFAULT_THRESHOLD = 0.3  # of a network with one output channel

_MISSING = object()
_NORMS = ('BN', 'BN2d', 'SyncBN', 'MMSyncBN')
_SIZES = ('scale', 'scale_factor', 'keep_ratio')
_WINDOWS = ('window_crop', 'window_stride', 'pad_windows', 'version', 'ratios', 'flip')


@dataclasses.dataclass(frozen=True)
class RecordedSettings:
  """What a recorded config says about a network and its test.

  Attributes:
    network: Fields of `NonLocalNetConfig` by name.
    protocol: How the network was tested.
    assumed: Names of the protocol's fields that the config does not record.
    notes: Remarks for the user, one sentence each.
  """

  network: Mapping[str, Any]
  protocol: EvalProtocol
  assumed: tuple[str, ...]
  notes: tuple[str, ...] = ()


def recorded_settings(
  meta: Mapping[str, Any], *, source: str, in_channels: int = 3
) -> RecordedSettings:
  """Reads the settings in the `meta` of a checkpoint.

  A key that a section leaves out has MMSegmentation's own default. A section that is left out
  altogether has the settings of the published models.

  Args:
    meta: Not trusted. MMSegmentation 0.x stores the config's text as 'config', 1.x as 'cfg'.
    source: What to call the file in errors.
    in_channels: Number of channels of the network's input.

  Raises:
    UserError: If a setting can change predictions and is not supported, or is not known; the
      message names it.
  """
  texts = {key: meta.get(key) for key in ('cfg', 'config')}
  key = next((key for key, text in texts.items() if type(text) is str and text.strip()), None)
  if key is None:
    return _nothing_recorded()
  try:
    config = read_assignments(str(texts[key]))
  except ValueError as error:
    raise UserError(
      f"{source} records a config that cannot be read (meta['{key}']): {error}; load the weights "
      'from a file without it.'
    ) from error
  if 'model' not in config:
    return _nothing_recorded()
  recorded = _Reader(config, meta, source=source, in_channels=in_channels, key=key).read()
  ours = meta.get(PROTOCOL_KEY)
  if type(ours) is not str:
    return recorded
  try:
    if len(ours) > MAX_CHARACTERS:
      raise ValueError('too long')
    fields = json.loads(ours)
    protocol = EvalProtocol.from_dict(fields['protocol'])
    assumed = tuple(name for name in fields['assumed'] if hasattr(protocol, name))
  except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
    raise UserError(
      f"{source} has a damaged test protocol (meta['{PROTOCOL_KEY}']); write it again."
    ) from error
  return dataclasses.replace(recorded, protocol=protocol, assumed=assumed)


def protocol_entry(protocol: EvalProtocol, assumed: Sequence[str]) -> str:
  """The entry `PROTOCOL_KEY` of a file's `meta`, which holds what a config cannot."""
  return json.dumps({'protocol': protocol.to_dict(), 'assumed': list(assumed)})


def _nothing_recorded() -> RecordedSettings:
  return RecordedSettings(
    {}, EvalProtocol(), tuple(f.name for f in dataclasses.fields(EvalProtocol))
  )


class _Reader:
  """Reads a config that records a model."""

  def __init__(
    self,
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    source: str,
    in_channels: int,
    key: str,
  ):
    self._config, self._meta, self._source = config, meta, source
    self._in_channels = in_channels
    self._model = Section(config['model'], 'model', source)
    self._network: dict[str, Any] = {}
    self._protocol: dict[str, Any] = {}
    self._assumed: list[str] = []
    self._notes: list[str] = []
    self._pipeline, self._pipeline_name = self._test_pipeline()
    preprocessor = self._model.take('data_preprocessor', config.get('data_preprocessor'))
    self._preprocessor = preprocessor
    is_first = any(
      isinstance(step, dict)
      and str(step.get('type')).rpartition('.')[2] in ('MultiScaleFlipAug', 'Normalize')
      for step in self._pipeline or ()
    )
    self._is_first_version = preprocessor is None and (
      key == 'config' or is_first or 'img_norm_cfg' in config
    )

  def read(self) -> RecordedSettings:
    model = self._model
    model.expect('type', 'EncoderDecoder', needs='another way from features to labels')
    model.expect('neck', None, needs='a neck between backbone and head')
    epsilon = self._backbone()
    self._decode_head(epsilon)
    self._windows()
    model.ignore('pretrained', 'init_cfg', 'train_cfg', 'auxiliary_head')
    model.close()
    if self._preprocessor is not None:
      self._data_preprocessor()
    if self._pipeline is not None:
      self._test_steps(self._pipeline)
    else:
      self._assumed += _SIZES
    if 'mean' not in self._protocol:
      self._statistics_of_first_versions()
    try:
      protocol = EvalProtocol(**self._protocol)
    except ValueError as error:
      raise UserError(f'{self._source} records a test that is not supported: {error}.') from error
    return RecordedSettings(self._network, protocol, tuple(self._assumed), tuple(self._notes))

  def _backbone(self) -> float:
    """Reads the backbone; returns the epsilon of its batch norms."""
    if 'backbone' not in self._config['model']:
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
    self._network |= {
      'stage_strides': section.whole_numbers('strides', 4, (1, 2, 2, 2) if typed else (1, 2, 1, 1)),
      'stage_dilations': section.whole_numbers(
        'dilations', 4, (1, 1, 1, 1) if typed else (1, 1, 2, 4)
      ),
      'contract_dilation': section.is_on('contract_dilation', default=not typed),
    }
    epsilon = _batch_norm_epsilon(section, default={'type': 'BN'})
    self._network['batch_norm_epsilon'] = epsilon
    # In the shapes of the arrays: depth, channels. Of training only: the others.
    section.ignore('depth', 'in_channels', 'base_channels', 'stem_channels')
    section.ignore('frozen_stages', 'norm_eval', 'with_cp', 'zero_init_residual')
    section.ignore('stage_with_dcn', 'pretrained', 'init_cfg')
    section.close()
    return epsilon

  def _decode_head(self, epsilon: float) -> None:
    if 'decode_head' not in self._config['model']:
      self._assumed.append('align_corners')
      return
    section = self._model.part('decode_head')
    typed = section.has_type
    kind = section.kind('NLHead')
    if kind not in ('NLHead', 'FCNHead'):
      section.refuse('type', kind, 'which needs another head than NLHead')
    if typed:
      self._network['non_local'] = kind == 'NLHead'
    if kind == 'NLHead':
      modes = ('embedded_gaussian', 'gaussian', 'dot_product', 'concatenation')
      mode = section.take('mode', modes[0])
      if mode not in modes:
        section.refuse('mode', mode, f'which is none of {", ".join(modes)}')
      self._network |= {
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
    if 'align_corners' not in self._config['model']['decode_head'] and not typed:
      self._assumed.append('align_corners')
    corners = section.is_on('align_corners', default=False)
    self._network['align_corners'] = self._protocol['align_corners'] = corners
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
    self._network['threshold'] = float(threshold)

  def _windows(self) -> None:
    """Reads `test_cfg`, of the model or, in the first versions, beside it."""
    version: Version = 'v0' if self._is_first_version else 'v1'
    pads = self._is_first_version and self._released_before(6)
    self._protocol |= {'version': version, 'pad_windows': pads}
    settings = self._model.take('test_cfg', _MISSING)
    name = 'model.test_cfg'
    beside = self._config.get('test_cfg')
    # The one beside a model of 1.x is about the runner.
    if settings in (_MISSING, None) and isinstance(beside, dict) and 'type' not in beside:
      settings, name = beside, 'test_cfg'
    if settings in (_MISSING, None):
      if not self._model.has_type:
        self._assumed += _WINDOWS
      return
    section = Section(settings, name, self._source)
    mode = section.take('mode', 'whole')
    if mode not in ('whole', 'slide'):
      section.refuse('mode', mode, "which is neither 'whole' nor 'slide'")
    if mode == 'slide':
      self._protocol |= {
        'window_crop': section.whole_numbers('crop_size', 2),
        'window_stride': section.whole_numbers('stride', 2),
      }
    section.ignore('crop_size', 'stride')
    section.close()

  def _data_preprocessor(self) -> None:
    section = Section(self._preprocessor, 'data_preprocessor', self._source)
    kind = section.kind('SegDataPreProcessor')
    if kind != 'SegDataPreProcessor':
      section.refuse('type', kind, 'which needs another preprocessor than SegDataPreProcessor')
    # Images are read as BGR; either setting swaps the channels.
    swaps = [section.is_on(key, default=False) for key in ('bgr_to_rgb', 'rgb_to_bgr')]
    self._normalization(section, 'rgb' if any(swaps) else 'bgr')
    pad_value = section.take('pad_val', 0)
    padding = section.take('test_cfg')
    if padding:
      padding = Section(padding, 'data_preprocessor.test_cfg', self._source)
      if pad_value != 0:
        section.refuse('pad_val', pad_value, 'which needs padding with other values than 0')
      self._pad(padding, multiple='size_divisor', size='size')
      padding.close()
    section.ignore('size', 'size_divisor', 'seg_pad_val', 'batch_augments', 'non_blocking')
    section.close()

  def _pad(self, section: Section, *, multiple: str, size: str) -> None:
    """Reads the padding of test images: to a multiple, or to a size of at least a window's."""
    to_multiple = section.number(multiple, 1)
    to_size = section.whole_numbers(size, 2, None)
    crop = self._protocol.get('window_crop')
    if crop is None:
      self._protocol |= {
        'pad_multiple': to_multiple if to_multiple > 1 else None,
        'pad_size': to_size,
      }
      return
    # An image padded to a window's size gives the same windows, each padded.
    if to_multiple > 1:
      section.refuse(multiple, to_multiple, 'which needs windows over a padded image')
    if to_size not in (None, crop):
      section.refuse(size, to_size, 'which needs windows over a padded image')
    self._protocol['pad_windows'] |= to_size == crop

  def _normalization(self, section: Section, order: str) -> None:
    """Reads mean and standard deviation, for an order of the channels."""
    channels = self._in_channels
    mean, std = section.take('mean'), section.take('std')
    if mean is None:
      mean, std = 0.0, 1.0
    values = {}
    for name, value in (('mean', mean), ('std', std)):
      numbers = value if isinstance(value, tuple) else (value,)
      numbers = numbers * channels if len(numbers) == 1 else numbers
      if len(numbers) != channels or not all(type(x) in (int, float) for x in numbers):
        section.refuse(name, value, f'which is not {channels} numbers, one for each channel')
      if not all(math.isfinite(x) for x in numbers) or (name == 'std' and min(numbers) <= 0):
        section.refuse(name, value, 'which does not normalize')
      values[name] = tuple(float(x) for x in numbers)
    # Only three channels are swapped.
    self._protocol |= {**values, 'channel_order': order if channels == 3 else 'rgb'}

  def _statistics_of_first_versions(self) -> None:
    """Takes the normalization from `img_norm_cfg` where the pipeline does not give it."""
    settings = self._config.get('img_norm_cfg')
    if settings is not None:
      self._normalize(Section(settings, 'img_norm_cfg', self._source))
    elif self._pipeline is not None and self._model.has_type:
      Section({}, self._pipeline_name, self._source).refuse(
        'type',
        'Normalize',
        'which is missing, as is a data_preprocessor: images are not normalized',
      )
    else:
      self._assumed += ['mean', 'std', 'channel_order']

  def _normalize(self, section: Section) -> None:
    self._normalization(section, 'rgb' if section.is_on('to_rgb', default=True) else 'bgr')
    section.close()

  def _test_pipeline(self) -> tuple[Sequence[Any] | None, str]:
    """The steps of testing and their name; None if they are not recorded."""
    places = ('test_pipeline', 'test_dataloader.dataset.pipeline', 'data.test.pipeline')
    found = {place: _at(self._config, place) for place in places}
    found = {place: steps for place, steps in found.items() if isinstance(steps, tuple)}
    if not found:
      return None, ''
    name, *others = found
    for other in others:
      if _without_annotations(found[other]) != _without_annotations(found[name]):
        self._notes.append(f'Its config has another {other} than {name}, which was taken.')
    return found[name], name

  def _test_steps(self, steps: Sequence[Any]) -> None:
    """Reads what a pipeline does to an image before it is normalized."""
    steps_by_type: dict[str, Callable[[Section], None]] = {
      'LoadImageFromFile': self._load,
      'Resize': self._resize,
      'MultiScaleFlipAug': self._multi_scale_flip,
      'Normalize': self._normalize_once,
      'Pad': self._pad_step,
      'RandomFlip': self._flip,
    }
    # They make tensors, or read labels.
    harmless = ('LoadImageFromNDArray', 'InferencerLoader', 'LoadAnnotations', 'PackSegInputs')
    harmless += ('ImageToTensor', 'ToTensor', 'DefaultFormatBundle', 'Collect')
    for index, step in enumerate(steps):
      section = Section(step, f'{self._pipeline_name}[{index}]', self._source)
      kind = section.kind('')
      if kind in harmless:
        continue
      if kind not in steps_by_type:
        section.refuse('type', kind, 'a step of testing that is not known here')
      section.name = f'{self._pipeline_name}.{kind}'
      steps_by_type[kind](section)
      section.close()

  def _load(self, section: Section) -> None:
    section.expect('to_float32', False, needs='images resized as floats')
    section.expect('imdecode_backend', 'cv2', needs='images decoded by another library')
    if self._in_channels == 3:
      section.expect('color_type', 'color', needs='images read in another way')
    section.ignore('color_type', 'file_client_args', 'backend_args', 'ignore_empty')

  def _resize(self, section: Section) -> None:
    if 'keep_ratio' in self._protocol:
      section.refuse('type', 'Resize', 'the second one')
    keep = section.is_on('keep_ratio', default=self._is_first_version or not self._model.has_type)
    self._protocol['keep_ratio'] = keep
    section.expect('backend', 'cv2', needs='images resized by another library')
    section.expect('interpolation', 'bilinear', needs='images resized in another way')
    section.expect('ratio_range', None, needs='images resized at random')
    section.expect('min_size', None, needs='a smallest side')
    section.ignore('clip_object_border', 'multiscale_mode', 'override')
    scale, old, factor = (
      section.take('scale'),
      section.take('img_scale'),
      section.take('scale_factor'),
    )
    if self._is_first_version and 'scale' in self._protocol:
      return  # that of MultiScaleFlipAug counts
    if scale is None:
      scale = old
    if scale is not None:
      self._protocol['scale'] = self._box(section, 'scale', scale)
    elif factor is not None:
      factors = factor if isinstance(factor, tuple) else (factor, factor)
      if len(factors) != 2 or not all(type(x) in (int, float) and 0 < x < 1e3 for x in factors):
        section.refuse('scale_factor', factor, 'which is not one or two positive numbers')
      self._protocol['scale_factor'] = tuple(float(x) for x in factors)
    else:
      section.refuse('scale', None, 'which gives no size')

  def _box(self, section: Section, key: str, value: Any) -> tuple[int, int]:
    value = (value, value) if type(value) is int else value
    if isinstance(value, tuple) and len(value) == 1:
      value = value[0]
    width, height = Section({key: value}, section.name, self._source).whole_numbers(key, 2)
    return width, height

  def _multi_scale_flip(self, section: Section) -> None:
    """Reads the step of 0.x around all others, which also tests several sizes and flips."""
    scale, ratios = section.take('img_scale'), section.take('img_ratios')
    ratios = (1.0,) if ratios is None else ratios
    ratios = ratios if isinstance(ratios, tuple) else (ratios,)
    if not ratios or not all(type(x) in (int, float) and 0 < x < 100 for x in ratios):
      section.refuse('img_ratios', ratios, 'which is not positive numbers')
    flip = section.is_on('flip', default=False)
    if flip:
      section.expect(
        'flip_direction', 'horizontal', ('horizontal',), needs='images flipped upside down'
      )
    section.ignore('flip_direction')
    if scale is None:
      if ratios != (1,):
        section.refuse('img_ratios', ratios, 'which needs a scale to multiply')
      self._protocol['scale'] = None
    else:
      self._protocol['scale'] = self._box(section, 'img_scale', scale)
    self._protocol |= {'ratios': tuple(float(x) for x in ratios), 'flip': flip}
    steps = section.take('transforms', ())
    if not isinstance(steps, tuple):
      section.refuse('transforms', steps, 'which is no list')
    kinds = [step.get('type') for step in steps if isinstance(step, dict)]
    if flip and 'RandomFlip' not in kinds:
      section.refuse('flip', True, 'but no RandomFlip among its steps')
    if scale is not None and 'Resize' not in kinds:
      section.refuse('img_scale', scale, 'but no Resize among its steps')
    self._test_steps(steps)

  def _flip(self, section: Section) -> None:
    """Reads the flip of 0.x, which its MultiScaleFlipAug turns on, or one that never happens."""
    if not self._is_first_version:
      for key in ('prob', 'flip_ratio'):
        section.expect(key, None, 0, 0.0, needs='images flipped at random')
    section.ignore('prob', 'flip_ratio', 'direction')

  def _normalize_once(self, section: Section) -> None:
    if 'mean' in self._protocol:
      section.refuse('mean', section.take('mean'), 'beside a data_preprocessor')
    self._normalize(section)

  def _pad_step(self, section: Section) -> None:
    """Reads the padding of 0.x, after normalization, which was cut off again from 0.26 on."""
    if not self._is_first_version or 'mean' not in self._protocol:
      section.refuse('type', 'Pad', 'which needs padding before the images are normalized')
    if self._released_before(26, unknown=False):
      section.refuse('type', 'Pad', 'which MMSegmentation before 0.26 did not cut off again')
    section.expect('pad_val', 0, 0.0, needs='padding with other values than 0')
    section.ignore('seg_pad_val')
    self._pad(section, multiple='size_divisor', size='size')

  def _released_before(self, minor: int, *, unknown: bool = True) -> bool:
    """Whether the MMSegmentation that saved the file is older than 0.`minor`."""
    version = self._meta.get('mmseg_version')
    match = re.match(r'(\d{1,4})\.(\d{1,4})', version) if type(version) is str else None
    return unknown if match is None else (int(match[1]), int(match[2])) < (0, minor)


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


def _at(config: Mapping[str, Any], place: str) -> Any:
  value: Any = config
  for key in place.split('.'):
    value = value.get(key) if isinstance(value, Mapping) else None
  return value


def _without_annotations(steps: Sequence[Any]) -> list[Any]:
  return [
    step
    for step in steps
    if not (isinstance(step, dict) and str(step.get('type')).startswith(('Load', 'Pack')))
  ]
