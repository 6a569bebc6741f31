"""Evaluates weights on the val images of a dataset.

    nonlocal-jax eval --config=ade20k_r101 --config.data.source_dir=DIR --checkpoint=WEIGHTS
    nonlocal-jax eval --config=custom --config.data.source_dir=DIR --checkpoint=runs/custom

Prints the scores of each class and their means, and writes metrics.json, report.html and the
results of each image into the workdir. Where the weights record how they were tested, a config that
says otherwise is an error, unless its fields are set on the command line.
"""

from collections.abc import Sequence

from nonlocal_jax.cli.program import say_weights
from nonlocal_jax.cli.run_options import make_parser, parse
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime.devices import say_devices


def main(arguments: Sequence[str]) -> None:
  """Runs `nonlocal-jax eval`.

  Raises:
    UserError: If --checkpoint is missing.
  """
  options, config = parse(make_parser('eval', __doc__), arguments)
  if options.checkpoint is None:
    raise UserError(
      'eval needs --checkpoint: a .pth file, a converted directory, a workdir, or the name of a '
      'released model.'
    )

  from nonlocal_jax.experiment import Experiment

  experiment = Experiment.from_config(config)
  say_devices(experiment.mesh)
  say_weights(options.checkpoint)
  experiment.evaluate(
    options.checkpoint, options.workdir, overrides=options.fields_set, ema=options.ema
  )
