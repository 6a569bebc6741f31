"""From folders to prepared splits."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from configs import custom
from nonlocal_jax.data import datasets, layouts, preparation, prepared, transforms
from nonlocal_jax.errors import UserError
from nonlocal_jax.experiment import Experiment
from tests.image_trees import CLASSES, write_sample, write_tree

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_is_listed_and_prepared_byte_for_byte(layout, tmp_path, capfd):
  expected = write_tree(layout, tmp_path / 'source')
  opened = preparation.prepare(LAYOUTS[layout], tmp_path / 'source', data_dir=tmp_path / 'tfds')
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


def test_val_alone_then_train(tree, tmp_path):
  source, samples = tree
  hidden = source / 'images/train'
  hidden.rename(source / 'elsewhere')
  assert preparation.prepare(CUSTOM, source, splits=['val'], data_dir=tmp_path / 'tfds').keys() == {
    'val'
  }
  (source / 'elsewhere').rename(hidden)
  opened = preparation.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  assert {split: len(opened[split]) for split in opened} == {'train': 3, 'val': 2}
  assert list(opened['train']) == files_of(samples['train'])


def test_what_is_prepared_is_not_prepared_again(tree, tmp_path, monkeypatch):
  source, samples = tree
  preparation.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  monkeypatch.setattr(transforms, 'decode_image', None)
  opened = preparation.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  assert list(opened['val']) == files_of(samples['val'])


def test_shards_keep_the_order(tree, tmp_path, monkeypatch):
  source, samples = tree
  monkeypatch.setattr(preparation, '_SHARD_BYTES', 5000)
  opened = preparation.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')[
    'train'
  ]
  assert list(opened) == files_of(samples['train'])
  assert len(list(opened.directory.glob('*.array_record*'))) > 1


def test_data_dir_is_tfds_own_unless_given(tree, tmp_path, monkeypatch):
  constants = preparation.tfds.core.constants
  monkeypatch.setattr(constants, 'DATA_DIR', str(tmp_path / 'default'))
  opened = preparation.prepare(CUSTOM, tree[0], splits=['val'])['val']
  assert str(opened.directory).startswith(f'{tmp_path}/default/nonlocal_jax/custom-val-')


@pytest.mark.parametrize('change', ['content', 'time', 'new', 'renamed', 'gone'])
def test_changed_folders_are_prepared_anew(change, tree, tmp_path):
  source, samples = tree
  before = preparation.prepare(CUSTOM, source, splits=['val'], data_dir=tmp_path / 'tfds')['val']
  sample = samples['val'][0]
  new = layouts.Sample('z', *(path.with_name(f'z{path.suffix}') for path in sample[1:3]))
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
  after = preparation.prepare(CUSTOM, source, splits=['val'], data_dir=tmp_path / 'tfds')['val']
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

  with monkeypatch.context() as patch:
    patch.setattr(transforms, 'decode_label', interrupt)
    with pytest.raises(KeyboardInterrupt):
      preparation.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')
  assert {path.name for path in (tmp_path / 'tfds').rglob('*') if path.is_file()} == {'.lock'}
  opened = preparation.prepare(CUSTOM, source, splits=['train'], data_dir=tmp_path / 'tfds')
  assert list(opened['train']) == files_of(samples['train'])


PREPARE = """
import sys
from nonlocal_jax.data import datasets, preparation, prepared
preparation._SHARD_BYTES = 200_000
print('started', flush=True)
preparation.prepare(datasets.custom_dataset(4), sys.argv[1], splits=['train'], data_dir=sys.argv[2])
"""


def test_killed_preparation_leaves_nothing_that_opens(tmp_path):
  source, data_dir = tmp_path / 'source', tmp_path / 'tfds'
  samples = write_tree('custom', source)['train']
  for index in range(600):
    image, label = (path.with_name(f'y{index:03d}{path.suffix}') for path in samples[0][1:3])
    write_sample(layouts.Sample('', image, label), seed=index, size=None)
  expected = files_of(layouts.list_samples(CUSTOM, source, 'train').samples)
  rng, killed = np.random.default_rng(0), 0
  for _ in range(3):
    with subprocess.Popen(
      [sys.executable, '-c', PREPARE, source, data_dir], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
      process.stdout.readline()
      time.sleep(rng.uniform(0, 0.3))
      process.kill()
    if process.returncode == -signal.SIGKILL:
      killed += 1
      with contextlib.suppress(UserError):
        opened = prepared.open_prepared(CUSTOM, splits=['train'], data_dir=data_dir)['train']
        assert list(opened) == expected
  assert killed
  opened = preparation.prepare(CUSTOM, source, splits=['train'], data_dir=data_dir)['train']
  assert list(opened) == expected
  assert not list(data_dir.rglob('incomplete*'))


def test_of_two_processes_one_prepares_and_the_other_waits(tree, tmp_path, monkeypatch):
  source, samples = tree
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  in_shards, prepared, together = preparation._in_shards, [], threading.Barrier(2)

  def slowly(samples):
    prepared.append(samples)
    time.sleep(0.3)
    return in_shards(samples)

  def prepare():
    together.wait()
    return list(preparation.prepare(CUSTOM, source, **arguments)['val'])

  monkeypatch.setattr(preparation, '_in_shards', slowly)
  with ThreadPoolExecutor(2) as pool:
    found = [pool.submit(prepare) for _ in range(2)]
  assert [future.result() for future in found] == [files_of(samples['val'])] * 2
  assert len(prepared) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tree, tmp_path):
  source, samples = tree
  arguments = {'splits': ['train'], 'data_dir': tmp_path / 'tfds'}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'custom-train cannot be prepared in \S+: .*too large'):
      preparation.prepare(CUSTOM, source, **arguments)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert {path.name for path in (tmp_path / 'tfds').rglob('*') if path.is_file()} == {'.lock'}
  assert list(preparation.prepare(CUSTOM, source, **arguments)['train']) == files_of(
    samples['train']
  )


@pytest.mark.parametrize('damage', ['cut', 'gone', 'no metadata'])
def test_a_damaged_copy_is_found_on_opening(damage, tree, tmp_path):
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  directory = preparation.prepare(CUSTOM, tree[0], **arguments)['val'].directory
  (records,) = directory.glob('*.array_record*')
  if damage == 'cut':
    records.write_bytes(records.read_bytes()[:-1])
  elif damage == 'gone':
    records.unlink()
  else:
    (directory / 'metadata.json').unlink()
  for open_again in (
    lambda: preparation.prepare(CUSTOM, tree[0], **arguments),
    lambda: prepared.open_prepared(CUSTOM, **arguments),
  ):
    with pytest.raises(UserError, match=rf'copy of custom-val in {directory} is damaged'):
      open_again()


def test_prepared_copies_open_without_their_source(tree, tmp_path):
  source, samples = tree
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  with pytest.raises(UserError, match=r'custom-val was not prepared in \S+/tfds: give the folder'):
    prepared.open_prepared(CUSTOM, **arguments)
  preparation.prepare(CUSTOM, source, **arguments)
  samples['val'][0].image.unlink()
  preparation.prepare(CUSTOM, source, skip_bad=True, **arguments)  # the newer copy
  source.rename(tmp_path / 'elsewhere')
  opened = prepared.open_prepared(CUSTOM, **arguments)['val']
  assert [record['id'] for record in opened] == ['w']
  assert opened.source == str(source)
  # The same files, the same copy.
  moved = preparation.prepare(CUSTOM, tmp_path / 'elsewhere', **arguments)['val']
  files = {value.first_file for value in moved.label_values.values()}
  assert files == {str(tmp_path / 'elsewhere/labels/val/w.png')}
  write_tree('custom', tmp_path / 'other')
  preparation.prepare(CUSTOM, tmp_path / 'other', **arguments)
  with pytest.raises(UserError, match=r'several folders: .*\n  \S+/elsewhere \(.*\n  \S+/other \('):
    prepared.open_prepared(CUSTOM, **arguments)


@pytest.fixture
def described(tmp_path):
  """A custom dataset with `dataset.json`, prepared, and its config without the source."""
  source = tmp_path / 'project/data'
  write_tree('custom', source)
  description = {'classes': ['sky', 'sea'], 'label_map': [0, 1, 1, 255]}
  (source / 'dataset.json').write_text(json.dumps(description))
  preparation.prepare(CUSTOM, source, data_dir=tmp_path / 'tfds')
  config = custom.get_config()
  config.data.data_dir = str(tmp_path / 'tfds')
  return source, config


def test_a_copy_keeps_the_description_of_its_source(described):
  source, config = described
  with_source = custom.get_config()
  with_source.data.source_dir = str(source)
  expected = Experiment.from_config(with_source).dataset
  shutil.rmtree(source)
  dataset = Experiment.from_config(config).dataset
  assert dataset == expected
  assert dataset.label_lookup[[0, 1, 2, 3, 4, 255]].tolist() == [0, 1, 1, 255, 255, 255]
  assert dataset.classes == ('sky', 'sea')


def test_a_changed_description_is_kept_without_preparing_anew(described, monkeypatch):
  source, config = described
  (source / 'dataset.json').write_text(json.dumps({'classes': ['sky', 'sea', 'ship', 'crew']}))
  with monkeypatch.context() as patch:
    patch.setattr(transforms, 'decode_image', None)
    arguments = {'data_dir': config.data.data_dir}
    preparation.prepare(CUSTOM, source, splits=['val'], **arguments)
    with pytest.raises(UserError, match=r'prepared with different dataset\.json'):
      Experiment.from_config(config)
    config.data.num_classes = 4  # enough for a network, but not to read labels
    with pytest.raises(UserError, match=r'prepared with different dataset\.json'):
      Experiment.from_config(config).open_splits(source, ['val'])
    preparation.prepare(CUSTOM, source, splits=['train'], **arguments)
  dataset = Experiment.from_config(config).dataset
  assert dataset.classes == ('sky', 'sea', 'ship', 'crew')
  assert dataset.label_map == ()


def test_two_folders_of_one_name_are_told_apart(described, monkeypatch, tmp_path):
  source, config = described
  (tmp_path / 'other').mkdir()
  write_tree('custom', tmp_path / 'other/data')
  monkeypatch.chdir(tmp_path / 'other')
  opened = preparation.prepare(CUSTOM, 'data', data_dir=config.data.data_dir)
  assert opened['val'].source == f'{tmp_path}/other/data'
  with pytest.raises(UserError, match=rf'folders: .*\n  {tmp_path}/other/data .*\n  {source} '):
    Experiment.from_config(config)
  # Both remedies work.
  config.data.source_dir = 'data'
  config.data.num_classes = 4
  assert Experiment.from_config(config).dataset.classes[0] == 'class 0'
  config.data.source_dir, config.data.num_classes = '', None
  for split in opened.values():
    shutil.rmtree(split.directory.parent)
  assert Experiment.from_config(config).dataset.label_map == (0, 1, 1, 255)


def test_only_the_last_copy_must_be_intact(tree, tmp_path):
  source, samples = tree
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  older = preparation.prepare(CUSTOM, source, **arguments)['val'].directory
  samples['val'][0].image.unlink()
  newer = preparation.prepare(CUSTOM, source, skip_bad=True, **arguments)['val'].directory
  flip_a_bit(older / 'metadata.json')
  assert prepared.open_prepared(CUSTOM, **arguments)['val'].directory == newer
  flip_a_bit(newer / 'metadata.json')
  with pytest.raises(UserError, match=rf'copy of custom-val in {newer} is damaged'):
    prepared.open_prepared(CUSTOM, **arguments)


@pytest.mark.parametrize('name', ['origins.json', 'metadata.json', '*.array_record*'])
def test_no_flipped_bit_gives_another_copy(name, tree, tmp_path):
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  (tree[0] / 'dataset.json').write_text(json.dumps({'classes': ['a', 'b', 'c', 'd']}))
  split = preparation.prepare(CUSTOM, tree[0], **arguments)['val']
  (path,) = split.directory.glob(name)
  intact, samples, found = path.read_bytes(), list(split), set()
  expected = {key: value for key, value in vars(split).items() if key != '_records'}
  for seed in range(100):
    flip_a_bit(path, seed)
    try:
      opened = prepared.PreparedSplit(split.name, split.directory)
      assert vars(opened) == expected
      assert list(opened) == samples
      found.add('the same')  # between the values
    except UserError as error:
      assert f'{split.directory} is damaged' in str(error)
      found.add('refused')
    path.write_bytes(intact)
  assert 'refused' in found


def flip_a_bit(path, seed=0):
  data = bytearray(path.read_bytes())
  bit = int(np.random.default_rng(seed).integers(8 * len(data)))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def test_custom_copies_of_earlier_versions_need_their_source_once(described, tmp_path):
  source, config = described
  for origins in (tmp_path / 'tfds').rglob('origins.json'):
    origins.unlink()
  with pytest.raises(
    UserError, match=r'by an earlier version, which did not keep its dataset\.json'
  ):
    Experiment.from_config(config)
  preparation.prepare(CUSTOM, source, data_dir=config.data.data_dir)
  assert Experiment.from_config(config).dataset.label_map == (0, 1, 1, 255)


class Bucket(MemoryFileSystem):
  """A bucket in memory, whose listings name no protocol, as those of gcsfs."""

  protocol = 'gs'
  store, pseudo_dirs = {}, ['']  # its own

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + path.removeprefix('gs://').strip('/')

  def glob(self, path, **options):
    return [found.lstrip('/') for found in super().glob(path, **options)]


def test_a_bucket_is_a_source(tree, tmp_path, monkeypatch):
  source, samples = tree
  bucket = Bucket()
  bucket.put(f'{source}/', '/bucket/custom/', recursive=True)
  monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: bucket)
  opened = preparation.prepare(CUSTOM, 'gs://bucket/custom', data_dir=tmp_path / 'tfds')
  for split in samples:
    assert list(opened[split]) == files_of(samples[split])
  assert opened['val'].source == 'gs://bucket/custom'
  with pytest.raises(UserError, match='no folder gs://bucket/none'):
    preparation.prepare(CUSTOM, 'gs://bucket/none', data_dir=tmp_path / 'tfds')


def test_a_bucket_without_its_package_is_a_sentence(tmp_path):
  with pytest.raises(UserError, match=r'Folder gs://bucket/x cannot be read: .*gcsfs'):
    preparation.prepare(CUSTOM, 'gs://bucket/x', data_dir=tmp_path)


def test_unwritable_data_dir(tree, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'custom-val cannot be prepared in \S+/file/\S+: .*data_dir'):
    preparation.prepare(CUSTOM, tree[0], splits=['val'], data_dir=tmp_path / 'file')


def test_a_data_dir_that_is_not_utf8_is_refused(tree, tmp_path):
  """ArrayRecord raises TypeError, of a dozen lines."""
  folder = os.fsdecode(bytes(tmp_path) + b'/\xe9')
  with pytest.raises(UserError, match=r'in .*\\udce9/.*, whose name is not UTF-8'):
    preparation.prepare(CUSTOM, tree[0], splits=['val'], data_dir=folder)
  assert not list(tmp_path.rglob('*.array_record*'))
