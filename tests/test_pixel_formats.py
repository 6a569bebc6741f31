"""Images of one to many channels, of 8 and 16 bits, from the files to a prediction."""

import io
import json
import re
import shlex
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from flax import nnx
from PIL import ExifTags, Image, ImageOps

import nonlocal_jax
from nonlocal_jax.cli import main, prepare
from nonlocal_jax.data import datasets, preparation, transforms
from nonlocal_jax.data.pixel_formats import RGB, PixelFormat, decode, decode_any, displayable
from nonlocal_jax.data.split_checks import check_pixels
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.inference.images import ImageTooLargeError, as_array
from nonlocal_jax.recipes import get_config
from nonlocal_jax.weights.first_convolution import with_channels

SIZE = (40, 52)
DATASET = datasets.custom_dataset(3)


def samples(rng, channels: int, bits: int) -> np.ndarray:
  shape = SIZE if channels == 1 else (*SIZE, channels)
  return rng.integers(0, 2**bits, shape, dtype=f'uint{bits}')


def tiff_of(image: np.ndarray, **options) -> bytes:
  file = io.BytesIO()
  channels = image.shape[2] if image.ndim == 3 else 1
  options = {'photometric': 'rgb' if channels == 3 else 'minisblack', **options}
  if options.get('planarconfig') == 'separate':
    image = np.moveaxis(image, -1, 0)
  tifffile.imwrite(file, image, **options)
  return file.getvalue()


def png_of(image: np.ndarray) -> bytes:
  to_bgr = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(image.shape[-1])
  written, data = cv2.imencode('.png', image if to_bgr is None else cv2.cvtColor(image, to_bgr))
  assert written
  return data.tobytes()


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('planarconfig', ['contig', 'separate'])
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5, 13])
def test_tiff_files_have_the_samples_that_tifffile_wrote(rng, channels, bits, planarconfig):
  image = samples(rng, channels, bits)
  more = {'planarconfig': planarconfig} if channels > 1 else {}
  for compression in (None, 'zlib'):
    decoded, found = decode_any(tiff_of(image, compression=compression, **more))
    assert found == PixelFormat(channels, bits)
    np.testing.assert_array_equal(decoded, image.reshape(*SIZE, channels))


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('channels', [2, 3, 4, 5])
def test_equal_pages_of_a_tiff_file_are_its_channels(rng, channels, bits):
  pages = rng.integers(0, 2**bits, (channels, *SIZE), dtype=f'uint{bits}')
  file = io.BytesIO()
  tifffile.imwrite(file, pages, photometric='minisblack')  # a page for each
  assert len(tifffile.TiffFile(io.BytesIO(file.getvalue())).pages) == channels
  decoded, found = decode_any(file.getvalue())
  assert found == PixelFormat(channels, bits)
  np.testing.assert_array_equal(decoded, np.moveaxis(pages, 0, -1))
  if channels in (3, 4):
    first = np.moveaxis(pages[:3], 0, -1) >> (bits - 8)
    np.testing.assert_array_equal(decode(file.getvalue(), RGB), first)
  else:
    with pytest.raises(ValueError, match='and not with 3 channels of 8 bits'):
      decode(file.getvalue(), RGB)


def test_pages_that_are_images_of_their_own_are_refused(rng):
  file = io.BytesIO()
  with tifffile.TiffWriter(file) as writer:
    for size in (SIZE, (20, 26)):
      writer.write(rng.integers(0, 9, size, dtype=np.uint8), photometric='minisblack')
  for read in (decode_any, decode):
    with pytest.raises(ValueError, match='a TIFF file of 2 images'):
      read(file.getvalue())


def test_smaller_copies_in_a_tiff_file_are_left_out(rng):
  image, file = samples(rng, 5, 16), io.BytesIO()
  with tifffile.TiffWriter(file) as writer:
    writer.write(image, photometric='minisblack', planarconfig='contig')
    small = np.ascontiguousarray(image[::2, ::2])
    writer.write(small, photometric='minisblack', planarconfig='contig', subfiletype=1)
  decoded, found = decode_any(file.getvalue())
  assert found == PixelFormat(5, 16)
  np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_png_files(rng, channels, bits):
  image = samples(rng, channels, bits)
  decoded, found = decode_any(png_of(image))
  assert found == PixelFormat(channels, bits)
  np.testing.assert_array_equal(decoded, image.reshape(*SIZE, channels))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('mode', ['L', 'RGBA'])
