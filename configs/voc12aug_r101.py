r"""NonLocalNet R-101-D8 on Pascal VOC 2012 + Aug.

    python main.py --config=configs/voc12aug_r101.py --config.data.source_dir=DIR

DIR is VOCdevkit/VOC2012, with SegmentationClassAug/ beside SegmentationClass/. Variants, after a
colon (`configs/voc12aug_r101.py:512x512_20k`): 512x512_20k, 512x512_40k.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import published_config


def get_config(variant: str = '') -> ConfigDict:
  """Returns the published recipe of `variant`, by default of the model with the best mIoU."""
  return published_config('voc12aug', 101, variant)
