"""Every transform against mmsegmentation's own, pixel for pixel, given the same random draws."""

import contextlib
import io
import struct
import zlib
from unittest import mock

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.data import transforms
from nonlocal_jax.ops.normalization import normalize
from tests.mmseg_import import mmseg_module

mmcv = mmseg_module('mmcv')
peers = mmseg_module('mmseg.datasets.transforms')
mmcv_peers = mmseg_module('mmcv.transforms')

CASES = range(500)


def textured_image(rng, h, w):
  """Draws an image with detail at several scales, (h, w, 3) uint8 RGB."""
  image = np.zeros((h, w, 3))
  for cells in (3, 12, 60):
    noise = rng.normal(scale=40, size=(cells, cells, 3))
    image += cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC)
  return np.clip(image + rng.uniform(60, 200, size=3), 0, 255).astype(np.uint8)


def label_map(rng, h, w, classes=6):
  """Draws a label map of patches, one of them large and some ignored, (h, w) uint8."""
  cells = rng.integers(classes, size=(5, 7), dtype=np.uint8)
  cells[:3, :5] = rng.integers(classes)
  cells[rng.random(cells.shape) < 0.1] = 255
  return cv2.resize(cells, (w, h), interpolation=cv2.INTER_NEAREST)


def draw_sample(seed, smallest=40, largest=220):
  """Draws a sample for a case, and the generator that its transforms are to use."""
  rng = np.random.default_rng(seed)
  h, w = rng.integers(smallest, largest, size=2)
  return textured_image(rng, h, w), label_map(rng, h, w), np.random.default_rng(seed + 10_000)


@contextlib.contextmanager
def peer_draws(seed):
  """Lets mmsegmentation draw from the generator that `draw_sample` returns for a case."""
  rng = np.random.default_rng(seed + 10_000)
  draws = {
    'randint': rng.integers,
    'random_sample': rng.random,
    'uniform': rng.uniform,
    'choice': rng.choice,
  }
  with mock.patch.multiple(np.random, **draws):
    yield rng


def peer_sample(image, label):
  """What mmsegmentation's transforms hand to each other, BGR."""
  return {
    'img': np.ascontiguousarray(image[..., ::-1]),
    'img_shape': image.shape[:2],
    'gt_seg_map': label.copy(),
    'seg_fields': ['gt_seg_map'],
  }


def assert_same(ours, theirs):
  image, label = ours
  np.testing.assert_array_equal(image, theirs['img'][..., ::-1])
  np.testing.assert_array_equal(label, theirs['gt_seg_map'])


def encoded(array, suffix, mode=None, **options):
  """Encodes an array with Pillow."""
  file = io.BytesIO()
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(file, suffix, **options)
  return file.getvalue()


def test_decode_image_of_every_kind_and_orientation(tmp_path):
  path = tmp_path / 'image'
  kinds = [('JPEG', 'RGB'), ('JPEG', 'L'), ('PNG', 'RGB'), ('PNG', 'RGBA'), ('PNG', 'P')]
  kinds += [('PNG', 'L'), ('BMP', 'RGB'), ('TIFF', 'RGB')]
  for seed in CASES:
    image, _, _ = draw_sample(seed)
    suffix, mode = kinds[seed % len(kinds)]
    exif = Image.Exif()
    exif[0x0112] = seed // len(kinds) % 8 + 1
    options = {'exif': exif} if suffix == 'JPEG' else {}
    path.write_bytes(encoded(image, suffix, mode, **options))
    theirs = mmcv_peers.LoadImageFromFile()({'img_path': str(path)})['img'][..., ::-1]
    ours = transforms.decode_image(path.read_bytes())
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == np.uint8


