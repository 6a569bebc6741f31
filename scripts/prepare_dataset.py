"""Checks the images and label maps of a dataset and packs them into ArrayRecord files.

python scripts/prepare_dataset.py --dataset=ade20k --source=data/ade/ADEChallengeData2016
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.main import main

if __name__ == '__main__':
  main(['prepare', *sys.argv[1:]])
