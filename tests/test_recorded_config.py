"""Settings in the configs that mmsegmentation saves: honored as it does, or refused by name."""

import copy
import dataclasses
import inspect
import json

import cv2
import numpy as np
import pytest
import torch

import nonlocal_jax
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNetConfig
from nonlocal_jax.protocol import RATIOS, EvalProtocol
from nonlocal_jax.weights.mmseg_config import protocol_entry, recorded_settings
from nonlocal_jax.weights.mmseg_config_text import config_text
from tests import peer

NAME = 'nonlocal_r50-d8_4xb4-20k_voc12aug-512x512'
ALL = tuple(field.name for field in dataclasses.fields(EvalProtocol))


def resize(**settings):
  return {'type': 'Resize', **settings}


def changed(config, changes):
  """A copy of a config with other settings in its sections, by dotted names."""
  config = copy.deepcopy(config)
  for key, value in changes.items():
    place, _, name = key.rpartition('.')
    section = config
    for part in place.split('.') if place else ():
      section = section[part]
    section[name] = value
  if 'model.data_preprocessor' not in changes and 'resize' in config:
    step = config.pop('resize')
    config.test_pipeline = [config.test_pipeline[0], *([step] if step else []), *PACK]
  return config


PACK = [{'type': 'PackSegInputs'}]

# Each changes the function that the weights compute, or what it is applied to, and no shape but
# where `reduction` and `mode` do.
VARIANTS = {
  'inputs': {
    'model.data_preprocessor.bgr_to_rgb': False,
    'model.data_preprocessor.mean': [90.0, 100.0, 110.0],
    'model.data_preprocessor.std': [70.0, 60.0, 50.0],
    'model.backbone.strides': (1, 2, 2, 1),
    'model.backbone.dilations': (1, 1, 1, 2),
    'model.backbone.norm_cfg.eps': 0.1,
    'model.decode_head.norm_cfg.eps': 0.1,
    'model.decode_head.mode': 'dot_product',
    'resize': None,
  },
  'padded_to_a_multiple': {
    'model.data_preprocessor.test_cfg': {'size_divisor': 32},
    'model.backbone.contract_dilation': False,
    'model.decode_head.use_scale': False,
    'model.decode_head.reduction': 4,
    'resize': resize(scale=(90, 50)),
  },
  'padded_to_a_size': {
    'model.data_preprocessor.test_cfg': {'size': (80, 100)},
    'model.decode_head.mode': 'gaussian',
    'model.decode_head.align_corners': True,
    'resize': resize(scale_factor=(1.5, 0.8), keep_ratio=True),
  },
  'windows_larger_than_the_image': {
    'model.test_cfg': {'mode': 'slide', 'crop_size': (64, 48), 'stride': (40, 30)},
    'model.decode_head.mode': 'concatenation',
    'resize': resize(scale_factor=0.7),
  },
  'windows_of_padded_images': {
    'model.test_cfg': {'mode': 'slide', 'crop_size': (64, 48), 'stride': (40, 30)},
    'model.data_preprocessor.test_cfg': {'size': (64, 48)},
    'model.data_preprocessor.bgr_to_rgb': False,
    'model.data_preprocessor.rgb_to_bgr': True,
    'model.data_preprocessor.mean': None,
    'resize': resize(scale=72, keep_ratio=True),
  },
}


@pytest.fixture(scope='module')
def base_config():
  return peer.small_config(NAME, width=8, num_classes=30, shallow=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIANTS)
def test_each_of_these_settings_changes_the_predictions(name, base_config, tmp_path):
  """Those that change no shape, in mmsegmentation: none could be ignored unnoticed."""
  config = changed(base_config, VARIANTS[name])
  model = peer.randomise(peer.build_model(config))
  write_image(tmp_path / 'x.png')
  expected = peer.predict_file(config, model, tmp_path / 'x.png')
  for key, value in VARIANTS[name].items():
    if value in (4, 'gaussian', 'concatenation') or (
      name.startswith('windows_of') and 'bgr_to_rgb' in key
    ):
      continue
    others = {k: v for k, v in VARIANTS[name].items() if k != key}
    config = changed(base_config, {'resize': resize(scale=(64, 64), keep_ratio=True), **others})
    other = peer.build_model(config)
    other.load_state_dict(model.state_dict(), strict=True)
    assert (peer.predict_file(config, other, tmp_path / 'x.png') != expected).any(), key


