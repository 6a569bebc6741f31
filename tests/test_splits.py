"""Images are divided into those for training and for validation, by lists or by themselves."""

import itertools
import os

import numpy as np
import pytest
from etils.epath import backend

from nonlocal_jax.cli import prepare
from nonlocal_jax.data import datasets, layouts, preparation
from nonlocal_jax.data.formats import automatic_split, detection, splits
from nonlocal_jax.errors import UserError
from tests.scenes import make_scenes, write
from tests.test_prepared import Bucket

SCENES = make_scenes(10)
NAMES = [scene.name for scene in SCENES]


@pytest.fixture
def source(tmp_path):
  """A folder of images and label maps without splits."""
  folder = tmp_path / 'source'
  for scene in SCENES:
    write(folder / f'images/{scene.name}.jpg', scene.image)
    write(folder / f'labels/{scene.name}.png', scene.label)
  return folder


@pytest.fixture
def script_of_prepare(tmp_path, capsys):
  """A function of the options of `prepare` that returns what it complains of."""

  def run(*options):
    with pytest.raises(UserError) as error:
      prepare.main([*options, f'--data-dir={tmp_path / "prepared"}'])
    assert not capsys.readouterr().out
    return str(error.value)

  return run


def listed(source):
  found = {
    split: layouts.list_samples(datasets.custom_dataset(3), source, split)
    for split in ('train', 'val')
  }
  return {split: [sample.id for sample in listing.samples] for split, listing in found.items()}


def sentence(source):
  return detection.with_splits(source, detection.read_folder(source)).sentence


def test_without_lists_they_are_chosen_and_written_down(source, capsys):
  first = listed(source)
  assert len(first['val']) == 2
  assert sorted(first['train'] + first['val']) == NAMES
  assert capsys.readouterr().err.endswith(
    f'No list divided the images of {source}: 8 were chosen for training and 2 for validation, and '
    'listed in train.txt and val.txt there.\n'
  )
  for split, names in first.items():
    assert (source / f'{split}.txt').read_text().splitlines() == names
  times = [(source / f'{split}.txt').stat().st_mtime_ns for split in first]
  assert listed(source) == first
  assert [(source / f'{split}.txt').stat().st_mtime_ns for split in first] == times
  assert sentence(source).endswith(' images in images. train.txt and val.txt divide the images')
  write(source / 'images/new.jpg', SCENES[0].image)
  write(source / 'labels/new.png', SCENES[0].label)
  assert listed(source) == first
  capsys.readouterr()
  preparation.prepare(datasets.custom_dataset(3), source, data_dir=source / '.prepared')
  told = f"warning: 1 labeled image of {source} left out, which neither list has, such as 'new'."
  assert capsys.readouterr().err.splitlines().count(told) == 1


@pytest.mark.parametrize('place', ['', 'ImageSets/Segmentation/', 'ImageSets/'])
@pytest.mark.parametrize(
  'text',
  [
    'scene_0\nscene_5\n',
    'scene_0.jpg\r\nscene_5.JPG\r\n\r\n',
    'images/scene_0.jpg labels/scene_0.png\nimages/scene_5.jpg labels/scene_5.png',
    './source/images/scene_0.jpg\n/elsewhere/data/images/scene_5.jpg\n',
    'data\\images\\scene_0.jpg\r\ndata\\images\\scene_5.jpg\r\n',
    'scene_0.jpg,scene_0.png\n  scene_5.jpg,scene_5.png  \n',
    '\ufeffscene_0\nscene_5\nscene_5\n',
  ],
)
def test_a_list_of_val_leaves_the_others_for_training(text, place, source):
  path = source / f'{place}val.txt'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding='utf-8', newline='')
  found = listed(source)
  assert found['val'] == ['scene_0', 'scene_5']
  assert found['train'] == [name for name in NAMES if name not in found['val']]
  assert not list(source.rglob('train.txt'))
  assert sentence(source).endswith(
    f'{place}val.txt lists the val images; the other 8 are train images'
  )


