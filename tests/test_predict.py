"""predict.py: images in, label maps and pictures out."""

import dataclasses
import os
import re
import socket
import struct
import zlib

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import nonlocal_jax
from nonlocal_jax.cli import predict
from nonlocal_jax.cli.prediction_files import save_probabilities
from nonlocal_jax.data.datasets import PUBLISHED, merge_classes
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.pictures import colorize, overlay
from nonlocal_jax.inference import pretrained
from nonlocal_jax.inference.buckets import PaddedShape
from nonlocal_jax.inference.images import read_image
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.weights.checkpoints import save_weights
from nonlocal_jax.weights.loading import read_weights
from tests.test_predictor import image_of

SIZES = {'a.png': (60, 80), 'deep/b.jpg': (72, 64), 'ü c.bmp': (81, 49)}
SCALE = ['--scale', 96, 72]


@pytest.fixture
def folder(tmp_path):
  """A folder of images of different sizes, and a file that is none."""
  root = tmp_path / 'in'
  for name, size in SIZES.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(name[-4:], image_of(size))
    (root / name).write_bytes(data.tobytes())
  (root / 'notes.txt').write_text('no image')
  return root


def in_box(model):
  """The model, tested as `SCALE` says."""
  return model.with_protocol(dataclasses.replace(model.protocol, scale=(96, 72)))


def converted(peer_checkpoint, directory, dataset, classes=None):
  """The tiny network of the fixtures as one of `dataset`, with its first classes or others."""
  description, state = read_weights(peer_checkpoint, align_corners=None)
  classes = classes or PUBLISHED[dataset].classes[: len(description.classes)]
  fields = {**description.__dict__, 'dataset': dataset, 'classes': tuple(classes)}
  save_weights(directory, state, type(description)(**fields))
  return directory


def test_a_folder_becomes_label_maps_and_pictures(folder, peer_checkpoint, script, tmp_path):
  out = tmp_path / 'out'
  arguments = [f'--checkpoint={peer_checkpoint}', f'--out={out}', *SCALE]
  assert script(predict, folder, *arguments) == (None, '')
  model = in_box(nonlocal_jax.load(peer_checkpoint))
  names = {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()}
  stems = ['a', 'deep/b', 'ü c']
  assert names == {f'{stem}{end}' for stem in stems for end in ('.png', '_overlay.jpg')}
  for stem, (name, size) in zip(stems, SIZES.items(), strict=True):
    image = read_image(folder / name)
    label = Image.open(out / f'{stem}.png')
    np.testing.assert_array_equal(np.array(label), model.predict(image))
    colours = np.array(label.convert('RGB'))
    np.testing.assert_array_equal(colours, np.array(model.palette)[np.array(label)])
    picture = np.array(Image.open(out / f'{stem}_overlay.jpg'))
    assert picture.shape[0] >= size[0]
    assert picture.shape[1] > size[1]


