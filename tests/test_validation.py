"""Bad files and doubtful labels are found when a dataset is prepared."""

import io
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.data import datasets, layouts, preparation, transforms, validation
from nonlocal_jax.data.label_values import LabelValue, check_label_values, class_shares
from nonlocal_jax.data.label_values import usual_mistakes as mistakes
from nonlocal_jax.data.split_checks import check_split
from nonlocal_jax.errors import UserError
from tests.image_trees import CLASSES, png_of, write_sample, write_tree
from tests.mmseg_import import mmseg_module

CUSTOM = datasets.custom_dataset(CLASSES)


@pytest.fixture
def sample(tmp_path):
  """A sample of a photograph-like JPEG and its label map."""
  paths = [tmp_path / name for name in ('image.jpg', 'label.png')]
  found = layouts.Sample('image', *paths)
  write_sample(found, seed=0)
  return found


def photo(h=60, w=90, seed=0):
  coarse = np.random.default_rng(seed).integers(256, size=(6, 9, 3), dtype=np.uint8)
  return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


def encoded(array, suffix, mode=None, **options):
  file, image = io.BytesIO(), Image.fromarray(array)
  (image.convert(mode) if mode else image).save(file, suffix, **options)
  return file.getvalue()


def complaint(sample):
  with pytest.raises(UserError) as error:
    validation.read_sample(sample)
  return str(error.value)


@pytest.mark.parametrize('suffix', ['JPEG', 'PNG', 'BMP', 'TIFF'])
def test_images_cut_off_anywhere_are_refused(suffix, sample):
  whole = encoded(photo(), suffix)
  cuts = np.random.default_rng(0).integers(len(whole), size=60).tolist()
  for length in [0, 1, *cuts, len(whole) - 1]:
    sample.image.write_bytes(whole[:length])
    assert complaint(sample).startswith(f'File {sample.image} is ')


def test_what_follows_a_whole_image_does_no_harm(sample):
  sample.label.write_bytes(png_of(np.zeros((60, 90), np.uint8)))
  for rest in (b'\0' * 7, b'trailing bytes'):
    data = encoded(photo(), 'JPEG') + rest
    sample.image.write_bytes(data)
    assert validation.read_sample(sample).image == data


def test_label_maps_cut_off_anywhere_are_refused(sample):
  whole = png_of(photo(300, 400)[..., 0])
  sample.image.write_bytes(encoded(photo(300, 400), 'JPEG'))
  cuts = np.random.default_rng(0).integers(len(whole), size=60).tolist()
  for length in [0, 1, *cuts, len(whole) - 1]:
    sample.label.write_bytes(whole[:length])
    assert re.fullmatch(
      rf'File {sample.label} is (not an image,|cut off) or broken: replace it\.', complaint(sample)
    )


@pytest.mark.parametrize('which', ['image', 'label'])
def test_a_flipped_bit_in_a_png_file_is_refused(which, sample):
  sample = sample._replace(image=sample.image.with_suffix('.png'))
  sample.image.write_bytes(encoded(photo(), 'PNG'))
  sample.label.write_bytes(png_of(photo()[..., 0]))
  path = getattr(sample, which)
  whole = path.read_bytes()
  validation.read_sample(sample)
  for bit in np.random.default_rng(0).integers(8 * len(whole), size=100).tolist():
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    assert complaint(sample).startswith(f'File {path} is ')


@pytest.mark.parametrize(
  ('data', 'found'),
  [
    (encoded(photo(), 'PNG'), 'RGB'),
    (encoded(np.zeros((9, 9), np.uint16), 'PNG'), 'I;16'),
    (encoded(photo(), 'PNG', 'LA'), 'LA'),
  ],
)
def test_label_maps_of_another_kind_are_refused(data, found, sample):
  sample.label.write_bytes(data)
  assert complaint(sample) == (
    f'File {sample.label} is not a label map of one channel of 8 bits but {found}: replace it.'
  )


@pytest.mark.parametrize('data', [b'', b'MATLAB 5.0 MAT-file' + b'\0' * 200, b'text'])
def test_broken_label_maps_of_sbd_are_refused(data, sample):
  mat = sample.label.with_suffix('.mat')
  mat.write_bytes(data)
  said = complaint(sample._replace(label=mat))
  assert said == (
    f'File {mat} is not a MATLAB file with GTcls.Segmentation, or broken: replace it.'
  )


def test_label_maps_of_sbd_of_another_type_are_refused(sample):
  mat = sample.label.with_suffix('.mat')
  validation.scipy.io.savemat(mat, {'GTcls': {'Segmentation': np.zeros((5, 4))}})
  said = complaint(sample._replace(label=mat))
  assert said == f'File {mat} is not a label map of 8 bits but 2 axes of float64: replace it.'