def test_images_for_testing_are_neither_for_training_nor_for_validation(source, capsys):
  (source / 'test.txt').write_text('scene_0\nscene_5\n')
  (source / 'train.csv').write_text('id,label\nscene_1,2\n')
  chosen = listed(source)
  assert sorted(chosen['train'] + chosen['val']) == [
    name for name in NAMES if name not in ('scene_0', 'scene_5')
  ]
  assert sentence(source).endswith(
    'train.txt and val.txt divide the images; test.txt and train.csv are not used'
  )
  assert not detection.with_splits(source, detection.read_folder(source)).warning
  (source / 'val.txt').unlink()
  (source / 'train.txt').write_text('scene_1\nscene_2\n')
  assert listed(source) == {'train': ['scene_1', 'scene_2'], 'val': NAMES[3:5] + NAMES[6:]}
  (source / 'test.txt').write_text('\n'.join(NAMES))
  with pytest.raises(UserError) as error:
    listed(source)
  assert str(error.value) == (
    f'{source}/train.txt and {source}/test.txt name all images of {source}, so that none is left '
    'for val: rename the latter to val.txt, or strike some out.'
  )


@pytest.mark.parametrize('place', ['', 'ImageSets/Segmentation/'])
def test_a_list_for_both_bounds_what_is_divided(place, source):
  (source / place).mkdir(parents=True, exist_ok=True)
  (source / f'{place}trainval.txt').write_text('\n'.join(NAMES[:6]))
  (source / f'{place}val.txt').write_text('scene_3\nscene_4\n')
  assert listed(source) == {'train': NAMES[:3] + NAMES[5:6], 'val': ['scene_3', 'scene_4']}
  assert sentence(source).endswith(
    f'{place}val.txt lists the val images; the other 4 of {place}trainval.txt are train images'
  )
  (source / f'{place}val.txt').unlink()
  chosen = listed(source)
  assert sorted(chosen['train'] + chosen['val']) == NAMES[:6]
  assert listed(source) == chosen


def test_lists_beside_folders_of_splits_are_told(source):
  for folder in ('images', 'labels'):
    for path in list((source / folder).iterdir()):
      split = 'val' if path.stem in ('scene_1', 'scene_2') else 'train'
      (source / folder / split).mkdir(exist_ok=True)
      path.rename(source / folder / split / path.name)
  before = sentence(source)
  (source / 'val.txt').write_text('scene_3\n')
  assert sentence(source) == f'{before}. val.txt is not used: the images are divided already'


def test_lists_go_if_the_images_they_name_cannot_be_prepared(source, capsys):
  (source / 'labels/scene_5.png').write_bytes(b'broken')
  dataset = datasets.custom_dataset(3)
  with pytest.raises(UserError, match=r'scene_5\.png is not an image, or broken'):
    preparation.prepare(dataset, source, data_dir=source / '.prepared')
  assert not list(source.glob('*.txt'))
  assert capsys.readouterr().err.endswith('train.txt and val.txt were removed again.\n')
  (source / 'labels/scene_5.png').unlink()
  (source / 'images/scene_5.jpg').unlink()
  splits = preparation.prepare(dataset, source, data_dir=source / '.prepared')
  assert sum(map(len, splits.values())) == 9
  (source / 'labels/scene_6.png').write_bytes(b'broken')
  with pytest.raises(UserError, match=r'scene_6\.png is not an image, or broken'):
    preparation.prepare(dataset, source, data_dir=source / '.prepared')
  assert len(list(source.glob('*.txt'))) == 2  # which were there before


