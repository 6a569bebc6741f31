"""The demo set: seeded, and its evidence out of the backbone's sight."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nonlocal_jax.data import synthetic
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNet, NonLocalNetConfig
from nonlocal_jax.models.nonlocal_net import state_shapes

SHAPES = range(2, 8)


def samples(count: int):
  return [synthetic.demo_sample(np.random.default_rng((5, index))) for index in range(count)]


def test_each_image_has_a_disc_and_shapes_of_its_colour():
  colours = set()
  for image, label in samples(50):
    assert image.shape == (192, 192, 3)
    assert image.dtype == label.dtype == np.uint8
    values = set(np.unique(label)) - {0, 1}
    assert np.any(label == 1)
    assert values <= set(SHAPES)
    (colour,) = {(value - 2) % 3 for value in values}
    red, green, blue = image[label == 1].mean(axis=0)
    assert colour == np.argmax([red, green, blue])
    colours.add(colour)
  assert colours == {0, 1, 2}


def test_equal_seeds_give_equal_images():
  first, again = samples(2), samples(2)
  np.testing.assert_array_equal(first[0][0], again[0][0])
  assert np.any(first[0][0] != first[1][0])


def test_the_folder_appears_whole_and_is_kept(tmp_path):
  directory = tmp_path / 'set'
  (tmp_path / 'set.partial/images').mkdir(parents=True)  # left by an interrupted run
  synthetic.write_demo_set(directory, train=2, val=1)
  files = sorted(path for path in directory.rglob('*') if path.is_file())
  assert [str(path.relative_to(directory)) for path in files] == [
    'images/train/0000.jpg',
    'images/train/0001.jpg',
    'images/val/0000.jpg',
    'labels/train/0000.png',
    'labels/train/0001.png',
    'labels/val/0000.png',
  ]
  assert [path.name for path in tmp_path.iterdir()] == ['set']
  stamps = [path.stat().st_mtime_ns for path in files]
  synthetic.write_demo_set(directory, train=2, val=1)
  assert [path.stat().st_mtime_ns for path in files] == stamps


def test_of_two_processes_one_writes_the_set_and_the_other_waits(tmp_path, monkeypatch):
  """As threads, each with a descriptor of its own of the file that is locked."""
  write, written, together = synthetic._write_files, [], threading.Barrier(2)

  def slowly(directory, **counts):
    written.append(directory)
    time.sleep(0.3)
    write(directory, **counts)

  def make(_):
    together.wait()
    synthetic.write_demo_set(tmp_path / 'set', train=2, val=1)
    return len([path for path in (tmp_path / 'set').rglob('*') if path.is_file()])

  monkeypatch.setattr(synthetic, '_write_files', slowly)
  with ThreadPoolExecutor(2) as pool:
    assert list(pool.map(make, range(2))) == [6, 6]
  assert len(written) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_a_set_that_cannot_be_written_is_a_sentence(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'file/set cannot be written: File exists'):
    synthetic.write_demo_set(tmp_path / 'file/set')


@pytest.mark.parametrize('non_local', [False, True])
def test_only_the_block_sees_the_disc_from_the_shapes(non_local):
  """Without the block the shapes' logits have no gradient in the disc's pixels."""
  config = NonLocalNetConfig.from_depth(14, width=2, num_classes=8, non_local=non_local)
  averaging = {  # every layer the mean of what it sees, so that nothing it sees can cancel
    path: variable.replace(
      jnp.full(variable.shape, 1 / np.prod(variable.shape[:-1]) if 'kernel' in path else 1.0)
    )
    for path, variable in nnx.to_flat_state(state_shapes(config))
  }
  graphdef, state = nnx.graphdef(NonLocalNet.abstract(config)), nnx.from_flat_state(averaging)

  def shapes_logits(image: jax.Array, label: jax.Array) -> jax.Array:
    logits = nnx.merge(graphdef, state)(image[None] / 255)[0]
    return jnp.sum(jnp.where((label >= 2)[..., None], logits, 0))

  gradient = jax.jit(jax.grad(shapes_logits))
  for image, label in samples(12):
    seen = np.abs(gradient(jnp.asarray(image, jnp.float32), label)).max(axis=-1)
    assert seen[label >= 2].max() > 0
    assert (seen[label == 1].max() > 0) == non_local
