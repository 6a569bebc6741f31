"""The command that evaluates: `python main.py --mode=eval --checkpoint=WEIGHTS`."""

from pathlib import Path

from ml_collections import ConfigDict

from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.evaluate import evaluate_checkpoint


def evaluate(config: ConfigDict, workdir: Path, *, checkpoint: Path | None) -> None:
  """Evaluates weights; see `evaluate_checkpoint`.

  Raises:
    UserError: If there is no checkpoint.
  """
  if checkpoint is None:
    raise UserError(
      '--mode=eval needs --checkpoint: a .pth file, a converted directory or a workdir.'
    )
  evaluate_checkpoint(config, checkpoint, workdir)