def test_probabilities_confidence_and_unknown_pixels(
  folder, peer_checkpoint, script, tmp_path, capsys
):
  out, plain = tmp_path / 'out', tmp_path / 'plain'
  arguments = [folder, f'--checkpoint={peer_checkpoint}', f'--out={out}', *SCALE]
  asked = ['--probabilities', '--confidence', '--unknown-below=0.6']
  assert script(predict, *arguments, *asked) == (None, '')
  said = capsys.readouterr().out.splitlines()
  model = in_box(nonlocal_jax.load(peer_checkpoint))
  unknown = pixels = 0
  for stem, name in zip(['a', 'deep/b', 'ü c'], SIZES, strict=True):
    image = read_image(folder / name)
    labels, expected = model.predict(image, return_probabilities=True)
    with np.load(out / f'{stem}_probabilities.npz') as archive:
      assert archive['classes'].tolist() == list(model.classes)
      assert archive['probabilities'].dtype == np.float16
      np.testing.assert_allclose(archive['probabilities'], expected, atol=1e-3)
    with Image.open(out / f'{stem}_confidence.png') as shades:
      assert shades.mode == 'L'
      np.testing.assert_allclose(np.array(shades), 255 * expected.max(axis=-1), atol=0.51)
    with Image.open(out / f'{stem}.png') as label_map:
      found, colors = np.array(label_map), np.array(label_map.convert('RGB'))
    is_unknown = found == 255
    assert np.mean(is_unknown == (expected.max(axis=-1) < 0.6)) > 0.999
    assert np.mean((found == labels)[~is_unknown]) > 0.999
    assert (colors[is_unknown] == 0).all()
    unknown, pixels = unknown + is_unknown.sum(), pixels + is_unknown.size
  assert 0 < unknown < pixels
  share = f'{unknown / pixels:.2%}'
  assert said[1:] == [
    f'{share} of their pixels are unknown (label 255): their class is less likely than 0.6.'
  ]
  # The results are replaced by the next ones, and by nothing else's.
  assert script(predict, *arguments, '--confidence', '--unknown-below=0.6') == (None, '')
  printed = capsys.readouterr()
  assert printed.out.splitlines()[1:] == said[1:]
  assert not list(out.rglob('*.npz'))  # they would lie beside label maps that they are not of
  assert (
    'Removed 3 files of an earlier prediction that would not fit these label maps, ' in printed.err
  )
  (out / 'a_probabilities.npz').write_bytes(b'of the user')
  assert script(predict, *arguments, '--no-overlays') == (None, '')
  assert sorted(path.name for path in out.rglob('*') if path.is_file()) == [
    'a.png',
    'a_probabilities.npz',
    'b.png',
    'ü c.png',
  ]
  status, message = script(predict, *arguments, *asked)
  assert (status, 'a_probabilities.npz exists and is no earlier' in message) == (1, True)
  assert script(predict, folder / 'a.png', *arguments[1:2], f'--out={plain}', *SCALE) == (None, '')
  assert sorted(path.name for path in plain.iterdir()) == ['a.png', 'a_overlay.jpg']


@pytest.mark.parametrize(
  ('asked', 'sentence'),
  [
    (['--unknown-below=1.5'], '--unknown-below is 1.5; it must be a probability between 0 and 1.'),
    (['--unknown-below=nan'], '--unknown-below is nan; it must be a probability between 0 and 1.'),
    (
      ['--unknown-below=0.5', '--submission'],
      '--submission needs a class for each pixel: leave out --unknown-below.',
    ),
    (
      ['--scale', '0', '9'],
      '--scale has 0; give width and height in pixels, e.g. --scale 2048 512.',
    ),
    (['--confidence'], 'Results of two images would both be {out}/a_confidence.png: rename one of'),
  ],
)
def test_options_that_cannot_be(asked, sentence, folder, peer_checkpoint, script, tmp_path):
  (folder / 'a_confidence.png').write_bytes((folder / 'a.png').read_bytes())
  out = tmp_path / 'out'
  status, said = script(predict, folder, f'--checkpoint={peer_checkpoint}', f'--out={out}', *asked)
  assert status == 1
  assert said.startswith(f'error: {sentence.format(out=out)}')
  assert not out.exists()


@pytest.mark.slow
def test_padded_prediction_is_that_of_the_logits(peer_checkpoint):
  """Of the whole image at its own size, without any padding."""
  model = nonlocal_jax.load(peer_checkpoint)
  image = image_of((60, 80))
  normalized = nonlocal_jax.normalize(image[None])
  expected = np.asarray(model.logits(normalized)).argmax(-1)[0]
  assert np.mean(model.predict(image) == expected) > 0.999
  several = model.predict(image, multi_scale_flip=True)
  assert several.shape == (60, 80)
  assert 0.3 < np.mean(several == expected) < 1


def test_convolutions_and_products_are_computed_as_asked_and_agree(
  folder, peer_checkpoint, script, monkeypatch, tmp_path
):
  """Of the network that the script has loaded, by the operations that are traced."""
  load, loaded = nonlocal_jax.load, []

  def keep_loaded(*arguments, **options):
    loaded.append(load(*arguments, **options))
    return loaded[-1]

  monkeypatch.setattr(nonlocal_jax, 'load', keep_loaded)
  arguments = [folder / 'a.png', f'--checkpoint={peer_checkpoint}', *SCALE]
  for options in ([], ['--convolution=direct', '--precision=default']):
    out = f'--out={tmp_path / str(len(loaded))}'
    assert script(predict, *arguments, out, *options) == (None, '')
  images = nonlocal_jax.normalize(image_of((48, 56))[None])
  of_fast, of_direct = (str(jax.make_jaxpr(in_box(model).logits)(images)) for model in loaded)
  convolutions = of_direct.count(' conv_general_dilated[')
  assert convolutions > 0
  assert of_fast.count(' dot_general[') > convolutions // 2 > of_direct.count(' dot_general[')
  assert 'HIGHEST' in of_fast
  network = of_direct[: of_direct.rindex(' conv_general_dilated[')]  # upsampling is always exact
  assert 'Precision.DEFAULT' in network
  assert 'HIGHEST' not in network
  fast, direct = (np.array(Image.open(tmp_path / name / 'a.png')) for name in ('0', '1'))
  assert np.mean(fast == direct) > 0.999


