"""Draws augmented training samples and counts the pixels of each class.

python scripts/browse_dataset.py --config=configs/custom.py --config.data.source_dir=DIR --out=OUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.main import main

if __name__ == '__main__':
  main(['browse', *sys.argv[1:]])
