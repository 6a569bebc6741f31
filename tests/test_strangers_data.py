"""Datasets as tools and people leave them are prepared, and the printed command trains."""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from nonlocal_jax.cli import prepare
from nonlocal_jax.data import datasets, prepared
from tests import annotation_trees as trees
from tests.scenes import COLORS, NAMES, histogram, in_colors, make_scenes, write

SCENES = make_scenes(8)
SMALL = {
  'model.depth': 14,
  'model.width': 4,
  'train.steps': 10,
  'train.batch_size': 4,
  'train.scale': (96, 96),
  'train.crop': (64, 64),
  'train.log_every': 5,
  'eval.scale': (96, 96),
  'init_backbone': 'none',
}


class Truth(NamedTuple):
  """What a dataset holds: its classes, the pixels of each in all images, what is said of it."""

  classes: list[str]
  pixels: list[int]
  said: str


def split_of(index: int, names=('train', 'val')) -> str:
  return names[index % 4 == 3]


def write_cvat_masks(root: Path) -> Truth:
  """CVAT, "Segmentation mask 1.1" with images."""
  for scene in SCENES:
    write(root / f'JPEGImages/{scene.name}.jpg', scene.image)
    write(root / f'SegmentationClass/{scene.name}.png', in_colors(scene.label))
    write(root / f'SegmentationObject/{scene.name}.png', in_colors(scene.label, COLORS[::-1]))
  lists = root / 'ImageSets/Segmentation'
  lists.mkdir(parents=True)
  (lists / 'default.txt').write_text(''.join(f'{scene.name}\n' for scene in SCENES))
  lines = [f'{name}:{r},{g},{b}::' for name, (r, g, b) in zip(NAMES, COLORS, strict=True)]
  lines = ['# label:color_rgb:parts:actions', *lines]
  (root / 'labelmap.txt').write_text('\n'.join(lines) + '\n')
  return Truth(
    [*NAMES],
    histogram(SCENES),
    'label maps in colors in SegmentationClass; images in JPEGImages; 3 classes of labelmap.txt. '
    'train.txt and val.txt divide the images.',
  )


def write_roboflow_masks(root: Path) -> Truth:
  """Roboflow, "Semantic Segmentation Masks"."""
  for index, scene in enumerate(SCENES):
    for split in [split_of(index, ('train', 'valid')), *(['test'] if index == 0 else [])]:
      name = f'{scene.name}_jpg.rf.0123456789abcdef{index}'
      write(root / f'{split}/{name}.jpg', scene.image)
      write(root / f'{split}/{name}_mask.png', scene.label)
      lines = [f'{value}, {name}' for value, name in enumerate(NAMES)]
      (root / split / '_classes.csv').write_text('\n'.join(['Pixel Value, Class', *lines]))
  (root / 'README.dataset.txt').write_text('# Scenes\n')
  return Truth(
    [*NAMES],
    histogram(SCENES),
    'label maps of class indices beside their images in train, valid; 3 classes of '
    'train/_classes.csv; test is not used.',
  )


def write_supervisely_masks(root: Path) -> Truth:
  """Supervisely, "Export as masks", without the annotations."""
  for index, scene in enumerate(SCENES):
    folder = root / f'dataset {index // 6 + 1}'
    write(folder / f'img/{scene.name}.jpg', scene.image)
    write(folder / f'masks_machine/{scene.name}.png', scene.label, 'RGB')
    write(folder / f'masks_human/{scene.name}.png', in_colors(scene.label))
  colors = {name: [value] * 3 for value, name in enumerate(NAMES) if value}
  (root / 'obj_class_to_machine_color.json').write_text(json.dumps(colors))
  return Truth(
    [*NAMES],
    histogram(SCENES),
    'label maps in colors in dataset 1/masks_machine, dataset 2/masks_machine; images in dataset 1/'
    'img, dataset 2/img; 3 classes of obj_class_to_machine_color.json. train.txt and val.txt ',
  )


def write_mmsegmentation(root: Path) -> Truth:
  """MMSegmentation's folders, with the names of the classes."""
  for index, scene in enumerate(SCENES):
    write(root / f'img_dir/{split_of(index)}/{scene.name}.jpg', scene.image)
    write(root / f'ann_dir/{split_of(index)}/{scene.name}.png', scene.label)
  (root / 'classes.txt').write_text('\n'.join(NAMES))
  return Truth(
    [*NAMES],
    histogram(SCENES),
    'label maps of class indices in ann_dir/train, ann_dir/val; images in img_dir/train, '
    'img_dir/val; 3 classes of classes.txt.',
  )


