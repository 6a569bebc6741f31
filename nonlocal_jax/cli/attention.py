"""Draws where pixels look: the weights of the non-local block over an image.

    nonlocal-jax attention --checkpoint=WEIGHTS photo.jpg --point=320,240 --out=DIR

For each --point=X,Y, in pixels from the upper left corner, writes DIR/photo_attention_X_Y.png: the
weights over the image, lines to the 20 largest ones and a ring around the pixel. With sliding
windows, a pixel sees the window whose center is nearest to it.
"""

import re
from collections.abc import Sequence
from typing import get_args

from PIL import Image

import nonlocal_jax
from nonlocal_jax.cli.prediction_files import check_not_replaced, save
from nonlocal_jax.cli.program import Parser, add_ema, path_option, say_weights
from nonlocal_jax.data.pixel_formats import PixelFormat, displayable
from nonlocal_jax.errors import UsageError, UserError
from nonlocal_jax.evaluation.attention_picture import attention_picture
from nonlocal_jax.inference.images import read_image
from nonlocal_jax.inference.pretrained import Precision
from nonlocal_jax.runtime.files import make_folder


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax attention`."""
  parser = Parser('nonlocal-jax attention', __doc__)
  parser.add_argument('image', metavar='IMAGE', type=path_option, help='an image file')
  parser.add_argument(
    '--checkpoint',
    required=True,
    type=path_option,
    help='a .pth file, a converted directory, the workdir of a training run, or the name of a '
    'released model, which is downloaded: see nonlocal-jax models',
  )
  parser.add_argument(
    '--point',
    required=True,
    action='append',
    type=_point,
    metavar='X,Y',
    help='a pixel; may be given several times',
  )
  parser.add_argument('--out', required=True, type=path_option, help='folder of the pictures')
  parser.add_argument(
    '--precision',
    choices=get_args(Precision),
    default='highest',
    help='precision of matrix products, see nonlocal-jax predict --help (default: highest)',
  )
  add_ema(parser)
  options = parser.parse(arguments)
  points = list(dict.fromkeys(options.point))
  targets = [options.out / f'{options.image.stem}_attention_{x}_{y}.png' for x, y in points]
  check_not_replaced(targets)
  say_weights(options.checkpoint)
  model = nonlocal_jax.load(options.checkpoint, ema=options.ema, precision=options.precision)
  if not model.description.config.non_local:
    raise UserError(f'{options.checkpoint} has no non-local block: give weights that have one.')
  image = read_image(options.image, pixels=PixelFormat.of_protocol(model.protocol))
  height, width = image.shape[:2]
  for x, y in points:
    if not (0 <= x < width and 0 <= y < height):
      raise UserError(
        f'--point={x},{y} lies outside {options.image}, which has {width}x{height} pixels.'
      )
  labels = model.predict(image)
  look = model.image_attention(image)
  make_folder(options.out)
  for point, target in zip(points, targets, strict=True):
    x, y = point
    caption = f'({x}, {y}), predicted as {model.classes[labels[y, x]]}'
    picture = attention_picture(displayable(image), look(point), caption=caption)
    save(Image.fromarray(picture), target)
    print(target)


def _point(text: str) -> tuple[int, int]:
  match = re.fullmatch(r'\(?\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)?', text)
  if match is None:
    raise UsageError(f'--point is {text!r}; give a pixel as X,Y, e.g. --point=320,240.')
  return int(match[1]), int(match[2])