def test_lists_go_if_label_values_are_none(source, script_of_prepare):
  (source / 'classes.txt').write_text('sky\nsea\n')  # the label maps have three
  complaint = script_of_prepare('--dataset=custom', f'--source={source}')
  assert 'Label value 2' in complaint
  (source / 'classes.txt').write_text('sky\n')
  complaint = script_of_prepare('--dataset=custom', f'--source={source}')
  assert 'Dataset custom has 1 class' in complaint
  assert not [path.name for path in source.glob('*.txt') if path.name != 'classes.txt']


def test_that_lists_are_removed_is_told_once(source, tmp_path, capsys):
  (source / 'labels/scene_5.png').write_bytes(b'broken')
  with pytest.raises(UserError, match=r'scene_5\.png is not an image, or broken'):
    prepare.main(['--dataset=custom', f'--source={source}', f'--data-dir={tmp_path / "prepared"}'])
  assert capsys.readouterr().err.count('train.txt and val.txt were removed again.') == 1
  assert not list(source.glob('*.txt'))


def test_two_lists_and_names_with_spaces_and_of_any_script(source):
  names = ['a b', 'Straße', 'e\u0301', '道路.v2']
  for scene, name in zip(SCENES, names, strict=False):
    write(source / f'images/deep down/{name}.jpg', scene.image)
    write(source / f'labels/deep down/{name}.png', scene.label)
  (source / 'Training.txt').write_text('a b.jpg\nimages/deep down/Straße.jpg\n')
  (source / 'valid.txt').write_text('\u00e9\n道路.v2\n')
  assert listed(source) == {
    'train': ['deep down/Straße', 'deep down/a b'],
    'val': ['deep down/\u00e9', 'deep down/道路.v2'],
  }


@pytest.mark.parametrize(
  ('lists', 'said'),
  [
    ({'val.txt': ''}, 'There are no image names in {source}/val.txt: add them, or delete the list'),
    (
      {'val.txt': 'scene_1\nscene_2', 'train.txt': 'scene_3\nscene_2\n'},
      "Image 'scene_2' stands both in {source}/train.txt and in {source}/val.txt: strike it out in",
    ),
    ({'val.txt': '\n'.join(NAMES)}, '{source}/val.txt names all images of {source}, so that none'),
    (
      {'val.txt': 'scene_1', 'ImageSets/train.txt': 'scene_2'},
      '{source}/val.txt and {source}/ImageSets/train.txt both divide the images: delete the lists',
    ),
    (
      {'val.txt': 'scene_1', 'valid.txt': 'scene_2'},
      '{source}/val.txt and {source}/valid.txt both list val images: delete one.',
    ),
    (
      {'val.txt': 'images/scene_1.jpg labels/scene_2.png'},
      "{source}/val.txt has 'labels/scene_2.png' after the image 'scene_1' in line 1, which is not",
    ),
    (
      {'val.txt': 'scene_0 1\nscene_1 -1\n'},
      "{source}/val.txt has '1' after the image 'scene_0' in",
    ),
    (
      {'val.txt': 'images/scene_0.jpg,labels/scene_1.png\n'},
      "{source}/val.txt has 'labels/scene_1.png' after the image 'scene_0' in line 1, which is not",
    ),
    (
      {'val.txt': 'images/scene_0.jpg, labels/scene_1.png\n'},
      "{source}/val.txt has 'labels/scene_1.png' after the image 'scene_0' in line 1, which is not",
    ),
    ({'train.txt': 'nothing\nscene_3'}, None),
  ],
)
def test_wrong_lists_are_a_sentence(lists, said, source):
  for name, text in lists.items():
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(text)
  if said is None:
    listing = layouts.list_samples(datasets.custom_dataset(3), source, 'train')
    assert [sample.id for sample in listing.samples] == ['scene_3']
    assert listing.incomplete == {
      'nothing': f"There is no image 'nothing' in {source}, which {source}/train.txt names in line "
      '1: add it, or strike it out there.'
    }
    return
  with pytest.raises(UserError) as error:
    listed(source)
  assert str(error.value).startswith(said.format(source=source))