def write_image(path):
  image = np.random.default_rng(0).integers(0, 256, (15, 19, 3), np.uint8)
  cv2.imwrite(str(path), cv2.resize(image, (75, 58)))


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIANTS)
def test_predictions_are_those_of_the_original(name, base_config, converter, tmp_path):
  """Of the file, of the directory that it becomes, and of the file that this becomes."""
  config = changed(base_config, VARIANTS[name])
  model = peer.randomise(peer.build_model(config))
  meta = {'cfg': config.pretty_text, 'mmseg_version': '1.2.2'}
  torch.save({'meta': meta, 'state_dict': model.state_dict()}, tmp_path / 'x.pth')
  write_image(tmp_path / 'x.png')
  expected = peer.predict_file(config, model, tmp_path / 'x.png')
  assert len(np.unique(expected)) > 2
  loaded = nonlocal_jax.load(tmp_path / 'x.pth')
  assert (loaded.predict(tmp_path / 'x.png') == expected).mean() >= 0.999
  assert not loaded.description.assumed
  assert converter(tmp_path / 'x.pth', tmp_path / 'converted') == (None, '')
  assert converter(tmp_path / 'converted', '--to-pth', tmp_path / 'back.pth') == (None, '')
  for path in ('converted', 'back.pth'):
    description = nonlocal_jax.load(tmp_path / path).description
    assert description.protocol == loaded.protocol
    assert description.config.predicts_like(loaded.description.config)
  # The text alone says the same, to mmsegmentation as well.
  written = torch.load(tmp_path / 'back.pth')['meta']['cfg']
  assert settings_of(written).protocol == loaded.protocol
  again = peer.parse_config(written)
  for part in (again.model.backbone, again.model.decode_head, again.model.auxiliary_head):
    part.norm_cfg.type = 'BN'
  again.model.backbone.depth = config.model.backbone.depth
  again_model = peer.build_model(again)
  again_model.load_state_dict(torch.load(tmp_path / 'back.pth')['state_dict'], strict=True)
  found = peer.predict_file(again, again_model, tmp_path / 'x.png')
  np.testing.assert_array_equal(found, expected)


def settings_of(text, key='cfg', **meta):
  return recorded_settings({key: text, **meta}, source='x.pth')


REFUSED = [
  ({'model.type': 'CascadeEncoderDecoder'}, "model.type='CascadeEncoderDecoder'"),
  ({'model.neck': {'type': 'FPN'}}, r"model.neck=\{'type': 'FPN'\}, which needs a neck"),
  ({'model.backbone.type': 'ResNetV1d'}, 'model.backbone.type='),
  ({'model.backbone.type': 'ResNet'}, 'model.backbone.deep_stem=False'),
  ({'model.backbone.avg_down': True}, 'model.backbone.avg_down=True'),
  ({'model.backbone.style': 'caffe'}, "model.backbone.style='caffe', which needs bottlenecks"),
  ({'model.backbone.multi_grid': (1, 2, 4)}, 'model.backbone.multi_grid'),
  ({'model.backbone.out_indices': (0, 1, 3, 2)}, 'model.backbone.out_indices'),
  ({'model.backbone.dcn': {'type': 'DCN'}}, 'model.backbone.dcn'),
  ({'model.backbone.strides': (1, 2, 0, 1)}, 'model.backbone.strides'),
  ({'model.backbone.norm_cfg.type': 'GN'}, 'model.backbone.norm_cfg.type'),
  ({'model.backbone.norm_cfg.eps': 0.5}, 'model.decode_head.norm_cfg.eps=1e-05'),
  ({'model.backbone.blur': True}, 'model.backbone.blur=True, a setting that is not known'),
  ({'model.decode_head.type': 'ANNHead'}, 'model.decode_head.type'),
  ({'model.decode_head.mode': 'cosine'}, 'model.decode_head.mode'),
  ({'model.decode_head.dilation': 2}, 'model.decode_head.dilation=2'),
  ({'model.decode_head.in_index': 2}, 'model.decode_head.in_index=2'),
  ({'model.decode_head.act_cfg': {'type': 'GELU'}}, 'model.decode_head.act_cfg'),
  ({'model.decode_head.out_channels': 2}, 'model.decode_head.out_channels=2'),
  (
    {'model.decode_head.out_channels': 1, 'model.decode_head.threshold': 1.5},
    'model.decode_head.threshold=1.5',
  ),
  ({'model.decode_head.temperature': 2.0}, 'model.decode_head.temperature=2.0, a setting'),
  ({'model.data_preprocessor.mean': [1.0, 2.0]}, 'data_preprocessor.mean'),
  ({'model.data_preprocessor.std': [1.0, 0.0, 2.0]}, 'data_preprocessor.std'),
  ({'model.data_preprocessor.gamma': 2}, 'data_preprocessor.gamma=2'),
  (
    {'model.data_preprocessor.test_cfg': {'size_divisor': 8}, 'model.data_preprocessor.pad_val': 9},
    'data_preprocessor.pad_val=9',
  ),
  (
    {
      'model.data_preprocessor.test_cfg': {'size_divisor': 8},
      'model.test_cfg': {'mode': 'slide', 'crop_size': (64, 48), 'stride': (40, 30)},
    },
    'data_preprocessor.test_cfg.size_divisor=8',
  ),
  ({'model.test_cfg': {'mode': 'tile'}}, "model.test_cfg.mode='tile'"),
  ({'model.test_cfg': {'mode': 'slide', 'crop_size': (9, 9)}}, 'model.test_cfg.stride'),
  (
    {'model.test_cfg': {'mode': 'slide', 'crop_size': (9, 9), 'stride': (10, 9)}},
    r'window_stride is \(10, 9\), which leaves gaps',
  ),
  ({'model.test_cfg': {'mode': 'whole', 'blend': 1}}, 'model.test_cfg.blend=1'),
  (
    {'resize': resize(scale=(9, 9), interpolation='area')},
    "test_pipeline.Resize.interpolation='area'",
  ),
  ({'resize': resize(scale=(9, 9), backend='pillow')}, 'test_pipeline.Resize.backend'),
  ({'resize': resize(scale=(9, 9), sharpen=1)}, 'test_pipeline.Resize.sharpen=1'),
  ({'resize': {'type': 'ResizeToMultiple'}}, r"test_pipeline\[1\].type='ResizeToMultiple'"),
  ({'resize': {'type': 'Pad', 'size': (9, 9)}}, "test_pipeline.Pad.type='Pad'"),
  ({'resize': {'type': 'RandomFlip', 'prob': 0.5}}, 'test_pipeline.RandomFlip.prob=0.5'),
]


