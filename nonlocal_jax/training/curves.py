"""The curves of a run as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nonlocal_jax.files import whole_file
from nonlocal_jax.training.log import read_log

CURVES = 'curves.png'
_POINTS = 200  # of a smoothed curve


def write_curves(log: Path, path: Path) -> None:
  """Draws losses, learning rate and mIoU against the step.

  Args:
    log: The run's `log.jsonl`.
    path: The PNG file.
  """
  lines = read_log(log)
  steps = [line for line in lines if 'loss' in line]
  evaluations = [line for line in lines if 'mIoU' in line]
  figure = Figure(figsize=(9, 6.5), layout='constrained')
  canvas = FigureCanvasAgg(figure)
  loss, scores = figure.subplots(2, 1, sharex=True)
  at = np.array([line['step'] for line in steps])
  for key, name in (('loss', 'loss'), ('loss_auxiliary', 'auxiliary loss')):
    values = np.array([line[key] for line in steps])
    (plain,) = loss.plot(at, values, alpha=0.25, linewidth=0.8)
    parts = np.array_split(np.arange(len(at)), min(_POINTS, max(len(at) // 10, 1)))
    means = [(at[part].mean(), values[part].mean()) for part in parts if len(part)]
    loss.plot(*zip(*means, strict=True), color=plain.get_color(), label=name)
  loss.set_ylabel('loss')
  loss.set_yscale('log')
  loss.legend(loc='upper right')
  rate = loss.twinx()
  rate.plot(at, [line['lr'] for line in steps], color='grey', linewidth=0.8, linestyle='--')
  rate.set_ylabel('learning rate (dashed)')
  for key in ('mIoU', 'mAcc', 'aAcc'):
    values = [line[key] for line in evaluations]
    scores.plot([line['step'] for line in evaluations], values, marker='.', label=key)
  scores.set_ylabel('percent on val')
  scores.set_xlabel('step')
  scores.legend(loc='lower right')
  with whole_file(path) as partial:
    canvas.print_figure(partial, format='png', dpi=110)