def test_attention_is_computed_as_asked(folder, peer_checkpoint, script, monkeypatch, tmp_path):
  arguments = [folder / 'a.png', f'--checkpoint={peer_checkpoint}', f'--out={tmp_path}/out', *SCALE]
  status, said = script(predict, *arguments, '--attention=cudnn')
  assert status == 1
  assert said.startswith('error: attention is cudnn, which needs an NVIDIA GPU, and this program')
  asked = []
  monkeypatch.setattr(pretrained, 'chosen_attention', lambda name, *_, **__: asked.append(name))
  with pytest.raises(ValueError, match='attention is None'):
    script(predict, *arguments, '--attention=auto')
  assert asked == ['auto']
  monkeypatch.setattr(pretrained, 'chosen_attention', lambda *_, **__: 'flash')
  model = nonlocal_jax.load(peer_checkpoint, attention='auto')
  images = nonlocal_jax.normalize(image_of((48, 56))[None])
  assert 'pallas_call' in str(jax.make_jaxpr(model.logits)(images))
  model = nonlocal_jax.load(peer_checkpoint)
  assert 'pallas_call' not in str(jax.make_jaxpr(model.logits)(images))


@pytest.mark.parametrize(
  ('dataset', 'values'),
  [
    ('cityscapes', [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]),
    ('ade20k', list(range(1, 20))),
  ],
)
def test_submissions_have_the_servers_label_values(
  dataset, values, folder, peer_checkpoint, script, tmp_path
):
  weights = converted(peer_checkpoint, tmp_path / 'weights', dataset)
  out = tmp_path / 'out'
  arguments = [f'--checkpoint={weights}', f'--out={out}', '--submission', *SCALE]
  assert script(predict, folder / 'a.png', *arguments) == (None, '')
  model = in_box(nonlocal_jax.load(weights))
  label = model.predict(read_image(folder / 'a.png'))
  np.testing.assert_array_equal(np.array(Image.open(out / 'a.png')), np.array(values)[label])
  assert [path.name for path in out.iterdir()] == ['a.png']


def test_submissions_of_chosen_classes_have_the_values_of_their_names(peer_checkpoint, tmp_path):
  chosen = merge_classes(PUBLISHED['ade20k'], [*[255] * 20, *range(18, -1, -1)])
  weights = converted(peer_checkpoint, tmp_path / 'chosen', 'ade20k', chosen.classes)
  # Class 0 is the 39th of ADE20K and so on down to the 21st; its server counts from 1.
  values = predict.submission_values(nonlocal_jax.load(weights))
  assert values.tolist() == list(range(39, 20, -1))
  merged = merge_classes(PUBLISHED['ade20k'], [0, *range(19)])
  weights = converted(peer_checkpoint, tmp_path / 'merged', 'ade20k', merged.classes)
  with pytest.raises(UserError, match=r"merged or renamed ones, such as 'wall/building': predict"):
    predict.submission_values(nonlocal_jax.load(weights))


def test_images_that_cannot_be_read_are_listed_and_the_others_done(
  folder, peer_checkpoint, script, tmp_path, capsys
):
  (folder / 'bad.png').write_bytes(b'')
  out = tmp_path / 'out'
  arguments = [f'--checkpoint={peer_checkpoint}', f'--out={out}', '--no-overlays', *SCALE]
  status, said = script(predict, f'{folder}/*.png', *arguments)
  assert status == 1
  assert said == (f'error: 1 image failed:\n  File {folder}/bad.png is not an image, or broken.')
  assert [path.name for path in out.iterdir()] == ['a.png']
  said = capsys.readouterr().out
  assert re.fullmatch(rf'Predicted 1 of 2 images in \d+\.\d s, to {out}\.', said.strip())


