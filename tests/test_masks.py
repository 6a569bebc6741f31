"""Label maps in files of their own: indices, colors, black and white, and where they lie."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.data import datasets, layouts, preparation, transforms
from nonlocal_jax.data.formats import detection, mask_scan
from nonlocal_jax.data.split_checks import check_split
from nonlocal_jax.errors import UserError
from tests.scenes import COLORS, NAMES, in_colors, make_scenes, write

SCENES = make_scenes()
TABLES = {  # by the file, its contents
  'labelmap.txt': '# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\n'
  'tree:20,160,40:leaf,trunk:grow\n',
  'class_dict.csv': 'name,r,g,b\nbackground,0,0,0\nroad, 128, 64, 128\ntree,20,160,40\n',
  'classes.txt': 'background 0 0 0\r\nroad 128 64 128\r\ntree 20 160 40\r\n',
  'class_names.txt': 'background,0,0,0\nroad,128,64,128\ntree,20,160,40\n',
  'label_colors.txt': '0 0 0\tbackground\n128 64 128\t\troad\n20 160 40\ttree\n',
  'obj_class_to_machine_color.json': '{"road": [128, 64, 128], "tree": [20, 160, 40]}',
  'dataset.json': json.dumps({'classes': NAMES, 'palette': COLORS}),
}


def name_of(id_: str) -> str:
  return id_.rpartition('/')[2].removesuffix('_sat').removesuffix('_image')


def prepared_labels(source: Path, tmp_path: Path) -> dict[str, np.ndarray]:
  """The class indices of each image as training sees them."""
  description = detection.read_folder(source).description
  known = {} if 'classes' in description else {'num_classes': 3}
  dataset = datasets.custom_dataset(**known, **description)
  opened = preparation.prepare(dataset, source, data_dir=tmp_path / 'tfds')
  for split in opened.values():
    check_split(split, dataset)
  return {
    name_of(record['id']): dataset.label_lookup[transforms.decode_label(record['label'])]
    for split in opened.values()
    for record in split
  }


def write_scenes(source, scenes=SCENES, *, encode=in_colors, mode=None, labels='labels'):
  """Writes all but two scenes for training and those for validation."""
  for index, scene in enumerate(scenes):
    split = 'val' if index < 2 else 'train'
    write(source / f'images/{split}/{scene.name}.jpg', scene.image)
    write(source / f'{labels}/{split}/{scene.name}.png', encode(scene.label), mode)


def check(found, scenes=SCENES):
  assert found.keys() == {scene.name for scene in scenes}
  for scene in scenes:
    np.testing.assert_array_equal(found[scene.name], scene.label)


@pytest.mark.parametrize('table', TABLES)
def test_colors_are_classes_by_each_table(table, tmp_path):
  write_scenes(tmp_path / 'source')
  (tmp_path / 'source' / table).write_text(TABLES[table])
  description = detection.read_folder(tmp_path / 'source').description
  assert description == {'classes': list(NAMES), 'palette': [list(color) for color in COLORS]}
  check(prepared_labels(tmp_path / 'source', tmp_path))


def test_colors_in_four_channels(tmp_path):
  write_scenes(tmp_path / 'source', mode='RGBA')
  (tmp_path / 'source/labelmap.txt').write_text(TABLES['labelmap.txt'])
  check(prepared_labels(tmp_path / 'source', tmp_path))


def test_colors_in_a_palette_with_one_of_them_twice(tmp_path):
  def encode(label):
    image = Image.fromarray(np.where(label == 2, 7, label + 3).astype(np.uint8))
    colors = np.zeros((256, 3), np.uint8)
    colors[[4, 7, 9]] = COLORS[1], COLORS[2], COLORS[1]
    pixels = np.asarray(image).copy()
    pixels[::2][pixels[::2] == 4] = 9
    image = Image.fromarray(pixels)
    image.putpalette(colors.ravel().tolist())
    return image

  for index, scene in enumerate(SCENES):
    split = 'val' if index < 2 else 'train'
    write(tmp_path / f'source/images/{split}/{scene.name}.jpg', scene.image)
    path = tmp_path / f'source/labels/{split}/{scene.name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(scene.label).save(path)
  (tmp_path / 'source/labelmap.txt').write_text(TABLES['labelmap.txt'])
  check(prepared_labels(tmp_path / 'source', tmp_path))


def write_palette(source, colors):
  """Writes label maps with a palette: index 1 of its first 3 colors is class 2, and 2 class 1."""
  for index, scene in enumerate(SCENES):
    split = 'val' if index < 2 else 'train'
    write(source / f'images/{split}/{scene.name}.jpg', scene.image)
    image = Image.fromarray(np.array([0, 2, 1], np.uint8)[scene.label])
    image.putpalette(np.ravel(colors).tolist())
    path = source / f'labels/{split}/{scene.name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_a_palette_in_another_order_than_the_table(tmp_path):
  write_palette(tmp_path / 'source', [COLORS[0], COLORS[2], COLORS[1]])
  (tmp_path / 'source/labelmap.txt').write_text(TABLES['labelmap.txt'])
  check(prepared_labels(tmp_path / 'source', tmp_path))


def test_a_palette_with_a_color_that_the_table_lacks_is_refused(tmp_path):
  write_palette(tmp_path / 'source', [COLORS[0], (9, 9, 9), COLORS[1]])
  (tmp_path / 'source/labelmap.txt').write_text(TABLES['labelmap.txt'])
  assert 'has colors of no class, [9, 9, 9] (484 pixels)' in complaint(
    tmp_path / 'source', tmp_path
  )


def write_sorted_palettes(source: Path) -> list[Path]:
  """Palette files as programs save them that sort colors, in each file in another order."""
  paths = []
  for index, scene in enumerate(SCENES):
    order = np.roll(np.arange(3), index)  # of the classes' colors in the palette
    split = 'val' if index < 2 else 'train'
    write(source / f'images/{split}/{scene.name}.jpg', scene.image)
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[scene.label])
    image.putpalette(np.ravel(np.array(COLORS)[order]).tolist())
    paths.append(source / f'labels/{split}/{scene.name}.png')
    paths[-1].parent.mkdir(parents=True, exist_ok=True)
    image.save(paths[-1])
  return paths


def test_palettes_that_differ_are_read_by_their_colors(tmp_path):
  write_sorted_palettes(tmp_path / 'source')
  (tmp_path / 'source/classes.txt').write_text(TABLES['classes.txt'])
  check(prepared_labels(tmp_path / 'source', tmp_path))


@pytest.mark.parametrize('names', ['', 'background\nroad\ntree\n'])
def test_palettes_that_differ_without_a_table_of_colors_are_refused(names, tmp_path):
  source = tmp_path / 'source'
  write_sorted_palettes(source)
  if names:
    (source / 'classes.txt').write_text(names)
  said = complaint(source, tmp_path)
  assert 'The palettes of label maps differ: value 0 is [' in said
  assert 'classes.txt (name r g b)' in said


def test_palettes_that_differ_where_they_are_not_used_are_one(tmp_path):
  source = tmp_path / 'source'
  write_palette(source, COLORS)
  path = next((source / 'labels/train').iterdir())
  with Image.open(path) as image:
    image.load()
  image.putpalette([*np.ravel(COLORS).tolist(), 7, 7, 7])  # value 3 does not occur
  image.save(path)
  assert prepared_labels(source, tmp_path).keys() == {scene.name for scene in SCENES}


def test_comments_and_running_numbers_in_classes_txt_are_no_names(tmp_path):
  for text in ('# mine\nbackground\nroad\n\ntree\n', '0 background\n1: road\n2, tree\n'):
    source = tmp_path / str(len(text))
    write_scenes(source, encode=lambda label: label)
    (source / 'classes.txt').write_text(text)
    assert detection.read_folder(source).description['classes'] == [*NAMES]
    check(prepared_labels(source, tmp_path))


def test_indices_of_a_palette_in_the_order_of_the_table_leave_255_without_a_class(tmp_path):
  """As VOC's own files, whose borders are 255."""
  source = tmp_path / 'source'
  write_palette(source, [COLORS[0], COLORS[1], COLORS[2], *[(1, 1, 1)] * 252, (224, 224, 192)])
  (source / 'labelmap.txt').write_text(TABLES['labelmap.txt'])
  for path in (source / 'labels').rglob('*.png'):
    with Image.open(path) as image:
      pixels, palette = np.array(image), image.getpalette()
    pixels[:2] = 255
    image = Image.fromarray(pixels)
    image.putpalette(palette)
    image.save(path)
  assert detection.read_folder(source).reading == ''
  found = prepared_labels(source, tmp_path)
  for scene in SCENES:
    expected = np.array([0, 2, 1], np.uint8)[scene.label]
    expected[:2] = 255
    np.testing.assert_array_equal(found[scene.name], expected)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_shades_of_gray_by_a_table(mode, tmp_path):
  """As Supervisely's machine masks with colors of one's own."""
  shades = np.array([0, 100, 200], np.uint8)
  write_scenes(tmp_path / 'source', encode=lambda label: shades[label], mode=mode)
  table = tmp_path / 'source/obj_class_to_machine_color.json'
  table.write_text('{"road": [100, 100, 100], "tree": [200, 200, 200]}')
  assert detection.read_folder(tmp_path / 'source').description['classes'] == list(NAMES)
  check(prepared_labels(tmp_path / 'source', tmp_path))
  table.write_text('{"road": [100, 100, 100]}')
  assert '[200, 200, 200] (484 pixels)' in complaint(tmp_path / 'source', tmp_path)