def write_voc(root: Path) -> Truth:
  """VOC's folders and lists: palettes, borders of 255, and images that are in no list."""
  for scene in SCENES:
    label = scene.label.copy()
    label[:2] = 255
    image = Image.fromarray(label)
    image.putpalette(np.ravel([*COLORS, *[(0, 0, 0)] * 252, (224, 224, 192)]).tolist())
    path = root / f'SegmentationClass/{scene.name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    write(root / f'JPEGImages/{scene.name}.jpg', scene.image)
    write(root / f'JPEGImages/other_{scene.name}.jpg', scene.image)
  lists = root / 'ImageSets/Segmentation'
  lists.mkdir(parents=True)
  for split in ('train', 'val'):
    names = [s.name for index, s in enumerate(SCENES) if split_of(index) == split]
    (lists / f'{split}.txt').write_text('\n'.join(names) + '\n')
  (lists / 'trainval.txt').write_text('\n'.join(scene.name for scene in SCENES) + '\n')
  counts = sum(np.bincount(scene.label[2:].ravel(), minlength=3) for scene in SCENES)
  return Truth(
    [f'class {value}' for value in range(3)],
    counts.tolist(),
    'label maps of class indices in SegmentationClass; images in JPEGImages. ImageSets/'
    'Segmentation/train.txt and ImageSets/Segmentation/val.txt divide the images.',
  )


def write_one_folder(root: Path) -> Truth:
  """Images and label maps in one folder, with a list of those for validation."""
  for scene in SCENES:
    write(root / f'{scene.name}.png', scene.image)
    write(root / f'{scene.name}_label.png', scene.label)
  (root / 'val.txt').write_text('scene_3.png\r\nscene_7.png\r\n')
  return Truth(
    [f'class {value}' for value in range(3)],
    histogram(SCENES),
    'label maps of class indices beside their images. val.txt lists the val images; the other 6 '
    'are train images.',
  )


def write_folders_without_list(root: Path) -> Truth:
  """Two folders, and nothing that divides the images."""
  for scene in SCENES:
    write(root / f'Images/{scene.name}.JPG', scene.image)
    write(root / f'Masks/{scene.name}.PNG', scene.label)
  (root / 'classes.txt').write_text('\n'.join(NAMES))
  return Truth(
    [*NAMES],
    histogram(SCENES),
    'images in Images; 3 classes of classes.txt. train.txt and val.txt divide',
  )


def write_black_and_white(root: Path) -> Truth:
  """Masks of 0 and 255, the splits first."""
  scenes = make_scenes(8, classes=2)
  for index, scene in enumerate(scenes):
    write(root / f'{split_of(index)}/images/{scene.name}.png', scene.image)
    write(root / f'{split_of(index)}/masks/{scene.name}.png', scene.label * np.uint8(255))
  return Truth(
    ['background', 'foreground'],
    histogram(scenes, 2),
    'black-and-white label maps (0 is background, 255 is foreground) in train/masks, val/masks;',
  )


def write_camvid(root: Path) -> Truth:
  """CamVid as it goes about: colors, class_dict.csv, and names with an ending."""
  for index, scene in enumerate(SCENES):
    write(root / f'{split_of(index)}/{scene.name}.png', scene.image)
    write(root / f'{split_of(index)}_labels/{scene.name}_L.png', in_colors(scene.label))
  lines = [f'{name},{r},{g},{b}' for name, (r, g, b) in zip(NAMES, COLORS, strict=True)]
  (root / 'class_dict.csv').write_text('\n'.join(['name,r,g,b', *lines]))
  return Truth([*NAMES], histogram(SCENES), 'label maps in colors in train_labels, val_labels;')


def write_colors_described(root: Path) -> Truth:
  """Colors by the palette of dataset.json, of which one has no class."""
  for index, scene in enumerate(SCENES):
    label = scene.label.copy()
    label[:3] = 3
    write(root / f'images/{split_of(index)}/{scene.name}.jpg', scene.image)
    write(
      root / f'labels/{split_of(index)}/{scene.name}.png', in_colors(label, (*COLORS, (9, 9, 9)))
    )
  description = {
    'classes': [*NAMES],
    'palette': [*COLORS, (9, 9, 9)],
    'label_map': [0, 1, 2, 255],
  }
  (root / 'dataset.json').write_text(json.dumps(description))
  counts = sum(np.bincount(scene.label[3:].ravel(), minlength=3) for scene in SCENES)
  return Truth([*NAMES], counts.tolist(), 'label maps in colors in labels/train, labels/val;')


