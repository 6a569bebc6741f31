"""The log of a training run as CSV files, for spreadsheets and data frames."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nonlocal_jax.runtime.files import write_whole

TRAINING = 'train.csv'
EVALUATION = 'eval.csv'


class CsvFile:
  """A CSV file with a header, to which rows are appended.

  Numbers have all their digits, and are 'nan' where they are not finite, as in `log.jsonl`.
  """

  def __init__(self, path: Path, rows: Callable[[], Iterable[Mapping[str, float]]]):
    """Writes the file anew.

    Args:
      path: The file.
      rows: Returns all rows that there are so far, in order.

    Raises:
      UserError: If it cannot be written.
    """
    self._path, self._rows = path, rows
    self._names: list[str] = []
    self._write_all()

  def append(self, row: Mapping[str, float]) -> None:
    """Appends a row that `rows` already returns.

    The file is written anew if the row has a value that those before did not have: of the first
    row, and of a run that an earlier version began.

    Raises:
      OSError, UserError: If it cannot be written.
    """
    if row.keys() <= set(self._names):
      with self._path.open('a') as file:
        file.write(_as_text(self._names, [row]))
    else:
      self._write_all()

  def _write_all(self) -> None:
    rows = list(self._rows())
    self._names = list(dict.fromkeys(name for row in rows for name in row))
    header = ','.join(self._names) + '\n' if rows else ''
    write_whole(self._path, header + _as_text(self._names, rows))


def _as_text(names: Sequence[str], rows: Iterable[Mapping[str, float]]) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, names, restval='', lineterminator='\n')
  for row in rows:
    values = {name: value if math.isfinite(value) else math.nan for name, value in row.items()}
    writer.writerow(values)
  return text.getvalue()
