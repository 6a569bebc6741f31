"""What a network is made of: blocks, width, classes."""

import dataclasses
import functools

from flax import nnx

from nonlocal_jax.errors import UserError
from nonlocal_jax.models.non_local import NonLocalBlock
from nonlocal_jax.models.nonlocal_net import NonLocalNet
from nonlocal_jax.models.resnet import STAGE_BLOCKS
from nonlocal_jax.ops.attention import Attention
from nonlocal_jax.ops.convolution import Method, convolution_function


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the shapes of a network's weights tell about it.

  Attributes:
    stage_blocks: Bottlenecks in each stage of the backbone.
    width: Base channels.
    num_classes: Classes of the heads.
    non_local: Whether the decode head has the non-local block.
  """

  stage_blocks: tuple[int, ...]
  width: int
  num_classes: int
  non_local: bool = True

  @classmethod
  def of_depth(
    cls, depth: int, *, width: int, num_classes: int, non_local: bool = True
  ) -> 'Architecture':
    """The architecture with the blocks per stage of a backbone of `depth` layers.

    Raises:
      UserError: If `depth` is unknown.
    """
    if depth not in STAGE_BLOCKS:
      raise UserError(
        f'config.model.depth is {depth}; it must be one of {", ".join(map(str, STAGE_BLOCKS))}.'
      )
    return cls(STAGE_BLOCKS[depth], width, num_classes, non_local)

  @property
  def depth(self) -> int:
    """Layers of the backbone, as in its name: three a bottleneck, stem and classifier."""
    return 3 * sum(self.stage_blocks) + 2

  @property
  def inner_channels(self) -> int:
    """Channels in which the non-local block, if there is one, compares positions."""
    block = self.abstract().decode_head.nl_block
    return 0 if block is None else block.g.out_features

  def __str__(self) -> str:
    """E.g. 'R-50, width 64, 19 classes'."""
    without = '' if self.non_local else ', without the non-local block'
    return f'R-{self.depth}, width {self.width}, {self.num_classes} classes{without}'

  def build(
    self,
    *,
    align_corners: bool = False,
    dropout: float = 0.1,
    zero_init: bool = True,
    rngs: nnx.Rngs,
  ) -> NonLocalNet:
    """Makes the network with initial weights; see `NonLocalNet` for the arguments."""
    return NonLocalNet(
      self.num_classes,
      stage_blocks=self.stage_blocks,
      width=self.width,
      non_local=self.non_local,
      align_corners=align_corners,
      dropout=dropout,
      zero_init=zero_init,
      rngs=rngs,
    )

  @functools.cache  # noqa: B019 architectures are small, and few
  def state_shapes(self) -> nnx.State:
    """Parameters and running statistics with shapes in place of arrays; not to be changed."""
    return nnx.state(self.abstract())

  def abstract(
    self,
    *,
    align_corners: bool = False,
    dropout: float = 0.1,
    convolution: Method = 'fast',
    attention: Attention = 'blocks',
    loops: bool = True,
  ) -> NonLocalNet:
    """The network with shapes in place of arrays; costs no memory.

    Args:
      align_corners: See `NonLocalNet`, as for `dropout`.
      dropout: Share of channels dropped.
      convolution: How convolutions are computed, see `ops.convolution`.
      attention: How the non-local block computes its softmax, see `NonLocalBlock`.
      loops: Whether equal residual blocks are one loop, see `ResNet`.
    """
    parts = self._abstract_parts(align_corners=align_corners, dropout=dropout)
    model = nnx.merge(*parts, copy=True)
    model.set_attributes(nnx.Conv, conv_general_dilated=convolution_function(convolution))
    if self.non_local:
      model.set_attributes(NonLocalBlock, attention=attention)
    model.backbone.loops = loops
    return model

  @functools.cache  # noqa: B019 see `state_shapes`
  def _abstract_parts(
    self, *, align_corners: bool, dropout: float
  ) -> tuple[nnx.GraphDef[NonLocalNet], nnx.State]:
    return nnx.split(
      nnx.eval_shape(
        lambda: self.build(align_corners=align_corners, dropout=dropout, rngs=nnx.Rngs(0))
      )
    )
