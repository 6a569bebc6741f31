"""The command that trains: `python main.py --mode=train`."""

from pathlib import Path

from ml_collections import ConfigDict

from nonlocal_jax.runtime.parallel import is_first_process
from nonlocal_jax.training.loop import train_and_evaluate


def train(
  config: ConfigDict, workdir: Path, *, checkpoint: Path | None, new_classifier: bool
) -> None:
  """Trains and says where the results are; see `train_and_evaluate`."""
  train_and_evaluate(config, workdir, checkpoint=checkpoint, new_classifier=new_classifier)
  if is_first_process():
    print(f'Results are in {workdir}.')
