"""The recipe that all configs share; on top of it the published models, `custom` and `demo`.

Sizes: scales are (width, height) boxes that an image is resized into with its aspect kept, long
edge to long edge; crops are (height, width). The numbers of the recipe are those of
mmsegmentation's `configs/nonlocal_net` and `configs/_base_`.
"""

from ml_collections import ConfigDict, config_dict

from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.errors import UserError, nearest
from nonlocal_jax.weights.released import RELEASED, ReleasedModel

BATCH_SIZES = {'cityscapes': 8, 'ade20k': 16, 'voc12aug': 16}


def base_config() -> ConfigDict:
  """The recipe with VOC's sizes; data set and classes are still to be set."""
  config = ConfigDict()
  config.name = ''  # printed, and the name of the default workdir
  config.seed = 0
  config.init_backbone = ''  # .pth file with the backbone's initial weights; empty: random

  config.model = ConfigDict()
  config.model.depth = 50  # layers of the backbone: 14, 26, 50 or 101
  config.model.width = 64  # base channels
  config.model.non_local = True  # False leaves out the non-local block
  config.model.zero_init = True  # the block starts as the identity
  config.model.align_corners = False  # corner convention of every resize of logits
  config.model.dropout = 0.1
  # How convolutions are computed on CPUs: 'fast', or 'direct' as elsewhere (for comparisons).
  config.model.convolution = 'fast'
  # Of the non-local block: 'blocks' of queries; on an NVIDIA GPU 'cudnn', which rounds what goes in
  # to the 11 bits of TF32, or 'flash', as exact as float32; 'auto': the fastest as exact as asked.
  config.model.attention = 'blocks'

  config.data = ConfigDict()
  config.data.dataset = 'custom'  # cityscapes, ade20k, voc12aug, custom or demo
  # Folder or bucket of images and labels, as the dataset's authors lay it out; empty: open what was
  # prepared before.
  config.data.source_dir = ''
  config.data.data_dir = ''  # where the prepared copy goes; empty: ~/tensorflow_datasets
  # Of a custom set; what is not given here may stand in dataset.json in its folder.
  config.data.num_classes = config_dict.placeholder(int)
  config.data.classes = ()  # names; empty: 'class 0', 'class 1', ...
  config.data.palette = ()  # (red, green, blue) of each class; empty: made up
  config.data.ignore_labels = ()  # label values that have no class, beside 255
  config.data.reduce_zero_label = config_dict.placeholder(bool)  # 0 has no class, k is class k - 1
  # Of any set: class k becomes label_map[k], 255 is none, and so are those beyond its end.
  config.data.label_map = ()
  config.data.workers = 0  # processes that prepare batches; 0: threads of the main process

  config.train = ConfigDict()
  config.train.steps = 20_000
  config.train.batch_size = 16  # over all devices
  config.train.scale = (2048, 512)
  config.train.ratio_range = (0.5, 2.0)  # random factor of the scale
  config.train.crop = (512, 512)
  config.train.cat_max_ratio = 0.75  # largest share of a crop that one class may have
  config.train.flip_probability = 0.5
  config.train.photometric_distortion = True
  config.train.auxiliary_weight = 0.4
  config.train.avg_non_ignore = False  # loss: mean over labelled pixels; False: over all
  config.train.class_weights = ()  # of each class in the loss; empty: 1
  config.train.ohem = False  # loss of hard pixels only: those that get their class below ...
  config.train.ohem_threshold = 0.7  # ... this probability,
  config.train.ohem_min_kept = 100_000  # and so many at least, times the images of a batch
  # Statistics of batch normalisation in training: those of the 'global' batch (SyncBN), of each
  # device's part ('per_device'), or 'frozen'.
  config.train.batch_norm = 'global'
  config.train.accumulate = 1  # parts of a device's share that are computed one after the other
  config.train.dtype = 'float32'  # of activations: float32 or bfloat16; weights are float32
  config.train.rematerialize = False  # computes blocks again in the backward pass: less memory
  config.train.ema_decay = 0.0  # of an average of the weights, which is then evaluated; 0: none
  config.train.precision = 'default'  # of matrix products (jax_default_matmul_precision)
  config.train.log_every = 50

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 0.01
  config.optimizer.min_learning_rate = 1e-4
  config.optimizer.power = 0.9
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 5e-4
  config.optimizer.schedule = 'v0'  # poly over t / steps; v1 (mmsegmentation 1.x): t / (steps - 1)
  config.optimizer.decay_norm_and_bias = True  # False: weight decay on kernels only
  config.optimizer.head_multiplier = 1.0  # of the learning rate of both heads

  config.eval = ConfigDict()
  config.eval.scale = (2048, 512)
  config.eval.window_crop = ()  # (height, width) of sliding windows; empty: the whole image at once
  config.eval.window_stride = ()
  config.eval.protocol = 'v0'  # the published numbers' own; v1: mmsegmentation 1.x
  config.eval.multi_scale_flip = False  # mean over six sizes, plain and mirrored
  # Small images in windows: True pads them to the window, False takes a smaller one; None: v0 pads.
  config.eval.pad_windows = config_dict.placeholder(bool)
  config.eval.batch_size = 1  # images at once on each device
  config.eval.shapes = 4  # padded shapes that images of all sizes share; each compiles once
  config.eval.more_scores = False  # Dice, F-score, precision and recall, too
  config.eval.precision = 'highest'
  config.eval.every = 2_000

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 2_000
  config.checkpoint.keep = 3
  return config


