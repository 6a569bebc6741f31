"""Reads the literals in the text of a config, without executing anything in it."""

import ast
from typing import Any

MAX_CHARACTERS = 100_000  # of a text; those that MMSegmentation saves have some 10,000
_MAX_INTEGER = 2**63


class Unread:
  """Stands for an expression that is no literal."""

  def __repr__(self) -> str:
    """As it is shown in errors."""
    return 'an expression'


def read_assignments(text: str) -> dict[str, Any]:
  """Reads the values that a Python text assigns to names at its top level.

  >>> read_assignments("model = dict(norm_cfg=dict(type='BN'), strides=[1, 2])")
  {'model': {'norm_cfg': {'type': 'BN'}, 'strides': (1, 2)}}

  Args:
    text: Assignments of literals and `dict(...)` calls, as MMSegmentation saves them; not trusted.

  Returns:
    The values by name, lists as tuples; `Unread` for what is none of these.

  Raises:
    ValueError: If the text is too long, is no Python, or has a huge integer.
  """
  if len(text) > MAX_CHARACTERS:
    raise ValueError(f'it has {len(text)} characters, more than {MAX_CHARACTERS}')
  try:
    module = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ValueError('it is no Python text') from error
  values: dict[str, Any] = {}
  for statement in module.body:
    if isinstance(statement, ast.Assign):
      value = _value(statement.value)
      values |= {target.id: value for target in statement.targets if isinstance(target, ast.Name)}
  return values


def _value(node: ast.expr) -> Any:
  match node:
    case ast.Constant(value=int() as number) if number >= _MAX_INTEGER:
      raise ValueError('it has an integer of more than 64 bits')
    case ast.Constant():
      return node.value
    case ast.List() | ast.Tuple():
      return tuple(_value(item) for item in node.elts)
    case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
      pairs = zip(node.keys, node.values, strict=True)
      return {key.value: _value(item) for key, item in pairs if isinstance(key, ast.Constant)}
    case ast.Call(func=ast.Name(id='dict'), args=[]) if all(word.arg for word in node.keywords):
      return {word.arg: _value(word.value) for word in node.keywords}
    case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
      return -number
    case _:
      return Unread()