@pytest.mark.parametrize('table', ['dataset.json', 'classes.txt'])
def test_indices_of_a_palette_count_where_its_colors_are_those_of_no_table(table, tmp_path):
  """As always for the palette of `dataset.json`, which pictures are drawn with."""
  write_scenes(tmp_path / 'source', encode=lambda label: label, mode='P')
  (tmp_path / 'source' / table).write_text(TABLES[table])
  found = detection.read_folder(tmp_path / 'source')
  assert (found.reading, found.description['classes']) == ('', list(NAMES))
  check(prepared_labels(tmp_path / 'source', tmp_path))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'LA', 'I;16'])
def test_indices_in_one_channel_in_equal_ones_and_in_sixteen_bits(mode, tmp_path):
  deep = mode == 'I;16'
  write_scenes(
    tmp_path / 'source',
    encode=lambda label: label.astype(np.uint16) if deep else label,
    mode=None if deep else mode,
  )
  (tmp_path / 'source/classes.txt').write_text('\n'.join(NAMES))
  found = detection.read_folder(tmp_path / 'source')
  assert found.description == {'classes': list(NAMES)}
  check(prepared_labels(tmp_path / 'source', tmp_path))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'P'])
def test_black_and_white_is_background_and_foreground(mode, tmp_path):
  scenes = make_scenes(12, classes=2)
  write_scenes(tmp_path / 'source', scenes, encode=lambda label: label * np.uint8(255), mode=mode)
  found = detection.read_folder(tmp_path / 'source')
  assert found.description == {'classes': ['background', 'foreground']}
  assert '(0 is background, 255 is foreground)' in found.sentence
  check(prepared_labels(tmp_path / 'source', tmp_path), scenes)


