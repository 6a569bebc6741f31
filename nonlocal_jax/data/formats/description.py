"""Joins what a folder was found to hold with what its `dataset.json` says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nonlocal_jax.data.datasets import custom_dataset, merge_classes
from nonlocal_jax.data.formats.found import Found
from nonlocal_jax.errors import UserError


def merged(found: Found, own: Mapping[str, Any], path: Path) -> dict[str, Any]:
  """Completes a description; where both say something, `dataset.json` wins.

  Label maps that are drawn or converted (`Found.reading`) have the found classes in their order. If
  `dataset.json` names the same classes in another order, a label map leads to it. Its own label map
  starts from the found classes, as that of a published dataset does.

  Args:
    found: What was found.
    own: The contents of `dataset.json`.
    path: That file, for the message.

  Returns:
    The arguments of `custom_dataset`.

  Raises:
    UserError: If the names are of other classes than those found.
  """
  description = {**found.description, **own}
  names: list[str] = list(found.description.get('classes', ()))
  if not found.reading or not names:
    return description
  wanted: list[str] = own.get('classes', [])
  label_map = own.get('label_map', [])
  if own.get('reduce_zero_label') and not wanted:
    raise UserError(
      f'In {path}, "reduce_zero_label" is true, but value 0 of the labels is {names[0]!r}: take it '
      'out, or write "label_map" with 255 for what has no class.'
    )
  if label_map:
    palette = found.description.get('palette', ())
    joined = merge_classes(custom_dataset(classes=names, palette=palette), label_map)
    for key, values in (('classes', joined.classes), ('palette', joined.palette)):
      if len(own.get(key, ())) != joined.num_classes:  # else they are those of the joined ones
        description[key] = [list(v) if isinstance(v, tuple) else v for v in values]
    return description
  if not wanted or wanted == names:
    return description
  if sorted(wanted) == sorted(names):
    description['label_map'] = [wanted.index(name) for name in names]
    if 'palette' in found.description and 'palette' not in own:
      colors = dict(zip(names, found.description['palette'], strict=True))
      description['palette'] = [colors[name] for name in wanted]
    return description
  kept = [old == new for old, new in zip(names, wanted, strict=False) if old in wanted]
  if len(wanted) != len(names) or not all(kept):
    raise UserError(
      f'{path} names the classes {", ".join(wanted)}, but the labels have {", ".join(names)}: name '
      'these in the order that you want, or lead them to yours by "label_map".'
    )
  return description  # other names for the same classes
