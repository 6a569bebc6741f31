r"""NonLocalNet R-50-D8 on Cityscapes.

    python main.py --config=configs/cityscapes_r50.py --config.data.source_dir=DIR

DIR holds leftImg8bit/ and gtFine/ with *_gtFine_labelTrainIds.png. Variants, after a colon
(`configs/cityscapes_r50.py:512x1024_40k`): 512x1024_40k, 512x1024_80k, 769x769_40k, 769x769_80k.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import published_config


def get_config(variant: str = '') -> ConfigDict:
  """Returns the published recipe of `variant`, by default of the model with the best mIoU."""
  return published_config('cityscapes', 50, variant)
