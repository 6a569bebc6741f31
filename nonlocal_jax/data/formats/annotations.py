"""Files that annotate images with shapes: what they have in common, whichever tool wrote them."""

import collections
import contextlib
import dataclasses
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.data.formats.class_tables import find_table
from nonlocal_jax.data.formats.found import Found
from nonlocal_jax.data.formats.image_index import ImageIndex
from nonlocal_jax.data.formats.split_lists import SPLIT_NAMES
from nonlocal_jax.data.paths import in_one_form, version_of
from nonlocal_jax.data.samples import Listing, Sample, no_files
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import parse_json

BACKGROUND = 'background'
_LISTS = ('classes.txt', 'class_names.txt')  # of names in lines
_READ_AHEAD = 1 << 16  # bytes of a file that show what it is
_SPLITS = {
  **{name: split for split, names in SPLIT_NAMES.items() for name in names},
  **dict.fromkeys(('test', 'testing'), 'test'),
}


class Entry(NamedTuple):
  """An image in an annotation file.

  Attributes:
    names: Paths of the image as the file gives them, the likeliest first.
    file: The annotation file.
    draw: Makes the label map, (h, w) uint8, of the height and width of the decoded image; raises a
      `UserError` that names the file and the shape.
    shapes: How many shapes of each kind are drawn, by its name in the plural.
    left_out: How many there are of those that have no area.
    split: 'train', 'val', 'test', or '' if nothing says it.
    problem: A sentence on why the image cannot be used; empty if it can.
  """

  names: Sequence[str]
  file: Path
  draw: Callable[[int, int], np.ndarray]
  shapes: Mapping[str, int]
  left_out: Mapping[str, int] = {}
  split: str = ''
  problem: str = ''


def found_annotations(
  source: Path,
  entries: Sequence[Entry],
  *,
  title: str,
  classes: Sequence[str],
  palette: Sequence[Sequence[int]] = (),
  drawing: str,
) -> Found:
  """Finds the images of annotation files and describes them.

  Args:
    source: The folder.
    entries: The images of all its annotation files.
    title: What the files are.
    classes: Names of the classes, that of the background first.
    palette: Their colors; empty if the files give none.
    drawing: How the shapes are drawn, with a number that grows when that changes.

  Returns:
    What the folder holds.

  Raises:
    UserError: If it holds no shape with an area.
  """
  counts = collections.Counter(entry.split for entry in entries)
  divided = bool(counts['train'] and counts['val'])
  if divided and counts['']:
    file = next(entry.file for entry in entries if not entry.split)
    raise UserError(
      f'File {file} is neither of train nor of val, as others are: rename it, or move it away.'
    )
  tests = [entry for entry in entries if entry.split == 'test' and len(counts) > 1]
  used = [entry for entry in entries if entry.split != 'test' or len(counts) == 1]
  shapes, left_out = collections.Counter[str](), collections.Counter[str]()
  for entry in used:
    shapes.update(entry.shapes)
    left_out.update(entry.left_out)
  if len(classes) > IGNORE:
    raise UserError(
      f'The {title} in {source} have {len(classes)} classes with the one of the background, and '
      f'{IGNORE} are possible: merge some, or take those out that no shape has.'
    )
  for name in classes:
    if not name.strip():
      raise UserError(f'The {title} in {source} have a class without a name: name it.')
    if name != name.encode('utf-8', 'replace').decode() or not name.isprintable():
      raise UserError(
        f'The {title} in {source} have a class called {name!a}, which cannot be printed: rename it.'
      )
  if not shapes.total():
    only = f' but {_listed(left_out)}' if left_out else ''
    raise UserError(
      f'The {title} in {source} have no shapes with an area{only}: draw polygons or masks.'
    )
  images = ImageIndex(source)
  taken: dict[Path, Entry] = {}
  listings = {
    split: _listing(source, images, [entry for entry in used if split in ('', entry.split)], taken)
    for split in (('train', 'val') if divided else ('',))
  }
  for entry in tests:
    with contextlib.suppress(ValueError):
      images.find(entry.names, entry.file)
  count = sum(len(listing.samples) for listing in listings.values())
  empty = sum(not any(entry.shapes.values()) for entry in used)
  kinds = _listed({'classes': len(classes) - 1})
  remarks = [
    f'{_listed({"images": count})} with {_listed(shapes)} of {kinds}',
    f'pixels in none of them are class 0, {classes[0]}',
  ]
  if empty:
    remarks.insert(1, f'{_listed({"images": empty})} without any')
  others = {
    'without an area': left_out,
    'for testing': {'images': len(tests)},
    'that the annotations do not name': {'images': images.unused()},
  }
  others = [f'{_listed(counts)} {what}' for what, counts in others.items() if any(counts.values())]
  if others:
    remarks.append(f'left out: {", ".join(others)}')
  names = list(classes)
  return Found(
    sentence=f'{title}: {"; ".join(remarks)}',
    description={'classes': names, **({'palette': [*map(list, palette)]} if palette else {})},
    listing=listings.__getitem__ if divided else listings[''],
    reading=f'{drawing} {names}',
  )


def _listed(counts: Mapping[str, int]) -> str:
  """Lists counts, as in '2 polygons and 1 box'."""
  singular = {'boxes': 'box', 'brushes': 'brush', 'classes': 'class'}
  words = [
    f'{count:,} {kind if count != 1 else singular.get(kind, kind.removesuffix("s"))}'
    for kind, count in counts.items()
    if count
  ]
  return ' and '.join([*([', '.join(words[:-1])] if words[1:] else []), *words[-1:]])


