"""Writes tiny datasets as tools for annotation export them, with the label maps that they mean.

The shapes have sides along the axes and whole coordinates, so that every tool's rasterization has a
closed form: pycocotools leaves out the pixels at the far ends, the others draw them.
"""

import base64
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SIZES = [(40, 48), (36, 52), (44, 40), (40, 40), (38, 46), (50, 42)]  # (height, width)
NAMES = ['road', 'car']  # in the tools' own order
CLASSES = ['background', *NAMES]


def boxes_of(index: int) -> list[tuple[str, tuple[int, int, int, int]]]:
  """The boxes of an image, later ones above: class, (left, top, right, bottom)."""
  return [
    ('road', (2, 20 + index, 30, 34)),
    ('car', (10 + index, 15, 20 + index, 25)),
    ('road', (25, 3, 35, 9 + index)),
  ]


def expected_label(index: int, *, ends: int, names: Sequence[str] = CLASSES) -> np.ndarray:
  """The label map of an image, (h, w) uint8.

  Args:
    index: Which image.
    ends: 1 if the far ends of boxes belong to them, else 0.
    names: The classes in order.
  """
  label = np.zeros(SIZES[index], np.uint8)
  for name, (left, top, right, bottom) in boxes_of(index):
    label[top : bottom + ends, left : right + ends] = names.index(name)
  return label


def corners_of(box: tuple[int, int, int, int]) -> list[list[int]]:
  """The corners of a box, [x, y] each."""
  left, top, right, bottom = box
  return [[left, top], [right, top], [right, bottom], [left, bottom]]


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
  """The pixels of a box without its far ends, (h, w) uint8."""
  mask = np.zeros(size, np.uint8)
  left, top, right, bottom = box
  mask[top:bottom, left:right] = 1
  return mask


def write_image(path: Path, index: int) -> None:
  """Writes an image of noise in the size of its index."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(index)
  Image.fromarray(rng.integers(256, size=(*SIZES[index], 3), dtype=np.uint8)).save(path)


def coco_content(indices: Sequence[int], *, first_id: int = 1, folder: str = '') -> dict:
  """COCO's JSON for some images; the three boxes are a polygon, run lengths and a packed string."""
  annotations = []
  for index in indices:
    for number, (name, box) in enumerate(boxes_of(index)):
      mask = mask_of(box, SIZES[index])
      if number == 0:
        segmentation = [np.ravel(corners_of(box)).tolist()]
      elif number == 1:
        flat = mask.ravel(order='F')
        edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
        counts = np.diff(edges, prepend=0).tolist()
        segmentation = {'size': list(SIZES[index]), 'counts': counts}
      else:
        packed = coco_mask.encode(np.asfortranarray(mask))
        segmentation = {'size': list(SIZES[index]), 'counts': packed['counts'].decode()}
      annotations.append(
        {
          'id': len(annotations) + 1,
          'image_id': index,
          'category_id': NAMES.index(name) + first_id,
          'segmentation': segmentation,
          'iscrowd': int(number == 1),
          'bbox': [box[0], box[1], box[2] - box[0], box[3] - box[1]],
          'area': int(mask.sum()),
        }
      )
  images = [
    {'id': i, 'file_name': f'{folder}{i}.jpg', 'height': SIZES[i][0], 'width': SIZES[i][1]}
    for i in indices
  ]
  categories = [
    {'id': i + first_id, 'name': name, 'supercategory': ''} for i, name in enumerate(NAMES)
  ]
  return {'info': {}, 'images': images, 'annotations': annotations, 'categories': categories}


def write_json(path: Path, content: object) -> None:
  """Writes a JSON file and the folders above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def write_coco(root: Path) -> None:
  """COCO's own archives: annotations/instances_SPLIT.json, and images in a folder per split."""
  for split, indices in {'train2017': [0, 1, 2, 3], 'val2017': [4, 5]}.items():
    write_json(root / f'annotations/instances_{split}.json', coco_content(indices))
    for index in indices:
      write_image(root / split / f'{index}.jpg', index)


def write_roboflow(root: Path) -> None:
  """Roboflow's "COCO segmentation": the first category only groups the others."""
  for split, indices in {'train': [0, 1, 2], 'valid': [3, 4], 'test': [5]}.items():
    content = coco_content(indices)
    content['categories'] = [
      {'id': 0, 'name': 'street', 'supercategory': 'none'},
      *({**category, 'supercategory': 'street'} for category in content['categories']),
    ]
    write_json(root / split / '_annotations.coco.json', content)
    for index in indices:
      write_image(root / split / f'{index}.jpg', index)


