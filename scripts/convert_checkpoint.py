"""Converts checkpoints of MMSegmentation to directories, and weights trained here to .pth files.

python scripts/convert_checkpoint.py FILE.pth OUT              one file to a directory
python scripts/convert_checkpoint.py FOLDER OUT                each .pth of a folder, to OUT/STEM
python scripts/convert_checkpoint.py SOURCE --to-pth OUT.pth   for MMSegmentation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.main import main

if __name__ == '__main__':
  main(['convert', *sys.argv[1:]])