def test_what_is_no_file_is_listed_and_never_opened(
  folder, peer_checkpoint, script, tmp_path, capsys
):
  """A pipe to which nobody writes would be waited for without end."""
  os.mkfifo(folder / 'pipe.png')
  (folder / 'link.png').symlink_to('nowhere.png')
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(folder / 'socket.png'))  # the length of its path is limited
    arguments = [f'--checkpoint={peer_checkpoint}', f'--out={tmp_path / "out"}', *SCALE]
    status, said = script(predict, folder, *arguments)
  assert (status, said.splitlines()) == (
    1,
    [
      'error: 3 images failed:',
      f'  File {folder}/link.png is a link to a file that does not exist.',
      f'  File {folder}/pipe.png is a pipe or device, no file.',
      f'  File {folder}/socket.png is a pipe or device, no file.',
    ],
  )
  printed = capsys.readouterr()
  assert printed.out.startswith('Predicted 3 of 6 images')
  assert (
    'Left out: 1 file with names that do not end as those of images or videos do, such as '
    f'{folder}/notes' in printed.err
  )
  status, said = script(predict, folder / 'pipe.png', *arguments)
  assert said == f'error: 1 image failed:\n  File {folder}/pipe.png is a pipe or device, no file.'
  model = in_box(nonlocal_jax.load(peer_checkpoint))
  with pytest.raises(UserError, match='is a pipe or device, no file'):
    model.predict(folder / 'pipe.png')
  with pytest.raises(UserError, match='is a folder, no file'):
    model.predict(folder)


