"""Trains or evaluates NonLocalNet.

python main.py --config=configs/ade20k_r101.py --config.data.source_dir=DIR
"""

from pathlib import Path

from nonlocal_jax.cli.modes import define_flags, run

define_flags(default_config=Path(__file__).parent / 'configs/demo.py')

if __name__ == '__main__':
  run()