def test_a_label_map_of_another_size_is_refused(sample):
  sample.image.write_bytes(encoded(photo(60, 90), 'JPEG'))
  sample.label.write_bytes(png_of(np.zeros((60, 80), np.uint8)))
  assert complaint(sample) == (
    f'Label map {sample.label} is 80x60 pixels but its image {sample.image} is 90x60: replace one '
    'of them.'
  )


def test_an_image_that_exif_turns_away_from_its_label_map_is_refused(sample):
  exif = Image.Exif()
  exif[0x0112] = 6
  sample.image.write_bytes(encoded(photo(60, 90), 'JPEG', exif=exif))
  sample.label.write_bytes(png_of(np.zeros((60, 90), np.uint8)))
  assert 'is 60x90 once turned as its EXIF orientation says: replace' in complaint(sample)


@pytest.mark.parametrize('orientation', [2, 3, 4, 6])
@pytest.mark.parametrize('mode', ['L', 'CMYK', 'RGB'])
def test_grey_cmyk_and_turned_images_are_what_the_reference_makes_of_them(
  mode, orientation, sample
):
  exif = Image.Exif()
  exif[0x0112] = orientation
  sample.image.write_bytes(encoded(photo(), 'JPEG', mode, exif=exif))
  load = mmseg_module('mmcv.transforms').LoadImageFromFile()
  theirs = load({'img_path': str(sample.image)})['img'][..., ::-1]
  sample.label.write_bytes(png_of(np.zeros(theirs.shape[:2], np.uint8)))
  ours = transforms.decode_image(validation.read_sample(sample).image)
  np.testing.assert_array_equal(ours, theirs)


def test_a_file_that_is_gone_is_a_sentence(sample):
  sample.label.unlink()
  assert complaint(sample) == (
    f'File {sample.label} cannot be read (No such file or directory): replace it.'
  )


def test_bad_samples_are_all_named_and_may_be_left_out(tmp_path):
  source = tmp_path / 'source'
  good = write_tree('custom', source)['train']
  (source / 'images/train/x.tif').write_bytes(b'II*')
  (source / 'labels/train/deep/down/c.png').unlink()
  arguments = {'splits': ['train'], 'data_dir': tmp_path / 'tfds'}
  missing = (
    f'Image {source}/images/train/deep/down/c.PNG has no label map: expected '
    f'{source}/labels/train/deep/down/c.png.'
  )
  broken = f'File {source}/images/train/x.tif is not an image, or broken: replace it.'
  with pytest.raises(UserError) as error:
    preparation.prepare(CUSTOM, source, **arguments)
  assert str(error.value) == f'{missing} Or leave it out with skip_bad.'
  (source / 'labels/train/deep/down/c.png').write_bytes(b'')
  with pytest.raises(UserError) as error:
    preparation.prepare(CUSTOM, source, **arguments)
  lines = str(error.value).split('\n  ')
  assert lines[0].startswith('custom-train has 2 bad samples; mend them, or leave them out with')
  assert lines[2:] == [broken]
  (source / 'labels/train/deep/down/c.png').unlink()

  opened = preparation.prepare(CUSTOM, source, skip_bad=True, **arguments)['train']
  assert [record['id'] for record in opened] == [good[0].id]
  assert opened.left_out == [missing, broken]
  assert 'Left out of custom-train: 2 bad samples.' in check_split(opened, CUSTOM)
  good[0].image.write_bytes(b'')
  with pytest.raises(UserError, match=r'a\.b\.\w+ is not an image'):
    preparation.prepare(CUSTOM, source, skip_bad=True, **arguments)


def test_a_whole_shard_of_bad_samples_may_be_left_out(tmp_path, monkeypatch):
  monkeypatch.setattr(preparation, '_SHARD_BYTES', 1)
  source = tmp_path / 'source'
  (source / 'images/val').mkdir(parents=True)
  samples = write_tree('custom', source)
  samples['val'][0].image.write_bytes(b'')
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  opened = preparation.prepare(CUSTOM, source, skip_bad=True, **arguments)['val']
  assert [record['id'] for record in opened] == ['w']


def values(**pixels):
  return {int(k[1:]): LabelValue(count, f'{k}.png') for k, count in pixels.items()}