ANNOTATED = {  # what is said of the exports in annotation_trees
  'coco': 'COCO annotations (annotations/instances_train2017.json and 1 more): 6 images with 6 '
  'polygons and 12 masks of 2 classes; pixels in none of them are class 0, background.',
  'roboflow': '5 images with 5 polygons and 10 masks of 2 classes; pixels in none of them are '
  'class 0, background; left out: 1 image for testing.',
  'cvat_coco': 'COCO annotations (annotations/instances_default.json): 6 images with 6 polygons ',
  'label_studio_coco': 'COCO annotations (result.json): 6 images with 6 polygons and 12 masks of 2',
  'labelme': 'labelme annotations (0.json and 5 more): 6 images with 12 polygons and 6 rectangles '
  'of 2 classes; pixels in none of them are class 0, _background_.',
  'cvat': 'CVAT annotations of images (annotations.xml): 6 images with 6 masks, 6 boxes and 6 '
  'polygons of 2 classes; pixels in none of them are class 0, background; left out: 6 tags without',
  'label_studio': 'Label Studio tasks (project-1.json): 6 images with 6 polygons, 6 rectangles and '
  '6 brushes of 2 classes; pixels in none of them are class 0, background.',
  'supervisely': 'Supervisely annotations (meta.json): 6 images with 12 polygons and 6 bitmaps of '
  '2 classes; pixels in none of them are class 0, background; left out: 6 points without an area.',
}


def write_annotated(name: str, root: Path) -> Truth:
  """Polygons, boxes and masks as a tool exports them."""
  trees.EXPORTS[name][0](root)
  pixels = trees.pixels_of(name)
  return Truth(list(pixels), list(pixels.values()), ANNOTATED[name])


