"""Segments images: a label map and a picture of it for each.

python scripts/predict.py --checkpoint=WEIGHTS INPUT... --out=DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.predict import main
from nonlocal_jax.cli.program import run_program

if __name__ == '__main__':
  run_program(main)
