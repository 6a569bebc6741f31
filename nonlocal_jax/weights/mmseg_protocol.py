"""Reads the test of a network in a recorded config of MMSegmentation, 0.x and 1.x."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nonlocal_jax.errors import UserError
from nonlocal_jax.protocol import EvalProtocol, Version
from nonlocal_jax.weights.config_section import Section

_MISSING = object()
_SIZES = ('scale', 'scale_factor', 'keep_ratio')
_WINDOWS = ('window_crop', 'window_stride', 'pad_windows', 'version', 'ratios', 'flip')


class ProtocolReader:
  """Takes how a network was tested from a recorded config.

  Attributes:
    assumed: Names of the fields of `EvalProtocol` that the config does not record.
    notes: Remarks for the user, one sentence each.
  """

  def __init__(
    self,
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    model: Section,
    *,
    source: str,
    in_channels: int,
    key: str,
  ):
    """Finds the pipeline and the version of MMSegmentation.

    Args:
      config: The recorded config.
      meta: What the file records beside it.
      model: The section `model` of the config, which is left without what was read.
      source: What to call the file in errors.
      in_channels: Number of channels of the network's input.
      key: Of the config in `meta`.
    """
    self.assumed: list[str] = []
    self.notes: list[str] = []
    self._config, self._meta, self._source = config, meta, source
    self._in_channels, self._model = in_channels, model
    self._protocol: dict[str, Any] = {}
    self._pipeline, self._pipeline_name = self._test_pipeline()
    preprocessor = model.take('data_preprocessor', config.get('data_preprocessor'))
    self._preprocessor = preprocessor
    is_first = any(
      isinstance(step, dict)
      and str(step.get('type')).rpartition('.')[2] in ('MultiScaleFlipAug', 'Normalize')
      for step in self._pipeline or ()
    )
    self._is_first_version = preprocessor is None and (
      key == 'config' or is_first or 'img_norm_cfg' in config
    )

  def read(self, align_corners: bool | None) -> EvalProtocol:
    """Reads windows, preprocessor and pipeline.

    Args:
      align_corners: The corner convention of the head; None if it is not recorded.

    Raises:
      UserError: If a setting can change predictions and is not supported, or is not known.
    """
    if align_corners is None:
      self.assumed.append('align_corners')
    else:
      self._protocol['align_corners'] = align_corners
    self._windows()
    if self._preprocessor is not None:
      self._data_preprocessor()
    if self._pipeline is not None:
      self._test_steps(self._pipeline)
    else:
      self.assumed += _SIZES
    if 'mean' not in self._protocol:
      self._statistics_of_first_versions()
    try:
      return EvalProtocol(**self._protocol)
    except ValueError as error:
      raise UserError(f'{self._source} records a test that is not supported: {error}.') from error

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
        self.assumed += _WINDOWS
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
      self.assumed += ['mean', 'std', 'channel_order']

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
        self.notes.append(f'Its config has another {other} than {name}, which was taken.')
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
