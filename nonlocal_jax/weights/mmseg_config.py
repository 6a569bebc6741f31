"""The config text that mmsegmentation saves with its weights: how the network is to be tested."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_PAIR = r'[(\[]\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,?\s*[)\]]'
_SLIDES = re.compile(r'\bmode\s*=\s*[\'"]slide')
_TEST_CFG = re.compile(r'\btest_cfg\s*=\s*dict\(((?:[^()]|\([^()]*\))*)\)')


@dataclasses.dataclass(frozen=True)
class RecordedConfig:
  """What a config says of testing. None stands for what it does not say.

  Attributes:
    align_corners: Whether logits are resized corner on corner.
    test_scale: (width, height) of the box that test images are resized into.
    window_crop: (height, width) of the sliding windows; None, too, for whole images.
    window_stride: (vertical, horizontal) step of the windows; None, too, for whole images.
  """

  align_corners: bool | None = None
  test_scale: tuple[int, int] | None = None
  window_crop: tuple[int, int] | None = None
  window_stride: tuple[int, int] | None = None

  @classmethod
  def of_meta(cls, meta: Mapping[str, Any]) -> 'RecordedConfig':
    """Reads the `meta` of a checkpoint.

    Args:
      meta: Of any origin. mmsegmentation 0.x has the text as 'config', 1.x as 'cfg'.
    """
    texts = [text for text in (meta.get('cfg'), meta.get('config')) if type(text) is str]
    text = texts[0][:1_000_000] if texts else ''
    corners = set(re.findall(r'\balign_corners\s*=\s*(True|False)\b', text))
    slides = next((cfg[1] for cfg in _TEST_CFG.finditer(text) if _SLIDES.search(cfg[1])), '')
    crop, stride = _pair('crop_size', slides), _pair('stride', slides)
    _, _, test_pipeline = text.partition('test_pipeline = ')
    return cls(
      align_corners=corners == {'True'} if len(corners) == 1 else None,
      test_scale=_pair('(?:img_)?scale', test_pipeline),
      window_crop=crop if stride else None,
      window_stride=stride if crop else None,
    )

  def to_text(self) -> str:
    """The config's lines about testing, as `of_meta` and people read them."""
    mode = "mode='whole'"
    if self.window_crop:
      mode = f"mode='slide', crop_size={self.window_crop}, stride={self.window_stride}"
    head = f'dict(align_corners={bool(self.align_corners)})'
    lines = [f'model = dict(decode_head={head}, auxiliary_head={head}, test_cfg=dict({mode}))']
    if self.test_scale:
      lines.append(f"test_pipeline = [dict(type='Resize', scale={self.test_scale})]")
    return '\n'.join(lines) + '\n'


def _pair(key: str, text: str) -> tuple[int, int] | None:
  match = re.search(rf'\b{key}\s*=\s*{_PAIR}', text)
  return (int(match[1]), int(match[2])) if match else None
