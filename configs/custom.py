r"""NonLocalNet on your own dataset, whose format is found out: see nonlocal-jax prepare --help.

    python main.py --config=configs/custom.py --config.data.source_dir=DIR \
      --config.data.num_classes=11 --config.data.ignore_labels='(11,)'

Where nothing in the folder names the classes, give their number. Label 255 and `ignore_labels` have
no class. By default, sizes and schedule are those of the Pascal VOC models, and whole images are
evaluated.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import custom_config


def get_config() -> ConfigDict:
  """Returns the recipe of Pascal VOC, 20k steps, for your own dataset."""
  return custom_config()
