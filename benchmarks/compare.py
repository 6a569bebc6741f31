"""Compares the speed and memory of this library with MMSegmentation, and writes a report.

    python benchmarks/compare.py
    python benchmarks/compare.py --out=DIR --only inference training
    python benchmarks/compare.py --data=DIR --num-classes=11 --ignore-label=11 --eval-scale=480x360

Measurements of both alternate. After each, writes OUT/results.md, OUT/scaling.png and
OUT/results.json. On a GPU, results.md also has shares of its peak and published figures of a V100.
Needs the packages in requirements-dev.txt.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import write_report
from nonlocal_jax.cli import benchmark
from nonlocal_jax.cli.benchmark import Record, at_least_one, write_json
from nonlocal_jax.cli.program import run_program
from nonlocal_jax.errors import UserError

PEER = Path(__file__).resolve().parent / 'peer.py'


def main(arguments: Sequence[str]) -> None:
  """Runs the comparison.

  Raises:
    UserError: If MMSegmentation is not installed.
  """
  parser = benchmark.make_parser('python benchmarks/compare.py', __doc__, out='benchmarks')
  parser.add_argument(
    '--rounds', type=at_least_one, default=3, help='measurements of each side; default: 3'
  )
  options = benchmark.parse(parser, arguments)
  if not all(map(importlib.util.find_spec, ('torch', 'mmengine', 'mmseg'))):
    raise UserError('MMSegmentation is missing: pip install -r requirements-dev.txt.')
  benchmark.run(options, write=_write, peer=PEER)


def _write(
  out: Path, machine: Record, settings: Mapping[str, Any], records: Sequence[Record]
) -> None:
  write_json(out, machine, settings, records)
  write_report(out, machine, settings, records)


if __name__ == '__main__':
  run_program(lambda: main(sys.argv[1:]))
