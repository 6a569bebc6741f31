"""In which format a folder holds labels, and what its description adds."""

import json

import numpy as np
import pytest

from nonlocal_jax.data import datasets, layouts, preparation, transforms
from nonlocal_jax.data.formats import detection
from nonlocal_jax.data.formats.found import Candidate, Found
from nonlocal_jax.errors import UserError
from tests.image_trees import CLASSES, write_tree

CUSTOM = datasets.custom_dataset(CLASSES)
FOUND = {'classes': ['background', 'road', 'car'], 'palette': [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}


@pytest.fixture
def striped(tmp_path, monkeypatch):
  """A folder in a made-up format, whose labels are drawn: row k is class k % 3."""
  source = tmp_path / 'source'
  samples = write_tree('custom', source)

  def draw(h, w):
    return np.repeat(np.arange(h, dtype=np.uint8)[:, None] % 3, w, axis=1)

  def list_split(split):
    drawn = [
      layouts.Sample(id_, image, source / 'stripes.json', draw) for id_, image, *_ in samples[split]
    ]
    return layouts.Listing(drawn, {})

  def find(folder, own):
    del own
    path = folder / 'stripes.json'
    if path.exists():
      return Candidate(path.name, lambda: Found('stripes', FOUND, list_split, path.read_text()))
    return None

  (source / 'stripes.json').write_text('1')
  (source / 'labels').rename(source / 'elsewhere')
  monkeypatch.setitem(detection.FORMATS, 'stripes', find)
  return source


def test_label_maps_are_drawn_when_a_folder_is_prepared(striped, tmp_path):
  opened = preparation.prepare(CUSTOM, striped, data_dir=tmp_path / 'tfds')
  for split in opened.values():
    for record, (h, w) in zip(split, split.sizes, strict=True):
      label = transforms.decode_label(record['label'])
      np.testing.assert_array_equal(label, np.tile(np.arange(h) % 3, (w, 1)).T)
  assert opened['val'].description == FOUND


def test_what_decides_the_drawing_is_in_the_fingerprint(striped, tmp_path):
  arguments = {'splits': ['val'], 'data_dir': tmp_path / 'tfds'}
  before = preparation.prepare(CUSTOM, striped, **arguments)['val'].directory
  again = preparation.prepare(CUSTOM, striped, **arguments)['val'].directory
  (striped / 'stripes.json').write_text('2')
  after = preparation.prepare(CUSTOM, striped, **arguments)['val'].directory
  assert before == again != after


def test_two_formats_in_one_folder_are_refused_unless_one_is_chosen(striped):
  (striped / 'elsewhere').rename(striped / 'labels')
  with pytest.raises(UserError, match=r'more than one format, masks \(.*\) and stripes \(strip'):
    detection.read_folder(striped)
  (striped / 'dataset.json').write_text('{"format": "stripes"}')
  assert detection.read_folder(striped).sentence == 'stripes'
  (striped / 'dataset.json').write_text('{"format": "stripe"}')
  with pytest.raises(
    UserError, match=r"'format' is 'stripe' \(did you mean 'stripes'\?\); it must"
  ):
    detection.read_folder(striped)
  (striped / 'labels').rename(striped / 'elsewhere')
  (striped / 'dataset.json').write_text('{"format": "masks"}')
  with pytest.raises(UserError, match=r"holds nothing of the format 'masks', which its dataset\."):
    detection.read_folder(striped)


def test_a_folder_of_nothing_known_is_a_sentence(tmp_path):
  with pytest.raises(UserError, match=r'no images with labels in a format that is known: put imag'):
    detection.read_folder(tmp_path)
  with pytest.raises(UserError, match=r'There is no folder .*/missing: give the folder'):
    detection.read_folder(tmp_path / 'missing')


@pytest.mark.parametrize(
  ('own', 'expected'),
  [
    ({}, FOUND),
    ({'classes': ['nothing', 'way', 'auto']}, {**FOUND, 'classes': ['nothing', 'way', 'auto']}),
    ({'ignore_labels': [2]}, {**FOUND, 'ignore_labels': [2]}),
    (
      {'classes': ['car', 'background', 'road']},
      {
        'classes': ['car', 'background', 'road'],
        'palette': [[2, 2, 2], [0, 0, 0], [1, 1, 1]],
        'label_map': [1, 2, 0],
      },
    ),
    (
      {'label_map': [255, 0, 1]},
      {'classes': ['road', 'car'], 'palette': FOUND['palette'][1:], 'label_map': [255, 0, 1]},
    ),
    (
      {'label_map': [0, 1, 1], 'classes': ['free', 'taken']},
      {'classes': ['free', 'taken'], 'palette': FOUND['palette'][:2], 'label_map': [0, 1, 1]},
    ),
  ],
)
def test_a_description_beside_the_data_wins(own, expected, striped):
  (striped / 'dataset.json').write_text(json.dumps(own))
  description = detection.read_folder(striped).description
  assert description == expected
  datasets.custom_dataset(**description)


@pytest.mark.parametrize(
  ('own', 'sentence'),
  [
    ({'classes': ['road', 'car']}, 'names the classes road, car, but the labels have backgr'),
    (
      {'classes': ['road', 'background', 'lorry']},
      'name these in the order that you want, or lead',
    ),
    (
      {'reduce_zero_label': True},
      "is true, but value 0 of the labels is 'background': take it out",
    ),
  ],
)
def test_a_description_of_other_classes_is_refused(own, sentence, striped):
  (striped / 'dataset.json').write_text(json.dumps(own))
  with pytest.raises(UserError, match=sentence):
    detection.read_folder(striped)
