"""A small NonLocalNet on a set that it makes itself, to see the whole path in minutes on a CPU.

    python main.py

In each image the class of every grey square and triangle is its shape and the colour of the one
disc far away, farther than the backbone sees. `--config.model.non_local=False` shows what is lost
without the block.
"""

from ml_collections import ConfigDict

from nonlocal_jax.recipes import base_config


def get_config() -> ConfigDict:
  """One block per stage, an eighth of the channels, no augmentation that could cut off the disc."""
  config = base_config()
  config.name = 'demo'
  config.model.depth = 14
  config.model.width = 8
  config.model.zero_init = False  # from scratch and in few steps: the block starts open
  config.data.dataset = 'demo'
  config.data.num_classes = 8
  config.train.steps = 400
  config.train.batch_size = 8
  config.train.scale = config.eval.scale = (192, 192)
  config.train.ratio_range = (1.0, 1.0)
  config.train.crop = (192, 192)
  config.train.cat_max_ratio = 1.0
  config.train.photometric_distortion = False
  config.train.log_every = 10
  config.optimizer.learning_rate = 0.05
  config.eval.every = config.checkpoint.every = 200
  return config
