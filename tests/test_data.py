"""From folders to prepared splits: listing, preparing, checking."""

import re
import sys

import cv2
import numpy as np
import pytest

from nonlocal_jax.data import builders, datasets, layouts, transforms
from nonlocal_jax.errors import UserError
from tests.image_trees import CLASSES, write_sample, write_tree
from tests.mmseg_import import mmseg_module

CUSTOM = datasets.custom_dataset(CLASSES)
LAYOUTS = {**datasets.PUBLISHED, 'custom': CUSTOM}


@pytest.fixture
def tree(tmp_path):
  """A custom dataset: its folder and its samples by split."""
  return tmp_path / 'source', write_tree('custom', tmp_path / 'source')


def files_of(samples):
  return [
    {'id': sample.id, 'image': sample.image.read_bytes(), 'label': sample.label.read_bytes()}
    for sample in samples
  ]


@pytest.mark.parametrize(
  ('name', 'peer'),
  [
    ('cityscapes', 'CityscapesDataset'),
    ('ade20k', 'ADE20KDataset'),
    ('voc12aug', 'PascalVOCDataset'),
  ],
)
def test_published_classes_are_mmsegs(name, peer):
  meta = getattr(mmseg_module('mmseg.datasets'), peer).METAINFO
  dataset = datasets.PUBLISHED[name]
  assert dataset.name == name
  assert dataset.classes == tuple(class_name.strip() for class_name in meta['classes'])
  assert dataset.palette == tuple(map(tuple, meta['palette']))


def test_custom_dataset():
  named = datasets.custom_dataset(2, classes=['sky', 'sea'], palette=[(1, 2, 3), (4, 5, 6)])
  assert (named.classes, named.palette) == (('sky', 'sea'), ((1, 2, 3), (4, 5, 6)))
  assert CUSTOM.classes == ('class 0', 'class 1', 'class 2', 'class 3')
  assert CUSTOM.num_classes == len(CUSTOM.palette) == CLASSES
  assert len(set(datasets.distinct_colours(255))) == 255
  with pytest.raises(UserError, match='custom has 3 classes but 1 class names: give one for each'):
    datasets.custom_dataset(3, classes=['sky'])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_is_listed_and_prepared_byte_for_byte(layout, tmp_path, capfd):
  expected = write_tree(layout, tmp_path / 'source')
  for split, samples in expected.items():
    assert layouts.list_samples(LAYOUTS[layout], tmp_path / 'source', split) == (samples, [], 0)
  opened = builders.prepare(LAYOUTS[layout], tmp_path / 'source', data_dir=tmp_path / 'tfds')
  for split, samples in expected.items():
    assert list(opened[split]) == files_of(samples)
  printed = capfd.readouterr()
  assert not printed.out
  assert re.findall(r'Preparing \S+', printed.err.replace('\r', '\n'))
  assert {line.split(':')[0] for line in re.split(r'[\r\n]+', printed.err) if line} == {
    f'Preparing {layout}-train',
    f'Preparing {layout}-val',
  }
  assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize(
  ('layout', 'inner'),
  [
    ('cityscapes', 'cityscapes'),
    ('ade20k', 'ADEChallengeData2016'),
    ('ade20k', 'ade/ADEChallengeData2016'),
    ('voc12aug', 'VOC2012'),
    ('voc12aug', 'VOCdevkit/VOC2012'),
  ],
)
def test_the_folder_above_will_do(layout, inner, tmp_path):
  expected = write_tree(layout, tmp_path / inner)
  assert layouts.list_samples(LAYOUTS[layout], tmp_path, 'val').samples == expected['val']


def test_files_that_are_no_images_are_passed_over(tree):
  source, samples = tree
  (source / 'images/val/.hidden.jpg').write_bytes(b'')
  (source / 'images/val/notes.txt').write_bytes(b'')
  assert layouts.list_samples(CUSTOM, source, 'val').samples == samples['val']


def test_val_alone_then_train(tree, tmp_path):
  source, samples = tree
  hidden = source / 'images/train'
  hidden.rename(source / 'elsewhere')
  assert builders.prepare(CUSTOM, source, splits=['val'], data_dir=tmp_path / 'tfds').keys() == {
    'val'
  }
  (source / 'elsewhere').rename(hidden)
  opened = builders.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  assert {split: len(opened[split]) for split in opened} == {'train': 3, 'val': 2}
  assert list(opened['train']) == files_of(samples['train'])