def demo_config() -> ConfigDict:
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


def custom_config() -> ConfigDict:
  """The recipe of Pascal VOC, 20k steps, for a dataset of your own."""
  config = base_config()
  config.name = 'custom'
  return config


def config_names() -> list[str]:
  """Names that `get_config` takes, without variants."""
  published = sorted({f'{model.dataset}_r{model.depth}' for model in RELEASED})
  return [*published, 'custom', 'demo']


def get_config(name: str) -> ConfigDict:
  """Returns the config of that name.

  Args:
    name: One of `config_names`, for a published model optionally with a variant after a colon, as
      in 'ade20k_r101:512x512_80k'.

  Raises:
    UserError: If there is no config or variant of that name.
  """
  base, _, variant = name.partition(':')
  names = config_names()
  if base not in names:
    raise UserError(
      f'there is no config {base!r}; the nearest is {nearest(base, names)}, of {", ".join(names)}; '
      'a file is given by its path.'
    )
  if base in ('custom', 'demo'):
    if variant:
      raise UserError(f'config {base} has no variants, but {variant!r} follows the colon.')
    return custom_config() if base == 'custom' else demo_config()
  dataset, _, depth = base.rpartition('_r')
  return published_config(dataset, int(depth), variant)


def published_config(dataset: str, depth: int, variant: str) -> ConfigDict:
  """The recipe of one published model.

  Args:
    dataset: 'cityscapes', 'ade20k' or 'voc12aug'.
    depth: 50 or 101.
    variant: Crop and schedule, e.g. '769x769_80k'; empty for the best published.

  Raises:
    UserError: If there is no such variant.
  """
  variants = {
    variant_name(model): model
    for model in RELEASED
    if (model.dataset, model.depth) == (dataset, depth) and not model.replaced
  }
  if variant and variant not in variants:
    raise UserError(
      f'no variant {variant!r} was published for {dataset} with R-{depth}; '
      f'give one of {", ".join(variants)} after the colon.'
    )
  best = max(variants.values(), key=lambda model: model.miou)
  model = variants.get(variant, best)

  config = base_config()
  config.name = model.name
  config.model.depth = depth
  config.model.zero_init = True  # the block starts as the identity
  config.model.align_corners = model.align_corners
  config.data.dataset = dataset
  config.data.num_classes = PUBLISHED[dataset].num_classes
  config.data.reduce_zero_label = PUBLISHED[dataset].reduce_zero_label
  config.train.steps = model.steps
  config.train.batch_size = BATCH_SIZES[dataset]
  config.train.scale = config.eval.scale = model.protocol.scale
  config.train.crop = model.crop
  config.eval.window_crop = model.protocol.window_crop or ()
  config.eval.window_stride = model.protocol.window_stride or ()
  config.eval.every = config.checkpoint.every = model.steps // 10

  config.published = ConfigDict()
  config.published.checkpoint = model.file
  config.published.miou = model.miou
  config.published.miou_ms_flip = model.miou_ms_flip  # None: not published
  return config


def variant_name(model: ReleasedModel) -> str:
  """E.g. '769x769_80k'."""
  height, width = model.crop
  return f'{height}x{width}_{model.steps // 1000}k'
