"""Names of images and label maps, and lists of them, as systems, editors and scripts write them."""

import codecs
import unicodedata

import pytest

from nonlocal_jax.data import datasets, layouts, validation
from nonlocal_jax.errors import UserError
from tests.image_trees import CLASSES, turn_into_sbd, write_sample, write_tree

CUSTOM = datasets.custom_dataset(CLASSES)
LAYOUTS = {**datasets.PUBLISHED, 'custom': CUSTOM}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_suffixes_are_read_in_any_case(layout, tmp_path):
  """Those of images, label maps and MATLAB files."""
  folder = tmp_path / 'VOC2012' if layout == 'voc12aug' else tmp_path
  samples = write_tree(layout, folder)['train']
  if layout == 'voc12aug':
    turn_into_sbd(folder)
    label = tmp_path / 'benchmark_RELEASE/dataset/cls/2008_000002.mat'
    samples[-1] = samples[-1]._replace(label=label)
  renamed = []
  for id_, *paths, _ in samples:
    others = [path.with_name(f'{path.stem}{path.suffix.swapcase()}') for path in paths]
    for path, other in zip(paths, others, strict=True):
      path.rename(other)
    renamed.append(layouts.Sample(id_, *others))
  listing = layouts.list_samples(LAYOUTS[layout], tmp_path, 'train')
  assert listing.samples == renamed
  assert not any(listing[1:])
  for sample in renamed:
    assert validation.read_sample(sample).size


@pytest.mark.parametrize('form', ['NFC', 'NFD'])
def test_names_in_another_form_of_unicode_are_the_same(form, tmp_path):
  """MacOS writes é as two characters, Linux as one."""
  (original, *_) = write_tree('custom', tmp_path)['val']
  other = {'NFC': 'NFD', 'NFD': 'NFC'}[form]
  image = original.image.with_name(f'{unicodedata.normalize(form, "é")}.jpg')
  label = original.label.with_name(f'{unicodedata.normalize(other, "é")}.png')
  original.image.rename(image)
  original.label.rename(label)
  found = layouts.list_samples(CUSTOM, tmp_path, 'val')
  assert layouts.Sample('\u00e9', image, label) in found.samples
  assert found.unused_labels == 0
  both = image.with_name(f'{unicodedata.normalize(other, "é")}.JPEG')
  both.touch()
  with pytest.raises(UserError, match='cannot be told apart'):
    layouts.list_samples(CUSTOM, tmp_path, 'val')


@pytest.mark.parametrize('suffix', ['webp', 'avif', 'gif', 'jp2', 'ppm', 'dib', 'jpe', 'JPEG'])
def test_images_of_each_type_that_the_decoder_reads_are_taken(suffix, tmp_path):
  (sample, *_) = write_tree('custom', tmp_path)['val']
  sample.image.unlink()
  image = sample.image.with_suffix(f'.{suffix}')
  write_sample(sample._replace(image=image), seed=0)
  found = layouts.list_samples(CUSTOM, tmp_path, 'val').samples
  assert image in [sample.image for sample in found]
  assert validation.read_sample(found[0]).image == image.read_bytes()


def test_a_label_map_of_another_type_is_named(tmp_path):
  sample = write_tree('custom', tmp_path)['val'][0]
  sample.label.rename(sample.label.with_suffix('.tif'))
  (reason,) = layouts.list_samples(CUSTOM, tmp_path, 'val').incomplete.values()
  assert reason == (
    f'Image {sample.image} has no label map: expected {sample.label}, found '
    f'{sample.label.with_suffix(".tif")}: label maps are read from PNG files only; convert them.'
  )


@pytest.mark.parametrize(
  'text',
  [
    b'\xef\xbb\xbfa\r\n\r\nb \r\n',
    'a\nb\n'.encode('utf-16'),
    codecs.BOM_UTF16_BE + 'a\r\nb'.encode('utf-16-be'),
    b'a.jpg\n/JPEGImages/b.jpg /SegmentationClass/b.png\n',
    b'\n  a\t\n\tb',
  ],
)
def test_lists_of_images_as_editors_and_scripts_write_them(text, tmp_path):
  expected = write_tree('voc12aug', tmp_path)['val']
  (tmp_path / 'ImageSets/Segmentation/val.txt').write_bytes(text)
  listing = layouts.list_samples(LAYOUTS['voc12aug'], tmp_path, 'val')
  assert listing.samples == expected
  assert not listing.incomplete


@pytest.mark.parametrize('text', [b'a\xff\n', 'a\n'.encode('utf-16-le')])
def test_a_list_in_another_encoding_is_a_sentence(text, tmp_path):
  write_tree('voc12aug', tmp_path)
  path = tmp_path / 'ImageSets/Segmentation/val.txt'
  path.write_bytes(text)
  with pytest.raises(UserError, match=f'^File {path} is no text in UTF-8: save it as that'):
    layouts.list_samples(LAYOUTS['voc12aug'], tmp_path, 'val')


def test_names_in_lists_are_of_any_form_of_unicode(tmp_path):
  sample = write_tree('voc12aug', tmp_path)['val'][0]
  renamed = sample._replace(
    id='\u00e9',
    image=sample.image.with_name('e\u0301.jpg'),
    label=sample.label.with_name('\u00e9.png'),
  )
  for before, after in zip(sample[1:3], renamed[1:3], strict=True):
    before.rename(after)
  (tmp_path / 'ImageSets/Segmentation/val.txt').write_text('e\u0301\n')
  listing = layouts.list_samples(LAYOUTS['voc12aug'], tmp_path, 'val')
  assert listing.samples == [renamed]
