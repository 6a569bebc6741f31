"""Words of messages."""


def counted(count: int, noun: str) -> str:
  """Returns a count with its noun.

  >>> counted(1, 'device'), counted(2, 'process'), counted(1200, 'image')
  ('1 device', '2 processes', '1,200 images')
  """
  plural = f'{noun}es' if noun.endswith('s') else f'{noun}s'
  return f'{count:,} {noun if count == 1 else plural}'
