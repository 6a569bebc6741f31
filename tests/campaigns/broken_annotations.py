"""Searches for broken annotation files that end in anything but a sentence.

    python -m tests.campaigns.broken_annotations --count=2000

Puts odd values in place of random parts of what each tool exports, or takes them out, and reads
and draws everything. Prints what is no `UserError`, and takes too long.
"""

import argparse
import collections
import copy
import json
import random
import re
import tempfile
import time
import traceback
from pathlib import Path

from nonlocal_jax.errors import UserError
from tests import annotation_trees as trees
from tests.test_annotations import complaints_of

ODD = [
  *(None, True, False, 0, -1, 1, 3.5, 1e308, -1e308, float('nan'), float('inf'), 10**30, 2**31),
  *('', 'x', '0', 'road', '../..', '\0', '\ud800', '/', 'é' * 300),
  *([], [[]], [None], {}, {'': []}, [1, 2], [[1, 2]], [[1, 2], [3, 4], [5, 6]], [0] * 50),
]
SECONDS = 5


def places(value: object, above: tuple = ()) -> list[tuple]:
  """All paths of keys and indices in nested lists and objects."""
  items = (
    list(value.items())
    if isinstance(value, dict)
    else list(enumerate(value))
    if isinstance(value, list)
    else []
  )
  return [p for key, inner in items for p in [(*above, key), *places(inner, (*above, key))]]


def mutate(content: object, rng: random.Random) -> object:
  """Replaces or removes up to three parts of a JSON value."""
  content = copy.deepcopy(content)
  for _ in range(rng.randint(1, 3)):
    found = places(content)
    if not found:
      return rng.choice(ODD)
    *folder, key = rng.choice(found)
    place = content
    for step in folder:
      place = place[step]
    if rng.random() < 0.2:
      del place[key]
    else:
      place[key] = copy.deepcopy(rng.choice([*ODD, place]))
  return content


def mutate_text(text: str, rng: random.Random) -> str:
  """Replaces up to three attributes of an XML file, or cuts it."""
  for _ in range(rng.randint(1, 3)):
    found = list(re.finditer(r'"[^"]*"|<\w+|</\w+>', text))
    match = rng.choice(found)
    new = rng.choice(['""', '"nan"', '"-1"', '"1e999"', '"x"', '"1;2"', '"1,2"', '', '<a', '&lt;'])
    text = text[: match.start()] + new + text[match.end() :]
  return text


def main() -> None:
  """Runs the campaign."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  rng = random.Random(options.seed)
  said: collections.Counter[str] = collections.Counter()
  for name, (write, _) in trees.EXPORTS.items():
    with tempfile.TemporaryDirectory() as folder:
      root = Path(folder)
      write(root)
      files = [*root.rglob('*.json'), *root.rglob('*.xml')]
      whole = {path: path.read_text() for path in files}
      for number in range(options.count // len(trees.EXPORTS)):
        path = rng.choice(files)
        if path.suffix == '.json':
          path.write_text(json.dumps(mutate(json.loads(whole[path]), rng)))
        else:
          path.write_text(mutate_text(whole[path], rng), errors='surrogatepass')
        start = time.monotonic()
        try:
          complaints = complaints_of(root)
          said.update(re.sub(r"/\S+|'[^']*'|[\d.e+-]+|nan|inf", '_', text) for text in complaints)
          odd = [text for text in complaints if '\n' in text or not text.endswith('.')]
          if odd:
            print(f'{name} {number}: {odd[0]!r}')
        except UserError:
          raise
        except Exception:  # noqa: BLE001
          print(f'{name} {number}: {traceback.format_exc()}\n{path.read_text()[:2000]}')
        if (seconds := time.monotonic() - start) > SECONDS:
          print(f'{name} {number}: {seconds:.0f} s')
        path.write_text(whole[path])
  for sentence, count in said.most_common():
    print(count, ascii(sentence[:200]))


if __name__ == '__main__':
  main()
