"""Broken files of annotation tools are refused, in sentences that name the file and the shape."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.data.formats import detection
from tests import annotation_trees as trees
from tests.test_annotations import complaints_of, labels_of

COCO = 'annotations/instances_default.json'
POLYGON = 'Annotation 1 of image 0.jpg in .*default.json has '


def changed(path, change):
  """Changes the contents of a JSON file: by what the function returns, or in place."""
  content = json.loads(path.read_text())
  replaced = change(content)
  trees.write_json(path, content if replaced is None else replaced)


def first(content):
  return content['annotations'][0]


def set_segmentation(value):
  return lambda content: first(content).update(segmentation=value)


def set_in(key, index, /, **values):
  return lambda content: content[key][index].update(values)


def append(name, value):
  return lambda content: content[name].append(value)


def boxes_only(content):
  for annotation in content['annotations']:
    del annotation['segmentation']


def keypoints_only(content):
  boxes_only(content)
  for annotation in content['annotations']:
    annotation['keypoints'] = [1, 2, 2]


def too_many_classes(content):
  content['categories'] += [{'id': index, 'name': f'{index}'} for index in range(100, 400)]
  first(content)['category_id'] = 399


def panoptic(content):
  content['annotations'] = [{'image_id': 0, 'file_name': '0.png', 'segments_info': []}]


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    (set_segmentation([[1, 1, float('nan'), 1, 5, 5]]), POLYGON + 'a coordinate that is no finite'),
    (set_segmentation([[1, 1, 1e999, 1, 5, 5]]), POLYGON + 'a coordinate that is no finite number'),
    (set_segmentation([]), POLYGON + 'no segmentation, perhaps only a box: mend it, or take it o'),
    (set_segmentation([[]]), POLYGON + 'a polygon of fewer than three points'),
    (set_segmentation([[1, 1, 9, 9]]), POLYGON + 'a polygon of fewer than three points'),
    (set_segmentation([[1, 1, 9, 9, 3]]), POLYGON + 'a polygon that is no list of numbers x, y'),
    (set_segmentation([['1', 1, 9, 9, 3, 3]]), POLYGON + 'a polygon that is no list of numbers'),
    (set_segmentation([1, 1, 9, 9, 3, 3]), POLYGON + 'a polygon that is no list of numbers'),
    (
      set_segmentation([[0, 0, 48, 40] * 200]),
      POLYGON + 'an outline of 19,200 pixels, longer than',
    ),
    (set_segmentation('polygon'), POLYGON + 'a segmentation that is no list of polygons'),
    (
      set_segmentation([[1, 1, 5000, 1, 5, 5]]),
      POLYGON + r'the point \(5000, 1\), far outside the',
    ),
    (
      set_segmentation([[-9, 1, -5, 1, -5, 5]]),
      POLYGON + r'the point \(-9, 1\), as all its points',
    ),
    (
      set_segmentation({'size': [48, 40], 'counts': [1920]}),
      POLYGON + r'run lengths of \(height, width\) \[48, 40\], and not \[40, 48\]',
    ),
    (
      set_segmentation({'size': [40, 48], 'counts': [10, 20]}),
      POLYGON + 'run lengths for 30 pixels, and not 1920',
    ),
    (
      set_segmentation({'size': [40, 48], 'counts': [-1, 1921]}),
      POLYGON + 'run lengths that are no whole numbers',
    ),
    (
      set_segmentation({'size': [40, 48], 'counts': 'oooooooo'}),
      POLYGON + 'run lengths that are no compressed string of COCO',
    ),
    (
      set_segmentation({'size': [40, 48], 'counts': 'PPYo1'}),
      POLYGON + 'run lengths for .* pixels, and not 1920',
    ),
    (set_segmentation({'size': [40, 48]}), POLYGON + 'no run lengths'),
    (
      set_in('annotations', 0, category_id=77),
      'Annotation 1 in .*default.json has the category_id 77, which is not listed there: add it',
    ),
    (
      set_in('annotations', 0, image_id=[1]),
      r'Annotation 1 in .*default.json has the image_id \[1\], which is not listed there',
    ),
    (
      set_in('categories', 1, name='road'),
      "the categories 1 and 2 are both called 'road': rename one, or give their annotations the",
    ),
    (set_in('categories', 1, name='a\nb'), r"a class called 'a\\nb', which cannot be printed: ren"),
    (set_in('categories', 1, name='\ud800'), r"a class called '\\ud800', which cannot be printed"),
    (set_in('categories', 1, id=1), 'the id 1 is of two categories: give one another'),
    (set_in('categories', 1, name=5), 'one of the categories lacks its id or name: mend it'),
    (set_in('images', 1, id=0), 'the id 0 is of two images: give one another'),
    (set_in('images', 1, file_name='0.jpg'), r'images/0.jpg is annotated twice, in .*\.json: take'),
    (set_in('images', 1, file_name='a/../../x.jpg'), r'There is no image a/../../x.jpg in .*, whi'),
    (set_in('images', 1, file_name='..'), r'There is no image \.\. in .*, which .* names: add it'),
    (
      set_in('images', 0, width=40, height=48),
      'has image 0.jpg with 40x48 pixels, but it has 48x40 .turned, perhaps by its EXIF orientat',
    ),
    (
      set_in('images', 0, width=480),
      'has image 0.jpg with 480x40 pixels, but it has 48x40: replace one of them',
    ),
    (too_many_classes, 'have 303 classes with the one of the background, and 255 are'),
    (boxes_only, 'is for detection: its 18 annotations have no segmentation, only boxes or keyp'),
    (keypoints_only, 'is for detection: its 18 annotations have no segmentation, only boxes or k'),
    (panoptic, 'is of COCO, but for panoptic segmentation, whose labels are PNG files: convert'),
    (
      lambda content: content.update(annotations=[{'image_id': 0, 'caption': 'A road.'}]),
      'is of COCO, but for captions: take the one of instances',
    ),
    (lambda content: content.update(annotations=[]), 'have no shapes with an area: draw polygons'),
    (
      lambda content: content.update(annotations={}),
      "'annotations' is no list of objects; mend it",
    ),
    (lambda content: content.pop('categories') and None, "'categories' is no list of objects"),
  ],
)
def test_coco(change, sentence, tmp_path):
  trees.write_cvat_coco(tmp_path)
  changed(tmp_path / COCO, change)
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, sentence)


def assert_sentence(complaint, sentence):
  assert re.search(sentence, complaint), complaint
  assert complaint.endswith('.')
  assert '\n' not in complaint


SHAPE = r"Shape 1 in .*0.json \(polygon, 'road'\) "


def base64_of(shape):
  return base64.b64encode(trees.png_of(np.ones(shape, np.uint8))).decode()


def set_shape(**values):
  return lambda content: content['shapes'][0].update(values)


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    (set_shape(points=[[1, 1], [9, 9]]), SHAPE + 'has 2 points: mend it, or take it out'),
    (set_shape(points=[]), SHAPE + 'has coordinates that are no pairs of x and y'),
    (set_shape(points=None), SHAPE + 'has a coordinate that is no number'),
    (set_shape(points=[[1, 1], [9], [3, 3]]), SHAPE + 'has coordinates that are no pairs of x a'),
    (set_shape(points=[[1, 1], [9, float('nan')], [3, 3]]), SHAPE + 'has a coordinate that is no'),
    (
      set_shape(points=[[1, 1], [9, 10**400], [3, 3]]),
      SHAPE + 'has a coordinate that is no number',
    ),
    (
      set_shape(points=[[1, 1], [9, 900], [3, 3]]),
      SHAPE + r'has the point \(9, 900\), far outside',
    ),
    (set_shape(shape_type='circle'), r"\(circle, 'road'\) has 4 points"),
    (set_shape(shape_type='points'), r"\(points, 'road'\) is of a kind that labelme does not dra"),
    (
      set_shape(shape_type='mask', points=[[1, 1], [5, 5]], mask='!'),
      r"\(mask, 'road'\) has a mask that is not in base64",
    ),
    (
      set_shape(shape_type='mask', points=[[1, 1], [5, 5]], mask=None),
      r"\(mask, 'road'\) has a mask that is not in base64",
    ),
    (
      set_shape(shape_type='mask', points=[[1, 1], [5, 5]], mask='\u00e9'),
      r"\(mask, 'road'\) has a mask that is not in base64",
    ),
    (
      set_shape(shape_type='mask', points=[[1, 1], [5, 5]], mask=base64_of((4, 5))),
      r"\(mask, 'road'\) has a mask of 5x4 pixels, and not 5x5",
    ),
    (set_shape(label=''), 'Shape 1 in .*0.json has no label: mend it, or take it out'),
    (set_shape(label='lorry'), r"0.json has the label 'lorry', which .*/labels.txt lacks: add it"),
    (set_shape(label=None), 'Shape 1 in .*0.json has no label: mend it, or take it out'),
    (
      lambda content: content.update(imageWidth=99),
      'has image 0.jpg with 99x40 pixels, but it has',
    ),
    (
      lambda content: content.update(imagePath='../../1.jpg'),
      r'1.jpg is annotated twice, in .*0\.js',
    ),
    (lambda content: content.update(imagePath=None), 'is not of labelme: it has no imagePath'),
    (lambda content: content.update(shapes=[1]), 'Shape 1 in .*0.json has no label'),
  ],
)
def test_labelme(change, sentence, tmp_path):
  trees.write_labelme(tmp_path)
  changed(tmp_path / '0.json', change)
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, sentence)


def replace(old, new):
  def change(text):
    assert old in text
    return text.replace(old, new, 1)

  return change


CVAT = r'Shape [123] of image 0.jpg in .*annotations.xml \((polygon|box|mask|star), .road.\) '
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>\n<annotations>'


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    (
      replace('points="2.00,20.00;', 'points="nan,20.00;'),
      CVAT + 'has a coordinate that is no fini',
    ),
    (
      replace('points="2.00,20.00;', 'points="x,20.00;'),
      CVAT + 'has something else than numbers as',
    ),
    (
      replace('points="2.00,20.00;', 'points="2.00;'),
      CVAT + 'has coordinates that are no pairs of',
    ),
    (
      replace('points="2.00,20.00;', 'points="2e9,20.00;'),
      CVAT + r'has the point \(2e\+09, 20\), far',
    ),
    (
      replace('points="2.00,20.00;30.00,20.00;30.00,34.00;2.00,34.00', 'points="2.00,20.00;9,9'),
      CVAT + 'has a polygon of fewer than three points',
    ),
    (replace('rle="0, 60"', 'rle="0, 61"'), CVAT + 'has run lengths for 61 pixels, and not 60'),
    (replace('rle="0, 60"', 'rle="0, 60.5"'), CVAT + 'has run lengths that are no whole numbers'),
    (replace('rle="0, 60"', 'rle="0, 1e30"'), CVAT + 'has run lengths that are no whole numbers'),
    (
      replace('rle="0, 60" left="25"', 'rle="0, 60" left="45"'),
      CVAT + 'has a mask of 10x6 pixels a',
    ),
    (
      replace('width="10" height="6"', 'width="1e9" height="1e9"'),
      CVAT + 'has 1000000000x1000000000',
    ),
    (
      replace('<mask label="road"', '<mask label="lorry"'),
      'has a label that the file does not list',
    ),
    (replace('<mask label="road"', '<star label="road"'), 'is no XML file of CVAT, or broken'),
    (replace('z_order="0"', 'z_order="top"'), CVAT + 'has something else than numbers as z_order'),
    (replace('width="48"', 'width="480"'), 'has image 0.jpg with 480x40 pixels, but it has 48x40'),
    (
      replace('width="48"', 'width="wide"'),
      'has image 0.jpg with widex40 pixels, but it has 48x40',
    ),
    (
      replace('name="0.jpg"', 'name="../7.jpg"'),
      'There is no image ../7.jpg in .*: add it, or take i',
    ),
    (
      replace('<annotations>', BOMB),
      'it declares a document type, which CVAT does not.: replace it',
    ),
    (
      replace('<annotations>', '<annotations>&b;'),
      'is no XML file of CVAT, or broken .undefined ent',
    ),
    (replace('utf-8', 'nan'), 'is no XML file of CVAT, or broken .unknown encoding'),
    (replace('</annotations>', ''), 'is no XML file of CVAT, or broken .no element found'),
    (
      replace('</meta>', '</meta><track id="0" label="car"></track>'),
      'of CVAT for video: export "CVA',
    ),
  ],
)
def test_cvat(change, sentence, tmp_path):
  trees.write_cvat(tmp_path)
  path = tmp_path / 'annotations.xml'
  path.write_text(change(path.read_text()))
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, sentence)


REGION = r'Region [123] of image .*no 0.jpg in .*project-1.json \(\w+, road\) '


def set_value(index, **values):
  return lambda tasks: tasks[0]['annotations'][1]['result'][index]['value'].update(values)


def set_result(index, **values):
  return lambda tasks: tasks[0]['annotations'][1]['result'][index].update(values)


def set_task(**values):
  return lambda tasks: tasks[0].update(values)


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    (set_value(0, points=[[1, 1], [2, 2]]), REGION + 'has a polygon of fewer than three points'),
    (
      set_value(0, points=[[1, 1], [2, 2], [float('nan'), 1]]),
      REGION + 'has a coordinate that is no',
    ),
    (set_value(0, points='all'), REGION + 'has a coordinate that is no number'),
    (
      set_value(0, points=[[1, 1], [2, 2], [9000, 1]]),
      REGION + r'has the point \(4320, 0.4\), far',
    ),
    (set_value(0, closed=False), REGION + 'has a polygon that is not closed'),
    (set_value(0, polygonlabels=['road', 'car']), 'has 2 labels, and not one'),
    (set_value(0, polygonlabels=[]), 'has 0 labels, and not one'),
    (
      set_value(1, width=None),
      r', car\) has something else than numbers as x, y, width, height or',
    ),
    (
      set_value(1, rotation='left'),
      r', car\) has something else than numbers as x, y, width, height',
    ),
    (set_value(2, rle=[0, 0, 0, 1]), REGION + 'has an rle of 0.25 pixels, and not 1920'),
    (set_value(2, rle=[0, 0]), REGION + 'has an rle that breaks off'),
    (set_value(2, rle=[300]), REGION + 'has an rle that is no list of bytes'),
    (set_value(2, rle=[255] * 20000), REGION + 'has an rle that is longer than one of single val'),
    (set_value(2, rle='abc'), REGION + 'has an rle that is no list of bytes'),
    (
      set_result(0, image_rotation=90),
      REGION + 'is of an image turned by 90 degrees, which is not',
    ),
    (set_result(0, original_width=99), 'has image .*no 0.jpg with 99x40 pixels, but it has 48x40'),
    (
      set_result(0, type='video', value={'x': 1}),
      r'\(video, no label\) is of a kind that is not read',
    ),
    (
      set_task(annotations=[]),
      'Task 0 in .*project-1.json is not annotated, or was skipped: annotate',
    ),
    (
      lambda tasks: tasks[0]['annotations'][0].update(was_cancelled=False),
      'Task 0 in .*project-1.json has 2 annotations: mark one as ground truth, or delete',
    ),
    (
      set_task(annotations=None),
      'Task 0 in .*project-1.json has no list of annotations: export "JS',
    ),
    (
      set_task(data={'text': 'no image'}),
      'Task 0 in .*project-1.json has 0 images in its data: give',
    ),
    (
      set_task(data={'a': '1.jpg', 'b': '2.jpg'}),
      'has 2 images in its data: give it one, called "im',
    ),
    (
      set_task(data={'image': '/data/upload/1/x.jpg'}),
      'There is no image /data/upload/1/x.jpg in ',
    ),
    (lambda tasks: [*tasks, 5], 'is not of Label Studio: it is no list of tasks; move it away'),
  ],
)
def test_label_studio(change, sentence, tmp_path):
  trees.write_label_studio(tmp_path)
  changed(tmp_path / 'project-1.json', change)
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, sentence)


OBJECT = r"Object [12] in .*ann/0.jpg.json \(\w+, '\w+'\) "


def set_object(index, **values):
  return lambda content: content['objects'][index].update(values)


def exterior(*points):
  return {'exterior': list(points), 'interior': []}


def png(array):
  return base64.b64encode(zlib.compress(trees.png_of(array))).decode()


ZIP_BOMB = base64.b64encode(zlib.compress(bytes(50_000_000), 9)).decode()


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    (
      set_object(0, points=exterior([1, 1], [2, 2])),
      OBJECT + 'has 2 points: mend it, or take it ou',
    ),
    (set_object(0, points=None), OBJECT + 'has no points'),
    (
      set_object(0, points=exterior([1, 1], [2, 2], [3, float('inf')])),
      OBJECT + 'has a coordinate th',
    ),
    (
      set_object(0, points=exterior([1, 1], [2, 2], [300, 3])),
      OBJECT + r'has the point \(300, 3\), fa',
    ),
    (set_object(0, classTitle='lorry'), OBJECT + 'has a class that meta.json lacks'),
    (set_object(0, geometryType='cuboid_3d'), OBJECT + 'is of a kind that is not read'),
    (
      set_object(1, bitmap={'data': '\u00e9', 'origin': [1, 1]}),
      OBJECT + 'has a mask that is no',
    ),
    (
      set_object(1, bitmap={'data': '!', 'origin': [1, 1]}),
      OBJECT + 'has a mask that is n',
    ),
    (
      set_object(1, bitmap={'data': ZIP_BOMB, 'origin': [1, 1]}),
      OBJECT + 'has a mask that is no PNG',
    ),
    (
      set_object(1, bitmap={'data': png(np.ones((99, 99), np.uint8)), 'origin': [1, 1]}),
      OBJECT + 'has a mask of 99x99 pixels, which is larger than the image',
    ),
    (
      set_object(1, bitmap={'data': png(np.ones((9, 9), np.uint8)), 'origin': [45, 1]}),
      OBJECT + r'has a mask of 9x9 pixels at \(45, 1\), which reaches beyond the image of 48x40',
    ),
    (set_object(1, bitmap={'data': png(np.ones((9, 9), np.uint8))}), OBJECT + 'has '),
    (
      lambda content: content['size'].update(width=7),
      'has image 0.jpg with 7x40 pixels, but it has',
    ),
    (lambda content: content.update(objects=3), 'is not of Supervisely: it has no list of objects'),
  ],
)
def test_supervisely(change, sentence, tmp_path):
  trees.write_supervisely(tmp_path)
  changed(tmp_path / 'day/ann/0.jpg.json', change)
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, sentence)


@pytest.mark.parametrize(
  'text', ['', '{', '[1, 2', '{"images": [}', '{"images": [], "images": []}', '\udc80', '[' * 10**5]
)
def test_files_that_are_no_json(text, tmp_path):
  trees.write_cvat_coco(tmp_path)
  (tmp_path / COCO).write_text('{"images": [' + text, errors='surrogateescape')
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(
    complaint, r'instances_default.json is no JSON file, or broken \(.*\): replace it'
  )


def test_an_image_in_two_folders_is_told_by_the_path_that_is_given(tmp_path):
  trees.write_cvat_coco(tmp_path)
  shutil.copytree(tmp_path / 'images', tmp_path / 'smaller')
  complaints = complaints_of(tmp_path)
  assert len(complaints) == 6
  pattern = r'Image 0.jpg, which .*default.json names, may be .*/images/0.jpg or .*/smaller/0.jpg'
  assert_sentence(complaints[0], pattern)
  changed(
    tmp_path / COCO,
    lambda content: (
      [
        image.update(file_name=f'C:\\\\data\\\\images\\\\{image["file_name"]}')
        for image in content['images']
      ]
      and None
    ),
  )
  assert len(labels_of(tmp_path)) == 6
  assert '6 images that the annotations do not name' in detection.read_folder(tmp_path).sentence


def test_images_turned_by_exif_are_annotated_as_they_are_seen(tmp_path):
  trees.write_cvat_coco(tmp_path)
  path = tmp_path / 'images/0.jpg'
  with Image.open(path) as image:
    exif = image.getexif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
  np.testing.assert_array_equal(labels_of(tmp_path)['0'], trees.expected_label(0, ends=0))
  changed(tmp_path / COCO, set_in('images', 0, width=40, height=48))
  (complaint,) = complaints_of(tmp_path)
  assert 'but it has 48x40 (turned, perhaps by its EXIF orientation): replace' in complaint


def test_images_that_only_labelme_s_file_holds_are_missing(tmp_path):
  trees.write_labelme(tmp_path)
  (tmp_path / '1.jpg').unlink()
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(
    complaint, 'There is no image 1.jpg in .*, which .*/1.json names: add it, or take'
  )


def test_images_of_the_same_stem_cannot_be_told_apart(tmp_path):
  trees.write_cvat_coco(tmp_path)
  (tmp_path / 'images/1.jpg').rename(tmp_path / 'images/0.bmp')
  changed(tmp_path / COCO, set_in('images', 1, file_name='0.bmp'))
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, 'Images .*/0.jpg and .*/0.bmp cannot be told apart, since suffixes do')


def test_other_files_in_coco_s_own_archives_are_passed_over(tmp_path):
  trees.write_coco(tmp_path)
  content = trees.coco_content([0])
  keypoints_only(content)
  trees.write_json(tmp_path / 'annotations/person_keypoints_train2017.json', content)
  trees.write_json(
    tmp_path / 'annotations/captions_train2017.json', {'images': [], 'annotations': []}
  )
  assert len(labels_of(tmp_path)) == 6


def test_an_image_for_training_and_for_validation_is_refused(tmp_path):
  trees.write_coco(tmp_path)
  changed(
    tmp_path / 'annotations/instances_val2017.json',
    set_in('images', 0, file_name='train2017/3.jpg', width=40, height=40),
  )
  (complaint,) = complaints_of(tmp_path)
  files = r'.*instances_train2017.json and .*instances_val2017.json'
  assert_sentence(complaint, f'train2017/3.jpg is annotated twice, in {files}: take one of the two')


def test_a_file_of_no_split_beside_others_is_refused(tmp_path):
  trees.write_coco(tmp_path)
  trees.write_json(tmp_path / 'annotations/instances_more.json', trees.coco_content([0]))
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(
    complaint, 'instances_more.json is neither of train nor of val, as others are: ren'
  )


def test_brushes_of_label_studio_without_their_images_are_refused(tmp_path):
  for name in ('Road-0', 'Car-0'):
    trees.write_image(tmp_path / f'task-1-annotation-2-by-1-tag-{name}.png', 0)
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(
    complaint, 'a brush of Label Studio as an image, which does not say of which image'
  )


def test_only_shapes_without_an_area_are_refused(tmp_path):
  trees.write_supervisely(tmp_path)
  for path in tmp_path.glob('*/ann/*.json'):
    changed(path, lambda content: content.update(objects=content['objects'][-1:]))
  (complaint,) = complaints_of(tmp_path)
  assert_sentence(complaint, 'have no shapes with an area but 6 points: draw polygons or masks')