def test_a_name_that_could_be_of_two_images_is_none(source):
  for folder in ('a', 'b'):
    write(source / f'images/{folder}/same.jpg', SCENES[0].image)
    write(source / f'labels/{folder}/same.png', SCENES[0].label)
  (source / 'val.txt').write_text('scene_1\nsame\n')
  listing = layouts.list_samples(datasets.custom_dataset(3), source, 'val')
  assert list(listing.incomplete) == ['same']
  (source / 'val.txt').write_text('scene_1\na/same\n')
  assert listed(source)['val'] == ['a/same', 'scene_1']


def test_images_without_label_maps_are_divided_as_well(source):
  (source / 'labels/scene_4.png').unlink()
  (source / 'labels/scene_5.png').write_bytes(b'broken')
  found = [
    layouts.list_samples(datasets.custom_dataset(3), source, split) for split in ('train', 'val')
  ]
  assert sorted(name for listing in found for name in listing.incomplete) == ['scene_4.jpg']
  lines = [(source / f'{split}.txt').read_text().split() for split in ('train', 'val')]
  assert sorted(lines[0] + lines[1]) == NAMES


def test_nothing_is_divided_where_no_label_map_can_be_read(source):
  for path in (source / 'labels').iterdir():
    path.write_bytes(b'broken')
  with pytest.raises(UserError, match=r'labels/scene_0\.png is not an image, or broken'):
    listed(source)
  for path in (source / 'labels').iterdir():
    path.rename(path.with_suffix('.tif'))
  with pytest.raises(UserError, match=r'scene_0\.jpg has no label map: expected .*scene_0\.tif: '):
    listed(source)
  assert sorted(path.name for path in source.iterdir()) == ['images', 'labels']


def test_names_that_lists_could_be_read_wrongly_of_are_found_again(source):
  names = ['a,b', ' two  spaces ', 'x.jpg', 'ein\u2028zwei', 'c:d']
  for scene, name in zip(SCENES, names, strict=False):
    write(source / f'images/{name}.jpg', scene.image)
    write(source / f'labels/{name}.png', scene.label)
  first = listed(source)
  assert sorted(first['train'] + first['val']) == sorted(NAMES + names)
  for split in ('train', 'val'):
    assert not layouts.list_samples(datasets.custom_dataset(3), source, split).incomplete


def test_one_image_cannot_be_divided(tmp_path):
  write(tmp_path / 'images/a.jpg', SCENES[0].image)
  write(tmp_path / 'labels/a.png', SCENES[0].label)
  with pytest.raises(UserError, match=r'has 1 image for training and validation, which can'):
    listed(tmp_path)
  assert not (tmp_path / 'train.txt').exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(source, monkeypatch):
  def refuse(path, text):
    raise UserError(f'{path} cannot be written: Read-only file system.')

  monkeypatch.setattr(splits, 'write_whole', refuse)
  with pytest.raises(UserError) as error:
    listed(source)
  assert str(error.value) == (
    f'The images of {source} are not divided into train and val, and the list train.txt cannot be '
    f'written there ({source}/train.txt cannot be written: Read-only file system): put images and '
    'labels into folders train and val, or add train.txt and val.txt with an image name in each '
    'line.'
  )


@pytest.mark.parametrize('name', ['a\nb', '\udcff'])
def test_names_that_do_not_fit_into_a_list_are_refused(name, source):
  write(source / f'images/{name}.jpg', SCENES[0].image)
  write(source / f'labels/{name}.png', SCENES[0].label)
  with pytest.raises(UserError, match='has a line break or is not UTF-8: rename the file'):
    listed(source)
  assert not (source / 'train.txt').exists()


@pytest.fixture
def bucket(source, monkeypatch):
  """The same folder in a bucket."""
  bucket = Bucket()
  bucket.put(f'{source}/', '/bucket/scenes/', recursive=True)
  monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: bucket)
  yield bucket
  bucket.rm('/bucket', recursive=True)


