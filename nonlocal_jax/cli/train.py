"""Trains a network, or resumes where a run was stopped.

    nonlocal-jax train                                    # the demo: makes its own images
    nonlocal-jax train --config=ade20k_r101 --config.data.source_dir=ADEChallengeData2016
    nonlocal-jax train --config=custom --config.data.source_dir=DIR --config.data.num_classes=11

The workdir gets checkpoints, metrics, curves and the config. The same command resumes a run.
"""

from collections.abc import Sequence

from nonlocal_jax.cli.run_options import FLAG, make_parser, parse
from nonlocal_jax.runtime.devices import say_advice_on_cuda
from nonlocal_jax.runtime.parallel import is_first_process, platform_of_mesh


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax train`."""
  parser = make_parser('train', __doc__)
  parser.add_argument(
    '--new_classifier',
    '--new-classifier',
    **FLAG,
    help='initialize the last layer of both heads instead of loading it from --checkpoint, for '
    'other classes',
  )
  parser.add_argument(
    '--match_classes',
    '--match-classes',
    **FLAG,
    help='load the last layer of both heads for the classes whose name --checkpoint has, and '
    'initialize it for the others; names may differ in case and in spaces, hyphens and underscores',
  )
  parser.add_argument(
    '--dry-run',
    '--dry_run',
    **FLAG,
    help='check everything, prepare the data, take a few steps that are not kept, and print the '
    'memory of a step and an estimate of time',
  )
  options, config = parse(parser, arguments)

  from nonlocal_jax.experiment import Experiment

  experiment = Experiment.from_config(config)
  say_advice_on_cuda(platform_of_mesh(experiment.mesh))  # the run prints its devices itself
  run = experiment.dry_run if options.dry_run else experiment.train
  run(
    options.workdir,
    checkpoint=options.checkpoint,
    new_classifier=options.new_classifier,
    match_classes=options.match_classes,
    ema=options.ema,
  )
  if is_first_process() and not options.dry_run:
    print(f'Results are in {options.workdir}.')
