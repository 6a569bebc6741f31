r"""NonLocalNet R-50-D8 on ADE20K.

    python main.py --config=configs/ade20k_r50.py --config.data.source_dir=DIR

DIR is ADEChallengeData2016, with images/ and annotations/. Variants, after a colon
(`configs/ade20k_r50.py:512x512_80k`): 512x512_80k, 512x512_160k.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import published_config


def get_config(variant: str = '') -> ConfigDict:
  """Returns the published recipe of `variant`, by default of the model with the best mIoU."""
  return published_config('ade20k', 50, variant)
