"""From prepared splits to batches and evaluation samples."""

import multiprocessing
import os
import pickle
import signal
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave

from nonlocal_jax.data import datasets, layouts, loader, preparation, transforms
from nonlocal_jax.errors import UserError
from tests.image_trees import CLASSES, write_sample, write_tree

TRAINING = {
  'augment': transforms.AugmentConfig(scale=(60, 40), crop=(32, 24)),
  'batch_size': 4,
  'seed': 3,
}


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
  """The splits of a custom dataset of twelve training images, opened."""
  root = tmp_path_factory.mktemp('prepared')
  samples = write_tree('custom', root / 'source')['train']
  for index in range(9):
    image, label = (path.with_name(f'y{index}{path.suffix}') for path in samples[0][1:3])
    write_sample(layouts.Sample(f'y{index}', image, label), seed=100 + index)
  return preparation.prepare(
    datasets.custom_dataset(CLASSES), root / 'source', data_dir=root / 'tfds'
  )


def take(batches, count):
  return [next(batches) for _ in range(count)]


def assert_same_batches(ours, theirs):
  for our, their in zip(ours, theirs, strict=True):
    assert our.keys() == their.keys()
    for key, value in our.items():
      np.testing.assert_array_equal(value, their[key])


def test_opened_split_is_a_sequence_that_travels(prepared):
  split = prepared['train']
  assert len(split) == 12
  assert split.sizes == [transforms.decode_label(record['label']).shape for record in split]
  assert split[-1] == split[11] == pickle.loads(pickle.dumps(split))[11]
  with pytest.raises(IndexError):
    split[12]


def test_a_split_is_opened_without_a_change_to_stdout(prepared, monkeypatch):
  """Threads that make batches open it, while others open it, too, and the main one prints."""
  split, seen = pickle.loads(pickle.dumps(prepared['train'])), []
  open_directory = preparation.tfds.builder_from_directory

  def watched(directory):
    seen.append(sys.stdout)
    return open_directory(directory)

  monkeypatch.setattr(preparation.tfds, 'builder_from_directory', watched)
  assert split[0] == prepared['train'][0]
  assert seen == [sys.stdout]


def test_batches_have_the_shapes_and_types_promised(prepared):
  batch = next(loader.train_batches(prepared['train'], **TRAINING))
  assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
    'image': ((4, 32, 24, 3), 'uint8'),
    'label': ((4, 32, 24), 'uint8'),
    'size': ((4, 2), 'int32'),
    'index': ((4,), 'int32'),
  }
  assert set(np.unique(batch['label'])) <= {*range(CLASSES), 255}


def test_every_epoch_has_every_image_once_in_another_order(prepared):
  batches = take(loader.train_batches(prepared['train'], **TRAINING), 6)
  epochs = np.concatenate([batch['index'] for batch in batches]).reshape(2, 12)
  assert (np.sort(epochs) == np.arange(12)).all()
  assert (epochs[0] != epochs[1]).any()
  crops = {
    epoch: batches[3 * epoch + place // 4]['image'][place % 4]
    for epoch, place in enumerate(np.argwhere(epochs == 0)[:, 1])
  }
  assert (crops[0] != crops[1]).any()


def test_seed_and_transforms_matter(prepared):
  indices = [
    next(loader.train_batches(prepared['train'], **{**TRAINING, 'seed': seed}))['index'].tolist()
    for seed in range(3)
  ]
  assert len(set(map(tuple, indices))) == 3
  plain = transforms.AugmentConfig(
    crop=(50, 50), ratio_range=None, cat_max_ratio=1.0, flip_probability=0.0, photometric=False
  )
  arguments = {**TRAINING, 'augment': plain}
  lookup = transforms.label_lookup(ignore_labels=(1,))
  batch = next(loader.train_batches(prepared['train'], **arguments, label_lookup=lookup))
  for index, (h, w), image, label in zip(
    *(batch[key] for key in ('index', 'size', 'image', 'label')), strict=True
  ):
    record = prepared['train'][index]
    np.testing.assert_array_equal(image[:h, :w], transforms.decode_image(record['image']))
    expected = transforms.decode_label(record['label'])
    np.testing.assert_array_equal(label[:h, :w], np.where(expected == 1, 255, expected))


@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [1, 2, 4])
def test_batches_do_not_depend_on_workers(num_workers, prepared):
  expected = take(loader.train_batches(prepared['train'], **TRAINING), 5)
  batches = loader.train_batches(prepared['train'], **TRAINING, num_workers=num_workers)
  assert_same_batches(take(batches, 5), expected)
  batches.set_state({'next_batch': 3})
  assert_same_batches(take(batches, 2), expected[3:])
  batches.close()