@pytest.mark.parametrize(
  ('own', 'classes'),
  [
    ({'classes': ['fine', 'crack']}, ['fine', 'crack']),
    ({'classes': ['foreground', 'background']}, ['foreground', 'background']),
    ({'num_classes': 2}, ['background', 'foreground']),
  ],
)
def test_black_and_white_with_names(own, classes, tmp_path):
  scenes = make_scenes(classes=2)
  write_scenes(tmp_path / 'source', scenes, encode=lambda label: label * np.uint8(255))
  (tmp_path / 'source/dataset.json').write_text(json.dumps(own))
  assert detection.read_folder(tmp_path / 'source').description['classes'] == classes
  found = prepared_labels(tmp_path / 'source', tmp_path)
  if classes[0] == 'foreground':
    found = {name: 1 - label for name, label in found.items()}
  check(found, scenes)


def test_one_name_in_classes_txt_is_that_of_white(tmp_path):
  scenes = make_scenes(classes=2)
  write_scenes(tmp_path / 'source', scenes, encode=lambda label: label * np.uint8(255))
  (tmp_path / 'source/classes.txt').write_text('crack\n')
  assert detection.read_folder(tmp_path / 'source').description['classes'] == [
    'background',
    'crack',
  ]


@pytest.mark.parametrize(
  'own', [{'ignore_labels': [255]}, {'num_classes': 3}, {'label_map': [0, 1]}, {'classes': NAMES}]
)
def test_where_255_may_mean_no_class_it_is_not_guessed(own, tmp_path):
  scenes = make_scenes(classes=2)
  write_scenes(tmp_path / 'source', scenes, encode=lambda label: label * np.uint8(255))
  (tmp_path / 'source/dataset.json').write_text(json.dumps(own))
  found = detection.read_folder(tmp_path / 'source')
  assert (found.reading, found.description) == (
    '',
    {**own, **{k: list(v) for k, v in own.items() if k == 'classes'}},
  )