@pytest.mark.parametrize(('changes', 'message'), REFUSED, ids=lambda x: str(x)[:50])
def test_what_is_not_supported_is_refused_by_name(changes, message, base_config):
  with pytest.raises(UserError, match=message) as caught:
    settings_of(changed(base_config, changes).pretty_text)
  assert str(caught.value).startswith('x.pth records a ')


@pytest.mark.parametrize(
  'section', ['model.backbone', 'model.decode_head', 'model.data_preprocessor']
)
def test_every_setting_of_the_original_is_known(section, base_config):
  """Each argument of mmsegmentation's classes, at its default: taken, or refused for a reason."""
  classes = {
    'model.backbone': ('mmseg.models.backbones.ResNet',),
    'model.decode_head': (
      'mmseg.models.decode_heads.NLHead',
      'mmseg.models.decode_heads.FCNHead',
      'mmseg.models.decode_heads.decode_head.BaseDecodeHead',
    ),
    'model.data_preprocessor': ('mmseg.models.SegDataPreProcessor',),
  }
  known = 0
  for path in classes[section]:
    module, _, name = path.rpartition('.')
    arguments = inspect.signature(getattr(peer.mmseg_module(module), name).__init__).parameters
    for argument in arguments.values():
      if argument.default is inspect.Parameter.empty:
        continue
      config = changed(base_config, {f'{section}.{argument.name}': argument.default})
      try:
        settings_of(config.pretty_text)
      except UserError as error:
        assert 'not known' not in str(error)
      known += 1
  assert known >= 9