CASES: dict[str, Callable[[Path], Truth]] = {
  **{name: functools.partial(write_annotated, name) for name in ANNOTATED},
  'CVAT segmentation mask 1.1': write_cvat_masks,
  'Roboflow semantic masks': write_roboflow_masks,
  'Supervisely machine masks': write_supervisely_masks,
  'MMSegmentation': write_mmsegmentation,
  'VOC lists': write_voc,
  'one folder with a list': write_one_folder,
  'folders without a list': write_folders_without_list,
  'black and white': write_black_and_white,
  'CamVid': write_camvid,
  'colors that dataset.json names': write_colors_described,
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_what_people_have_is_prepared_and_trained_on(case, script, program, tmp_path, capsys):
  source, data_dir = tmp_path / "a stranger's data", tmp_path / 'tfds'
  truth = CASES[case](source)
  arguments = ['--dataset=custom', '--source', source, '--data-dir', data_dir]
  assert script(prepare, *arguments) == (None, '')
  printed = capsys.readouterr().out
  assert f'{source} holds ' in printed
  assert truth.said in printed

  splits = prepared.open_prepared(datasets.custom_dataset(2), data_dir=data_dir)
  description = {'classes': truth.classes, **(splits['val'].description or {})}
  lookup = datasets.custom_dataset(**description).label_lookup
  pixels = np.zeros(256, np.int64)
  for split in splits.values():
    for value, found in split.label_values.items():
      pixels[lookup[value]] += found.pixels
  assert description['classes'] == truth.classes
  assert pixels[: len(truth.pixels)].tolist() == truth.pixels
  assert not pixels[len(truth.pixels) : 255].any()
  table = [line for line in printed.splitlines() if line.endswith(('%', '-'))]
  assert len(table) == 2 * len(truth.classes)

  command = shlex.split(printed.splitlines()[-1])
  assert command[:4] == ['python', '-m', 'nonlocal_jax', 'train']
  settings = [f'--config.{key}={value}' for key, value in SMALL.items()]
  assert program(*command[4:], *settings, '--workdir=run') == (None, '')
  metrics = json.loads(Path('run/metrics.json').read_text())
  assert metrics['step'] == 10
  assert metrics['images'] == len(splits['val'])
  assert list(metrics['classes']) == truth.classes


def write_plain(root: Path, *, encode=lambda label: label, suffix: str = '.png') -> None:
  for scene in SCENES:
    write(root / f'images/{scene.name}.jpg', scene.image)
    write(root / f'masks/{scene.name}{suffix}', encode(scene.label))


def with_transparency(label: np.ndarray) -> np.ndarray:
  return np.dstack([in_colors(label), np.where(label, 255, 0).astype(np.uint8)])


def spoilt(write_files: Callable[..., object], name: str, text: str | None) -> Callable:
  def write_and_spoil(root: Path) -> None:
    write_files(root)
    if text is None:
      (root / name).unlink()
    else:
      (root / name).write_text(text)

  return write_and_spoil


BAD = {  # what people have, and what is said of it
  'JPEG label maps': (
    lambda root: write_plain(root, encode=in_colors, suffix='.jpg'),
    'has no label map: expected {root}/masks/scene_0.png, found {root}/masks/scene_0.jpg, a format '
    'whose compression changes labels: export PNG files.',
  ),
  'colors without a table': (
    lambda root: write_plain(root, encode=in_colors),
    '"palette": [[0, 0, 0], [20, 160, 40], [128, 64, 128]]}}',
  ),
  'a table without one of the colors': (
    spoilt(write_cvat_masks, 'labelmap.txt', 'background:0,0,0::\nroad:128,64,128::\n'),
    'has colors of no class, [20, 160, 40] (484 pixels): add them to {root}/labelmap.txt, or',
  ),
  'a broken table': (
    spoilt(write_camvid, 'class_dict.csv', 'name,r,g,b\nroad,1,2\n'),
    "File {root}/class_dict.csv is no table of classes ('road,1,2' is not name,r,g,b): mend it, or "
    'move it away.',
  ),
  'pixel values with a gap': (
    spoilt(write_roboflow_masks, 'train/_classes.csv', 'Pixel Value, Class\n0, a\n3, b\n'),
    'File {root}/train/_classes.csv is no table of classes (its pixel values are not 0, 1, ... wit',
  ),
  'more values than names': (
    spoilt(write_mmsegmentation, 'classes.txt', 'background\nroad\n'),
    'Label value 2 (',
  ),
  'transparency': (
    lambda root: write_plain(root, encode=with_transparency),
    'is a label map with transparent pixels: replace it.',
  ),
  'values of 16 bits': (
    lambda root: write_plain(root, encode=lambda label: label.astype(np.uint16) * 300),
    'is a label map of 16 bits whose values reach 600, over 255: replace it.',
  ),
  'a list of nothing': (
    spoilt(write_one_folder, 'val.txt', '\n'),
    'There are no image names in {root}/val.txt: add them, or delete the list.',
  ),
  'a list with a missing image': (
    spoilt(write_one_folder, 'val.txt', 'scene_3\r\nscene_9\r\n'),
    "There is no image 'scene_9' in {root}, which {root}/val.txt names in line 2: add it, or",
  ),
  'an image in both lists': (
    spoilt(spoilt(write_one_folder, 'val.txt', 'scene_3\nscene_4\n'), 'train.txt', 'scene_4.png\n'),
    "Image 'scene_4' stands both in {root}/train.txt and in {root}/val.txt: strike it out in one",
  ),
  'a missing label map': (
    spoilt(write_folders_without_list, 'Masks/scene_2.PNG', None),
    'Image {root}/Images/scene_2.JPG has no label map: expected {root}/Masks/scene_2.png. Or leave',
  ),
  'label maps without images': (
    lambda root: [write(root / f'SegmentationClass/{s.name}.png', s.label) for s in SCENES],
    'Folder {root}/SegmentationClass has label maps, but there is no folder of images beside it: '
    'put them',
  ),
  'images alone': (
    lambda root: [write(root / f'{scene.name}.png', scene.image) for scene in SCENES],
    'Folder {root} holds no images with labels in a format that is known: put images into images/',
  ),
  'one image': (
    lambda root: [write(root / f'{kind}/a.png', SCENES[0].label) for kind in ('images', 'masks')],
    'Folder {root} has 1 image for training and validation, which cannot be divided: add more.',
  ),
  'two folders of label maps': (
    lambda root: [write_plain(root), write(root / 'labels/a.png', SCENES[0].label)],
    'Folders labels and masks in {root} could both be that of the label maps: move one of them awa',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_data_is_a_sentence_and_leaves_nothing_unfinished(case, script, tmp_path):
  write_files, sentence = BAD[case]
  source, data_dir = tmp_path / 'source', tmp_path / 'tfds'
  write_files(source)
  arguments = ['--dataset=custom', '--source', source, '--data-dir', data_dir]
  status, said = script(prepare, *arguments)
  assert status == 1
  assert said.startswith('error: ')
  assert sentence.format(root=source) in said
  assert not list(data_dir.rglob('incomplete*'))
