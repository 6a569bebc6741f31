"""A section of a recorded config, whose settings are taken one by one or refused by name."""

from typing import Any, Never

from nonlocal_jax.errors import UserError

_MISSING = object()


class Section:
  """A dict of a recorded config, from which each setting is taken once.

  Attributes:
    name: What to call it in errors, e.g. 'model.backbone'.
    source: What to call the file in errors.
    has_type: Whether it has a type. One without was written by this package, or by hand.
  """

  def __init__(self, settings: Any, name: str, source: str):
    """Copies `settings`, which must be a dict."""
    self.name, self.source = name, source
    if not isinstance(settings, dict):
      self._fail(name, settings, 'which is not a dict')
    self._left = dict(settings)
    self.has_type = 'type' in settings

  def has(self, key: str) -> bool:
    """Whether a setting is recorded and not taken yet."""
    return key in self._left

  def take(self, key: str, default: Any = None) -> Any:
    """Removes and returns a setting."""
    return self._left.pop(key, default)

  def refuse(self, key: str, value: Any, why: str) -> Never:
    """Raises the error about a setting."""
    self._fail(f'{self.name}.{key}', value, why)

  def _fail(self, name: str, value: Any, why: str) -> Never:
    shown = ascii(value) if not isinstance(value, str) else ascii(value[:100])
    raise UserError(
      f'{self.source} records a config with {ascii(name)[1:-1][:100]}={shown[:100]}, {why}; '
      'evaluate it with MMSegmentation, or load the weights from a file without a config.'
    )

  def expect(self, key: str, *allowed: Any, default: Any = _MISSING, needs: str) -> None:
    """Refuses a setting that is none of `allowed`; left out, it is the first unless `default`."""
    value = self.take(key, allowed[0] if default is _MISSING else default)
    if not any(type(value) is type(x) and value == x for x in allowed):
      self.refuse(key, value, f'which needs {needs}')

  def kind(self, default: str) -> str:
    """The type, without the name of its package."""
    value = self.take('type', default)
    return value.rpartition('.')[2] if isinstance(value, str) else repr(value)

  def is_on(self, key: str, *, default: bool) -> bool:
    """A setting that is True or False."""
    value = self.take(key, default)
    if not isinstance(value, bool):
      self.refuse(key, value, 'which is neither True nor False')
    return value

  def whole_numbers(self, key: str, count: int, default: tuple[int, ...] | None = ()) -> Any:
    """A setting of `count` positive integers, or None if that is the default."""
    value = self.take(key, default)
    if value is None and default is None:
      return None
    fits = isinstance(value, tuple) and len(value) == count
    if not fits or not all(type(x) is int and 0 < x < 100_000 for x in value):
      self.refuse(key, value, f'which is not {count} positive integers')
    return value

  def number(self, key: str, default: int) -> int:
    """A setting that is a positive integer, or None for the default."""
    value = self.take(key, default)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 100_000:
      self.refuse(key, value, 'which is no positive integer')
    return value

  def ignore(self, *keys: str) -> None:
    """Drops settings without influence on predictions."""
    for key in keys:
      self._left.pop(key, None)

  def close(self) -> None:
    """Refuses what is left."""
    for key, value in self._left.items():
      self.refuse(str(key), value, 'a setting that is not known here')

  def part(self, key: str, default: Any = None) -> 'Section':
    """A dict within this one."""
    return Section(self.take(key, default), f'{self.name}.{key}', self.source)