def write_cvat_coco(root: Path) -> None:
  """CVAT's "COCO 1.0" of a task: annotations/instances_default.json and images."""
  write_json(root / 'annotations/instances_default.json', coco_content(range(6)))
  for index in range(6):
    write_image(root / f'images/{index}.jpg', index)


def write_label_studio_coco(root: Path) -> None:
  """Label Studio's "COCO": result.json and images, and categories that begin with 0."""
  write_json(root / 'result.json', coco_content(range(6), first_id=0, folder='images/'))
  for index in range(6):
    write_image(root / f'images/{index}.jpg', index)


def write_labelme(root: Path) -> None:
  """labelme's: a JSON file beside each image, and labels.txt."""
  (root / 'labels.txt').parent.mkdir(parents=True, exist_ok=True)
  (root / 'labels.txt').write_text('\n'.join(['__ignore__', '_background_', *NAMES]))
  for index, (height, width) in enumerate(SIZES):
    write_image(root / f'{index}.jpg', index)
    shapes = [
      {
        'label': name,
        'points': corners_of(box),
        'group_id': None,
        'description': '',
        'shape_type': 'polygon',
        'flags': {},
        'mask': None,
      }
      for name, box in boxes_of(index)
    ]
    shapes[1] |= {'shape_type': 'rectangle', 'points': corners_of(boxes_of(index)[1][1])[::2]}
    data = base64.b64encode((root / f'{index}.jpg').read_bytes()).decode() if index % 2 else None
    content = {
      'version': '5.5.0',
      'flags': {},
      'shapes': shapes,
      'imagePath': f'{index}.jpg',
      'imageData': data,
      'imageHeight': height,
      'imageWidth': width,
    }
    write_json(root / f'{index}.json', content)


def write_cvat(root: Path) -> None:
  """CVAT's "CVAT for images 1.1": annotations.xml and images; the first box lies above others."""
  labels = ''.join(
    f'<label><name>{name}</name><color>{color}</color><attributes></attributes></label>'
    for name, color in zip(NAMES, ['#ff0000', '#0000ff'], strict=True)
  )
  images = []
  for index, (height, width) in enumerate(SIZES):
    write_image(root / f'images/{index}.jpg', index)
    shapes = []
    for number, (name, (left, top, right, bottom)) in enumerate(boxes_of(index)):
      common = f'label="{name}" source="manual" occluded="0" z_order="{number}"'
      if number == 0:
        points = ';'.join(f'{x:.2f},{y:.2f}' for x, y in corners_of((left, top, right, bottom)))
        shapes.append(f'<polygon {common} points="{points}"></polygon>')
      elif number == 1:
        ends = f'xtl="{left:.2f}" ytl="{top:.2f}" xbr="{right:.2f}" ybr="{bottom:.2f}"'
        shapes.append(f'<box {common} {ends}><attribute name="a">b</attribute></box>')
      else:
        w, h = right - left, bottom - top
        rle = f'rle="0, {w * h}" left="{left}" top="{top}" width="{w}" height="{h}"'
        shapes.append(f'<mask {common} {rle}></mask>')
    shapes.reverse()  # z_order says which is above
    shapes.append('<tag label="road" source="manual"></tag>')
    images.append(
      f'<image id="{index}" name={quoteattr(f"{index}.jpg")} width="{width}" height="{height}">'
      f'{"".join(shapes)}</image>'
    )
  (root / 'annotations.xml').write_text(
    '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task>'
    f'<labels>{labels}</labels></task></meta>{"".join(images)}</annotations>'
  )


def brush_of(mask: np.ndarray) -> list[int]:
  """Encodes a mask as Label Studio does: RGBA, single values and runs of up to 2^16."""
  flat = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
  bits = f'{len(flat):032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}'
  edges = np.append(np.flatnonzero(np.diff(flat, prepend=flat[0] ^ 1)), len(flat))
  for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
    value, length = int(flat[start]), stop - start
    if length <= 4:  # the values one by one
      bits += f'000{length - 1:03b}' + f'{value:08b}' * length
    else:
      which, size = next((w, s) for w, s in enumerate((3, 4, 8, 16)) if length <= 2**s)
      bits += f'1{which:02b}{length - 1:0{size}b}{value:08b}'
  bits += '0' * (-len(bits) % 8)
  return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def label_studio_results(index: int) -> list[dict]:
  """The results of a task: a polygon, a rectangle and a brush."""
  height, width = SIZES[index]
  results = []
  for number, (name, box) in enumerate(boxes_of(index)):
    percent = [[100 * x / width, 100 * y / height] for x, y in corners_of(box)]
    (x, y), (right, bottom) = percent[0], percent[2]
    kind, value = [
      ('polygonlabels', {'points': percent, 'closed': True}),
      (
        'rectanglelabels',
        {'x': x, 'y': y, 'width': right - x, 'height': bottom - y, 'rotation': 0},
      ),
      ('brushlabels', {'format': 'rle', 'rle': brush_of(mask_of(box, SIZES[index]))}),
    ][number]
    results.append(
      {
        'id': f'region{number}',
        'type': kind,
        'value': {**value, kind: [name]},
        'from_name': 'label',
        'to_name': 'image',
        'original_width': width,
        'original_height': height,
        'image_rotation': 0,
      }
    )
  return results


