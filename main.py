"""Trains a NonLocalNet as `nonlocal-jax train` does, or with --mode=eval evaluates one.

python main.py --config=configs/ade20k_r101.py --config.data.source_dir=DIR
"""

from nonlocal_jax.cli.modes import run

if __name__ == '__main__':
  run()