def test_one_other_value_in_one_file_makes_255_no_class(tmp_path, monkeypatch):
  monkeypatch.setattr(mask_scan, '_FIRST', 2)
  scenes = make_scenes(20, classes=2)
  write_scenes(tmp_path / 'source', scenes, encode=lambda label: label * np.uint8(255))
  assert detection.read_folder(tmp_path / 'source').reading == 'binary'
  path = tmp_path / f'source/labels/train/{scenes[-1].name}.png'
  write(path, scenes[-1].label)
  assert detection.read_folder(tmp_path / 'source').reading == ''


def test_many_files_are_read_once_to_find_black_and_white(tmp_path, monkeypatch):
  monkeypatch.setattr(mask_scan, 'cache_folder', lambda: tmp_path / 'cache')
  scenes = make_scenes(20, classes=2)
  write_scenes(tmp_path / 'source', scenes, encode=lambda label: label * np.uint8(255))
  contents, read = mask_scan.contents, []

  def counted(path):
    read.append(path)
    return contents(path)

  monkeypatch.setattr(mask_scan, 'contents', counted)
  assert detection.read_folder(tmp_path / 'source').reading == 'binary'
  assert len(set(read)) == 20
  read.clear()
  assert detection.read_folder(tmp_path / 'source').reading == 'binary'
  assert len(read) == mask_scan._FIRST
  (kept,) = (tmp_path / 'cache/label_kinds').iterdir()
  kept.write_text(kept.read_text().replace('binary', 'index'))  # damaged
  assert detection.read_folder(tmp_path / 'source').reading == 'binary'


def test_files_of_indices_are_told_by_the_first_few(tmp_path, monkeypatch):
  write_scenes(tmp_path / 'source', make_scenes(12), encode=lambda label: label)
  contents, read = mask_scan.contents, []

  def counted(path):
    read.append(path)
    return contents(path)

  monkeypatch.setattr(mask_scan, 'contents', counted)
  detection.read_folder(tmp_path / 'source')
  assert len(read) == 8


def test_one_name_is_that_of_what_is_not_the_background(tmp_path):
  write_scenes(tmp_path, make_scenes(classes=2), encode=lambda label: label)
  (tmp_path / 'classes.txt').write_text('crack\n')
  assert detection.read_folder(tmp_path).description == {'classes': ['background', 'crack']}


def test_a_palette_with_a_color_twice_is_for_pictures_alone(tmp_path):
  write_scenes(tmp_path / 'a', encode=lambda label: label)
  write_scenes(tmp_path / 'b')
  for folder in 'ab':
    text = json.dumps({'palette': [[0, 0, 0], [0, 0, 0], [1, 1, 1]]})
    (tmp_path / folder / 'dataset.json').write_text(text)
  check(prepared_labels(tmp_path / 'a', tmp_path))
  with pytest.raises(
    UserError, match=r'Two classes have the color \[0, 0, 0\] in .*dataset\.json: '
  ):
    detection.read_folder(tmp_path / 'b')


@pytest.mark.parametrize('layout', ['SPLIT/images', 'images/SPLIT', 'SPLIT_images'])
def test_without_val_images_something_to_do_is_named(layout, tmp_path):
  def add(split):
    for scene in SCENES:
      folder = layout.replace('SPLIT', split)
      write(tmp_path / folder / f'{scene.name}.jpg', scene.image)
      write(tmp_path / folder.replace('images', 'labels') / f'{scene.name}.png', scene.label)

  add('train')
  name = 'train_images' if layout == 'SPLIT_images' else 'train'
  missing = (
    f'There is no folder {layout.replace("SPLIT", "val")} in {tmp_path}: add the val images '
  )
  with pytest.raises(UserError) as error:
    layouts.list_samples(datasets.custom_dataset(3), tmp_path, 'val')
  assert str(error.value) == (
    f'{missing}there, or take all out of the folder {name}, to have them divided.'
  )
  add('test')
  with pytest.raises(UserError) as error:
    layouts.list_samples(datasets.custom_dataset(3), tmp_path, 'val')
  assert (
    str(error.value)
    == f'{missing}there, or rename {name.replace("train", "test")}, which is not used.'
  )


