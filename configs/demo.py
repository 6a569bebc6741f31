"""A small NonLocalNet on a generated dataset, trained and evaluated in minutes on a CPU.

    python main.py

In each image, the class of a gray square or triangle depends on its shape and on the color of a
disc that lies outside the receptive field of the backbone. `--config.model.non_local=False` shows
how much the non-local block contributes.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import demo_config


def get_config() -> ConfigDict:
  """Returns the recipe of the demo."""
  return demo_config()
