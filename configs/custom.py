r"""NonLocalNet on any folder with images/{train,val} and labels/{train,val}, equal stems.

    python main.py --config=configs/custom.py --config.data.source_dir=DIR \
      --config.data.num_classes=11 --config.data.ignore_labels='(11,)'

Labels are one-channel PNG files of class indices; 255 and `ignore_labels` have no class. Sizes and
schedule are those of the Pascal VOC models, tested on whole images, unless told otherwise.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import custom_config


def get_config() -> ConfigDict:
  """The recipe of Pascal VOC, 20k steps, for a dataset of your own."""
  return custom_config()