def complaint(source, tmp_path, **options):
  with pytest.raises(UserError) as error:
    preparation.prepare(
      datasets.custom_dataset(3), source, splits=['train'], data_dir=tmp_path / 'tfds', **options
    )
  return str(error.value)


def test_colors_of_no_class_are_counted(tmp_path):
  source = tmp_path / 'source'
  write_scenes(source)
  (source / 'labelmap.txt').write_text(TABLES['labelmap.txt'])
  path = source / 'labels/train/scene_3.png'
  pixels = in_colors(SCENES[3].label)
  pixels[0, :6], pixels[1, :2] = (1, 2, 3), (0, 0, 1)
  write(path, pixels)
  assert complaint(source, tmp_path) == (
    f'Label map {path} has colors of no class, [1, 2, 3] (6 pixels), [0, 0, 1] (2 pixels): add '
    f'them to {source}/labelmap.txt, or export the file anew, without smoothing and without '
    'compression that changes colors. Or leave it out with skip_bad.'
  )


def test_without_a_table_the_colors_are_listed_to_be_pasted(tmp_path):
  source = tmp_path / 'source'
  write_scenes(source)
  with pytest.raises(UserError, match='are in colors, and no file beside them says') as error:
    detection.read_folder(source)
  description = json.loads(str(error.value).splitlines()[1])
  assert sorted(map(tuple, description['palette'])) == sorted(COLORS)
  (source / 'dataset.json').write_text(json.dumps(description))
  found = prepared_labels(source, tmp_path)
  colors = np.array(description['palette'], np.uint8)
  for scene in SCENES:
    np.testing.assert_array_equal(colors[found[scene.name]], in_colors(scene.label))


def test_smoothed_label_maps_are_no_palette(tmp_path):
  rng = np.random.default_rng(0)
  write_scenes(
    tmp_path / 'source',
    encode=lambda label: rng.integers(256, size=(*label.shape, 3), dtype=np.uint8),
  )
  with pytest.raises(UserError, match=r'more than 255 colors, such as .* smoothed or compressed'):
    detection.read_folder(tmp_path / 'source')


@pytest.mark.parametrize(
  ('pixels', 'options', 'sentence'),
  [
    (np.full((9, 9, 4), 9, np.uint8), {}, 'is a label map with transparent pixels: replace it'),
    (np.full((9, 9), 300, np.uint16), {}, 'is a label map of 16 bits whose values reach 300, over'),
  ],
)
def test_label_maps_that_lose_something_are_refused(pixels, options, sentence, tmp_path):
  source = tmp_path / 'source'
  write_scenes(source, encode=lambda label: pixels)
  assert sentence in complaint(source, tmp_path)


def test_transparent_label_maps_without_a_table_are_told_as_such(tmp_path):
  transparent = np.full((9, 9, 4), (1, 2, 3, 0), np.uint8)
  write_scenes(tmp_path, encode=lambda label: transparent)
  with pytest.raises(UserError, match=r'scene_2\.png is a label map with transparent pixels'):
    detection.read_folder(tmp_path)


@pytest.mark.parametrize('odd', ['scene_2', 'scene_5'])  # the first of those for training
def test_one_label_map_of_indices_among_others_in_colors_is_refused_itself(odd, tmp_path):
  source = tmp_path / 'source'
  write_scenes(source)
  write(source / f'labels/train/{odd}.png', SCENES[int(odd[-1])].label)
  without_table = complaint(source, tmp_path)
  assert 'are in colors, and no file beside them says which class each is' in without_table
  (source / 'classes.txt').write_text(TABLES['classes.txt'])
  assert complaint(source, tmp_path).startswith(
    f'Label map {source}/labels/train/{odd}.png has colors of no class, ['
  )


@pytest.mark.parametrize('odd', ['scene_2', 'scene_5'])
def test_one_label_map_in_colors_among_others_of_indices_is_refused_itself(odd, tmp_path):
  source = tmp_path / 'source'
  write_scenes(source, encode=lambda label: label)
  path = source / f'labels/train/{odd}.png'
  write(path, in_colors(SCENES[int(odd[-1])].label))
  assert complaint(source, tmp_path) == (
    f'File {path} is not a label map of one channel of 8 bits but RGB: replace it. Or leave it out '
    'with skip_bad.'
  )


