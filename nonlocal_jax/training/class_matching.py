"""Finds the classes of a checkpoint among those of a dataset, by their names."""

import re
from collections.abc import Mapping, Sequence

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.wording import counted

_MOST_NAMED = 30  # classes in a message


def matched_classes(
  ours: Sequence[str], theirs: Sequence[str], *, source: str
) -> Mapping[int, int]:
  """Finds the classes that have the same name in a checkpoint.

  Names are the same if they differ only in case and in what separates their words: spaces, hyphens
  and underscores, of which those around a name do not count. Synonyms and plurals are others.

  >>> matched_classes(['Traffic_light', 'crack'], ['road', 'traffic light'], source='a.pth')
  {0: 1}

  Args:
    ours: Name of each class of the dataset.
    theirs: Name of each class of the checkpoint.
    source: What to call the checkpoint in errors.

  Returns:
    The index of each such class in `ours`, in their order, and its index in `theirs`.

  Raises:
    UserError: If either has no names, none is the same, or one is found twice.
  """
  if _are_numbered(theirs):
    raise UserError(
      f'{source} records no names of its classes, which match_classes needs; set new_classifier '
      'in place of it.'
    )
  if _are_numbered(ours):
    raise UserError(
      'match_classes needs the names of the classes, and the dataset has none: set '
      'config.data.classes, or "classes" in the dataset.json beside its images.'
    )
  here, there = (_by_name(names) for names in (ours, theirs))
  found = {}
  for name, indices in here.items():
    others = there.get(name, [])
    for names, places, where in ((ours, indices, 'the dataset'), (theirs, others, source)):
      if others and len(places) > 1:
        listed = ' and '.join(repr(names[index]) for index in places)
        raise UserError(
          f'match_classes finds no single class {name!r}, as {where} has {listed}: rename one, or '
          'set new_classifier in place of it.'
        )
    if others:
      found[indices[0]] = others[0]
  if not found:
    raise UserError(
      f'No class has the name of one in {source} ({_listed(ours)}; there {_listed(theirs)}), which '
      'match_classes needs; set new_classifier in place of it.'
    )
  return found


def check_order(ours: Sequence[str], theirs: Sequence[str], *, source: str) -> None:
  """Checks that classes of the same names are in the same order, as weights of them assume.

  Args:
    ours: Names of the dataset's classes.
    theirs: Names of those of the weights.
    source: The weights, for the message.

  Raises:
    UserError: If all names are the same, but not their order.
  """
  if list(ours) != list(theirs) and sorted(ours) == sorted(theirs):
    index = next(i for i, names in enumerate(zip(ours, theirs, strict=True)) if len({*names}) > 1)
    raise UserError(
      f'{source} has the classes of the dataset in another order: class {index} is '
      f'{theirs[index]!r} there and {ours[index]!r} here; order them as in the weights, or train '
      'with match_classes (--match_classes).'
    )


def describe_matches(matched: Mapping[int, int], ours: Sequence[str], theirs: Sequence[str]) -> str:
  """Says which classes keep their part of the classifiers, and which have a new one."""
  kept = [
    ours[here] if ours[here] == theirs[there] else f'{ours[here]} = {theirs[there]}'
    for here, there in matched.items()
  ]
  new = [name for index, name in enumerate(ours) if index not in matched]
  text = f'in both heads, the classifiers of {len(kept)} of {counted(len(ours), "class")} are kept'
  text += f' by name ({_listed(kept)})'
  return f'{text}, and those of {len(new)} are new ({_listed(new)})' if new else text


def _are_numbered(names: Sequence[str]) -> bool:
  return list(names) == [f'class {index}' for index in range(len(names))]


def _by_name(names: Sequence[str]) -> dict[str, list[int]]:
  found: dict[str, list[int]] = {}
  for index, name in enumerate(names):
    found.setdefault(re.sub(r'[\s_-]+', ' ', name).strip().casefold(), []).append(index)
  return found


def _listed(names: Sequence[str]) -> str:
  others = len(names) - _MOST_NAMED
  return ', '.join(names[:_MOST_NAMED]) + (f' and {others} others' if others > 0 else '')
