"""Paths, PIL images and arrays as arrays."""

import struct

import numpy as np
import pytest
from PIL import Image

import nonlocal_jax
from nonlocal_jax.errors import UserError
from nonlocal_jax.inference.images import as_array


@pytest.fixture
def colours(rng):
  return Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1', 'I;16'])
def test_a_pil_image_is_as_its_file(mode, colours, tmp_path):
  if mode == 'I;16':
    sixteen = np.asarray(colours.convert('L')).astype(np.uint16) * 257
    image = Image.fromarray(sixteen)
    assert image.mode == mode
  else:
    image = colours.convert(mode)
  image.save(tmp_path / 'image.png')
  found = as_array(image)
  np.testing.assert_array_equal(found, as_array(tmp_path / 'image.png'))
  np.testing.assert_array_equal(found, as_array(str(tmp_path / 'image.png')))
  if mode in ('RGB', 'RGBA'):
    np.testing.assert_array_equal(found, np.asarray(colours))


def test_orientation_is_applied(colours, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  colours.save(tmp_path / 'image.jpg', exif=exif, quality=95)
  found = as_array(Image.open(tmp_path / 'image.jpg'))
  assert found.shape == (60, 40, 3)
  # Two decoders of JPEG.
  difference = found.astype(int) - as_array(tmp_path / 'image.jpg')
  assert np.abs(difference).mean() < 3


def test_what_is_no_image_is_an_error(colours, tmp_path):
  with pytest.raises(UserError, match=r'none\.png cannot be read: No such file'):
    as_array(tmp_path / 'none.png')
  (tmp_path / 'text.png').write_text('text')
  with pytest.raises(UserError, match=r'text\.png is not an image, or broken'):
    as_array(tmp_path / 'text.png')
  too_large = b'BM' + bytes(8) + struct.pack('<IIiiHHIIiiII', 54, 40, 60000, 60000, 1, 24, *[0] * 6)
  (tmp_path / 'large.bmp').write_bytes(too_large)
  with pytest.raises(UserError, match=r'large\.bmp has 3,600,000,000 pixels, more than'):
    as_array(tmp_path / 'large.bmp')
  with pytest.raises(ValueError, match="image has mode 'F'; convert it to 'RGB' first"):
    as_array(colours.convert('F'))
  with pytest.raises(ValueError, match=r'image is \(4, 5\) uint8, expected \(h, w, 3\) uint8 RGB'):
    as_array(np.zeros((4, 5), np.uint8))
  with pytest.raises(
    TypeError, match='image has the type bytes, expected a path, a PIL image or an array'
  ):
    as_array(b'')


def test_a_list_gives_a_list(colours, peer_checkpoint, tmp_path):
  model = nonlocal_jax.load(peer_checkpoint)
  colours.save(tmp_path / 'image.png')
  array = np.asarray(colours)
  several = model.predict([tmp_path / 'image.png', colours, array])
  assert [labels.dtype for labels in several] == [np.int32] * 3
  for labels in several:
    np.testing.assert_array_equal(labels, model.predict(array))
  assert model.predict([]) == []
