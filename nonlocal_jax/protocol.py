"""How an image is tested: at what sizes, whole or in windows, plain or mirrored."""

import dataclasses
from typing import Literal, Self

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale testing

Version = Literal['v0', 'v1']
Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Sliding windows.

  Attributes:
    crop: (height, width) of a window, in pixels.
    stride: (vertical, horizontal) step between windows, in pixels.
  """

  crop: Size
  stride: Size


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A way of testing.

  Attributes:
    scale: (width, height) of the box that images are resized into, see `transforms.rescaled_size`;
      None for their own size.
    windows: How to slide; None for the whole image at once.
    ratios: Of the sizes at which an image is tested; over more than one, and over flips, the mean
      of the probabilities decides.
    flip: Whether each size is tested mirrored, too.
    ratios_of_image: Whether ratios multiply the image's own size and not `scale`.
    pad_windows: Whether the network sees a window on an image smaller than it padded with zeros
      instead of a smaller window.
  """

  scale: tuple[int, int] | None = None
  windows: Windows | None = None
  ratios: tuple[float, ...] = (1.0,)
  flip: bool = False
  ratios_of_image: bool = False
  pad_windows: bool = False

  @classmethod
  def of_version(
    cls,
    version: Version,
    *,
    scale: tuple[int, int] | None,
    windows: Windows | None = None,
    multi_scale_flip: bool = False,
    pad_windows: bool | None = None,
  ) -> Self:
    """The protocol of a version of mmsegmentation.

    Args:
      version: 'v0', by which the published numbers were made, multiplies the test scale and pads
        small windows; 'v1' multiplies each image's own size and does not pad.
      scale: See the class.
      windows: See the class.
      multi_scale_flip: Whether to test at the six `RATIOS`, plain and mirrored.
      pad_windows: See the class; None for what the version does.
    """
    return cls(
      scale=scale,
      windows=windows,
      ratios=RATIOS if multi_scale_flip else (1.0,),
      flip=multi_scale_flip,
      ratios_of_image=multi_scale_flip and version == 'v1',
      pad_windows=version == 'v0' if pad_windows is None else pad_windows,
    )

  @property
  def flips(self) -> int:
    """How often each size is tested: 2 with flips, else 1."""
    return 2 if self.flip else 1