def test_colors_beside_names_without_colors_are_refused_with_the_file_to_complete(tmp_path):
  write_scenes(tmp_path / 'source')
  (tmp_path / 'source/classes.txt').write_text('background\nroad\ntree\n')
  said = complaint(tmp_path / 'source', tmp_path)
  assert f'in colors, and {tmp_path}/source/classes.txt names classes without colors: write' in said
  assert '[128, 64, 128] (' in said
  (tmp_path / 'source/classes.txt').write_text('road #804080\n')
  with pytest.raises(UserError, match=r"\('road #804080' is not name r g b: colors are numbers"):
    detection.read_folder(tmp_path / 'source')


def test_smoothed_colors_are_told(tmp_path):
  write_scenes(tmp_path / 'source', encode=lambda label: cv2.blur(in_colors(label), (3, 3)))
  said = complaint(tmp_path / 'source', tmp_path)
  assert re.search(
    r'\d of them have \d\d% of the pixels: if the others are smoothed edges or due to comp', said
  )


def test_label_maps_of_16_bits_in_each_channel_are_refused_with_the_reason(tmp_path):
  write_scenes(tmp_path / 'source')
  for path in (tmp_path / 'source/labels').glob('*/*.png'):
    cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16))
  assert 'not a label map of 8 bits in each channel but of 16' in complaint(
    tmp_path / 'source', tmp_path
  )


def test_black_and_white_of_three_classes_is_refused(tmp_path):
  write_scenes(tmp_path, make_scenes(classes=2), encode=lambda label: 255 * label)
  (tmp_path / 'classes.txt').write_text('a\nb\nc\n')
  with pytest.raises(UserError, match=r'have the values 0 and 255 only, and 255 is ignored, so'):
    prepared_labels(tmp_path, tmp_path)


def test_tiff_label_maps_are_refused_with_the_reason(tmp_path):
  for scene in SCENES:
    write(tmp_path / f'source/images/train/{scene.name}.jpg', scene.image)
    write(tmp_path / f'source/labels/train/{scene.name}.tif', scene.label)
  assert complaint(tmp_path / 'source', tmp_path).endswith(
    'scene_0.tif: label maps are read from PNG files only; convert them.'
  )


def test_labels_txt_of_labelme_names_the_classes(tmp_path):
  write_scenes(tmp_path / 'source', encode=lambda label: label)
  names = ['_background_', 'road', 'tree']
  (tmp_path / 'source/labels.txt').write_text('\n'.join(['__ignore__', *names]))
  assert detection.read_folder(tmp_path / 'source').description == {'classes': names}


def test_jpeg_label_maps_are_refused_with_the_reason(tmp_path):
  source = tmp_path / 'source'
  for scene in SCENES:
    write(source / f'images/train/{scene.name}.jpg', scene.image)
    write(source / f'labels/train/{scene.name}.jpg', in_colors(scene.label))
  assert complaint(source, tmp_path) == (
    f'Image {source}/images/train/scene_0.jpg has no label map: expected {source}/labels/train/'
    f'scene_0.png, found {source}/labels/train/scene_0.jpg, a format whose compression changes '
    'labels: export PNG files.'
  )


@pytest.mark.parametrize(
  ('name', 'text', 'sentence'),
  [
    ('labelmap.txt', 'a:0,0,0::\nb\n', "('b' is not name:r,g,b::): mend it"),
    ('labelmap.txt', 'a:0,0,0::\na:1,0,0::\n', "(it has 'a' twice among its names)"),
    ('labelmap.txt', 'a:0,0,0::\nb:0,0,0::\n', '(it has (0, 0, 0) twice among its colors)'),
    ('labelmap.txt', 'a:0,0,0::\nb:0,0,256::\n', '(color (0, 0, 256) is beyond 255)'),
    ('labelmap.txt', '# nothing\n', '(it is empty)'),
    ('classes.txt', '\n'.join(map(str, range(256))), '(it has 256 names, and 255 classes are pos'),
    ('class_dict.csv', 'a,0,0,0\n', '(its first line is not name,r,g,b)'),
    ('class_dict.csv', 'name,r,g,b\na,0,0\n', "('a,0,0' is not name,r,g,b)"),
    ('_classes.csv', 'Pixel Value, Class\n0, a\n2, b\n', '(its pixel values are not 0, 1, ... wi'),
    ('_classes.csv', 'Pixel Value, Class\nx, a\n', "('x,a' is not a new pixel value and a class)"),
    ('classes.txt', '1 a\n2 b\n', '(its lines begin with the numbers 1, 2, ...'),
    ('classes.txt', 'a 0 0 0\nb\n', "('b' is not name r g b, as others are)"),
    ('labels.txt', 'road\nscene_1.JPG 1\n', "('scene_1.JPG 1' is the name of an image): mend it"),
    ('label_colors.txt', 'a 0 0 0\n', "('a 0 0 0' is not r g b name)"),
    ('obj_class_to_machine_color.json', '{"a": [1, 2]}', "(the color of 'a' is not [r, g, b])"),
    ('obj_class_to_machine_color.json', '[]', '(no JSON object)'),
  ],
)
def test_a_wrong_table_is_a_sentence(name, text, sentence, tmp_path):
  write_scenes(tmp_path)
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError) as error:
    detection.read_folder(tmp_path)
  assert str(error.value).startswith(f'File {tmp_path / name} is no table of classes')
  assert sentence in str(error.value)


