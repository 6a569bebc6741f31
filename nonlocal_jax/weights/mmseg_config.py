"""Reads the test protocol from the config text that mmsegmentation saves with its weights."""

import re
from collections.abc import Mapping
from typing import Any

from nonlocal_jax.protocol import EvalProtocol

_PAIR = r'[(\[]\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,?\s*[)\]]'
_SLIDES = re.compile(r'\bmode\s*=\s*[\'"]slide')
_TEST_CFG = re.compile(r'\btest_cfg\s*=\s*dict\(((?:[^()]|\([^()]*\))*)\)')


def recorded_protocol(meta: Mapping[str, Any]) -> tuple[EvalProtocol, tuple[str, ...]]:
  """Reads the test protocol from the `meta` of a checkpoint.

  What the config does not say takes mmsegmentation's default: half-pixel corners, whole images at
  their own size.

  Args:
    meta: Not trusted. mmsegmentation 0.x stores the config's text as 'config', 1.x as 'cfg'.

  Returns:
    The protocol, and the names of fields that the config leaves open and that matter.
  """
  texts = [text for text in (meta.get('cfg'), meta.get('config')) if type(text) is str]
  text = texts[0][:1_000_000] if texts else ''
  corners = set(re.findall(r'\balign_corners\s*=\s*(True|False)\b', text))
  slides = next((cfg[1] for cfg in _TEST_CFG.finditer(text) if _SLIDES.search(cfg[1])), '')
  crop, stride = _pair('crop_size', slides), _pair('stride', slides)
  _, _, test_pipeline = text.partition('test_pipeline = ')
  protocol = EvalProtocol.from_version(
    'v0',
    scale=_pair('(?:img_)?scale', test_pipeline),
    window_crop=crop if stride else None,
    window_stride=stride if crop else None,
    align_corners=corners == {'True'},
  )
  return protocol, () if len(corners) == 1 else ('align_corners',)


def config_text(protocol: EvalProtocol) -> str:
  """The lines of a config about testing, as `recorded_protocol` and people read them."""
  mode = "mode='whole'"
  if protocol.window_crop:
    mode = f"mode='slide', crop_size={protocol.window_crop}, stride={protocol.window_stride}"
  head = f'dict(align_corners={protocol.align_corners})'
  lines = [f'model = dict(decode_head={head}, auxiliary_head={head}, test_cfg=dict({mode}))']
  if protocol.scale:
    lines.append(f"test_pipeline = [dict(type='Resize', scale={protocol.scale})]")
  return '\n'.join(lines) + '\n'


def _pair(key: str, text: str) -> tuple[int, int] | None:
  """Two numbers that a config assigns to a key; None if it does not, or one of them is zero."""
  match = re.search(rf'\b{key}\s*=\s*{_PAIR}', text)
  pair = (int(match[1]), int(match[2])) if match else (0, 0)
  return pair if min(pair) > 0 else None
