"""Writes the report of an evaluation again, or compares two evaluations.

    nonlocal-jax report runs/custom
    nonlocal-jax report runs/before runs/after --out=comparison.html

A and B are folders in which nonlocal-jax eval or train wrote metrics.json. Of one, writes
A/report.html anew from what is saved there. Of two on the same classes, prints the IoU of each
class in A and B, and writes them with what differs between the runs into the page --out. Only
earlier reports are replaced.
"""

from collections.abc import Sequence

from nonlocal_jax.cli.program import Parser
from nonlocal_jax.errors import UsageError
from nonlocal_jax.evaluation.comparison_page import compared, comparison_page, comparison_table
from nonlocal_jax.evaluation.report_page import PAGE, report_page, write_page
from nonlocal_jax.evaluation.saved import read_evaluation
from nonlocal_jax.runtime.files import given_path


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax report`."""
  parser = Parser('nonlocal-jax report', __doc__)
  parser.add_argument('a', metavar='A', type=given_path, help='folder of an evaluation')
  parser.add_argument(
    'b', metavar='B', nargs='?', type=given_path, help='folder of another one, to compare'
  )
  parser.add_argument(
    '--out',
    type=given_path,
    metavar='FILE.html',
    help='the page; default: A/report.html, and for two none',
  )
  options = parser.parse(arguments)
  if options.out is not None and options.out.suffix.lower() not in ('.html', '.htm'):
    raise UsageError(f'--out is {options.out}; it must end in .html.')
  first = read_evaluation(options.a)
  if options.b is None:
    out = options.out or options.a / PAGE
    write_page(out, report_page(first))
  else:
    out = options.out
    comparison = compared(first, read_evaluation(options.b))
    if out is not None:
      write_page(out, comparison_page(comparison))
    print(f'A: {options.a}\nB: {options.b}\n{comparison_table(comparison)}')
  if out is not None:
    print(out)