def write_label_studio(root: Path) -> None:
  """Label Studio's "JSON" beside the images that were uploaded or in its local storage."""
  tasks = []
  for index in range(6):
    write_image(root / f'images/street no {index}.jpg', index)
    address = [
      f'/data/upload/1/0a1b2c3d-street%20no%20{index}.jpg',
      f'/data/local-files/?d=folder/images/street%20no%20{index}.jpg',
    ][index % 2]
    annotations = [
      {'id': 1, 'was_cancelled': True, 'result': []},
      {'id': 2, 'was_cancelled': False, 'result': label_studio_results(index)},
    ]
    tasks.append({'id': index, 'data': {'image': address}, 'annotations': annotations})
  write_json(root / 'project-1.json', tasks)


def png_of(mask: np.ndarray) -> bytes:
  """A mask as a PNG file of one bit."""
  file = io.BytesIO()
  Image.fromarray(mask).convert('1').save(file, 'PNG')
  return file.getvalue()


def write_supervisely(root: Path) -> None:
  """A project of Supervisely with two datasets; the second box is a bitmap."""
  colors = zip(NAMES, ['#FF0000', '#0000FF'], strict=True)
  classes = [{'title': name, 'shape': 'any', 'color': color} for name, color in colors]
  write_json(root / 'meta.json', {'classes': classes, 'tags': []})
  for index, (height, width) in enumerate(SIZES):
    folder = root / ('day' if index < 4 else 'night')
    write_image(folder / f'img/{index}.jpg', index)
    objects = []
    for number, (name, box) in enumerate(boxes_of(index)):
      common = {'id': number, 'classTitle': name, 'tags': []}
      points = {'exterior': corners_of(box), 'interior': []}
      if number == 1:
        side = np.full((box[3] - box[1] + 1, box[2] - box[0] + 1), 255, np.uint8)
        data = base64.b64encode(zlib.compress(png_of(side))).decode()
        bitmap = {'data': data, 'origin': [box[0], box[1]]}
        objects.append({**common, 'geometryType': 'bitmap', 'bitmap': bitmap})
      else:
        objects.append({**common, 'geometryType': 'polygon', 'points': points})
    point = {'points': {'exterior': [[1, 1]], 'interior': []}}
    objects.append({'classTitle': 'road', 'geometryType': 'point', 'tags': [], **point})
    size = {'height': height, 'width': width}
    content = {'description': '', 'tags': [], 'size': size, 'objects': objects}
    write_json(folder / f'ann/{index}.jpg.json', content)


# By name: what writes it, and whether far ends of boxes belong to them.
EXPORTS: dict[str, tuple[Callable[[Path], None], int]] = {
  'coco': (write_coco, 0),
  'roboflow': (write_roboflow, 0),
  'cvat_coco': (write_cvat_coco, 0),
  'label_studio_coco': (write_label_studio_coco, 0),
  'labelme': (write_labelme, 1),
  'cvat': (write_cvat, 0),
  'label_studio': (write_label_studio, 0),
  'supervisely': (write_supervisely, 1),
}


def pixels_of(name: str) -> dict[str, int]:
  """How often each class occurs in the images of an export that are not for testing."""
  _, ends = EXPORTS[name]
  indices = range(5 if name == 'roboflow' else 6)
  counts = sum(
    np.bincount(expected_label(i, ends=ends).ravel(), minlength=len(CLASSES)) for i in indices
  )
  first = '_background_' if name == 'labelme' else 'background'
  pixels = dict(zip([first, *NAMES], np.asarray(counts).tolist(), strict=True))
  if name == 'label_studio':  # which does not list its labels
    pixels = {key: pixels[key] for key in [first, *sorted(NAMES)]}
  return pixels
