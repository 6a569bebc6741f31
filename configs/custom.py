r"""NonLocalNet on your own dataset: images/{train,val} and labels/{train,val}, equal stems.

    python main.py --config=configs/custom.py --config.data.source_dir=DIR \
      --config.data.num_classes=11 --config.data.ignore_labels='(11,)'

Labels are one-channel PNG files of class indices; 255 and `ignore_labels` have no class. By
default, sizes and schedule are those of the Pascal VOC models, and whole images are evaluated.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import custom_config


def get_config() -> ConfigDict:
  """Returns the recipe of Pascal VOC, 20k steps, for your own dataset."""
  return custom_config()
