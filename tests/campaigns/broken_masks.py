"""Searches for broken label maps, tables and lists that end in anything but a sentence.

    python -m tests.campaigns.broken_masks --count=2000

Changes, cuts or deletes files of small datasets, looks for their format and reads all samples.
Prints what is no `UserError`.
"""

import argparse
import collections
import contextlib
import io
import random
import re
import tempfile
import traceback
from pathlib import Path

from nonlocal_jax.data import datasets, layouts
from nonlocal_jax.data.formats import detection
from nonlocal_jax.data.validation import read_sample
from nonlocal_jax.errors import UserError
from tests import test_strangers_data as strangers

WRITERS = (
  *(strangers.write_cvat_masks, strangers.write_roboflow_masks, strangers.write_supervisely_masks),
  *(strangers.write_camvid, strangers.write_one_folder, strangers.write_colors_described),
  *(strangers.write_black_and_white, strangers.write_voc),
)
ODD = (b'9' * 30, b'-1', b'\n', b',', b':', b'\0', b'1e9', b'[', b'{}', b'"', b'../', b'\xc3\xa9')


def spoil(path: Path, rng: random.Random) -> None:
  """Deletes, cuts, changes or extends a file."""
  data, kind = bytearray(path.read_bytes()), rng.randrange(10)
  place = rng.randrange(len(data) + 1)
  if kind == 0:
    path.unlink()
    return
  if kind <= 2:
    del data[place:]
  elif kind <= 5 and data:
    for _ in range(rng.randint(1, 4)):
      data[rng.randrange(len(data))] = rng.randrange(256)
  else:
    data[place:place] = rng.choice(ODD)
  path.write_bytes(data)


def complaints_of(root: Path) -> list[str]:
  """What is said of a folder: at once, or of its images."""
  try:
    found = detection.with_splits(root, detection.read_folder(root))
    known = {} if 'classes' in found.description else {'num_classes': 3}
    dataset = datasets.custom_dataset(**{**known, **found.description})
    samples, said = [], []
    for split in ('train', 'val'):
      listing = layouts.list_samples(dataset, root, split, found)
      samples += listing.samples
      said += listing.incomplete.values()
  except UserError as error:
    return [str(error)]
  for sample in samples:
    try:
      read_sample(sample)
    except UserError as error:
      said.append(str(error))
  return said


def main() -> None:
  """Runs the campaign."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  rng = random.Random(options.seed)
  said: collections.Counter[str] = collections.Counter()
  for number in range(options.count):
    write = rng.choice(WRITERS)
    with tempfile.TemporaryDirectory() as folder:
      root = Path(folder)
      write(root)
      files = sorted(path for path in root.rglob('*') if path.is_file())
      texts = [path for path in files if path.suffix in ('.txt', '.csv', '.json')]
      for path in {rng.choice(rng.choice([files, texts or files])) for _ in range(2)}:
        spoil(path, rng)
      try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress
          complaints = complaints_of(root)
        said.update(re.sub(r"/\S+|'[^']*'|\d+", '_', text)[:100] for text in complaints)
        odd = [text for text in complaints if not text.endswith('.')]
        if odd:
          print(f'{write.__name__} {number}: {odd[0]!a}')
      except Exception:  # noqa: BLE001
        print(f'{write.__name__} {number}: {traceback.format_exc()}')
  for sentence, count in said.most_common():
    print(count, ascii(sentence))


if __name__ == '__main__':
  main()