def test_images_in_a_bucket_are_divided_and_listed_there(source, bucket):
  first = listed('gs://bucket/scenes')
  assert first == listed(source)
  assert bucket.cat('/bucket/scenes/val.txt').decode().splitlines() == first['val']
  assert listed('gs://bucket/scenes') == first


def test_a_bucket_that_cannot_be_written_is_a_sentence(bucket, monkeypatch):
  def refuse(*arguments, **options):
    raise PermissionError('403 Forbidden')

  monkeypatch.setattr(bucket, 'open', refuse)
  monkeypatch.setattr(splits, 'present_classes', lambda samples: np.ones((len(samples), 255), bool))
  with pytest.raises(UserError, match=r'the list train\.txt cannot be written there \(403 Forb'):
    layouts.list_samples(datasets.custom_dataset(3), 'gs://bucket/scenes', 'val')


def test_of_two_lists_none_stays_where_one_cannot_be_written(source, monkeypatch):
  write_whole = splits.write_whole

  def refuse(path, text):
    if path.name == 'val.txt':
      raise UserError(f'{path} cannot be written: No space left on device.')
    write_whole(path, text)

  monkeypatch.setattr(splits, 'write_whole', refuse)
  with pytest.raises(UserError, match=r'the list val\.txt cannot be written there'):
    listed(source)
  assert sorted(path.name for path in source.iterdir()) == ['images', 'labels']


def present_in(generator, images, classes, share):
  return generator.random((images, classes)) < share


def test_every_class_is_in_both_parts_where_possible():
  """Against all choices of at most half of the images that leave each class in training."""
  rng = np.random.default_rng(0)
  for _ in range(300):
    images, classes = int(rng.integers(2, 9)), int(rng.integers(1, 6))
    present = present_in(rng, images, classes, rng.choice([0.2, 0.4, 0.6]))
    is_val = automatic_split.choose_val([f'{index}' for index in range(images)], present)
    assert 0 < is_val.sum() <= max(1, images // 2)

    def in_both(choice, present=present):
      return int((present[choice].any(0) & present[~choice].any(0)).sum())

    choices = map(np.array, itertools.product([False, True], repeat=images))
    allowed = [
      in_both(choice)
      for choice in choices
      if 0 < choice.sum() <= max(1, images // 2)
      and (present[~choice].any(0) >= present.any(0)).all()
    ]
    if allowed:
      assert in_both(is_val) == max(allowed)
      assert (present[~is_val].any(0) == present.any(0)).all()


@pytest.mark.parametrize('images', [2, 3, 7, 100, 999])
def test_a_fifth_is_for_validation_whatever_the_order(images):
  present = present_in(np.random.default_rng(images), images, 4, 0.7)
  names = [f'image {index}' for index in range(images)]
  is_val = automatic_split.choose_val(names, present)
  assert is_val.sum() == max(1, round(images / 5))
  order = np.random.default_rng(1).permutation(images)
  again = automatic_split.choose_val([names[index] for index in order], present[order])
  np.testing.assert_array_equal(again, is_val[order])
  if images > 10:
    other = automatic_split.choose_val(names, present, seed=1)
    assert (other != is_val).any()


def test_a_class_of_one_image_stays_in_training():
  present = np.zeros((50, 3), bool)
  present[:, 0], present[7, 1], present[[3, 9], 2] = True, True, True
  for seed in range(20):
    is_val = automatic_split.choose_val([f'{index}' for index in range(50)], present, seed=seed)
    assert not is_val[7]
    assert is_val[[3, 9]].sum() == 1


def test_a_pipe_among_the_lists_is_no_list(source):
  os.mkfifo(source / 'val.txt')
  (source / 'train.txt').write_text('\n'.join(NAMES[:8]))
  assert listed(source)['val'] == NAMES[8:]