def test_exif_orientations_are_applied(rng, mode, orientation):
  image = Image.fromarray(samples(rng, 1 if mode == 'L' else 4, 8))
  exif, file = Image.Exif(), io.BytesIO()
  exif[ExifTags.Base.Orientation] = orientation
  image.save(file, 'PNG', exif=exif)
  decoded, _ = decode_any(file.getvalue())
  expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
  np.testing.assert_array_equal(decoded.squeeze(), expected)


def test_rgb_is_made_of_any_file_as_before(rng):
  files = [png_of(samples(rng, channels, 8)) for channels in (1, 3, 4)]
  gray_with_alpha = io.BytesIO()
  Image.fromarray(samples(rng, 1, 8)).convert('LA').save(gray_with_alpha, 'PNG')
  for data in (*files, gray_with_alpha.getvalue()):
    np.testing.assert_array_equal(decode(data, RGB), transforms.decode_image(data))
  assert decode_any(gray_with_alpha.getvalue())[1] == RGB


@pytest.mark.parametrize(
  ('data', 'said'),
  [
    (tiff_of(np.zeros(SIZE, np.float32)), 'a TIFF file of float32'),
    (tiff_of(np.zeros(SIZE, np.int16)), 'a TIFF file of int16'),
    (tiff_of(np.zeros((*SIZE, 129), np.uint8), planarconfig='contig'), '129 channels'),
    (tiff_of(np.zeros((*SIZE, 5), np.uint8), planarconfig='contig')[:300], 'broken'),
    (b'II*\0 and no more', 'broken'),
  ],
)
def test_other_samples_and_broken_files_are_refused(data, said):
  with pytest.raises(ValueError, match=said):
    decode_any(data)


def test_a_file_of_another_format_is_named(rng, tmp_path):
  path = tmp_path / 'a.tif'
  path.write_bytes(tiff_of(samples(rng, 5, 16), planarconfig='contig'))
  with pytest.raises(UserError, match=r'a\.tif is an image with 5 channels of 16 bits, and not'):
    as_array(path, pixels=PixelFormat(1, 16))
  with pytest.raises(ImageTooLargeError):
    as_array(path, pixels=PixelFormat(5, 16), max_pixels=SIZE[0] * SIZE[1] - 1)
  assert as_array(path, pixels=PixelFormat(5, 16)).shape == (*SIZE, 5)


def test_augmentation_treats_each_channel_alike(rng):
  """Scale, crop, flip and padding of five channels are those of each of them, drawn alike."""
  image = samples(rng, 5, 16)
  label = rng.integers(0, 3, SIZE, dtype=np.uint8)
  augment = transforms.AugmentConfig(crop=(48, 48), scale=(60, 50), photometric=False)
  whole = transforms.train_sample(np.random.default_rng(3), image, label, augment)
  for channel in range(5):
    one = image[..., channel : channel + 1]
    alone = transforms.train_sample(np.random.default_rng(3), one, label, augment)
    # OpenCV's instructions for one channel and for several round some pixels in another way.
    of_channel = whole['image'][..., channel].astype(int)
    np.testing.assert_allclose(of_channel, alone['image'][..., 0], rtol=0, atol=1)
    np.testing.assert_array_equal(whole['label'], alone['label'])
  assert whole['image'].dtype == np.uint16


def test_displayable_images(rng):
  gray = samples(rng, 1, 8)[..., None]
  np.testing.assert_array_equal(displayable(gray), np.repeat(gray, 3, -1))
  image = samples(rng, 5, 8)
  np.testing.assert_array_equal(displayable(image), image[..., :3])
  deep = displayable(np.linspace(1000, 3000, 3 * 64).astype(np.uint16).reshape(8, 8, 3))
  assert deep.dtype == np.uint8
  assert (deep.min(), deep.max()) == (0, 255)
  assert (displayable(np.full((4, 4, 1), 7, np.uint16)) == 0).all()