def test_overlays_too_large_for_jpeg_are_png_files(peer_checkpoint, script, tmp_path, capsys, rng):
  image = rng.integers(0, 256, (2, 66_000, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / 'wide.png')
  arguments = [f'{tmp_path}/wide.*', f'--checkpoint={peer_checkpoint}', f'--out={tmp_path / "out"}']
  assert script(predict, *arguments, *SCALE) == (None, '')
  assert f'does not allow, such as {tmp_path}/out/wide_overlay.png.' in capsys.readouterr().err
  with (
    Image.open(tmp_path / 'out/wide_overlay.png') as picture,
    Image.open(tmp_path / 'out/wide.png') as labels,
  ):
    colors = np.asarray(labels.convert('RGB')).astype(int)
    np.testing.assert_allclose(np.asarray(picture)[:2, :66_000], (image + colors) / 2, atol=1)
    assert labels.size == (66_000, 2)
  (tmp_path / 'out/wide_overlay.png').write_bytes((tmp_path / 'wide.png').read_bytes())
  status, said = script(predict, *arguments, *SCALE)
  assert (status, 'wide_overlay.png exists and is no earlier prediction' in said) == (1, True)


def test_results_are_never_inputs_and_replace_nothing_else(
  folder, peer_checkpoint, script, tmp_path, capsys
):
  arguments = [folder, f'--checkpoint={peer_checkpoint}', *SCALE]
  before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
  status, said = script(predict, *arguments, f'--out={folder}')
  assert (status, said) == (
    1,
    f'error: {folder}/a.png exists and is no earlier prediction: give another --out, or remove it.',
  )
  assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
  for name in ('predicted', 'predicted', 'again'):
    capsys.readouterr()
    assert script(predict, *arguments, f'--out={folder / name}') == (None, '')
    assert capsys.readouterr().out.startswith('Predicted 3 of 3 images')
    found = {str(path.relative_to(folder / name)) for path in (folder / name).rglob('*.png')}
    assert found == {'a.png', 'deep/b.png', 'ü c.png'}
  assert {path: path.read_bytes() for path in before} == before
  status, said = script(predict, f'{folder}/again/*', *arguments[1:], f'--out={tmp_path}/out')
  assert (status, 'holds only results of earlier predictions' in said) == (1, True)


def test_a_home_folder_is_expanded(folder, peer_checkpoint, script, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  link = tmp_path / 'weights.pth'
  link.symlink_to(peer_checkpoint)
  arguments = ['--checkpoint=~/weights.pth', '--out=~/out', '--no-overlays', *SCALE]
  assert script(predict, '~/in/a.*', *arguments) == (None, '')
  assert (tmp_path / 'out' / 'a.png').is_file()


def test_a_name_that_is_too_long_stops_no_other(folder, peer_checkpoint, script, tmp_path):
  for length in (240, 251):  # of the file's name; the results' are longer
    (folder / f'{"n" * (length - 4)}.png').write_bytes((folder / 'a.png').read_bytes())
  out = tmp_path / 'out'
  status, said = script(predict, folder, f'--checkpoint={peer_checkpoint}', f'--out={out}', *SCALE)
  failure = f'{out}/{"n" * 247}_overlay.jpg cannot be written: File name too long.'
  assert (status, said) == (1, f'error: 1 image failed:\n  {failure}')
  written = {path.name for path in out.rglob('*.jpg')}
  assert written == {f'{stem}_overlay.jpg' for stem in ('a', 'b', 'ü c', 'n' * 236)}


def png_header(width: int, height: int) -> bytes:
  """A PNG file that promises a size and holds hardly any pixels."""
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunks = {b'IHDR': header, b'IDAT': zlib.compress(bytes(100)), b'IEND': b''}
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks.items()
  )


@pytest.mark.slow
def test_thin_and_giant_images_stop_no_other(
  folder, peer_checkpoint, script, tmp_path, capsys, rng
):
  for name, size in {'thin.png': (1, 10_000), 'tall.png': (10_000, 1)}.items():
    cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), np.uint8))
  for name, size in {'giant': (20_000, 20_000), 'promise': (2**31 - 1, 2**31 - 1)}.items():
    (folder / f'{name}.png').write_bytes(png_header(*size))
  out = tmp_path / 'out'
  arguments = [folder, f'--checkpoint={peer_checkpoint}', f'--out={out}', '--no-overlays', *SCALE]
  status, said = script(predict, *arguments)
  assert (status, said.splitlines()) == (
    1,
    [
      'error: 2 images failed:',
      f'  File {folder}/giant.png has 400,000,000 pixels, more than 134,217,728: shrink it, or set '
      '--max-pixels if the memory suffices.',
      f'  File {folder}/promise.png has {(2**31 - 1) ** 2:,} pixels, more than 134,217,728: shrink '
      'it.',
    ],
  )
  assert capsys.readouterr().out.startswith('Predicted 5 of 7 images')
  model = in_box(nonlocal_jax.load(peer_checkpoint))
  for name in ('thin', 'tall'):
    label = model.predict(folder / f'{name}.png')
    np.testing.assert_array_equal(np.array(Image.open(out / f'{name}.png')), label)
  assert label.shape == (10_000, 1)
  status, said = script(predict, *arguments, '--max-pixels=4800')
  assert 'a.png has 4,800 pixels' not in said
  assert f'File {folder}/thin.png has 10,000 pixels, more than 4,800: shrink it, or set' in said
  with pytest.raises(UserError, match='or set max_pixels if the memory suffices'):
    model.predict(folder / 'a.png', max_pixels=4799)


def test_files_of_probabilities_are_results_too(folder, capsys):
  save_probabilities(np.zeros((2, 2, 1)), ['a'], folder / 'a_probabilities.npz')
  (folder / 'of_the_user.npz').write_bytes(b'')
  assert len(predict.find_inputs([str(folder)]).images) == len(SIZES)
  said = capsys.readouterr().err
  assert said.startswith('Left out: 1 result of earlier predictions.\nLeft out: 2 files with names')
  assert '_probabilities.npz' not in said


def test_wrong_inputs_are_a_sentence(folder, peer_checkpoint, script, tmp_path):
  arguments = [f'--checkpoint={peer_checkpoint}', f'--out={tmp_path / "out"}']
  status, said = script(predict, '', *arguments)
  assert (status, said) == (
    1,
    'error: an INPUT is empty: give an image, a video, a folder, or a pattern.',
  )
  status, said = script(predict, 'nowhere/*.jpg', *arguments)
  assert status == 1
  assert said.startswith(
    'error: nowhere/*.jpg is neither an image or video nor a folder of them nor a'
  )
  (folder / 'a.jpg').write_bytes((folder / 'a.png').read_bytes())
  status, said = script(predict, folder, *arguments)
  assert (status, 'would both go to a.png: rename one.' in said) == (1, True)
  (folder / 'a.jpg').unlink()
  status, said = script(predict, folder, *arguments, '--submission')
  assert said == (
    'error: --submission is for models of Cityscapes and ADE20K, and this one is of custom.'
  )
  blocked = tmp_path / 'file'
  blocked.touch()
  status, said = script(
    predict, folder, f'--checkpoint={peer_checkpoint}', f'--out={blocked}', *SCALE
  )
  assert said == f'error: Folder {blocked} cannot be made: File exists.'