def test_what_is_prepared_is_not_prepared_again(tree, tmp_path, monkeypatch):
  source, samples = tree
  builders.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  monkeypatch.setattr(transforms, 'decode_image', None)
  opened = builders.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  assert list(opened['val']) == files_of(samples['val'])


def test_shards_keep_the_order(tree, tmp_path, monkeypatch):
  source, samples = tree
  monkeypatch.setattr(builders, '_SHARD_BYTES', 5000)
  opened = builders.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')['train']
  assert list(opened) == files_of(samples['train'])
  assert len(list(opened.directory.glob('*.array_record*'))) > 1


def test_data_dir_is_tfds_own_unless_given(tree, tmp_path, monkeypatch):
  constants = builders.tfds.core.constants
  monkeypatch.setattr(constants, 'DATA_DIR', str(tmp_path / 'default'))
  opened = builders.prepare(CUSTOM, tree[0], splits=['val'])['val']
  assert str(opened.directory).startswith(f'{tmp_path}/default/nonlocal_jax/custom-val-')


@pytest.mark.parametrize('change', ['content', 'time', 'new', 'renamed', 'gone'])
def test_changed_folders_are_prepared_anew(change, tree, tmp_path):
  source, samples = tree
  before = builders.prepare(CUSTOM, source, splits=['val'], data_dir=tmp_path / 'tfds')['val']
  sample = samples['val'][0]
  new = layouts.Sample('z', *(path.with_name(f'z{path.suffix}') for path in sample[1:]))
  if change == 'content':
    write_sample(sample, seed=99)
  elif change == 'time':
    sample.label.touch()
  elif change == 'new':
    write_sample(new, seed=99)
  elif change == 'renamed':
    sample.image.rename(new.image)
    sample.label.rename(new.label)
  else:
    sample.image.unlink()
  after = builders.prepare(CUSTOM, source, splits=['val'], data_dir=tmp_path / 'tfds')['val']
  assert after.directory != before.directory
  assert list(after) == files_of(layouts.list_samples(CUSTOM, source, 'val').samples)


def test_interrupted_preparation_leaves_nothing_that_opens(tree, tmp_path, monkeypatch):
  source, samples = tree
  decode_label, calls = transforms.decode_label, []

  def interrupt(data):
    calls.append(data)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return decode_label(data)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(transforms, 'decode_label', interrupt)
    builders.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')
  assert not [path for path in (tmp_path / 'tfds').rglob('*') if path.is_file()]
  opened = builders.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')
  assert list(opened['train']) == files_of(samples['train'])


def test_another_process_may_prepare_the_same_meanwhile(tree, tmp_path, monkeypatch):
  source, samples = tree
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  in_shards = builders._in_shards

  def prepare_meanwhile(samples):
    monkeypatch.setattr(builders, '_in_shards', in_shards)
    builders.prepare(CUSTOM, source, **arguments)
    return in_shards(samples)

  monkeypatch.setattr(builders, '_in_shards', prepare_meanwhile)
  assert list(builders.prepare(CUSTOM, source, **arguments)['val']) == files_of(samples['val'])


def remove(path):
  path.unlink() if path.is_file() else path.rename(path.with_name('moved'))


