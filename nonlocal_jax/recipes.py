"""Training recipes: the base config, the published models, `custom` and `demo`.

A scale is a (width, height) box: images are resized to fit into it, long edge along long edge, with
their aspect ratio kept. Crops are (height, width). All values are those of MMSegmentation's
`configs/nonlocal_net` and `configs/_base_`.
"""

from ml_collections import ConfigDict, config_dict

from nonlocal_jax.data.datasets import PUBLISHED
from nonlocal_jax.errors import UserError, nearest
from nonlocal_jax.weights.released import (
  RELEASED,
  best_release,
  released_backbone,
  released_variants,
)

BALANCED = ('balanced',)  # class weights, which are then computed from the labels
BATCH_SIZES = {'cityscapes': 8, 'ade20k': 16, 'voc12aug': 16}


def base_config() -> ConfigDict:
  """Returns the base recipe with the sizes of Pascal VOC; dataset and classes must be set."""
  config = ConfigDict()
  config.name = ''  # printed, and the name of the default workdir
  config.seed = 0
  # Initial weights of the backbone: a .pth file, or resnet50_v1c or resnet101_v1c, which training
  # downloads; empty or none: random.
  config.init_backbone = ''

  config.model = ConfigDict()
  config.model.depth = 50  # layers of the backbone: 14, 26, 50 or 101
  config.model.width = 64  # base channels
  config.model.non_local = True  # False leaves out the non-local block
  config.model.zero_init = True  # the block starts as the identity
  config.model.align_corners = False  # corner convention of every resize of logits
  config.model.dropout = 0.1
  # How convolutions are computed on CPUs: 'fast', or 'direct' as elsewhere (for comparisons).
  config.model.convolution = 'fast'
  # Attention of the non-local block: 'blocks' of queries; on NVIDIA GPUs also 'cudnn' (inputs are
  # rounded to 11 bits, as in TF32) and 'flash' (float32 accuracy); 'auto': the fastest of those
  # that are as accurate as the precision asks for.
  config.model.attention = 'blocks'

  config.data = ConfigDict()
  config.data.dataset = 'custom'  # cityscapes, ade20k, voc12aug, custom or demo
  # Folder or bucket of images and labels in the layout of the dataset's authors; empty: open data
  # that was prepared before.
  config.data.source_dir = ''
  config.data.data_dir = ''  # where the prepared copy goes; empty: ~/tensorflow_datasets
  # For a custom dataset; fields not set here are what its folder is found to hold, and what
  # dataset.json in it says.
  config.data.num_classes = config_dict.placeholder(int)
  config.data.classes = ()  # names; empty: 'class 0', 'class 1', ...
  config.data.palette = ()  # (red, green, blue) of each class; empty: generated
  config.data.ignore_labels = ()  # label values without a class, in addition to 255
  # Whether label 0 has no class and label k is class k - 1.
  config.data.reduce_zero_label = config_dict.placeholder(bool)
  # For any dataset: class k becomes label_map[k]; 255 and classes beyond its end are ignored.
  config.data.label_map = ()
  # Of the images; None: RGB of 8 bits, which any file is converted to. Other images are read as
  # they are, and mean and std are needed, which `nonlocal-jax prepare` measures.
  config.data.channels = config_dict.placeholder(int)
  config.data.bits = config_dict.placeholder(int)  # of a sample, 8 or 16
  config.data.mean = ()  # of each channel; empty: ImageNet's, for RGB
  config.data.std = ()
  config.data.skip_bad = False  # leaves out samples with a missing or broken file
  config.data.workers = 0  # processes that load batches; 0: threads of the main process

  config.train = ConfigDict()
  config.train.steps = 20_000
  config.train.batch_size = 16  # over all devices
  config.train.scale = (2048, 512)
  config.train.ratio_range = (0.5, 2.0)  # random factor of the scale
  config.train.crop = (512, 512)
  config.train.cat_max_ratio = 0.75  # maximum share of a crop that one class may cover
  config.train.flip_probability = 0.5
  config.train.photometric_distortion = True
  config.train.auxiliary_weight = 0.4
  config.train.avg_non_ignore = False  # averages the loss over labeled pixels; False: over all
  # Loss weight of each class; empty: 1. ('balanced',): inverse to its share of the labeled pixels.
  config.train.class_weights = ()
  config.train.ohem = False  # online hard example mining: loss of hard pixels only
  config.train.ohem_threshold = 0.7  # hard: the probability of the pixel's class is below this
  config.train.ohem_min_kept = 100_000  # minimum number of pixels kept, per image of the batch
  config.train.focal_gamma = 0.0  # focal loss: pixels weighted by (1 - probability)^gamma; 0: off
  config.train.dice_weight = 0.0  # factor of a Dice loss that is added; 0: none
  # Statistics of batch normalization in training: of the 'global' batch (SyncBN), of each device's
  # share ('per_device'), or the running ones ('frozen').
  config.train.batch_norm = 'global'
  config.train.accumulate = 1  # gradient accumulation steps
  config.train.dtype = 'float32'  # of activations: float32 or bfloat16; weights are float32
  config.train.rematerialize = False  # recomputes blocks in the backward pass to save memory
  # On GPUs: the same bits in every run, also in a resumed one, but slower; on CPUs they always are.
  config.train.deterministic = False
  config.train.ema_decay = 0.0  # decay of averaged weights, which are then evaluated; 0: off
  config.train.precision = 'default'  # matmul precision (jax_default_matmul_precision)
  config.train.log_every = 50

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 0.01
  config.optimizer.min_learning_rate = 1e-4
  config.optimizer.power = 0.9
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 5e-4
  config.optimizer.schedule = 'v0'  # poly over t / steps; v1 (MMSegmentation 1.x): t / (steps - 1)
  config.optimizer.decay_norm_and_bias = True  # False: weight decay on kernels only
  config.optimizer.head_multiplier = 1.0  # factor of the learning rate of both heads

  config.eval = ConfigDict()
  config.eval.scale = (2048, 512)  # box that images are resized into; empty: their own size
  config.eval.scale_factor = ()  # (width, height) factors of the image's own size instead
  config.eval.keep_ratio = True  # False: images are resized to the scale itself
  config.eval.window_crop = ()  # (height, width) of sliding windows; empty: the whole image at once
  config.eval.window_stride = ()
  config.eval.protocol = 'v0'  # v0: as the published numbers; v1: MMSegmentation 1.x
  config.eval.multi_scale_flip = False  # averages six scales, each plain and flipped
  # Images smaller than a window: True pads them, False shrinks the window; None: v0 pads.
  config.eval.pad_windows = config_dict.placeholder(bool)
  # Maximum number of images per device; None: what is fast on GPUs and TPUs of one process, else 1.
  config.eval.batch_size = config_dict.placeholder(int)
  config.eval.shapes = 4  # maximum number of padded shapes; each is compiled once
  config.eval.more_scores = False  # also reports Dice, F-score, precision and recall
  config.eval.report = True  # also writes report.html and the results of each image
  config.eval.precision = 'highest'
  config.eval.every = 2_000
  # Evaluations in a row without a better mIoU after which training stops; 0: it never does.
  config.eval.patience = 0

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 2_000
  config.checkpoint.keep = 3

  config.log = ConfigDict()
  config.log.wandb = ''  # project of Weights & Biases that gets the log; empty: none
  config.log.mlflow = ''  # experiment of MLflow at MLFLOW_TRACKING_URI; empty: none
  return config


