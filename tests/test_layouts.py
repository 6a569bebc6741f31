"""What each dataset is, and where its files are found."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from nonlocal_jax.data import datasets, layouts, transforms, validation
from nonlocal_jax.errors import UserError
from tests.image_trees import CLASSES, turn_into_sbd, write_tree
from tests.mmseg_import import mmseg_module

CUSTOM = datasets.custom_dataset(CLASSES)
LAYOUTS = {**datasets.PUBLISHED, 'custom': CUSTOM}


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
  named = datasets.custom_dataset(classes=['sky', 'sea'], palette=[[1, 2, 3], [4, 5, 6]])
  assert (named.classes, named.palette) == (('sky', 'sea'), ((1, 2, 3), (4, 5, 6)))
  assert CUSTOM.classes == ('class 0', 'class 1', 'class 2', 'class 3')
  assert CUSTOM.num_classes == len(CUSTOM.palette) == CLASSES
  assert datasets.custom_dataset(label_map=[2, 255, 0, 1]).num_classes == 3
  assert len(set(datasets.distinct_colors(255))) == 255


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    ({'num_classes': 3, 'classes': ['sky']}, 'has 3 classes but 1 class names: give one for each'),
    ({'num_classes': 3, 'palette': [(1, 2, 3)]}, 'has 3 classes but 1 colors: give one for each'),
    ({}, 'The number of classes of dataset custom is not known: set num_classes, or'),
    ({'classes': ['sky']}, 'has 1 class; from 2 to 255 are possible'),
    ({'num_classes': 2, 'label_map': [0, 3]}, 'leads to class 3, but there are 2 classes: lead to'),
    (
      {'classes': ['__ignore__', '_background_', 'crack']},
      "Class 0 .* is called '__ignore__', which labelme writes into label files as 255 .* take the "
      'name out of classes, or, if the label files have 0 there, add 0 to ignore_labels',
    ),
    (
      {'classes': ['_background_', 'crack', '__ignore__'], 'reduce_zero_label': True},
      'Class 2 .* if the label files have 3 there, add 3 to ignore_labels',
    ),
  ],
)
def test_custom_dataset_that_does_not_fit_together(arguments, sentence):
  with pytest.raises(UserError, match=sentence):
    datasets.custom_dataset(**arguments)


def test_a_name_of_labelme_without_a_value_is_no_class():
  dataset = datasets.custom_dataset(
    classes=['_background_', 'crack', '__ignore__'], ignore_labels=[2]
  )
  assert dataset.label_lookup[:3].tolist() == [0, 1, 255]


def test_label_map_is_mmsegs(tmp_path):
  """Subsets, mergers and other orders, after reduce_zero_label, on random label files."""
  peers = mmseg_module('mmseg.datasets.transforms')
  path = tmp_path / 'label.png'
  for seed in range(100):
    rng = np.random.default_rng(seed)
    label = rng.integers(256, size=(20, 30), dtype=np.uint8)
    validation.Image.fromarray(label).save(path)
    reduce = bool(seed % 2)
    label_map = rng.choice([*range(6), 255], size=255).tolist()
    load = peers.LoadAnnotations()
    load.reduce_zero_label = reduce
    theirs = load(
      {
        'seg_map_path': str(path),
        'reduce_zero_label': reduce,
        'label_map': dict(enumerate(label_map)),
        'seg_fields': [],
      }
    )['gt_seg_map']
    dataset = datasets.custom_dataset(6, reduce_zero_label=reduce, label_map=label_map)
    np.testing.assert_array_equal(dataset.label_lookup[label], theirs)


def test_merged_classes():
  city = datasets.merge_classes(datasets.PUBLISHED['cityscapes'], [0, 0] + [255] * 11 + [1, 1, 1])
  assert city.classes == ('road/sidewalk', 'car/truck/bus')
  assert city.palette == ((128, 64, 128), (0, 0, 142))
  assert city.label_lookup[[0, 1, 2, 12, 13, 15, 16, 18, 255]].tolist() == [
    *(0, 0, 255, 255, 1, 1),
    *(255, 255, 255),
  ]
  room = datasets.merge_classes(datasets.PUBLISHED['ade20k'], [1, 255, 255, 0])
  assert room.classes == ('floor', 'wall')
  assert room.label_lookup[[0, 1, 2, 3, 4, 5, 150, 255]].tolist() == [
    *(255, 1, 255, 255, 0),
    *(255, 255, 255),
  ]
  for label_map in ([0] * 20, [0, 2], [1, 1, 2], [0, 255]):
    with pytest.raises(UserError, match=r'give one for each of the first of its 19 classes'):
      datasets.merge_classes(datasets.PUBLISHED['cityscapes'], label_map)


def test_description_beside_the_images(tmp_path):
  assert datasets.read_description(tmp_path) == {}
  description = {
    'classes': ['sky', 'sea'],
    'palette': [[1, 2, 3], [4, 5, 6]],
    'reduce_zero_label': True,
    'ignore_labels': [9],
    'label_map': [1, 0],
    'num_classes': 2,
  }
  (tmp_path / 'dataset.json').write_text(json.dumps(description))
  assert datasets.read_description(tmp_path) == description
  dataset = datasets.custom_dataset(**description)
  assert dataclasses.asdict(dataset) == {
    'name': 'custom',
    'layout': 'custom',
    'classes': ('sky', 'sea'),
    'palette': ((1, 2, 3), (4, 5, 6)),
    'reduce_zero_label': True,
    'ignore_labels': (9,),
    'label_map': (1, 0),
    'published_sizes': {},
  }


@pytest.mark.parametrize(
  ('text', 'sentence'),
  [
    ('{"classes": ', r'dataset\.json is no JSON object \('),
    ('[' * 100_000, r'dataset\.json is no JSON object \(nested too deeply\)'),
    ('{"ignore_labels": [], "ignore_labels": [2]}', r"\(it has 'ignore_labels' twice\)"),
    ('[]', r'dataset\.json is no JSON object'),
    (
      '{"names": []}',
      r"has a field 'names', which means nothing: it may have num_classes, classes",
    ),
    ('{"classes": [1]}', r"'classes' is \[1\]; it must be a list of names"),
    ('{"palette": [[1, 2]]}', r"'palette' is .*; it must be a list of \[red, green, blue\]"),
    ('{"reduce_zero_label": 1}', r"'reduce_zero_label' is 1; it must be true or false"),
    ('{"label_map": [256]}', r"'label_map' is \[256\]; it must be a list of numbers"),
    ('{"ignore_labels": 11}', r"'ignore_labels' is 11; it must be a list of numbers"),
    ('{"num_classes": true}', r"'num_classes' is true; it must be a number from 2 to 255"),
  ],
)
def test_a_wrong_description_is_a_sentence(text, sentence, tmp_path):
  (tmp_path / 'dataset.json').write_text(text)
  with pytest.raises(UserError, match=sentence):
    datasets.read_description(tmp_path)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_is_listed(layout, tmp_path):
  for split, samples in write_tree(layout, tmp_path).items():
    listing = layouts.list_samples(LAYOUTS[layout], tmp_path, split)
    assert listing.samples == samples
    assert not any(listing[1:])


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


def test_files_that_are_no_images_are_told_and_lonely_labels_counted(tmp_path):
  samples = write_tree('custom', tmp_path)
  (tmp_path / 'images/val/.hidden.jpg').write_bytes(b'')
  (tmp_path / 'images/val/notes.txt').write_bytes(b'')
  (tmp_path / 'labels/val/lonely.png').write_bytes(b'')
  found = layouts.list_samples(CUSTOM, tmp_path, 'val')
  assert found == (samples['val'], {}, 1, ['notes.txt'], '')


def test_names_in_any_script(tmp_path):
  (original, *_) = write_tree('custom', tmp_path)['val']
  for name in ('Straße', '道路', 'a b%20c', "o'clock"):
    for path in original[1:3]:
      path.with_name(f'{name}{path.suffix}').write_bytes(path.read_bytes())
  found = layouts.list_samples(CUSTOM, tmp_path, 'val').samples
  assert {sample.id for sample in found} == {'v', 'w', 'Straße', '道路', 'a b%20c', "o'clock"}


def test_names_that_are_no_text_are_a_sentence(tmp_path):
  (original, *_) = write_tree('custom', tmp_path)['val']
  for path in original[1:3]:
    path.rename(path.with_name(f'\udcff{path.suffix}'))
  with pytest.raises(UserError, match=r"udcff\.\w+' is not UTF-8: rename the file"):
    layouts.list_samples(CUSTOM, tmp_path, 'val')


def test_cityscapes_takes_label_ids_where_train_ids_are_lacking(tmp_path):
  first, *others = write_tree('cityscapes', tmp_path)['train']
  ids = first.label.with_name('a_0_gtFine_labelIds.png')
  ids.write_bytes(first.label.read_bytes())
  listed = layouts.list_samples(LAYOUTS['cityscapes'], tmp_path, 'train').samples
  assert listed == [first, *others]
  first.label.unlink()
  listed = layouts.list_samples(LAYOUTS['cityscapes'], tmp_path, 'train').samples
  assert listed == [first._replace(label=ids), *others]


def test_label_ids_become_train_ids(tmp_path):
  """Every id as in the table of the benchmark's own scripts (cityscapesscripts, labels.py)."""
  sample = write_tree('cityscapes', tmp_path)['val'][0]
  train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
  train_ids |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
  h, w = transforms.decode_label(sample.label.read_bytes()).shape
  ids = np.resize(np.arange(256, dtype=np.uint8), (h, w))
  path = sample.label.with_name('u_0_gtFine_labelIds.png')
  validation.Image.fromarray(ids).save(path)
  read = validation.read_sample(sample._replace(label=path))
  expected = np.vectorize(lambda id_: train_ids.get(id_, 255))(ids)
  np.testing.assert_array_equal(transforms.decode_label(read.label), expected)
  np.testing.assert_array_equal(read.pixels, np.bincount(expected.ravel(), minlength=256))


