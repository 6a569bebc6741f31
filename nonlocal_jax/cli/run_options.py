"""Options that `train` and `eval` share."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from nonlocal_jax.cli.config import Config, config_text, fields_set, read_config
from nonlocal_jax.cli.program import Parser, add_ema, path_option, print_and_exit
from nonlocal_jax.cli.supervision import connect_to_parent, is_supervised, run_supervised
from nonlocal_jax.recipes import base_config, config_names, fields_of
from nonlocal_jax.runtime.parallel import find_place, join_processes


def make_parser(command: str, description: str | None) -> Parser:
  """Makes the parser of a command that runs a config; --help lists the config's fields."""
  fields = '\n'.join(f'  {line}' for line in config_text(base_config()).splitlines())
  epilog = (
    'fields of the config with their defaults, set by --config.FIELD=VALUE as in '
    f'--config.model.depth=101:\n{fields}'
  )
  parser = Parser(f'nonlocal-jax {command}', description, epilog=epilog)
  add = parser.add_argument
  add(
    '--config',
    default='demo',
    metavar='NAME',
    help=f'one of {", ".join(config_names())}, for a published model with a variant as in '
    'ade20k_r101:512x512_80k, or a file; default: demo',
  )
  add(
    '--print-config',
    '--print_config',
    action='store_true',
    help='print the resolved config and do nothing else',
  )
  add('--workdir', type=path_option, metavar='DIR', help='output directory; default: runs/NAME')
  add(
    '--checkpoint',
    type=path_option,
    metavar='PATH',
    help='a .pth file, a converted directory, a workdir (runs/NAME for its newest checkpoint, '
    'runs/NAME/best for the one with the best mIoU), or the name of a released model, which is '
    'downloaded: see nonlocal-jax models',
  )
  add_ema(parser)
  add('--distributed', **FLAG, help='run on several processes that all execute the same command')
  add(
    '--coordinator',
    metavar='HOST:PORT',
    help='address of the first process; not needed on Slurm, Open MPI and cloud TPUs',
  )
  add(
    '--processes',
    type=int,
    metavar='COUNT',
    help='number of processes, with --coordinator',
  )
  add(
    '--process',
    type=int,
    metavar='INDEX',
    help='index of this process, from 0, with --coordinator',
  )
  add(
    '--partner-timeout',
    type=_seconds,
    default=30.0,
    metavar='SECONDS',
    help='how long --distributed waits for the other processes at the start, and how long one may '
    'be silent later before all end; default: 30',
  )
  return parser


def parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
  """Parses options and config; handles --print-config and --distributed.

  With --distributed it returns in a child process, and exits in this one at the child's end.

  Args:
    parser: See `make_parser`.
    arguments: The command line.

  Returns:
    The options, with `workdir` set to a path and `fields_set` to the names of the config's fields
    on the command line, and the config.

  Raises:
    UserError: If an option, a field or a value is invalid.
  """
  options, rest = parser.parse_with_config(arguments, fields_of(base_config()))
  place = None
  if options.distributed and not options.print_config:
    place = find_place(options.coordinator, options.processes, options.process)
    if not is_supervised():
      command, timeout = parser.prog.split()[-1], options.partner_timeout
      sys.exit(run_supervised(command, arguments, place, timeout=timeout))
    connect_to_parent()
  config = read_config([f'--config={options.config}', *rest])
  if options.print_config:
    print_and_exit(config_text(config))
  if place is not None:
    join_processes(place, timeout=options.partner_timeout)
  options.fields_set = fields_set(rest)
  options.workdir = options.workdir or Path('runs', config.name)
  return options, config


def _seconds(text: str) -> float:
  """Parses a positive number."""
  seconds = float(text)
  if not 0 < seconds < math.inf:
    raise argparse.ArgumentTypeError(f'{text} is not a positive number')
  return seconds


def true_or_false(text: str) -> bool:
  """Parses 'true' or 'false', in any case."""
  values = {'true': True, 'false': False}
  if text.lower() not in values:
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
  return values[text.lower()]


# `--distributed` and `--distributed=true` mean the same.
FLAG = {'nargs': '?', 'const': True, 'default': False, 'type': true_or_false, 'metavar': 'true'}
