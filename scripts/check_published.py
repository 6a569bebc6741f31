"""Evaluates released checkpoints and compares their scores with the published ones.

python scripts/check_published.py --checkpoints=DIR --data=DIR --out=published
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.main import main

if __name__ == '__main__':
  main(['check-published', *sys.argv[1:]])