def test_label_values_are_counted_and_checked(tmp_path):
  samples = write_tree('custom', tmp_path / 'source')['train']
  opened = preparation.prepare(
    CUSTOM, tmp_path / 'source', splits=['train'], data_dir=tmp_path / 'tfds'
  )['train']
  labels = [transforms.decode_label(sample.label.read_bytes()) for sample in samples]
  assert set(opened.label_values) == {0, 1, 2, 3, 255}
  for value, found in opened.label_values.items():
    assert found.pixels == sum((label == value).sum() for label in labels)
    assert found.first_file == str(samples[0].label)
  for fitting in (
    CUSTOM,
    datasets.custom_dataset(3, ignore_labels=(3,)),
    datasets.custom_dataset(3, reduce_zero_label=True),
    datasets.custom_dataset(label_map=(0, 1)),
  ):
    check_label_values(opened.label_values, fitting, split='x')
  with pytest.raises(UserError) as error:
    check_split(opened, datasets.custom_dataset(3))
  assert str(error.value) == (
    f'Label value 3 ({opened.label_values[3].pixels} pixels of custom-train, first in '
    f'{samples[0].label}) is none of the 3 classes 0..2: add it to ignore_labels, correct '
    'num_classes, or, where 0 means unlabeled and classes start at 1, set reduce_zero_label=True '
    'in the config or in dataset.json.'
  )
  with pytest.raises(UserError, match=r'none of the 2 classes 1\.\.2'):
    check_split(opened, datasets.custom_dataset(2, reduce_zero_label=True))


def test_shares_of_classes():
  dataset = datasets.custom_dataset(classes=['sky', 'sea'], label_map=(0, 1, 255, 1))
  shares = class_shares(values(_0=50, _1=20, _2=60, _3=30, _255=40), dataset)
  assert shares.pixels.tolist() == [50, 50]
  assert shares.ignored == 100
  assert [line.split() for line in shares.table(dataset).splitlines()] == [
    ['class', 'share', 'of', 'labeled', 'pixels'],
    ['sky', '50.00', '%'],
    ['sea', '50.00', '%'],
    ['ignored', '50.00', '%', 'of', 'all', 'pixels'],
  ]


def test_what_is_usual_is_no_mistake():
  assert not mistakes(values(_0=5, _1=5, _255=5), datasets.custom_dataset(2), split='x')
  reduced = datasets.custom_dataset(2, reduce_zero_label=True)
  assert not mistakes(values(_0=5, _1=5, _2=5), reduced, split='x')


@pytest.mark.parametrize(
  ('found', 'dataset', 'sentences'),
  [
    (
      values(_0=10, _1=30),
      datasets.custom_dataset(2, reduce_zero_label=True),
      [
        'Label value 0 (25.00 % of the pixels of x) is ignored and value 2 does not occur: if 0 is '
        'a class, leave out reduce_zero_label.',
        'No pixel of x is class 1.',
      ],
    ),
    (
      values(_0=30, _255=10),
      CUSTOM,
      [
        'The label files of x have the values 0 and 255 only, and 255 (25.00 % of the pixels) is '
        'ignored: if it is a class, give names to two classes, and no other values.',
        'No pixel of x is class 1, class 2, class 3.',
      ],
    ),
    (
      values(_0=30, _1=10),
      datasets.custom_dataset(classes=['sky', 'Void']),
      [
        "Class 1 is called 'Void', and yet counts in training and mIoU: add its value to "
        'ignore_labels if it means that there is no class.'
      ],
    ),
    (values(_255=10), datasets.PUBLISHED['cityscapes'], ['No pixel of x has a class.']),
    (
      values(_0=10),
      datasets.PUBLISHED['cityscapes'],
      ['No pixel of x is sidewalk, building, wall, fence, pole and 13 more.'],
    ),
  ],
)
def test_usual_mistakes(found, dataset, sentences):
  assert mistakes(found, dataset, split='x') == sentences


def test_label_maps_without_an_image_are_told(tmp_path):
  write_tree('custom', tmp_path / 'source')
  (tmp_path / 'source/labels/val/lonely.png').write_bytes(b'')
  opened = preparation.prepare(CUSTOM, tmp_path / 'source', data_dir=tmp_path / 'tfds')
  assert check_split(opened['val'], CUSTOM) == ['custom-val has 1 label map without an image.']
  assert not check_split(opened['train'], CUSTOM)


def test_files_of_other_types_beside_the_images_are_told(tmp_path):
  write_tree('custom', tmp_path / 'source')
  (tmp_path / 'source/images/val/photo.heic').write_bytes(b'')
  opened = preparation.prepare(CUSTOM, tmp_path / 'source', data_dir=tmp_path / 'tfds')
  assert check_split(opened['val'], CUSTOM) == [
    'Left out of custom-val: 1 file beside its images, such as photo.heic, with names that do not '
    'end as those of images do.'
  ]
  assert not check_split(opened['train'], CUSTOM)


def test_other_sizes_than_the_published_are_told(tmp_path):
  write_tree('ade20k', tmp_path / 'source')
  dataset = datasets.PUBLISHED['ade20k']
  opened = preparation.prepare(dataset, tmp_path / 'source', data_dir=tmp_path / 'tfds')
  told = [check_split(opened[split], dataset)[0] for split in ('train', 'val')]
  assert told == [
    'ade20k-train has 3 images; the published split has 20,210.',
    'ade20k-val has 2 images; the published split has 2,000.',
  ]
