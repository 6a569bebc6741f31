"""Trains or evaluates NonLocalNet.

python main.py --config=configs/ade20k_r101.py --config.data.source_dir=DIR
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from nonlocal_jax.command_line import config_errors, run_program
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.evaluate import evaluate_checkpoint
from nonlocal_jax.recipes import check_values
from nonlocal_jax.runtime.parallel import is_first_process, join_processes
from nonlocal_jax.training.loop import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
  'config', str(Path(__file__).parent / 'configs/demo.py'), 'What to do, with what.'
)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'Train, or evaluate --checkpoint.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results go. Default: runs/NAME.')
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Weights to evaluate, or to train on from: a .pth file, a converted directory or a workdir.',
)
_NEW_CLASSIFIER = flags.DEFINE_bool(
  'new_classifier', False, 'Start training with new last layers in place of those of --checkpoint.'
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Work together with the other processes that run the same command.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of the first process; found by itself on Slurm and cloud TPUs.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many they are; see --coordinator.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which this one is, from 0; see --coordinator.')


def main(argv: list[str]) -> None:
  """Runs what the flags say."""
  if len(argv) > 1:
    raise UserError(f'{argv[1]!r} is no flag; options start with --, see --help.')
  config = _CONFIG.value
  check_values(config)
  if _DISTRIBUTED.value:
    join_processes(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  workdir = Path(_WORKDIR.value or f'runs/{config.name}')
  if _MODE.value == 'train':
    checkpoint = Path(_CHECKPOINT.value) if _CHECKPOINT.value else None
    train_and_evaluate(config, workdir, checkpoint=checkpoint, new_classifier=_NEW_CLASSIFIER.value)
    if is_first_process():
      print(f'Results are in {workdir}.')
  else:
    if not _CHECKPOINT.value:
      raise UserError(
        '--mode=eval needs --checkpoint: a .pth file, a converted directory or a workdir.'
      )
    evaluate_checkpoint(config, Path(_CHECKPOINT.value), workdir)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; what is wrong with a config becomes a `UserError`."""
  with config_errors(flags.FLAGS):
    remaining = flags.FLAGS(argv)
    _ = _CONFIG.value.name  # raises where the file could not be loaded
    return remaining


def run() -> None:
  """The program from the command line."""
  run_program(lambda: app.run(main, flags_parser=parse_flags))


if __name__ == '__main__':
  run()