@pytest.fixture
def folder(rng, tmp_path):
  """Images of five channels of 16 bits, whose third one never varies."""
  source = tmp_path / 'many'
  for split, count in (('train', 3), ('val', 2)):
    for kind in ('images', 'labels'):
      (source / kind / split).mkdir(parents=True)
    for index in range(count):
      label = rng.integers(0, 3, (4, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
      image = 60_000 + rng.integers(0, 40, (64, 64, 5)) + 100 * label[..., None].astype(int)
      image[..., 2] = 5
      data = tiff_of(image.astype(np.uint16), planarconfig='contig', compression='zlib')
      (source / f'images/{split}/{index}.tif').write_bytes(data)
      Image.fromarray(label).save(source / f'labels/{split}/{index}.png')
  return source


def test_mean_and_standard_deviation_are_those_of_numpy(folder, tmp_path):
  split = preparation.prepare(DATASET, folder, data_dir=tmp_path / 'tfds')['train']
  assert split.pixel_formats == {PixelFormat(5, 16): 3}
  images = np.concatenate([tifffile.imread(path) for path in (folder / 'images/train').iterdir()])
  mean, std = split.channel_statistics()
  np.testing.assert_allclose(mean, images.mean((0, 1), dtype=np.float64), rtol=1e-12)
  np.testing.assert_allclose(std, images.std((0, 1), dtype=np.float64), rtol=1e-9)
  with pytest.raises(UserError, match=r'3 images of 5 channels of 16 bits.*prints the command'):
    check_pixels(split, RGB)


def test_images_of_two_formats_are_refused(folder, rng, tmp_path):
  (folder / 'images/train/1.tif').unlink()
  gray = rng.integers(0, 2**16, (64, 64), dtype=np.uint16)
  (folder / 'images/train/1.png').write_bytes(png_of(gray))
  split = preparation.prepare(DATASET, folder, data_dir=tmp_path / 'tfds')['train']
  assert split.channel_statistics() is None
  for pixels in (RGB, PixelFormat(5, 16)):
    with pytest.raises(UserError, match=r'others have .*; else convert them, as all must have'):
      check_pixels(split, pixels)


def test_parts_of_two_formats_are_refused_by_prepare(folder, rng, tmp_path):
  for path in (folder / 'images/val').iterdir():
    path.unlink()
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path.with_suffix('.png').write_bytes(png_of(image))
  arguments = ['--dataset=custom', f'--source={folder}', f'--data-dir={tmp_path / "tfds"}']
  with pytest.raises(UserError) as error:
    prepare.main(arguments)
  assert re.fullmatch(
    r'custom-val has \d images? of 3 channels of 8 bits, and they are read as 5 channels of 16 '
    'bits: '
    'if all images of train and val have that, nonlocal-jax prepare prints the command; else '
    'convert them, as all must have one format.',
    str(error.value),
  )


def test_deep_gray_images_are_read_as_rgb_with_a_warning(folder, rng, tmp_path):
  for path in (folder / 'images').glob('*/*.tif'):
    path.unlink()
    gray = rng.integers(0, 2**16, (64, 64), dtype=np.uint16)
    path.with_suffix('.png').write_bytes(png_of(gray))
  split = preparation.prepare(DATASET, folder, data_dir=tmp_path / 'tfds')['train']
  (warning,) = check_pixels(split, RGB)
  assert '3 images of custom-train have 16 bits, of which the upper 8 are read' in warning
  assert check_pixels(split, PixelFormat(1, 16)) == []


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'channels': 0}, 'from 1 to 128'),
    ({'bits': 12}, 'config.data.bits is 12'),
    ({'channels': 5}, 'config.data.mean has 0 values, and the images have 5 channels of 8 bits'),
    ({'channels': 1, 'mean': (1.0,), 'std': (1.0, 2.0)}, 'config.data.std has 2 values'),
    ({'channels': 1, 'mean': (1.0,), 'std': (0.0,)}, 'std positive'),
    ({'mean': (1.0, 2.0, 3.0)}, 'config.data.std has 0 values'),
  ],
)
def test_options_that_do_not_fit(fields, said):
  config = get_config('custom')
  config.data.num_classes = 3
  for name, value in fields.items():
    config.data[name] = value
  with pytest.raises(UserError, match=said):
    Experiment.from_config(config)


