"""Many images at once: the labels of one by one, few programs, few images in memory."""

import types

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import nonlocal_jax
from nonlocal_jax.inference import pretrained, stream
from nonlocal_jax.inference.batches import batches_of, images_at_once
from nonlocal_jax.inference.buckets import PaddedShape, shapes_with_room
from nonlocal_jax.inference.images import as_array, sizes_of
from nonlocal_jax.models import Execution
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.parallel import data_mesh
from tests.test_predictor import image_of

SIZES = [(60, 80), (72, 64), (60, 80), (81, 49), (30, 40), (60, 80), (57, 78)]


def compiled_programs(model):
  """Number of programs that a model has compiled, by kind."""
  predictor = model._predictor_of(None)
  return predictor._window_logits._cache_size(), predictor._predict._cache_size()


@pytest.fixture(scope='module')
def images():
  return [image_of(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope='module')
def one_by_one(images, peer_checkpoint):
  model = nonlocal_jax.load(peer_checkpoint)
  return [model.predict(image) for image in images]


@pytest.mark.parametrize('num_devices', [1, 4])
@pytest.mark.parametrize('at_once', [1, 2, 5])
def test_labels_are_those_of_one_by_one(
  num_devices, at_once, images, one_by_one, peer_checkpoint, monkeypatch
):
  monkeypatch.setattr(stream, 'images_at_once', lambda *_: at_once)
  model = nonlocal_jax.load(peer_checkpoint, devices=jax.local_devices()[:num_devices])
  found = {index: labels for index, _, labels in model.predict_many(images)}
  assert sorted(found) == list(range(len(images)))
  equal = [np.mean(found[index] == labels) for index, labels in enumerate(one_by_one)]
  assert np.mean(equal) > 0.9999  # up to ties at rounding
  assert compiled_programs(model) == (1, 1)


def test_batches_have_one_size_and_every_image_once():
  small, large = (PaddedShape.from_image(size, EvalProtocol()) for size in [(64, 64), (128, 64)])
  shapes = [small, large, *[small] * 12]
  batches = batches_of(shapes, most=lambda shape: 3 if shape == small else 8, num_devices=2)
  assert [(x.shape, x.indices, x.size) for x in batches] == [
    (small, (0, 2, 3, 4, 5, 6), 6),
    (small, (7, 8, 9, 10, 11, 12), 6),
    (small, (13,), 6),
    (large, (1,), 2),
  ]


def gpus(gibibytes, *, processes=(0,)):
  """Stands for a mesh of GPUs with some memory each."""
  limit = {'bytes_limit': gibibytes * 2**30}
  devices = [
    types.SimpleNamespace(platform='cuda', process_index=index, memory_stats=lambda: limit)
    for index in processes
  ]
  return types.SimpleNamespace(devices=np.array(devices))


@pytest.mark.parametrize(
  ('size', 'gibibytes', 'expected'),
  [
    ((512, 512), 80, 16),
    ((512, 512), 4, 4),
    ((1024, 2048), 80, 2),
    ((4096, 4096), 80, 1),
    ((4096, 4096), 1, 1),
  ],
)
def test_batches_suit_the_memory(size, gibibytes, expected):
  protocol = EvalProtocol()
  shape = PaddedShape.from_image(size, protocol)
  assert images_at_once(shape, protocol, gpus(gibibytes)) == expected
  flipped = EvalProtocol(flip=True)
  assert images_at_once(shape, flipped, gpus(gibibytes)) == max(expected // 2, 1)
  assert images_at_once(shape, protocol, data_mesh()) == 1
  assert images_at_once(shape, protocol, gpus(80, processes=(0, 1))) == 1
  # Label maps of photographs that are tested smaller, and their images, take memory, too.
  small = EvalProtocol(scale=(64, 64))
  shape = PaddedShape.from_image((4000, 6000), small)
  assert images_at_once(shape, small, gpus(80)) == 1


def test_photographs_of_several_sizes_share_programs():
  """As many as are worth compiling: one for a few of them, more for hundreds."""
  protocol = EvalProtocol(scale=(2048, 512))
  photographs = [(375, 500), (427, 640), (640, 480), (333, 500)]
  for platform, few in [('cpu', 2), ('gpu', 1)]:
    shape_of = shapes_with_room(photographs, protocol, platform=platform)
    assert len(set(shape_of.values())) <= few
    shape_of = shapes_with_room(photographs * 5000, protocol, platform=platform)
    assert few < len(set(shape_of.values())) <= 4
    for size, shape in shape_of.items():
      needed = PaddedShape.from_image(size, protocol)
      for view, of_image in zip(shape.views, needed.views, strict=True):
        assert all(np.array(view.network) >= of_image.network)
      assert all(np.array(shape.result) >= size)
  assert shapes_with_room([], protocol, platform='cpu') == {}


class _Recorded:
  """Stands for an array on a device: waiting for it is recorded."""

  def __init__(self, events, number, array):
    self._events, self._number, self._array = events, number, array

  def copy_to_host_async(self):
    pass

  def __array__(self, *_, **__):
    self._events.append(('wait', self._number))
    return self._array


class _Predictor:
  """A predictor whose labels are the first pixel of each image."""

  def __init__(self):
    self.protocol = EvalProtocol()
    self.mesh = data_mesh(jax.local_devices()[:1])
    self.events = []

  def logits(self, state, shape, views, sizes, *, batch_size):
    number = len(self.events) - sum(kind == 'wait' for kind, _ in self.events)
    self.events.append(('dispatch', number))
    labels = np.zeros((batch_size, *shape.result), np.uint8)
    for label, (image,), (height, width) in zip(labels, views, sizes, strict=False):
      label[:height, :width] = image[0, 0, 0]
    return _Recorded(self.events, number, labels)

  def labels(self, batch):
    return batch


def test_devices_have_the_next_batch_before_a_result_is_waited_for(monkeypatch):
  predictor = _Predictor()
  images = [np.full((64, 64, 3), value, np.uint8) for value in range(5)]
  found = list(stream.predictions(images, predictor, None))
  assert [x.index for x in found] == list(range(5))
  assert [set(x.labels.ravel().tolist()) for x in found] == [{value} for value in range(5)]
  order = [('dispatch', 0)]
  for number in range(1, 5):
    order += [('dispatch', number), ('wait', number - 1)]
  assert predictor.events == [*order, ('wait', 4)]


def test_few_images_are_in_memory(monkeypatch):
  """However many there are."""
  monkeypatch.setattr(stream, 'PIXELS_AHEAD', 3 * 64 * 64)
  monkeypatch.setattr(stream, 'images_at_once', lambda *_: 2)
  read, seen, held = [], set(), []
  as_before = stream.as_array

  def counted(image, **options):
    read.append(image)
    held.append(len(read) - len(seen))
    return as_before(image, **options)

  monkeypatch.setattr(stream, 'as_array', counted)
  images = [np.full((64, 64, 3), value, np.uint8) for value in range(40)]
  for prediction in stream.predictions(images, _Predictor(), None):
    seen.add(prediction.index)
  assert seen == set(range(40))
  assert max(held) <= 3 + 2 + 2  # that wait, of the next batch, and of the one before it


def test_sizes_that_headers_do_not_tell_are_those_of_the_pixels(monkeypatch):
  monkeypatch.setattr(stream, 'images_at_once', lambda *_: 4)
  images = [np.full((60 + value, 64, 3), value, np.uint8) for value in range(5)]
  told = [(60, 64), None, (62, 64), (90, 20), (64, 64)]
  monkeypatch.setattr(stream, 'sizes_of', lambda _, **__: told)
  found = {x.index: x.labels for x in stream.predictions(images, _Predictor(), None)}
  for index, image in enumerate(images):
    np.testing.assert_array_equal(found[index], image[..., 0])


def test_sizes_are_those_of_the_arrays(tmp_path):
  pixels = np.zeros((40, 60, 3), np.uint8)
  given = [pixels, Image.fromarray(pixels)]
  for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'{orientation}.jpg'
    Image.fromarray(pixels).save(path, exif=exif)
    given += [path, str(path), Image.open(path)]
  assert sizes_of(given) == [as_array(image).shape[:2] for image in given]
  (tmp_path / 'text.png').write_text('text')
  odd = [tmp_path / 'text.png', tmp_path / 'none.png', np.zeros((4, 4), np.uint8), b'']
  assert sizes_of(odd) == [None] * 4


def test_files_that_cannot_be_read_leave_the_others(peer_checkpoint, tmp_path):
  model = nonlocal_jax.load(peer_checkpoint)
  Image.fromarray(image_of((60, 80))).save(tmp_path / 'a.png')
  (tmp_path / 'b.png').write_text('text')
  paths = [tmp_path / 'b.png', tmp_path / 'a.png', tmp_path / 'none.png']
  errors = {}
  found = list(model.predict_many(paths, on_error=errors.__setitem__))
  assert [x.index for x in found] == [1]
  np.testing.assert_array_equal(found[0].labels, model.predict(tmp_path / 'a.png'))
  assert [str(errors[index]).removeprefix(f'File {tmp_path}/') for index in sorted(errors)] == [
    'b.png is not an image, or broken.',
    'none.png cannot be read: No such file or directory.',
  ]
  with pytest.raises(nonlocal_jax.UserError, match='is not an image'):
    list(model.predict_many(paths))


@pytest.mark.slow
def test_predictions_with_folded_batch_norms_are_the_same(
  images, one_by_one, peer_checkpoint, monkeypatch
):
  """As on GPUs, which are told from CPUs in one place; logits come from the weights as loaded."""
  monkeypatch.setattr(pretrained, 'platform_of_mesh', lambda _: 'gpu')
  model = nonlocal_jax.load(peer_checkpoint, execution=Execution.for_platform('cpu'))
  found = [model.predict(image) for image in images]
  assert np.mean([np.mean(x == y) for x, y in zip(found, one_by_one, strict=True)]) > 0.999
  predictor = model._predictor_of(None)
  assert nnx.merge(predictor.graphdef, model._prediction_state).execution.batch_norm == 'folded'
  monkeypatch.undo()
  as_loaded = nonlocal_jax.load(peer_checkpoint)
  normalized = nonlocal_jax.normalize(images[0][None])
  np.testing.assert_array_equal(model.logits(normalized), as_loaded.logits(normalized))