def _listing(
  source: Path, images: ImageIndex, entries: Sequence[Entry], taken: dict[Path, Entry]
) -> Listing:
  """Lists the images of some entries; `taken` has those of others, and then these as well."""
  samples: dict[str, Sample] = {}
  incomplete: dict[str, str] = {}
  for entry in entries:
    try:
      image = images.find(entry.names, entry.file)
    except ValueError as error:
      name = in_one_form(entry.names[0])
      key = f'{name} of {entry.file.name}' if name in incomplete else name
      incomplete[key] = entry.problem or f'{error}.'
      continue
    id_ = in_one_form(image.relative_to(source).with_suffix('').as_posix())
    reason = entry.problem or no_files(image)
    if image in taken:
      files = ' and '.join(sorted({str(taken[image].file), str(entry.file)}))
      samples.pop(id_, None)
      reason = f'Image {image} is annotated twice, in {files}: take one of the two out.'
    elif id_ in samples:
      reason = (
        f'Images {samples[id_].image} and {image} cannot be told apart, since suffixes do not '
        'count: rename one of them, also in the annotations.'
      )
    taken[image] = entry
    if reason:
      incomplete[in_one_form(image.relative_to(source).as_posix())] = reason
    else:
      samples[id_] = Sample(id_, image, entry.file, entry.draw)
  return Listing([samples[id_] for id_ in sorted(samples)], incomplete)


def split_named(names: Iterable[str]) -> str:
  """Returns the split that some names of files, folders or subsets speak of.

  >>> split_named(['annotations', 'instances_train2017.json'])
  'train'
  >>> split_named(['trainer.json'])
  ''

  Args:
    names: Such as the parts of a path.

  Returns:
    'train', 'val' or 'test'; '' if they speak of none, or of several.
  """
  words = (word for name in names for word in re.findall('[a-z]+', name.lower()))
  found = {_SPLITS[word] for word in words if word in _SPLITS}
  return found.pop() if len(found) == 1 else ''


def ordered_classes(source: Path, files: Iterable[Path], names: Iterable[str]) -> list[str]:
  """Orders classes; the first is the one of what no shape covers, under the name that it has there.

  Args:
    source: The folder.
    files: The annotation files. Where classes.txt lies beside one of them or in a folder above,
      with a name in each line, that gives the order, and may name further classes.
    names: The classes in the order of the tool.

  Returns:
    Their names.

  Raises:
    UserError: If classes.txt lacks one.
  """
  names = list(names)
  table = find_table(folders_of(source, files), _LISTS)
  if table is not None:
    missing = [name for name in names if name not in table.names and not _is_background(name)]
    if missing:
      raise UserError(
        f'File {table.file} lacks the class {missing[0]!r}, which the annotations have: add it, or '
        'delete the file.'
      )
    names = list(table.names)
  own = next(filter(_is_background, names), BACKGROUND)
  return [own, *(name for name in names if name != own)]


def folders_of(source: Path, files: Iterable[Path]) -> list[Path]:
  """Lists the folders of some files below a folder, and those between, that one first."""
  parents = {folder for file in files for folder in file.relative_to(source).parents}
  return [source / folder for folder in sorted(parents, key=lambda folder: folder.parts)]


def _is_background(name: str) -> bool:
  return name.strip().lower() in (BACKGROUND, '_background_')


def beginning(path: Path) -> bytes:
  """Reads the beginning of a file, which shows what it is; b'' if it cannot be read."""
  try:
    with path.open('rb') as file:
      return file.read(_READ_AHEAD)
  except OSError:
    return b''


def evidence_of(source: Path, files: Sequence[Path]) -> str:
  """Names the first of some files below a folder, and says how many more there are."""
  more = f' and {len(files) - 1} more' if len(files) > 1 else ''
  return f'{files[0].relative_to(source).as_posix()}{more}'


def read_json(path: Path, keep: Callable[[dict], dict] | None = None) -> Any:
  """Reads a JSON file.

  Args:
    path: The file.
    keep: Replaces each object by what is kept of it, to save memory.

  Raises:
    UserError: If it cannot be read or is not JSON.
  """
  try:
    return parse_json(path.read_bytes(), keep)
  except OSError as error:
    reason = error.strerror or str(error)
    raise UserError(f'File {path} cannot be read ({reason}): replace it.') from error
  except ValueError as error:
    raise UserError(f'File {path} is no JSON file, or broken ({error}): replace it.') from error


@dataclasses.dataclass(eq=False)
class Document:
  """The contents of a file, once for all that read it while somebody holds it.

  Attributes:
    path: The file.
    content: What a function made of it.
  """

  path: Path
  content: Any


_documents: weakref.WeakValueDictionary[tuple, Document] = weakref.WeakValueDictionary()


def document(path: Path, parse: Callable[[Path], Any]) -> Document:
  """Parses a file, unless what was made of it is still held.

  Args:
    path: The file.
    parse: Parses it.
  """
  key = (parse, path, version_of(path))
  found = _documents.get(key)
  if found is None:
    found = _documents[key] = Document(path, parse(path))
  return found


def check_size(stated: Any, h: int, w: int, image: str, file: Path) -> None:
  """Compares the size that an annotation file states for an image with that of the image.

  Args:
    stated: (height, width), None where it states none.
    h: Height of the decoded image.
    w: Its width.
    image: The image's name.
    file: The annotation file.

  Raises:
    UserError: If they differ.
  """
  height, width = (h if stated[0] is None else stated[0]), (w if stated[1] is None else stated[1])
  if (height, width) != (h, w):
    turned = ' (turned, perhaps by its EXIF orientation)' if (height, width) == (w, h) else ''
    raise UserError(
      f'File {file} has image {image} with {width}x{height} pixels, but it has {w}x{h}{turned}: '
      'replace one of them.'
    )
