"""Training and evaluating behind one set of flags, of which --mode says which."""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from nonlocal_jax.cli.evaluate import evaluate
from nonlocal_jax.cli.program import config_errors, run_program
from nonlocal_jax.cli.train import train
from nonlocal_jax.errors import UserError
from nonlocal_jax.recipes import check_values
from nonlocal_jax.runtime.parallel import join_processes

flags.disclaim_key_flags()  # they are those of the program that calls `define_flags`


def define_flags(default_config: Path) -> None:
  """Defines the flags; to be called once.

  Args:
    default_config: What --config is where it is not given.
  """
  config_flags.DEFINE_config_file('config', str(default_config), 'What to do, with what.')
  flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'Train, or evaluate --checkpoint.')
  flags.DEFINE_string('workdir', None, 'Where results go. Default: runs/NAME.')
  flags.DEFINE_string(
    'checkpoint',
    None,
    'Weights to evaluate, or to train on from: a .pth file, a converted directory or a workdir.',
  )
  flags.DEFINE_bool(
    'new_classifier',
    False,
    'Start training with new last layers in place of those of --checkpoint.',
  )
  flags.DEFINE_bool(
    'distributed', False, 'Work together with the other processes that run the same command.'
  )
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of the first process; found by itself on Slurm and cloud TPUs.'
  )
  flags.DEFINE_integer('processes', None, 'How many they are; see --coordinator.')
  flags.DEFINE_integer('process', None, 'Which this one is, from 0; see --coordinator.')


def main(argv: list[str]) -> None:
  """Runs what the flags say."""
  if len(argv) > 1:
    raise UserError(f'{argv[1]!r} is no flag; options start with --, see --help.')
  given = flags.FLAGS
  config = given.config
  check_values(config)
  if given.distributed:
    join_processes(given.coordinator, given.processes, given.process)
  workdir = Path(given.workdir or f'runs/{config.name}')
  checkpoint = Path(given.checkpoint) if given.checkpoint else None
  if given.mode == 'train':
    train(config, workdir, checkpoint=checkpoint, new_classifier=given.new_classifier)
  else:
    evaluate(config, workdir, checkpoint=checkpoint)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; what is wrong with a config becomes a `UserError`."""
  with config_errors(flags.FLAGS):
    remaining = flags.FLAGS(argv)
    _ = flags.FLAGS.config.name  # raises where the file could not be loaded
    return remaining


def run() -> None:
  """The program from the command line."""
  run_program(lambda: app.run(main, flags_parser=parse_flags))