def test_photometric_distortion_is_for_rgb(tmp_path):
  config = get_config('custom')
  config.data.update(num_classes=3, channels=1, mean=(90.0,), std=(30.0,))
  experiment = Experiment.from_config(config)
  with pytest.raises(UserError, match='photometric_distortion changes saturation and hue of RGB'):
    experiment.train(tmp_path / 'run')


def test_an_adapted_kernel_sees_equal_channels_as_before(rng):
  """What it makes of an image whose channels are equal depends on its sum over them alone."""
  kernel = rng.standard_normal((3, 3, 3, 8)).astype(np.float32)
  others = {('backbone', 'stem', 1, 'conv', 'kernel'): nnx.Param(jnp.ones((3, 3, 8, 8)))}
  path = ('backbone', 'stem', 0, 'conv', 'kernel')
  state = nnx.from_flat_state({path: nnx.Param(jnp.asarray(kernel)), **others})
  for channels in (1, 3, 5):
    adapted = dict(nnx.to_flat_state(with_channels(state, channels)))
    new = np.asarray(adapted[path][...])
    assert new.shape == (3, 3, channels, 8)
    assert new.dtype == np.float32
    np.testing.assert_allclose(new.sum(2), kernel.sum(2), atol=1e-6)
    assert np.ptp(new, axis=2).max() == 0  # no channel is preferred
    assert all((adapted[key][...] == value[...]).all() for key, value in others.items())


@pytest.mark.slow
def test_the_printed_command_trains_and_its_weights_predict(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  main.main(['prepare', '--dataset=custom', f'--source={folder}', '--data-dir=tfds'])
  command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
  options = command[command.index('train') :]
  scale = ['--config.train.scale=(64,64)', '--config.train.crop=(64,64)']
  tiny = ['--config.model.depth=14', '--config.model.width=2', '--config.train.batch_size=4']
  run = ['--workdir=run', '--config.train.steps=10', '--config.eval.scale=(64,64)']
  released = f'--checkpoint={Path(__file__).parent / "data/converted_of_2026_11"}'
  main.main([*options, *tiny, *scale, *run, released, '--new_classifier'])
  assert 'its first convolution adapted from 3 to 5 channels' in capsys.readouterr().out

  model = nonlocal_jax.load('run')
  assert PixelFormat.of_protocol(model.protocol) == PixelFormat(5, 16)
  path = folder / 'images/val/0.tif'
  labels = model.predict(path)
  np.testing.assert_array_equal(labels, model.predict(tifffile.imread(path)))
  main.main(['predict', '--checkpoint=run', str(folder / 'images/val'), '--out=predicted'])
  np.testing.assert_array_equal(np.asarray(Image.open('predicted/0.png')), labels)
  with Image.open('predicted/0_overlay.jpg') as picture:
    assert picture.mode == 'RGB'
  common = ['eval', '--config=custom', '--config.data.num_classes=3', '--config.data.data_dir=tfds']
  evaluate = [*common, *tiny[:2], '--config.eval.scale=(64,64)', '--checkpoint=run', '--workdir=e']
  main.main(evaluate)
  trained, evaluated = (json.loads(Path(of, 'metrics.json').read_text()) for of in ('run', 'e'))
  assert evaluated['mIoU'] == trained['mIoU']
  with pytest.raises(UserError, match=r'takes images of mean \(.*but config.data.mean is'):
    main.run([*evaluate, '--config.data.mean=(1.0,2.0,3.0)', '--config.data.std=(1.0,1.0,1.0)'])
  refused = ['--format=onnx', '--size=64,64', '--out=a.onnx']
  with pytest.raises(UserError, match='takes images of 16 bits'):
    main.run(['export', '--checkpoint=run', *refused])