def test_overlays_darken_unknown_pixels_and_name_them():
  image = np.full((100, 120, 3), 200, np.uint8)
  label = np.full((100, 120), 255, np.uint8)
  label[50:] = 0
  picture = overlay(image, label, classes=['sky'], palette=[(100, 0, 0)])
  assert (picture[:50, :120] == 100).all()
  assert ((picture[:, 120:] == 0).all(-1)).sum() > 100
  only = overlay(image, np.full_like(label, 255), classes=['sky'], palette=[(100, 0, 0)])
  assert not (only[:, 120:] == (100, 0, 0)).all(-1).any()


def test_overlay_mixes_colours_and_names_the_classes_that_occur():
  image = np.full((100, 120, 3), 200, np.uint8)
  label = np.zeros((100, 120), np.uint8)
  label[:10] = 2
  palette = [(100, 0, 0), (0, 100, 0), (0, 0, 100)]
  picture = overlay(image, label, classes=['sky', 'unseen', 'ship'], palette=palette)
  assert (picture[:10, :120] == (100, 100, 150)).all()
  assert (picture[10:100, :120] == (150, 100, 100)).all()
  legend = picture[:, 120:]
  assert [(legend == colour).all(-1).sum() > 100 for colour in palette] == [True, False, True]


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.int64])
def test_colours_are_those_of_the_palette(dtype, rng):
  palette = rng.integers(0, 256, (150, 3)).tolist()
  label = rng.choice([*range(150), 255], (30, 41)).astype(dtype)
  expected = np.array([*palette, [0, 0, 0]])[np.minimum(label, 150)]
  for places in (np.s_[:, :], np.s_[:, ::-2]):
    found = colorize(label[places], palette)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[places])


def test_windows_go_through_the_network_at_their_own_size(peer_checkpoint):
  description, state = read_weights(peer_checkpoint, align_corners=False)
  protocol = EvalProtocol(window_crop=(41, 49), window_stride=(30, 30))
  model = nonlocal_jax.PretrainedModel(dataclasses.replace(description, protocol=protocol), state)
  image = image_of((70, 66))
  shape = PaddedShape.from_image((70, 66), protocol).with_room(networks=False)
  assert shape.result == (128, 128)
  assert [view.network for view in shape.views] == [(41, 49)]
  assert not shape.padded
  found = model.predict(image)
  logits = np.zeros((70, 66, 19))
  counts = np.zeros((70, 66, 1))
  for top in (0, 29):
    for left in (0, 17):
      window = np.s_[top : top + 41, left : left + 49]
      normalized = nonlocal_jax.normalize(image[window][None])
      logits[window] += np.asarray(model.logits(normalized))[0]
      counts[window] += 1
  assert np.mean(found == (logits / counts).argmax(-1)) > 0.999


@pytest.mark.parametrize('side', [1, 64, 65, 375, 511, 512, 513, 769, 1024, 2049, 6000])
def test_little_room_is_left_and_near_sizes_share_it(side):
  rooms = {
    PaddedShape.from_image((s, 500), EvalProtocol()).with_room(networks=True).views[0].network
    for s in range(side, side + 8)
  }
  assert len(rooms) <= 2
  for height, width in rooms:
    assert side <= height <= max(9 / 8 * (side + 7), side + 7 + 63)
    assert width == 512


@pytest.mark.parametrize(('size', 'padded'), [((512, 1024), False), ((512, 1023), True)])
def test_images_that_fill_their_room_are_not_masked(size, padded):
  shape = PaddedShape.from_image(size, EvalProtocol()).with_room(networks=True)
  assert shape.views[0].network == (512, 1024)
  assert shape.padded == padded
