"""A small NonLocalNet on a set that it makes itself, to see the whole path in minutes on a CPU.

    python main.py

In each image the class of every grey square and triangle is its shape and the colour of the one
disc far away, farther than the backbone sees. `--config.model.non_local=False` shows what is lost
without the block.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import demo_config


def get_config() -> ConfigDict:
  """The recipe of the demo."""
  return demo_config()