FIRST_VERSIONS = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(
        type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False, style='pytorch', contract_dilation=True),
    decode_head=dict(
        type='NLHead', in_channels=2048, in_index=3, channels=512, dropout_ratio=0.1, reduction=2,
        use_scale=False, mode='embedded_gaussian', num_classes=19,
        norm_cfg=dict(type='SyncBN', requires_grad=True), align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', align_corners=False))
train_cfg = dict()
test_cfg = dict(mode='slide', crop_size=(769, 769), stride=(513, 513))
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=False)
train_pipeline = [dict(type='Resize', img_scale=(4, 5), ratio_range=(0.5, 2.0))]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(2049, 1025),
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=False),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img'])
        ])
]
"""


def test_configs_of_the_first_versions():
  expected = EvalProtocol(
    scale=(2049, 1025),
    window_crop=(769, 769),
    window_stride=(513, 513),
    align_corners=True,
    channel_order='bgr',
    mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0),
  )
  for key in ('config', 'cfg'):
    found = settings_of(FIRST_VERSIONS, key, mmseg_version='0.5.0')
    assert (found.protocol, found.assumed, found.notes) == (expected, (), ())
    network = NonLocalNetConfig.from_depth(50, num_classes=19, **found.network)
    assert network.differences(NonLocalNetConfig.from_depth(50, num_classes=19)) == [
      'use_scale False, not True',
      'align_corners True, not False',
    ]
  # Windows were padded until 0.6.
  later = settings_of(FIRST_VERSIONS, 'config', mmseg_version='0.30.0').protocol
  assert later == dataclasses.replace(expected, pad_windows=False)
  several = FIRST_VERSIONS.replace('flip=False', f'img_ratios={list(RATIOS)}, flip=True')
  assert settings_of(several, 'config').protocol == expected.with_multi_scale_flip()
  without = FIRST_VERSIONS.replace("'Normalize'", "'ToTensor'")
  assert settings_of(without, 'config').protocol == expected  # img_norm_cfg
  own_size = FIRST_VERSIONS.replace('(2049, 1025)', 'None').replace('slide', 'whole')
  found = settings_of(own_size, 'config', mmseg_version='0.5.0').protocol
  assert (found.scale, found.window_crop) == (None, None)


def test_padding_of_the_first_versions():
  """It was cut off again from 0.26 on."""
  step = "dict(type='Pad', size_divisor=32), dict(type='ImageToTensor'"
  text = FIRST_VERSIONS.replace("dict(type='ImageToTensor'", step).replace('slide', 'whole')
  assert settings_of(text, 'config', mmseg_version='0.30.0').protocol.pad_multiple == 32
  with pytest.raises(UserError, match=r"Pad.type='Pad', which MMSegmentation before 0\.26"):
    settings_of(text, 'config', mmseg_version='0.25.0')


def test_what_a_config_leaves_open_is_named():
  for nothing in ({}, {'config': ''}, {'config': 3, 'cfg': ['x']}, {'cfg': 'align_corners = True'}):
    found = recorded_settings(nothing, source='x.pth')
    assert (found.network, found.protocol, found.assumed) == ({}, EvalProtocol(), ALL)
  # As this package wrote it before 2027.
  text = (
    'model = dict(decode_head=dict(align_corners=True), auxiliary_head=dict(align_corners=True), '
    "test_cfg=dict(mode='slide', crop_size=(65, 65), stride=(43, 43)))\n"
    "test_pipeline = [dict(type='Resize', scale=(161, 97))]\n"
  )
  found = settings_of(text, 'config')
  assert found.protocol == EvalProtocol(
    scale=(161, 97), window_crop=(65, 65), window_stride=(43, 43), align_corners=True
  )
  assert found.assumed == ('mean', 'std', 'channel_order')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('model = dict(', r"records a config that cannot be read \(meta\['cfg'\]\): it is no Python"),
    ('a = 1\n' * 50_000, 'it has 300000 characters'),
    ('a = ' + '[' * 5000, 'it is no Python'),
    ('model = dict(type=open("x"))', 'model.type='),
    ('model = open("x")', 'model=an expression, which is not a dict'),
    ("model = dict(type='EncoderDecoder', backbone=3)", 'model.backbone=3, which is not a dict'),
    ("model = {'type': 'EncoderDecoder', 'a\\x1b[2J': 3}", r'model.a\\x1b\[2J=3'),
  ],
)
def test_texts_of_any_kind(text, message):
  with pytest.raises(UserError, match=message) as caught:
    settings_of(text)
  assert str(caught.value).isprintable()


def test_a_damaged_entry_of_this_package():
  text = config_text(NonLocalNetConfig.from_depth(50, num_classes=3), EvalProtocol())
  for entry in ('{', '[]', json.dumps({'protocol': {'scale': 3}, 'assumed': []})):
    with pytest.raises(UserError, match=r'x\.pth has a damaged test protocol'):
      settings_of(text, nonlocal_jax=entry)


def test_an_edited_config_of_a_file_of_this_package(base_config):
  text = changed(base_config, {'resize': resize(scale=(90, 50), keep_ratio=True)}).pretty_text
  written = settings_of(text).protocol
  entry = {'nonlocal_jax': protocol_entry(written.with_multi_scale_flip(), ())}
  assert settings_of(text, **entry).protocol == written.with_multi_scale_flip()
  for before, after, message in (
    ('bgr_to_rgb=True', 'bgr_to_rgb=False', 'channel_order=bgr in its config and rgb in meta'),
    ('123.675', '100.5', 'mean='),
    ('align_corners=False', 'align_corners=True', 'align_corners=True in its config and False'),
  ):
    assert before in text
    with pytest.raises(UserError, match=f'{message}.* take out that entry'):
      settings_of(text.replace(before, after), **entry)