def test_voc_is_joined_with_sbd(tmp_path):
  root = tmp_path / 'VOC2012'
  expected = write_tree('voc12aug', root)
  label = transforms.decode_label(expected['train'][-1].label.read_bytes())
  turn_into_sbd(root)
  train = layouts.list_samples(LAYOUTS['voc12aug'], tmp_path, 'train')
  assert [sample.id for sample in train.samples] == ['2007_000032', '2007_000039', '2008_000002']
  assert train.samples[:2] == expected['train'][:2]  # VOC's own label maps go first
  mat = tmp_path / 'benchmark_RELEASE/dataset/cls/2008_000002.mat'
  assert train.samples[2] == expected['train'][2]._replace(label=mat)
  read = validation.read_sample(train.samples[2])
  np.testing.assert_array_equal(transforms.decode_label(read.label), label)
  assert layouts.list_samples(LAYOUTS['voc12aug'], tmp_path, 'val').samples == expected['val']


def test_voc_without_a_list_takes_all_that_is_augmented(tmp_path):
  expected = write_tree('voc12aug', tmp_path)
  (tmp_path / 'ImageSets/Segmentation/aug.txt').unlink()
  for id_ in ('2007_000032', 'a'):  # as in the archive that goes about, VOC's own are there too
    (tmp_path / f'SegmentationClassAug/{id_}.png').write_bytes(b'')
  listed = layouts.list_samples(LAYOUTS['voc12aug'], tmp_path, 'train')
  assert listed.samples == expected['train']


