"""Datasets as tools and people leave them are prepared, and the printed command trains."""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

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
