"""NonLocalNet: backbone and heads in one module (mmseg `EncoderDecoder` with `NLHead`)."""

import jax
from flax import nnx

from nonlocal_jax.models.heads import AuxiliaryHead, NonLocalHead
from nonlocal_jax.models.resnet import STAGE_BLOCKS, ResNet
from nonlocal_jax.ops.masking import strided_sizes
from nonlocal_jax.ops.resize import resize_bilinear

OUTPUT_STRIDE = 8  # of the backbone


class NonLocalNet(nnx.Module):
  """Dilated ResNet with a non-local decode head and an auxiliary FCN head.

  The paths of its arrays are those of the released checkpoints (`backbone.layer3.5.conv2`),
  but for the stem and the shortcuts; `nonlocal_jax.weights.state_dict` holds the map.

  Attributes:
    align_corners: Whether logits are upsampled corner on corner (the 769x769 models) or with
      half-pixel centres.
  """

  def __init__(
    self,
    num_classes: int,
    *,
    depth: int = 50,
    stage_blocks: tuple[int, ...] | None = None,
    width: int = 64,
    non_local: bool = True,
    zero_init: bool = True,
    align_corners: bool = False,
    dropout: float = 0.1,
    rngs: nnx.Rngs,
  ):
    """Makes the network with the initial values of the original.

    Args:
      num_classes: Classes of both heads.
      depth: Layers of the backbone: 14, 26, 50 or 101.
      stage_blocks: Bottlenecks per stage, in place of those of `depth`.
      width: Base channels; 64 in the released models.
      non_local: Whether the decode head has the non-local block.
      zero_init: Whether that block starts as the identity, as in the original.
      align_corners: See the class.
      dropout: Share of channels dropped before the classifiers, in [0, 1).
      rngs: Source of the initial values.

    Raises:
      ValueError: If `depth` is unknown and `stage_blocks` not given.
    """
    if stage_blocks is None:
      if depth not in STAGE_BLOCKS:
        raise ValueError(f'depth is {depth}, expected one of {", ".join(map(str, STAGE_BLOCKS))}')
      stage_blocks = STAGE_BLOCKS[depth]
    self.align_corners = align_corners
    self.backbone = ResNet(stage_blocks=stage_blocks, width=width, rngs=rngs)
    self.decode_head = NonLocalHead(
      32 * width,
      8 * width,
      num_classes,
      non_local=non_local,
      zero_init=zero_init,
      dropout=dropout,
      rngs=rngs,
    )
    self.auxiliary_head = AuxiliaryHead(
      16 * width, 4 * width, num_classes, dropout=dropout, rngs=rngs
    )

  def __call__(self, images: jax.Array) -> jax.Array:
    """Logits at the size of the input.

    Args:
      images: (n, h, w, 3) float32, normalised RGB (see `normalize`).

    Returns:
      (n, h, w, num_classes) float32.
    """
    return self.upsample(self.encode_decode(images), images.shape[1:3])

  def encode_decode(self, images: jax.Array, *, sizes: jax.Array | None = None) -> jax.Array:
    """Logits at stride 8.

    Args:
      images: (n, h, w, 3) float32, normalised RGB.
      sizes: (n, 2) integers, height and width of each image without the padding at its bottom and
        right, which has then no influence; None for no padding.

    Returns:
      (n, ceil(h / 8), ceil(w / 8), num_classes) float32; without meaning in the padding.
    """
    _, features = self.backbone(images, sizes=sizes)
    return self.decode_head(features, sizes=strided_sizes(sizes, OUTPUT_STRIDE))

  def training_logits(self, images: jax.Array, *, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Logits of both heads at stride 8 in training mode; updates the running statistics.

    Args:
      images: (n, h, w, 3) float32, normalised RGB.
      rngs: Source of the dropped channels, stream 'dropout'.

    Returns:
      Logits of the decode head and of the auxiliary head, each (n, ceil(h / 8), ceil(w / 8),
      num_classes) float32.
    """
    auxiliary_features, features = self.backbone(images, train=True)
    logits = self.decode_head(features, train=True, rngs=rngs)
    return logits, self.auxiliary_head(auxiliary_features, train=True, rngs=rngs)

  def upsample(self, logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes logits (n, h, w, c) to `size` (height, width) by the network's corner convention."""
    return resize_bilinear(logits, size, align_corners=self.align_corners)