def move(path):
  path.rename(path.with_name('moved'))


@pytest.mark.parametrize(
  ('layout', 'spoil', 'sentence'),
  [
    ('custom', lambda root: move(root), 'There is no folder {root}: give the folder that holds'),
    (
      'custom',
      lambda root: move(root / 'images/train'),
      'There is no folder images/train in {root}: add the train images there, or take all out of '
      'the folder val, to have them divided.',
    ),
    (
      'ade20k',
      lambda root: [path.unlink() for path in (root / 'images/training').iterdir()],
      'Folder {root}/images/training holds no images: put the train images of ade20k there, as '
      'ID.jpg.',
    ),
    (
      'custom',
      lambda root: (root / 'images/train/x.bmp').touch(),
      'Files {root}/images/train/x.bmp and {root}/images/train/x.tif cannot be told apart, since '
      'neither suffixes nor forms of Unicode count: rename or delete one of them.',
    ),
    (
      'cityscapes',
      lambda root: move(root / 'gtFine'),
      'Image {root}/leftImg8bit/train/aachen/a_0_leftImg8bit.png has no label map: expected '
      '{root}/gtFine/train/aachen/a_0_gtFine_labelIds.png.',
    ),
    (
      'voc12aug',
      lambda root: (root / 'ImageSets/Segmentation/train.txt').unlink(),
      'There are no image names in {root}/ImageSets/Segmentation/train.txt: add them.',
    ),
    (
      'voc12aug',
      lambda root: [
        (root / 'ImageSets/Segmentation/aug.txt').unlink(),
        move(root / 'SegmentationClassAug'),
      ],
      'Nothing in or beside {root} is of SBD, the larger part of the training images: put '
      'VOCaug/dataset with train.txt, val.txt and cls/*.mat beside it, or SegmentationClassAug '
      'into it.',
    ),
  ],
)
def test_the_sentence(layout, spoil, sentence, tmp_path):
  root = tmp_path / 'source'
  write_tree(layout, root)
  spoil(root)
  with pytest.raises(UserError) as error:
    layouts.list_samples(LAYOUTS[layout], root, 'train')
  assert str(error.value).startswith(sentence.format(root=root))


