"""Segments images and videos and writes label maps and overlays.

python scripts/predict.py --checkpoint=WEIGHTS INPUT... --out=DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.main import main

if __name__ == '__main__':
  main(['predict', *sys.argv[1:]])
