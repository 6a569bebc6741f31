"""Trains or evaluates NonLocalNet: `nonlocal-jax train`, or with --mode=eval `nonlocal-jax eval`.

python main.py --config=configs/ade20k_r101.py --config.data.source_dir=DIR
"""

from nonlocal_jax.cli.modes import run

if __name__ == '__main__':
  run()
