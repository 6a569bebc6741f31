"""Fine-tuning that keeps what a checkpoint knows of classes with the same names."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.errors import UserError
from nonlocal_jax.models import NonLocalNet
from nonlocal_jax.runtime.parallel import data_mesh
from nonlocal_jax.training.checkpointing import started_from
from nonlocal_jax.training.class_matching import check_order, matched_classes
from nonlocal_jax.training.initial_weights import read_initial_weights
from nonlocal_jax.training.train_step import initial_state
from nonlocal_jax.weights.arrays import to_arrays
from nonlocal_jax.weights.checkpoints import save_weights
from nonlocal_jax.weights.loading import read_weights

CHECKPOINT = Path('tests/data/converted_of_2026_11')  # of Cityscapes
OURS = ('crack', 'Traffic_Light', 'road', 'puddle', 'side walk', 'sky')
KEPT = {1: 6, 2: 0, 5: 10}  # in Cityscapes: traffic light, road, sky


def test_classes_in_another_order_are_refused_unless_they_are_matched(checkpoint):
  theirs = checkpoint[0].classes
  check_order(theirs, theirs, source='there')
  check_order(['crack', *theirs[1:]], theirs, source='there')  # another name
  turned = [theirs[1], theirs[0], *theirs[2:]]
  with pytest.raises(UserError) as error:
    read_initial_weights(
      checkpoint[0].config, checkpoint[0].protocol, checkpoint=CHECKPOINT, classes=turned
    )
  assert str(error.value) == (
    f"{CHECKPOINT} has the classes of the dataset in another order: class 0 is 'road' there and "
    "'sidewalk' here; order them as in the weights, or train with match_classes (--match_classes)."
  )
  for options in ({'match_classes': turned}, {'new_classifier': True}):
    read_initial_weights(
      *(checkpoint[0].config, checkpoint[0].protocol),
      checkpoint=CHECKPOINT,
      classes=turned,
      **options,
    )


@pytest.fixture(scope='module')
def checkpoint():
  return read_weights(CHECKPOINT)


def start(checkpoint, path=CHECKPOINT, *, keep_ema=False, **options):
  """The network of `OURS`, its random state, the one that a run starts from, and what is said."""
  description, _ = checkpoint
  network = dataclasses.replace(description.config, num_classes=len(OURS))
  mesh = data_mesh(jax.devices()[:1])
  random = initial_state(network, optax.sgd(0.1), seed=3, keep_ema=keep_ema, mesh=mesh)
  initial = read_initial_weights(network, description.protocol, checkpoint=path, **options)
  return network, random, started_from(random, initial), initial.source


def logits_of(config, weights, images):
  """Logits of whole images."""
  graphdef = nnx.graphdef(NonLocalNet.abstract(config))
  return jax.jit(lambda weights: nnx.merge(graphdef, weights)(images))(weights)


def test_classes_of_the_same_name_keep_their_part_of_both_heads(checkpoint):
  description, given = checkpoint
  network, random, state, said = start(checkpoint, match_classes=OURS, keep_ema=True)
  found, new, known = (
    {name: np.asarray(array) for name, array in to_arrays(x).items()}
    for x in (state.variables, random.variables, given)
  )
  here, there = list(KEPT), list(KEPT.values())
  others = [index for index in range(len(OURS)) if index not in KEPT]
  classifiers = [name for name in known if 'conv_seg' in name]
  assert len(classifiers) == 4
  for name, array in known.items():
    if name in classifiers:
      np.testing.assert_array_equal(found[name][..., here], array[..., there])
      np.testing.assert_array_equal(found[name][..., others], new[name][..., others])
    else:
      np.testing.assert_array_equal(found[name], array)
  for ours, theirs in zip(*map(jax.tree.leaves, (state.params, state.ema)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert said == (
    f'{CHECKPOINT}; in both heads, the classifiers of 3 of 6 classes are kept by name '
    '(Traffic_Light = traffic light, road, sky), and those of 3 are new (crack, puddle, side walk)'
  )
  images = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)
  ours, theirs = (
    np.asarray(logits_of(config, weights, images))
    for config, weights in ((network, state.variables), (description.config, given))
  )
  np.testing.assert_array_equal(ours[..., here], theirs[..., there])
  assert ours[..., others].std() > 0


def test_the_order_of_classes_may_change(checkpoint):
  """As many classes as before, which would be taken for the same ones without a word."""
  description, given = checkpoint
  reversed_names = description.classes[::-1]
  network, protocol = description.config, description.protocol
  options = {'checkpoint': CHECKPOINT, 'match_classes': reversed_names}
  initial = read_initial_weights(network, protocol, **options)
  found = to_arrays(initial.fitted_to(nnx.split_state(given, nnx.Param, ...)[0]))
  for name, array in to_arrays(given).items():
    expected = array[..., ::-1] if 'conv_seg' in name else array
    np.testing.assert_array_equal(found[name], expected)
  assert 'are new' not in initial.source


def test_checkpoints_without_the_option_are_refused_with_its_name(checkpoint):
  with pytest.raises(
    UserError, match=r'other classes, set match_classes, .*, or new_classifier \('
  ):
    start(checkpoint)


@pytest.mark.parametrize(
  ('ours', 'theirs', 'sentence'),
  [
    (
      ['road', 'crack'],
      ['class 0', 'class 1'],
      'a.pth records no names of its classes, which match_classes needs; set new_classifier',
    ),
    (
      ['class 0', 'class 1', 'class 2'],
      ['road', 'sky'],
      'match_classes needs the names of the classes, and the dataset has none: set config.data.cla',
    ),
    (
      ['traffic light', 'Traffic-Light', 'sky'],
      ['traffic_light', 'sky'],
      "finds no single class 'traffic light', as the dataset has 'traffic light' and 'Traffic-Lig",
    ),
    (
      ['Sky', 'road'],
      ['sky', 'road', 'sky '],
      "match_classes finds no single class 'sky', as a.pth has 'sky' and 'sky '",
    ),
    (
      ['cracks', 'roads'],
      ['road', 'crack'],
      'No class has the name of one in a.pth (cracks, roads; there road, crack), which match_c',
    ),
  ],
)
def test_what_cannot_be_matched_is_refused(ours, theirs, sentence):
  with pytest.raises(UserError) as caught:
    matched_classes(ours, theirs, source='a.pth')
  assert sentence in str(caught.value)


def test_names_that_are_twice_but_not_asked_for_do_no_harm():
  assert matched_classes(['sky'], ['road', 'ROAD', 'sky'], source='a') == {0: 2}
  cityscapes, ade20k = PUBLISHED['cityscapes'].classes, PUBLISHED['ade20k'].classes
  found = matched_classes(ade20k, cityscapes, source='a')
  same = {name: name for name in ade20k if name in cityscapes}
  assert len(same) >= 10
  assert {ade20k[here]: cityscapes[there] for here, there in found.items()} == same


def test_a_checkpoint_without_names_is_told_by_its_file(checkpoint, tmp_path):
  description, state = checkpoint
  numbers = tuple(f'class {index}' for index in range(19))
  path = tmp_path / 'nameless'
  save_weights(path, state, dataclasses.replace(description, classes=numbers))
  with pytest.raises(UserError, match='nameless records no names of its classes'):
    start(checkpoint, path, match_classes=OURS)
