"""Files beside label maps that name the classes, and perhaps their colors."""

import csv
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from nonlocal_jax.data.datasets import IGNORED_BY_LABELME, Color
from nonlocal_jax.data.paths import IMAGE_SUFFIXES, read_text, without_suffix
from nonlocal_jax.data.transforms import IGNORE
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.files import parse_object


class ClassTable(NamedTuple):
  """Names of classes, in the order of their indices.

  Attributes:
    names: Name of each class.
    colors: Its RGB color in label maps, 0..255; empty if the file has none.
    file: Where they stand, for messages.
  """

  names: tuple[str, ...]
  colors: tuple[Color, ...]
  file: str


def find_table(folders: Iterable[Path], only: Collection[str] | None = None) -> ClassTable | None:
  """Reads the file that names the classes, if there is one.

  These are labelmap.txt of CVAT (`name:r,g,b:parts:actions`), _classes.csv of Roboflow (`Pixel
  Value, Class`), class_dict.csv (`name,r,g,b`), obj_class_to_machine_color.json of Supervisely
  (`{"name": [r, g, b]}`, beside which black is the background), classes.txt, class_names.txt and
  labels.txt (a name in each line, perhaps with `r g b`) and label_colors.txt (`r g b name`).

  Args:
    folders: Where they are looked for. Equal files in several folders are one.
    only: The names of files to look for; None for all of these.

  Returns:
    The table.

  Raises:
    UserError: If a file is not of its form, has a name or color twice, or files differ.
  """
  found: list[ClassTable] = []
  for folder in folders:
    for name, read in _READERS.items():
      path = folder / name
      if (only is None or name in only) and path.is_file():
        table = _checked(path, read)
        if not any(table[:2] == other[:2] for other in found):
          found.append(table)
  if len(found) > 1:
    raise UserError(
      f'Files {found[0].file} and {found[1].file} name different classes: delete one of them.'
    )
  return found[0] if found else None


def _checked(
  path: Path, read: Callable[[str], tuple[Sequence[str], Sequence[Color]]]
) -> ClassTable:
  try:
    names, colors = read(read_text(path))
    for values, what in ((names, 'names'), (colors, 'colors')):
      twice = next((value for value in values if values.count(value) > 1), None)
      if twice is not None:
        raise ValueError(f'it has {twice!r} twice among its {what}')
    wrong = next((color for color in colors if max(color) > 255), None)
    if wrong:
      raise ValueError(f'color {wrong} is beyond 255')
    if not names:
      raise ValueError('it is empty')
    if len(names) > IGNORE:
      raise ValueError(f'it has {len(names):,} names, and 255 classes are possible')
  except ValueError as error:
    raise UserError(
      f'File {path} is no table of classes ({error}): mend it, or move it away.'
    ) from error
  return ClassTable(tuple(names), tuple(colors), str(path))


def _lines(text: str) -> list[str]:
  return [line.strip() for line in text.splitlines() if line.strip()]


def _labelmap(text: str) -> tuple[list[str], list[Color]]:
  lines = [line for line in _lines(text) if not line.startswith('#')]
  return _matched(lines, r'(?P<name>.*?):(?P<r>\d+),(?P<g>\d+),(?P<b>\d+)(:.*)?', 'name:r,g,b::')


def _class_dict(text: str) -> tuple[list[str], list[Color]]:
  header, *lines = _lines(text) or ['']
  if [word.strip() for word in header.lower().split(',')] != ['name', 'r', 'g', 'b']:
    raise ValueError('its first line is not name,r,g,b')
  rows = list(csv.reader(lines, skipinitialspace=True))
  wrong = next((row for row in rows if len(row) != 4 or not all(map(_is_number, row[1:]))), None)
  if wrong:
    raise ValueError(f'{",".join(wrong)!r} is not name,r,g,b')
  return [row[0].strip() for row in rows], [(int(r), int(g), int(b)) for _, r, g, b in rows]


def _is_number(text: str) -> bool:
  return re.fullmatch(r'\s*[0-9]{1,4}\s*', text) is not None