def fields_of(config: ConfigDict, prefix: str = '') -> list[str]:
  """Returns the names of all fields of a config, such as 'train.steps'."""
  found = []
  for name, value in config.items():
    is_section = isinstance(value, ConfigDict)
    found += fields_of(value, f'{prefix}{name}.') if is_section else [f'{prefix}{name}']
  return found


def no_such_field(name: str) -> UserError:
  """Returns the error on a name that no field of a config has."""
  known = fields_of(base_config())
  same_end = [field for field in known if field.rpartition('.')[2] == name.rpartition('.')[2]]
  likely = nearest(name, same_end) or nearest(name, known) or next(iter(same_end), None)
  hint = f'; the nearest is config.{likely}.' if likely else ', see --print-config.'
  return UserError(f'there is no field config.{name}{hint}')


def demo_config() -> ConfigDict:
  """Returns the demo: one block per stage, width 8, no augmentation that could crop the disc."""
  config = base_config()
  config.name = 'demo'
  config.model.depth = 14
  config.model.width = 8
  config.model.zero_init = False  # learns faster from scratch
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
  """Returns the recipe of Pascal VOC, 20k steps, for your own dataset."""
  config = base_config()
  config.name = 'custom'
  return config


def config_names() -> list[str]:
  """Returns the names that `get_config` accepts, without variants."""
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
    model = next((m for m in RELEASED if base in (m.name, m.config_name)), None)
    if model is not None:
      raise UserError(f'{base} is a released model; the name of its config is {model.recipe}.')
    likely = nearest(base, names)
    raise UserError(
      f'there is no config {base!r}; {f"the nearest is {likely}, of " if likely else "there are "}'
      f'{", ".join(names)}; a file is given by its path.'
    )
  if base in ('custom', 'demo'):
    if variant:
      raise UserError(f'config {base} has no variants, but {variant!r} follows the colon.')
    return custom_config() if base == 'custom' else demo_config()
  dataset, _, depth = base.rpartition('_r')
  return published_config(dataset, int(depth), variant)


def published_config(dataset: str, depth: int, variant: str) -> ConfigDict:
  """Returns the recipe of a published model.

  Args:
    dataset: 'cityscapes', 'ade20k' or 'voc12aug'.
    depth: 50 or 101.
    variant: Crop and schedule, e.g. '769x769_80k'; empty for the model with the best mIoU.

  Raises:
    UserError: If there is no such variant.
  """
  variants = released_variants(dataset, depth)
  if variant and variant not in variants:
    raise UserError(
      f'no variant {variant!r} was published for {dataset} with R-{depth}; '
      f'give one of {", ".join(variants)} after the colon.'
    )
  model = variants[variant] if variant else best_release(dataset, depth)

  config = base_config()
  config.name = model.name
  config.init_backbone = released_backbone(depth).name
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