@pytest.mark.parametrize('num_threads', [1, 3])
def test_batches_do_not_depend_on_threads(prepared, num_threads):
  expected = take(loader.train_batches(prepared['train'], **TRAINING), 5)
  batches = loader.train_batches(prepared['train'], **TRAINING, num_threads=num_threads)
  assert_same_batches(take(batches, 5), expected)


def test_a_killed_worker_is_a_sentence(prepared):
  batches = loader.train_batches(prepared['train'], **TRAINING, num_workers=2)
  next(batches)
  worker = min(multiprocessing.active_children(), key=lambda process: process.pid)
  os.kill(worker.pid, signal.SIGKILL)
  with pytest.raises(
    UserError,
    match=rf'One of the 2 worker processes that load batches \(process {worker.pid}\) was ended by '
    r'SIGKILL, as the system does when memory runs out: use a smaller num_workers',
  ):
    take(batches, 100)
  batches.close()


def test_processes_share_each_batch(prepared):
  expected = take(loader.train_batches(prepared['train'], **TRAINING), 5)
  for process in range(2):
    batches = loader.train_batches(
      prepared['train'], **TRAINING, process_index=process, process_count=2
    )
    part = slice(2 * process, 2 * process + 2)
    share = [{key: value[part] for key, value in batch.items()} for batch in expected]
    assert_same_batches(take(batches, 5), share)
  with pytest.raises(UserError, match='A batch of 4 cannot be shared by 3 processes'):
    loader.train_batches(prepared['train'], **TRAINING, process_count=3)


def test_batches_go_on_where_a_checkpoint_was_saved(prepared, tmp_path):
  batches = loader.train_batches(prepared['train'], **TRAINING)
  take(batches, 4)
  with ocp.CheckpointManager(tmp_path / 'checkpoints') as manager:
    manager.save(4, args=ocp.args.Composite(batches=CheckpointSave(batches)))
    expected = take(batches, 3)
    manager.wait_until_finished()
    resumed = loader.train_batches(prepared['train'], **TRAINING)
    manager.restore(4, args=ocp.args.Composite(batches=CheckpointRestore(resumed)))
  assert resumed.get_state() == {'next_batch': 4}
  assert_same_batches(take(resumed, 3), expected)
  batches.set_state({'next_batch': 4})
  assert_same_batches(take(batches, 3), expected)


def test_far_states_are_reached_at_once(prepared):
  batches = loader.train_batches(prepared['train'], **TRAINING)
  batches.set_state({'next_batch': 10**9})
  next(batches)
  assert batches.get_state() == {'next_batch': 10**9 + 1}


def test_eval_batches_are_the_views_and_the_label_as_it_is(prepared):
  split, lookup = prepared['train'], transforms.label_lookup(ignore_labels=(0,))
  batches = [[3, 0], [], [11]]

  def view_sizes(size):
    return [(20, 30), size]

  found = list(loader.eval_batches(split, batches, view_sizes=view_sizes, label_lookup=lookup))
  assert [[sample.index for sample in batch] for batch in found] == batches
  for sample in (sample for batch in found for sample in batch):
    image = transforms.decode_image(split[sample.index]['image'])
    np.testing.assert_array_equal(sample.views[0], transforms.resize_to(image, (20, 30)))
    np.testing.assert_array_equal(sample.views[1], image)
    label = transforms.decode_label(split[sample.index]['label'])
    np.testing.assert_array_equal(sample.label, np.where(label == 0, 255, label))
