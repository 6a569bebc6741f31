"""The table of published and measured scores, with what is needed to reproduce each."""

import datetime
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nonlocal_jax.evaluation.deviations import likely_causes
from nonlocal_jax.evaluation.report import read_report
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.files import write_whole

Row = dict[str, Any]
# What of a report goes into published.json beside the scores.
_EVIDENCE = ('sha256', 'images', 'dataset', 'protocol', 'devices', 'platform', 'decoder')
_EVIDENCE += ('versions', 'date', 'not_comparable', 'classes')


def scored(row: Row, workdir: Path, cost: Mapping[str, Any]) -> Row:
  """Adds to a row what an evaluation found.

  Args:
    row: The row, with the published score.
    workdir: The evaluation's output directory.
    cost: Its `status`, `error`, `seconds` and `arguments`.
  """
  if cost['status'] != 0:
    return {**row, 'verdict': f'failed: {cost["error"]}'}
  report = read_report(workdir)
  measured = round(report['mIoU'], 2)
  difference = round(measured - row['published'], 2)
  compared, memory = report['published'], report['peak_memory_gib']
  verdict = 'not comparable'
  if compared:
    verdict = 'agrees' if compared['agrees'] else 'differs'
  confusion = report['confusion']
  return {
    **row,
    'measured': measured,
    'difference': difference if compared else None,
    'protocol': _words(EvalProtocol.from_dict(report['protocol'])),
    'seconds': round(cost['seconds'], 1),
    'images_per_second': round(report['images'] / report['seconds'], 3),
    'peak_gib': memory['device'] or memory['host'],
    'verdict': verdict,
    'likely_causes': [] if verdict == 'agrees' else likely_causes(report, difference),
    'command': shlex.join(['nonlocal-jax', 'eval', *cost['arguments']]),
    'evidence': {
      **{name: report[name] for name in _EVIDENCE},
      'precision': report['config_values']['eval']['precision'],
      'label_pixels': [sum(line) for line in confusion],
      'predicted_pixels': [sum(column) for column in zip(*confusion, strict=True)],
    },
  }


def write_tables(out: Path, rows: Sequence[Row], command: str) -> None:
  """Writes `published.json` and `published.md`."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  facts = {'command': command, 'date': now, 'rows': rows}
  write_whole(out / 'published.json', json.dumps(facts, indent=2) + '\n')
  parts = [f'Made by `{command}` on {now}.', table(rows), *_details(rows)]
  write_whole(out / 'published.md', '\n\n'.join(parts) + '\n')


def table(rows: Iterable[Row]) -> str:
  """Formats the scores as a Markdown table."""
  lines = [
    '| model | mode | published | measured | difference | protocol | seconds | images/s | peak GiB '
    '| |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    cells = [row['model'], row['mode'], f'{row["published"]:.2f}']
    cells += [_number(row['measured'], '.2f'), _number(row['difference'], '+.2f')]
    cells += [row['protocol'], _number(row['seconds'], '.0f')]
    cells += [_number(row['images_per_second'], '.3g'), _number(row['peak_gib'], '.1f')]
    # An error may have several lines, and a table has one for each row.
    verdict = ' '.join(row['verdict'].replace('|', '\\|').split())
    lines.append(f'| {" | ".join((*cells, verdict))} |')
  return '\n'.join(lines)


def _details(rows: Iterable[Row]) -> Iterable[str]:
  """Yields a section for each score: what it was measured with, and why it may be off."""
  for row in rows:
    if row['measured'] is None:
      continue
    facts = row['evidence']
    versions = ', '.join(f'{name} {version}' for name, version in facts['versions'].items())
    lines = [
      f'## {row["model"]}, {row["mode"]}',
      '',
      f'- weights: {row["file"]}, sha256 {facts["sha256"]}',
      f'- released at: {row["address"]}',
      f'- images: {facts["images"]:,} of {facts["dataset"]}, decoded by {facts["decoder"]}',
      f'- pixels with labels: {sum(facts["label_pixels"]):,}; of each class: see published.json',
      f'- device: {facts["devices"]}, precision {facts["precision"]}',
      f'- versions: {versions}',
      f'- command: `{row["command"]}`',
    ]
    if row['likely_causes']:
      lines += ['', 'What may explain the difference, the likeliest first:', '']
      lines += [f'{number}. {cause}' for number, cause in enumerate(row['likely_causes'], 1)]
    yield '\n'.join(lines)


def _words(protocol: EvalProtocol) -> str:
  scale = f'{protocol.scale[0]}x{protocol.scale[1]}' if protocol.scale else 'own size'
  windows = protocol.window_crop
  where = f'windows of {windows[0]}x{windows[1]}' if windows else 'whole'
  several = f', {len(protocol.ratios)} scales' if len(protocol.ratios) > 1 else ''
  return f'{protocol.version}, {scale}, {where}{several}{", flips" if protocol.flip else ""}'


def _number(value: float | None, form: str) -> str:
  return '' if value is None else format(value, form)