@pytest.mark.parametrize(
  ('layout', 'missing', 'sentence'),
  [
    (
      'custom',
      'labels/train/deep/down/c.png',
      'Image {root}/images/train/deep/down/c.PNG has no label map: expected '
      '{root}/labels/train/deep/down/c.png.',
    ),
    (
      'voc12aug',
      'SegmentationClassAug/2008_000002.png',
      'Image {root}/JPEGImages/2008_000002.jpg, named in {root}/ImageSets/Segmentation/aug.txt, '
      'has no label map: add it.',
    ),
    (
      'voc12aug',
      'JPEGImages/2007_000039.jpg',
      'There is no image {root}/JPEGImages/2007_000039.jpg: add it, or strike it out in '
      '{root}/ImageSets/Segmentation/train.txt.',
    ),
  ],
)
def test_what_is_incomplete_is_listed(layout, missing, sentence, tmp_path):
  samples = write_tree(layout, tmp_path)['train']
  (tmp_path / missing).unlink()
  listing = layouts.list_samples(LAYOUTS[layout], tmp_path, 'train')
  assert list(listing.incomplete.values()) == [sentence.format(root=tmp_path)]
  assert listing.samples == [sample for sample in samples if tmp_path / missing not in sample]


def test_pipes_and_links_to_nothing_are_told_and_folders_without_end_left(tmp_path):
  samples = write_tree('custom', tmp_path)['train']
  pipe, dangling = (tmp_path / f'images/train/{name}.png' for name in ('pipe', 'dangling'))
  os.mkfifo(pipe)
  dangling.symlink_to('nowhere.png')
  labelled = tmp_path / 'images/train/y.png'
  shutil.copy(samples[0].image, labelled)
  (tmp_path / 'labels/train/y.png').symlink_to('nowhere.png')
  for path in (pipe, dangling):
    shutil.copy(samples[0].label, tmp_path / f'labels/train/{path.name}')
  (tmp_path / 'images/train/endless').symlink_to('..')
  hidden = tmp_path / 'images/train/.ipynb_checkpoints/x-checkpoint.tif'
  hidden.parent.mkdir()
  shutil.copy(samples[-1].image, hidden)
  listing = layouts.list_samples(CUSTOM, tmp_path, 'train')
  assert listing.samples == samples
  assert {name: listing.incomplete.pop(name) for name in ('pipe.png', 'dangling.png', 'y.png')} == {
    'pipe.png': f'File {pipe} is a pipe or device, no file: replace it.',
    'dangling.png': f'File {dangling} is a link to a file that does not exist: replace it.',
    'y.png': f'File {tmp_path}/labels/train/y.png is a link to a file that does not exist: replace '
    'it.',
  }
  # The folder `endless` leads to the images of val, once, which have no labels there.
  assert sorted(listing.incomplete) == ['endless/val/v.jpg', 'endless/val/w.PNG']
