"""Measures how fast the network is on this machine and how much memory it needs.

python scripts/benchmark.py --out=DIR
python scripts/benchmark.py --out=DIR --peer    compares with MMSegmentation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nonlocal_jax.cli.main import main
from nonlocal_jax.cli.program import run_program

if __name__ == '__main__':
  if '--peer' in sys.argv:
    from benchmarks import compare

    sys.argv.remove('--peer')
    run_program(lambda: compare.main(sys.argv[1:]))
  else:
    main(['benchmark', *sys.argv[1:]])
