"""Polygons and run lengths in the files of tools for annotation, and broken ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from nonlocal_jax.data import transforms
from nonlocal_jax.data.formats import brushes, detection, shapes
from nonlocal_jax.data.samples import Listing
from nonlocal_jax.data.validation import read_sample
from nonlocal_jax.errors import UserError
from tests import annotation_trees as trees

LABELME = Path(__file__).parent / 'data/labelme'  # drawn by labelme 6.3.1


def listings_of(root):
  found = detection.read_folder(root)
  if isinstance(found.listing, Listing):
    return [found.listing]
  return [found.listing('train'), found.listing('val')]


def labels_of(root):
  """The label maps of a folder by the names of the images; fails where one is incomplete."""
  listings = listings_of(root)
  assert not any(listing.incomplete for listing in listings)
  samples = [sample for listing in listings for sample in listing.samples]
  return {
    sample.image.stem: transforms.decode_label(read_sample(sample).label) for sample in samples
  }


def complaints_of(root):
  """What is said of a folder: at once, or of its images."""
  try:
    listings = listings_of(root)
  except UserError as error:
    return [str(error)]
  found = [reason for listing in listings for reason in listing.incomplete.values()]
  for listing in listings:
    for sample in listing.samples:
      try:
        read_sample(sample)
      except UserError as error:
        found.append(str(error))
  return found


@pytest.mark.parametrize('name', trees.EXPORTS)
def test_label_maps_are_what_the_shapes_mean(name, tmp_path):
  write, ends = trees.EXPORTS[name]
  write(tmp_path)
  found = detection.read_folder(tmp_path)
  background, *names = found.description['classes']
  assert background in ('background', '_background_')
  assert names == (sorted(trees.NAMES) if name == 'label_studio' else trees.NAMES)
  labels = labels_of(tmp_path)
  assert len(labels) == (5 if name == 'roboflow' else 6)  # one is for testing
  for stem, label in labels.items():
    index = int(stem.split()[-1])
    expected = trees.expected_label(index, ends=ends, names=['background', *names])
    np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize(
  ('name', 'splits'),
  [('coco', {'train': '0123', 'val': '45'}), ('roboflow', {'train': '012', 'val': '34'})],
)
def test_splits_are_those_of_the_export(name, splits, tmp_path):
  trees.EXPORTS[name][0](tmp_path)
  listing = detection.read_folder(tmp_path).listing
  assert not isinstance(listing, Listing)
  for split, stems in splits.items():
    assert [sample.image.stem for sample in listing(split).samples] == list(stems)


@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')  # pycocotools'
def test_polygons_are_drawn_as_pycocotools_does(tmp_path):
  rng = np.random.default_rng(0)
  content = trees.coco_content([0, 1, 2])
  content['annotations'] = []
  for index in (0, 1, 2):
    h, w = trees.SIZES[index]
    for _ in range(30):
      parts = rng.uniform(-0.3, 1.3, size=(rng.integers(1, 4), rng.integers(3, 9), 2)) * [w, h]
      parts[:, 0] = [w / 2, h / 2]  # none is beside the image
      if rng.random() < 0.3:
        parts = parts.round()
      content['annotations'].append(
        {
          'id': len(content['annotations']),
          'image_id': index,
          'category_id': int(rng.integers(1, 3)),
          'segmentation': parts.reshape(len(parts), -1).tolist(),
        }
      )
  path = tmp_path / 'polygons.json'
  trees.write_json(path, content)
  for index in (0, 1, 2):
    trees.write_image(tmp_path / f'{index}.jpg', index)
  reference = COCO(path)
  for stem, label in labels_of(tmp_path).items():
    expected = np.zeros_like(label)
    for annotation in reference.imgToAnns[int(stem)]:
      expected[reference.annToMask(annotation) == 1] = annotation['category_id']
    np.testing.assert_array_equal(label, expected)


def test_run_lengths_are_those_of_pycocotools():
  rng = np.random.default_rng(0)
  for _ in range(100):
    h, w = rng.integers(1, 70, size=2)
    mask = np.asfortranarray(rng.random((h, w)) < rng.random(), np.uint8)
    label = shapes.empty_label((h, w))
    shapes.paint_counts(label, shapes.counts_in(coco_mask.encode(mask)['counts']), 1)
    np.testing.assert_array_equal(label, mask)


def test_long_runs_are_those_of_pycocotools():
  mask = np.zeros((2000, 1500), np.uint8, order='F')
  mask[10:1900, 20:1400] = 1
  mask[:, 700] = 1
  label = shapes.empty_label(mask.shape)
  shapes.paint_counts(label, shapes.counts_in(coco_mask.encode(mask)['counts']), 1)
  np.testing.assert_array_equal(label, mask)


def test_labelme_s_shapes_of_every_kind_are_drawn_as_labelme_does(tmp_path):
  (tmp_path / 'shapes.json').write_bytes((LABELME / 'shapes.json').read_bytes())
  Image.new('RGB', (160, 120)).save(tmp_path / 'photo.png')
  (tmp_path / 'labels.txt').write_text('__ignore__\n_background_\nroad\ncar\ntree\n')
  expected = np.asarray(Image.open(LABELME / 'label.png'))
  assert set(np.unique(expected)) == {0, 1, 2, 3, 255}
  np.testing.assert_array_equal(labels_of(tmp_path)['photo'], expected)
  (tmp_path / 'labels.txt').unlink()  # then in the order of the names
  renamed = np.array([0, 2, 1, 3, *range(4, 256)], np.uint8)[expected]
  np.testing.assert_array_equal(labels_of(tmp_path)['photo'], renamed)


def test_brushes_are_read_as_label_studio_s_own_package_does():
  # label_studio_sdk.converter.brush.mask2rle of the mask below
  data = [0, 0, 0, 252, 57, 27, 254, 83, 0, 194, 127, 247, 192, 48, 159, 253, 240, 12, 39, 255, 137]
  data += [192, 35, 255, 195, 224, 0]
  mask = np.zeros((7, 9), bool)
  mask[2:5, 3:8] = mask[6, 0] = True
  np.testing.assert_array_equal(brushes.alpha_in(data, 63).reshape(7, 9), mask)
  for length in range(len(data) - 1):
    with pytest.raises(ValueError, match='breaks off'):
      brushes.alpha_in(data[:length], 63)


def test_cvat_s_turned_boxes_and_ellipses(tmp_path):
  trees.write_cvat(tmp_path)
  turned = (
    '<image id="0" name="0.jpg" width="48" height="40">'
    '<box label="road" xtl="8" ytl="14" xbr="28" ybr="20" rotation="90"></box>'
    '<ellipse label="car" cx="38" cy="12" rx="6" ry="9" rotation="0"></ellipse>'
    '<polyline label="car" points="1,1;30,30"></polyline></image>'
  )
  text = (tmp_path / 'annotations.xml').read_text()
  start, end = text.index('<image id="0"'), text.index('<image id="1"')
  (tmp_path / 'annotations.xml').write_text(text[:start] + turned + text[end:])
  label = labels_of(tmp_path)['0']
  expected = np.zeros_like(label)
  expected[7:27, 15:21] = 1  # about (18, 17), the sides exchanged
  np.testing.assert_array_equal(label == 1, expected == 1)
  y, x = np.mgrid[:40, :48]
  inside = ((x - 38) / 6) ** 2 + ((y - 12) / 9) ** 2
  assert (label[inside < 0.9] == 2).all()
  assert not (label[inside > 1.2] == 2).any()
  assert '1 polyline' in detection.read_folder(tmp_path).sentence


def test_supervisely_s_polygons_have_holes(tmp_path):
  trees.write_supervisely(tmp_path)
  path = tmp_path / 'day/ann/0.jpg.json'
  content = json.loads(path.read_text())
  holed = {
    'exterior': trees.corners_of((5, 5, 20, 25)),
    'interior': [trees.corners_of((8, 9, 12, 15))],
  }
  rectangle = {'exterior': [[30.7, 12.2], [25.1, 8.9]], 'interior': []}
  content['objects'] = [
    {'classTitle': 'road', 'geometryType': 'polygon', 'points': holed},
    {'classTitle': 'car', 'geometryType': 'rectangle', 'points': rectangle},
  ]
  trees.write_json(path, content)
  expected = np.zeros(trees.SIZES[0], np.uint8)
  expected[5:26, 5:21] = 1
  expected[9:16, 8:13] = 0
  expected[8:13, 25:31] = 2
  np.testing.assert_array_equal(labels_of(tmp_path)['0'], expected)


def test_a_category_that_groups_others_counts_once_it_is_used(tmp_path):
  trees.write_roboflow(tmp_path)
  path = tmp_path / 'train/_annotations.coco.json'
  content = json.loads(path.read_text())
  content['annotations'][0]['category_id'] = 0
  trees.write_json(path, content)
  assert detection.read_folder(tmp_path).description['classes'] == [
    'background',
    'street',
    *trees.NAMES,
  ]


def test_images_without_shapes_are_all_background(tmp_path):
  trees.write_cvat_coco(tmp_path)
  path = tmp_path / 'annotations/instances_default.json'
  content = json.loads(path.read_text())
  content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 4]
  trees.write_json(path, content)
  assert not labels_of(tmp_path)['4'].any()
  sentence = detection.read_folder(tmp_path).sentence
  assert '6 images with 5 polygons and 10 masks of 2 classes; 1 image without any; pix' in sentence


def test_a_class_called_background_is_class_0(tmp_path):
  trees.write_cvat_coco(tmp_path)
  path = tmp_path / 'annotations/instances_default.json'
  content = json.loads(path.read_text())
  content['categories'][1]['name'] = 'Background'
  trees.write_json(path, content)
  assert detection.read_folder(tmp_path).description['classes'] == ['Background', 'road']
  for stem, label in labels_of(tmp_path).items():
    expected = trees.expected_label(int(stem), ends=0)
    np.testing.assert_array_equal(label, expected == 1)


def test_json_min_of_label_studio(tmp_path):
  tasks = []
  for index in range(6):
    trees.write_image(tmp_path / f'{index}.jpg', index)
    regions = [
      {**result['value'], 'original_width': w, 'original_height': h}
      for result in trees.label_studio_results(index)
      for h, w in [trees.SIZES[index]]
    ]
    tasks.append({'image': f's3://bucket/{index}.jpg', 'id': index, 'label': regions})
  trees.write_json(tmp_path / 'tasks.json', tasks)
  names = detection.read_folder(tmp_path).description['classes']
  for stem, label in labels_of(tmp_path).items():
    expected = trees.expected_label(int(stem), ends=0, names=names)
    np.testing.assert_array_equal(label, expected)


def test_label_studio_s_shapes_and_labels_in_two_results_of_one_id(tmp_path):
  """As <Labels> with <Polygon> and <Brush> writes them."""
  trees.write_label_studio(tmp_path)
  path = tmp_path / 'project-1.json'
  tasks = json.loads(path.read_text())
  for task in tasks:
    split = []
    for result in task['annotations'][1]['result']:
      kind = result['type']
      value = {key: inner for key, inner in result['value'].items() if key != kind}
      split.append({**result, 'type': kind.removesuffix('labels'), 'value': value})
      labels = result['value'][kind]
      split.append({**result, 'type': 'labels', 'value': {**value, 'labels': labels}})
    task['annotations'][1]['result'] = split
  trees.write_json(path, tasks)
  labels = labels_of(tmp_path)
  assert len(labels) == 6
  for stem, label in labels.items():
    expected = trees.expected_label(
      int(stem.split()[-1]), ends=0, names=['background', 'car', 'road']
    )
    np.testing.assert_array_equal(label, expected)


def test_names_of_photos_are_no_splits(tmp_path):
  """A picture of a train, called so, is not for training."""
  trees.write_labelme(tmp_path)
  for index, name in enumerate(['train 7', 'val_d_isere', 'test']):
    (tmp_path / f'{index}.jpg').rename(tmp_path / f'{name}.jpg')
    content = json.loads((tmp_path / f'{index}.json').read_text())
    (tmp_path / f'{index}.json').unlink()
    trees.write_json(tmp_path / f'{name}.json', {**content, 'imagePath': f'{name}.jpg'})
  assert len(labels_of(tmp_path)) == 6
  assert isinstance(detection.read_folder(tmp_path).listing, Listing)
  for index in (3, 4, 5):
    folder = tmp_path / ('validation' if index == 3 else 'train')
    folder.mkdir(exist_ok=True)
    for suffix in ('jpg', 'json'):
      (tmp_path / f'{index}.{suffix}').rename(folder / f'{index}.{suffix}')
  for name in ('train 7', 'val_d_isere', 'test'):
    (tmp_path / f'{name}.json').unlink()
  listing = detection.read_folder(tmp_path).listing
  assert not isinstance(listing, Listing)
  assert [sample.id for sample in listing('train').samples] == ['train/4', 'train/5']


@pytest.mark.parametrize('name', ['coco', 'cvat', 'label_studio', 'supervisely', 'labelme'])
def test_classes_txt_gives_the_order_and_may_have_more(name, tmp_path):
  write, ends = trees.EXPORTS[name]
  write(tmp_path)
  (tmp_path / 'labels.txt').unlink(missing_ok=True)
  (tmp_path / 'classes.txt').write_text('tree\ncar\n\nroad\n')
  expected = ['background', 'tree', 'car', 'road']
  assert detection.read_folder(tmp_path).description['classes'] == expected
  for stem, label in labels_of(tmp_path).items():
    drawn = trees.expected_label(int(stem.split()[-1]), ends=ends, names=expected)
    np.testing.assert_array_equal(label, drawn)
  (tmp_path / 'classes.txt').write_text('road\ntree\n')
  (complaint,) = complaints_of(tmp_path)
  assert complaint.endswith(
    "classes.txt lacks the class 'car', which the annotations have: add it, or delete the file."
  )


def test_subsets_of_a_cvat_project_are_splits(tmp_path):
  trees.write_cvat(tmp_path)
  path = tmp_path / 'annotations.xml'
  text = path.read_text()
  for index in range(6):
    subset = ['Train', 'Validation', 'Test'][max(0, index - 3)]
    text = text.replace(f'<image id="{index}"', f'<image id="{index}" subset="{subset}"')
    (tmp_path / f'images/{subset}').mkdir(exist_ok=True)
    (tmp_path / f'images/{index}.jpg').rename(tmp_path / f'images/{subset}/{index}.jpg')
  path.write_text(text)
  found = detection.read_folder(tmp_path)
  assert not isinstance(found.listing, Listing)
  assert [sample.id for sample in found.listing('val').samples] == ['images/Validation/4']
  assert len(found.listing('train').samples) == 4
  assert 'left out: 5 tags without an area, 1 image for testing' in found.sentence


def test_datasets_of_supervisely_called_after_splits_are_splits(tmp_path):
  trees.write_supervisely(tmp_path)
  (tmp_path / 'day').rename(tmp_path / 'train')
  (tmp_path / 'night').rename(tmp_path / 'val')
  listing = detection.read_folder(tmp_path).listing
  assert not isinstance(listing, Listing)
  assert [sample.id for sample in listing('val').samples] == ['val/img/4', 'val/img/5']


def test_a_project_in_a_folder_of_its_own_is_found(tmp_path):
  """As an unpacked archive is."""
  trees.write_supervisely(tmp_path / 'project')
  assert len(labels_of(tmp_path)) == 6


@pytest.mark.parametrize('name', trees.EXPORTS)
def test_annotations_need_not_lie_at_the_top(name, tmp_path):
  write, ends = trees.EXPORTS[name]
  write(tmp_path / 'export 1')
  names = detection.read_folder(tmp_path).description['classes']
  assert names[1:] == (sorted(trees.NAMES) if name == 'label_studio' else trees.NAMES)
  labels = labels_of(tmp_path)
  assert len(labels) == (5 if name == 'roboflow' else 6)
  for stem, label in labels.items():
    expected = trees.expected_label(
      int(stem.split()[-1]), ends=ends, names=['background', *names[1:]]
    )
    np.testing.assert_array_equal(label, expected)


def test_two_lists_of_labelme_that_differ_are_refused(tmp_path):
  trees.write_labelme(tmp_path / 'one')
  trees.write_labelme(tmp_path / 'two')
  assert complaints_of(tmp_path) == []
  (tmp_path / 'two/labels.txt').write_text('car\nroad\n')
  (complaint,) = complaints_of(tmp_path)
  assert complaint.endswith('two/labels.txt differ: take one away.')


def test_one_split_alone_is_all_images(tmp_path):
  trees.write_roboflow(tmp_path)
  for path in (tmp_path / 'valid').iterdir():
    path.unlink()
  found = detection.read_folder(tmp_path)
  assert isinstance(found.listing, Listing)
  assert [sample.id for sample in found.listing.samples] == ['train/0', 'train/1', 'train/2']
  assert '3 images with 3 polygons and 6 masks of 2 classes;' in found.sentence
  assert found.sentence.endswith('left out: 1 image for testing')