def _values(text: str) -> tuple[list[str], list[Color]]:
  header, *lines = _lines(text) or ['']
  if [word.strip() for word in header.lower().split(',')] != ['pixel value', 'class']:
    raise ValueError('its first line is not Pixel Value, Class')
  names: dict[int, str] = {}
  for row in csv.reader(lines, skipinitialspace=True):
    if len(row) != 2 or not _is_number(row[0]) or int(row[0]) in names:
      raise ValueError(f'{",".join(row)!r} is not a new pixel value and a class')
    names[int(row[0])] = row[1].strip()
  if sorted(names) != list(range(len(names))):
    raise ValueError('its pixel values are not 0, 1, ... without a gap')
  return [names[value] for value in sorted(names)], []


def _names(text: str) -> tuple[list[str], list[Color]]:
  lines = _without_numbers([line for line in _lines(text) if not line.startswith('#')])
  image = next((line for line in lines if without_suffix(line.split()[0], IMAGE_SUFFIXES)), None)
  if image:
    raise ValueError(f'{image!r} is the name of an image')
  if lines and re.search(r'#[0-9a-fA-F]{6}$', lines[0]):
    raise ValueError(f'{lines[0]!r} is not name r g b: colors are numbers up to 255')
  number = r'[\s,;:]+(?P<{}>\d{{1,3}})'.format
  colored = rf'(?P<name>.*?\S){number("r")}{number("g")}{number("b")}'
  has_colors = [re.fullmatch(colored, line) is not None for line in lines]
  if not any(has_colors):
    return lines, []
  return _matched(lines, colored, 'name r g b, as others are')


def _without_numbers(lines: list[str]) -> list[str]:
  """Takes running numbers off names, as in '0 road' and '1: car'.

  Raises:
    ValueError: If all lines have numbers that are not 0, 1, ...
  """
  numbered = [re.fullmatch(r'(\d{1,3})(?:[.:,;)]\s*|\s+)(\S.*)', line) for line in lines]
  if not lines or not all(numbered):
    return lines
  numbers = [int(match[1]) for match in numbered if match]
  if numbers != list(range(len(lines))):
    raise ValueError(
      f'its lines begin with the numbers {", ".join(map(str, numbers[:3]))}, ..., and classes are '
      '0, 1, ...'
    )
  return [match[2] for match in numbered if match]


def _names_of_labelme(text: str) -> tuple[list[str], list[Color]]:
  names, colors = _names(text)
  return (names[1:] if names[:1] == [IGNORED_BY_LABELME] and not colors else names), colors


def _colors_first(text: str) -> tuple[list[str], list[Color]]:
  number = r'(?P<{}>\d{{1,3}})[\s,;:]+'.format
  colored = rf'{number("r")}{number("g")}{number("b")}(?P<name>.*)'
  return _matched(_lines(text), colored, 'r g b name')


def _matched(lines: Sequence[str], pattern: str, form: str) -> tuple[list[str], list[Color]]:
  names, colors = [], []
  for line in lines:
    found = re.fullmatch(pattern, line, re.ASCII)
    if found is None:
      raise ValueError(f'{line!r} is not {form}')
    names.append(found['name'].strip())
    colors.append((int(found['r']), int(found['g']), int(found['b'])))
  return names, colors


def _machine_colors(text: str) -> tuple[list[str], list[Color]]:
  named = parse_object(text)
  for name, color in named.items():
    if not (isinstance(color, list) and len(color) == 3 and all(type(v) is int for v in color)):
      raise ValueError(f'the color of {name!r} is not [r, g, b]')
    if min(color) < 0:
      raise ValueError(f'the color of {name!r} is negative')
  names, colors = list(named), [(r, g, b) for r, g, b in named.values()]
  if (0, 0, 0) not in colors:
    names, colors = ['background', *names], [(0, 0, 0), *colors]
  return names, colors


_READERS = {
  'labelmap.txt': _labelmap,
  '_classes.csv': _values,
  'class_dict.csv': _class_dict,
  'obj_class_to_machine_color.json': _machine_colors,
  'classes.txt': _names,
  'class_names.txt': _names,
  'labels.txt': _names_of_labelme,
  'label_colors.txt': _colors_first,
}