def test_tables_that_differ_are_refused_and_equal_ones_are_one(tmp_path):
  write_scenes(tmp_path)
  for name in ('labelmap.txt', 'class_dict.csv'):
    (tmp_path / name).write_text(TABLES[name])
  assert detection.read_folder(tmp_path).description['classes'] == list(NAMES)
  (tmp_path / 'classes.txt').write_text('a\nb\nc\n')
  with pytest.raises(UserError, match=r'labelmap\.txt and .*classes\.txt name different classes'):
    detection.read_folder(tmp_path)


ARRANGEMENTS = {  # of image and label map, with SPLIT where splits have folders
  'images and masks': ('images/SPLIT/{}.jpg', 'masks/SPLIT/{}.png'),
  'mmsegmentation': ('img_dir/SPLIT/{}.jpg', 'ann_dir/SPLIT/{}.png'),
  'upper case': ('Images/SPLIT/{}.JPG', 'Labels/SPLIT/{}.PNG'),
  'training and validation': ('images/SPLITing/{}.jpg', 'annotations/SPLITing/{}.png'),
  'one folder of label maps': ('images/SPLIT/{}.jpg', 'labels/{}.png'),
  'splits first': ('SPLIT/images/{}.png', 'SPLIT/masks/{}.png'),
  'split and kind in one': ('SPLIT_images/{}.jpg', 'SPLIT_masks/{}.png'),
  'CamVid': ('SPLIT/{}.png', 'SPLIT_labels/{}_L.png'),
  'SegNet': ('SPLIT/{}.png', 'SPLITannot/{}.png'),
  'side by side': ('SPLIT/{}.jpg', 'SPLIT/{}_mask.png'),
  'names with suffix': ('images/SPLIT/{}.jpg', 'labels/SPLIT/{}.jpg.png'),
  'subfolders': ('images/SPLIT/a b/é/{}.jpg', 'labels/SPLIT/a b/é/{}.png'),
  'datasets': ('one/img/{}.png', 'one/masks_machine/{}.png'),
  'two folders': ('JPEGImages/{}.jpg', 'SegmentationClass/{}.png'),
  'one folder': ('{}.jpg', '{}.png'),
  'DeepGlobe': ('SPLIT/{}_sat.jpg', 'SPLIT/{}_mask.png'),
  'images with endings': ('images/{}_image.jpg', 'labels/{}_label.png'),
  'one folder with endings': ('{}.png', '{}_mask.png'),
}


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_images_and_label_maps_are_found_in_the_usual_folders(arrangement, tmp_path):
  for index, scene in enumerate(SCENES):
    for name, pixels in zip(ARRANGEMENTS[arrangement], (scene.image, scene.label), strict=True):
      split = 'train' if index > 1 else 'valid' if 'ing/' not in name else 'valida'
      name = name.replace('validing', 'validation')
      path = name.format(scene.name).replace(
        'SPLITing', {'train': 'training'}.get(split, 'validation')
      )
      write(tmp_path / 'source' / path.replace('SPLIT', split), pixels)
  found = {
    split: layouts.list_samples(datasets.custom_dataset(3), tmp_path / 'source', split)
    for split in ('train', 'val')
  }
  for listing in found.values():
    assert not listing.incomplete
    assert not listing.passed_over
    assert not listing.unused_labels
  assert sum(len(listing.samples) for listing in found.values()) == 6
  if 'SPLIT' in ARRANGEMENTS[arrangement][0]:
    assert {name_of(sample.id) for sample in found['val'].samples} == {
      'scene_0',
      'scene_1',
    }
  check(prepared_labels(tmp_path / 'source', tmp_path))