def test_decode_label_and_lookup(tmp_path):
  path = tmp_path / 'label.png'
  for seed in CASES:
    rng = np.random.default_rng(seed)
    label = rng.integers(256, size=rng.integers(2, 60, size=2), dtype=np.uint8)
    if seed % 3 == 0:
      data = encoded(label, 'PNG')
    elif seed % 3 == 1:
      file, image = io.BytesIO(), Image.fromarray(label)
      image.putpalette(rng.permutation(768) % 256)
      image.save(file, 'PNG')
      data = file.getvalue()
    else:
      data = encoded(label > 127, 'PNG')
    path.write_bytes(data)
    reduce = bool(seed // 3 % 2)
    load = peers.LoadAnnotations()
    load.reduce_zero_label = reduce
    sample = {'seg_map_path': str(path), 'reduce_zero_label': reduce, 'seg_fields': []}
    lookup = transforms.label_lookup(reduce_zero_label=reduce)
    ours = lookup[transforms.decode_label(path.read_bytes())]
    np.testing.assert_array_equal(ours, load(sample)['gt_seg_map'])
    assert ours.dtype == np.uint8


def test_lookup_ignores_values_as_they_stand_in_the_files():
  lookup = transforms.label_lookup(reduce_zero_label=True, ignore_labels=(3, 300))
  assert lookup[[0, 1, 2, 3, 4, 254, 255]].tolist() == [255, 0, 1, 255, 3, 253, 255]


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_gray_samples_of_any_depth_are_taken_as_they_are(bits, rng):
  label = rng.integers(2**bits, size=(7, 13))
  assert transforms.decode_label(gray_png(label, bits)).tolist() == label.tolist()


def gray_png(label, bits):
  """A PNG file with the values of an array as its samples, put together by the standard."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  h, w = label.shape
  rows = b''
  for row in label.tolist():
    samples = ''.join(format(value, f'0{bits}b') for value in row)
    samples += '0' * (-len(samples) % 8)
    rows += b'\0' + int(samples, 2).to_bytes(len(samples) // 8, 'big')
  header = struct.pack('>IIBBBBB', w, h, bits, 0, 0, 0, 0)
  chunks = chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def test_label_maps_of_other_formats_are_refused():
  """JPEG changes values, whatever the name of the file."""
  with pytest.raises(ValueError, match='not a PNG file but JPEG'):
    transforms.decode_label(encoded(np.zeros((50, 50), np.uint8), 'JPEG'))


def test_label_maps_of_more_pixels_than_pillow_reads_are_refused():
  data = bytearray(gray_png(np.zeros((1, 1), int), 8))
  data[16:24] = struct.pack('>II', 13500, 13500)
  data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
  with pytest.raises(ValueError, match=r'larger than the 178,956,970 pixels that Pillow'):
    transforms.decode_label(bytes(data))


@pytest.mark.parametrize(
  'data', [b'', b'text', encoded(np.zeros((50, 50, 3), np.uint8), 'PNG')[:-60]]
)
def test_broken_files_are_refused(data):
  with pytest.raises(ValueError, match='not an image, or broken'):
    transforms.decode_image(data)
  with pytest.raises(ValueError, match='not an image, or broken'):
    transforms.decode_label(data)


@pytest.mark.parametrize(
  ('array', 'mode'), [(np.zeros((9, 9, 3), np.uint8), 'RGB'), (np.zeros((9, 9), np.uint16), 'I;16')]
)
def test_labels_of_several_channels_or_16_bits_are_refused(array, mode):
  with pytest.raises(ValueError, match=f'not a label map of one channel of 8 bits but {mode}'):
    transforms.decode_label(encoded(array, 'PNG'))


def test_rescaled_size():
  rng = np.random.default_rng(0)
  for _ in range(2000):
    (h, w), box = rng.integers(1, 3000, size=2).tolist(), tuple(rng.integers(1, 3000, 2).tolist())
    theirs = mmcv.rescale_size((w, h), box)
    assert transforms.rescaled_size((h, w), box) == theirs[::-1]
  assert transforms.rescaled_size((1024, 2048), (2049, 1025)) == (1025, 2049)
  assert transforms.rescaled_size((1, 10_000), (2048, 512)) == (1, 2048)  # mmcv: (0, 2048)


def test_resize():
  for seed in CASES:
    image, label, rng = draw_sample(seed)
    box = tuple(rng.integers(30, 400, size=2).tolist())
    theirs = peers.Resize(scale=box, keep_ratio=True)(peer_sample(image, label))
    assert_same((transforms.resize(image, box), transforms.resize_label(label, box)), theirs)


def test_random_scale():
  for seed in CASES:
    image, label, rng = draw_sample(seed)
    scale, ratio_range = ((200, 60), (160, 160), (100, 210))[seed % 3], (0.5, 2.0)
    box = transforms.random_scale(rng, scale, ratio_range)
    ours = transforms.resize(image, box), transforms.resize_label(label, box)
    peer = mmcv_peers.RandomResize(
      scale=scale, ratio_range=ratio_range, resize_type='mmseg.Resize', keep_ratio=True
    )
    with peer_draws(seed):
      theirs = peer(peer_sample(image, label))
    assert box == theirs['scale']
    assert_same(ours, theirs)


def test_random_crop():
  draws = set()
  for seed in CASES:
    image, label, rng = draw_sample(seed)
    rng = mock.Mock(wraps=rng)
    ratio = (0.75, 0.4, 1.0)[seed % 3]
    ours = transforms.random_crop(rng, image, label, (64, 80), ratio)
    with peer_draws(seed):
      theirs = peers.RandomCrop((64, 80), cat_max_ratio=ratio)(peer_sample(image, label))
    assert_same(ours, theirs)
    draws.add(rng.integers.call_count // 2)
  assert {1, 2, 11} <= draws  # at once, at the second attempt, and given up


def test_random_flip():
  flipped = 0
  for seed in CASES:
    image, label, rng = draw_sample(seed)
    prob = (0.5, 0.2, 1.0, 0.0)[seed % 4]
    ours = transforms.random_flip(rng, image, label, prob)
    with peer_draws(seed):
      theirs = peers.RandomFlip(prob=prob)(peer_sample(image, label))
    assert_same(ours, theirs)
    flipped += theirs['flip']
  assert 150 < flipped < 350


def test_photometric_distortion():
  for seed in CASES:
    image, label, rng = draw_sample(seed)
    if seed % 3 == 0:
      image = rng.integers(256, size=image.shape, dtype=np.uint8)  # every colour there is
      rng = np.random.default_rng(seed + 10_000)
    ours = transforms.photometric_distortion(rng, image)
    with peer_draws(seed) as peer_rng:
      theirs = peers.PhotoMetricDistortion()(peer_sample(image, label))
    assert_same((ours, label), theirs)
    assert rng.bit_generator.state == peer_rng.bit_generator.state


def test_train_sample_is_the_training_pipeline():
  crop_size = (96, 120)
  for seed in CASES:
    image, label, rng = draw_sample(seed)
    augment = transforms.AugmentConfig(scale=(220, 130), crop=crop_size)
    ours = transforms.train_sample(rng, image, label, augment)
    with peer_draws(seed):
      theirs = peer_sample(image, label)
      for step in (
        mmcv_peers.RandomResize(
          scale=(220, 130), ratio_range=(0.5, 2.0), resize_type='mmseg.Resize', keep_ratio=True
        ),
        peers.RandomCrop(crop_size, cat_max_ratio=0.75),
        peers.RandomFlip(prob=0.5),
        peers.PhotoMetricDistortion(),
      ):
        theirs = step(theirs)
    h, w = ours['size']
    assert_same((ours['image'][:h, :w], ours['label'][:h, :w]), theirs)
    assert ours['image'].shape == (*crop_size, 3)
    assert ours['label'].shape == crop_size
    assert ours['size'].dtype == np.int32
    assert not ours['image'][h:].any()
    assert not ours['image'][:, w:].any()
    assert (ours['label'][h:] == 255).all()
    assert (ours['label'][:, w:] == 255).all()


def test_train_sample_with_everything_off_only_pads():
  image, label, rng = draw_sample(1, largest=60)
  augment = transforms.AugmentConfig(
    crop=(60, 60), ratio_range=None, cat_max_ratio=1.0, flip_probability=0.0, photometric=False
  )
  sample = transforms.train_sample(rng, image, label, augment)
  h, w = label.shape
  assert sample['size'].tolist() == [h, w]
  np.testing.assert_array_equal(sample['image'][:h, :w], image)
  np.testing.assert_array_equal(sample['label'][:h, :w], label)


def test_normalize_and_padding_on_the_device_are_the_preprocessors():
  """`SegDataPreProcessor`: BGR to RGB, normalised, padded with 0; to the last bit but one."""
  structures = mmseg_module('mmseg.structures')
  to_tensor = mmseg_module('torch').from_numpy
  peer = mmseg_module('mmseg.models').SegDataPreProcessor(
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    size=(64, 80),
  )
  for start in range(0, len(CASES), 100):
    images, sizes, expected = [], [], []
    for seed in CASES[start : start + 100]:
      image, label, _ = draw_sample(seed, smallest=20, largest=64)
      padded, _ = transforms.pad(image, label, (64, 80))
      images.append(padded)
      sizes.append(image.shape[:2])
      sample = structures.SegDataSample(gt_sem_seg=_pixel_data(label))
      inputs = [to_tensor(image[..., ::-1].transpose(2, 0, 1).copy())]
      found = peer({'inputs': inputs, 'data_samples': [sample]}, training=True)['inputs']
      expected.append(found[0].numpy().transpose(1, 2, 0))
    ours = jax.jit(normalize)(np.stack(images), sizes=np.array(sizes, np.int32))
    np.testing.assert_array_max_ulp(np.asarray(ours), np.stack(expected), maxulp=1)


def _pixel_data(label):
  tensor = mmseg_module('torch').from_numpy(label[None].astype(np.int64))
  return mmseg_module('mmengine.structures').PixelData(data=tensor)