@pytest.mark.parametrize(
  ('layout', 'spoil', 'sentence'),
  [
    (
      'custom',
      lambda root: remove(root),
      'There is no folder {root}: give the folder that holds custom.',
    ),
    (
      'custom',
      lambda root: remove(root / 'images/train'),
      'There is no folder images/train in {root}: give the folder of custom that holds it.',
    ),
    (
      'ade20k',
      lambda root: [remove(path) for path in (root / 'images/training').iterdir()],
      'Folder {root}/images/training holds no images: put the train images of ade20k there, as '
      'ID.jpg.',
    ),
    (
      'custom',
      lambda root: remove(root / 'labels/train/deep/down/c.png'),
      'Image {root}/images/train/deep/down/c.PNG has no label map: expected '
      '{root}/labels/train/deep/down/c.png.',
    ),
    (
      'custom',
      lambda root: (root / 'images/train/x.bmp').touch(),
      'Images {root}/images/train/x.bmp and {root}/images/train/x.tif would share one label map: '
      'rename one of them.',
    ),
    (
      'cityscapes',
      lambda root: remove(root / 'gtFine'),
      'Image {root}/leftImg8bit/train/aachen/a_0_leftImg8bit.png has no label map: expected '
      '{root}/gtFine/train/aachen/a_0_gtFine_labelTrainIds.png (made by csCreateTrainIdLabelImgs '
      'of the package cityscapesscripts).',
    ),
    (
      'voc12aug',
      lambda root: remove(root / 'ImageSets/Segmentation/aug.txt'),
      'There are no image names in {root}/ImageSets/Segmentation/aug.txt: add them (made by '
      'tools/dataset_converters/voc_aug.py of mmsegmentation).',
    ),
    (
      'voc12aug',
      lambda root: remove(root / 'SegmentationClassAug'),
      'Image {root}/JPEGImages/2008_000002.jpg has no label map: expected '
      '{root}/SegmentationClassAug/2008_000002.png (made by tools/dataset_converters/voc_aug.py of '
      'mmsegmentation).',
    ),
    (
      'voc12aug',
      lambda root: remove(root / 'JPEGImages/2007_000039.jpg'),
      'There is no image {root}/JPEGImages/2007_000039.jpg: add it, or strike it out in '
      '{root}/ImageSets/Segmentation/train.txt.',
    ),
    (
      'custom',
      lambda root: (root / 'images/train/x.tif').write_bytes(b'II*'),
      'File {root}/images/train/x.tif is not an image, or broken: replace it.',
    ),
    (
      'custom',
      lambda root: (root / 'labels/train/x.png').write_bytes(b''),
      'File {root}/labels/train/x.png is not an image, or broken: replace it.',
    ),
    (
      'custom',
      lambda root: cv2.imwrite(str(root / 'labels/train/x.png'), np.zeros((5, 5, 3), np.uint8)),
      'File {root}/labels/train/x.png is not a label map of one channel of 8 bits but RGB: replace '
      'it.',
    ),
    (
      'custom',
      lambda root: cv2.imwrite(str(root / 'labels/train/x.png'), np.zeros((6, 5), np.uint8)),
      'Label map {root}/labels/train/x.png is 5x6 pixels but its image {root}/images/train/x.tif '
      'is {size}: replace one of them.',
    ),
  ],
)
def test_the_sentence(layout, spoil, sentence, tmp_path):
  root = tmp_path / 'source'
  image = cv2.imread(str(write_tree(layout, root)['train'][-1].image))
  size = f'{image.shape[1]}x{image.shape[0]}'
  spoil(root)
  with pytest.raises(UserError) as error:
    builders.prepare(LAYOUTS[layout], root, splits=['train'], data_dir=tmp_path / 'tfds')
  assert str(error.value) == sentence.format(root=root, size=size)


def test_unwritable_data_dir(tree, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'custom-val cannot be prepared in \S+/file/\S+: .*data_dir'):
    builders.prepare(CUSTOM, tree[0], splits=['val'], data_dir=tmp_path / 'file')


def test_label_values_outside_the_classes(tree, tmp_path):
  source, samples = tree
  opened = builders.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')['train']
  labels = [transforms.decode_label(sample.label.read_bytes()) for sample in samples['train']]
  assert set(opened.label_values) == {0, 1, 2, 3, 255}
  for value, found in opened.label_values.items():
    assert found.pixels == sum((label == value).sum() for label in labels)
    assert found.first_file == samples['train'][0].label
  builders.check_label_values(opened, num_classes=4)
  builders.check_label_values(opened, num_classes=3, ignore_labels=(3,))
  builders.check_label_values(opened, num_classes=3, reduce_zero_label=True)
  pixels = opened.label_values[3].pixels
  with pytest.raises(UserError) as error:
    builders.check_label_values(opened, num_classes=3)
  assert str(error.value) == (
    f'Label value 3 ({pixels} pixels of custom-train, first in {samples["train"][0].label}) is '
    'none of the 3 classes 0..2: add it to --config.data.ignore_labels, correct '
    '--config.data.num_classes, or, where 0 means unlabelled and classes start at 1, set '
    '--config.data.reduce_zero_label=True.'
  )
  with pytest.raises(UserError, match=r'none of the 2 classes 1\.\.2'):
    builders.check_label_values(opened, num_classes=2, reduce_zero_label=True)
