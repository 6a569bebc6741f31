"""The best weights of a run stay until there are better ones."""

import math
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from nonlocal_jax.training.best_weights import BestWeights
from nonlocal_jax.weights.arrays import to_arrays
from nonlocal_jax.weights.run_checkpoints import RunCheckpoints, chosen_weights

OLD_RUN = Path(__file__).parent / 'data/workdir_of_2026_11'


def weights(value: float) -> nnx.State:
  return nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.constant(value)))


def saved(folder: Path) -> list[str]:
  return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def test_weights_of_a_later_step_stay_until_there_are_better_ones(tmp_path):
  with RunCheckpoints(tmp_path, keep=BestWeights.KEEP) as checkpoints:
    best = BestWeights(checkpoints, [])
    for step, score in ((8, math.nan), (16, 40.0), (24, 39.0), (32, 50.0)):
      if best.are_worse_than({'mIoU': score}):
        best.save(step, weights(score), {'mIoU': score})
      assert saved(tmp_path) == [{8: '8', 16: '16', 24: '16', 32: '32'}[step]]
  log = [{'step': 16, 'mIoU': 40.0}, {'step': 24, 'mIoU': 39.0}]  # the run went back to step 24
  with RunCheckpoints(tmp_path, keep=BestWeights.KEEP) as checkpoints:
    best = BestWeights(checkpoints, log)
    assert best.step == 32
    assert [best.are_worse_than({'mIoU': score}) for score in (45.0, 50.0, 50.1)] == [0, 0, 1]
    best.save(28, weights(50.1), {'mIoU': 50.1})  # of an earlier step, and all the same newer
    assert saved(tmp_path) == ['28']
    best.save(28, weights(50.2), {'mIoU': 50.2})
  with RunCheckpoints(tmp_path, keep=None) as checkpoints:
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_arrays(weights(0)))
    step, arrays = checkpoints.restore_model(target)
  assert (step, saved(tmp_path)) == (28, ['28'])
  assert {float(array.max()) for array in arrays.values()} == {0, np.float32(50.2)}


def test_the_better_of_two_is_kept_if_the_run_was_killed_before_it_deleted_one(tmp_path):
  with RunCheckpoints(tmp_path, keep=BestWeights.KEEP) as checkpoints:
    for step, score in ((28, 50.1), (32, 50.0)):
      checkpoints.save(step, model=weights(score), data={'mIoU': score})
      checkpoints.wait()
    assert BestWeights(checkpoints, []).step == 28
  assert saved(tmp_path) == ['28']


def test_weights_that_were_saved_without_their_score_are_as_good_as_those_before(tmp_path):
  shutil.copytree(OLD_RUN / 'best', tmp_path / 'best')
  log = [{'step': 16, 'mIoU': 40.0}, {'step': 40, 'mIoU': 60.0}]
  with RunCheckpoints(tmp_path / 'best', keep=BestWeights.KEEP) as checkpoints:
    best = BestWeights(checkpoints, log)
    assert best.step == 32
    assert [best.are_worse_than({'mIoU': score}) for score in (40.0, 40.1)] == [False, True]


def test_which_weights_of_a_workdir_are_taken_is_said(tmp_path):
  best = OLD_RUN / 'best'
  assert chosen_weights(OLD_RUN) == (
    f'The weights are those of step 36, the newest in {OLD_RUN}; those with the best mIoU are in '
    f'{best}.'
  )
  assert chosen_weights(best) == f'The weights are those of step 32, the newest in {best}.'
  assert chosen_weights(tmp_path) is None


@pytest.mark.parametrize(
  ('written', 'damaged'),
  [
    ('"position": 56', '"position": 54'),
    ('"position": 56', '"pmsition": 56'),
    ('"checksums"', '"checksuns"'),
    ('"data"', '"dat!"'),
  ],
)
def test_a_checkpoint_whose_record_is_damaged_is_set_aside(written, damaged, tmp_path, capsys):
  """Where in the data a run goes on, for one, would be another place without any other sign."""
  training = {'momentum': np.arange(3.0, dtype=np.float32)}
  with RunCheckpoints(tmp_path, keep=3) as checkpoints:
    for step, position in ((6, 48), (7, 56)):
      data = {'position': position}
      checkpoints.save(step, model=weights(step), training=training, data=data)
    checkpoints.wait()
  record = tmp_path / 'checkpoints/7/record/metadata'
  text = record.read_text()
  assert text.count(written) == 1
  record.write_text(text.replace(written, damaged))
  with RunCheckpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.data_of(7) == {}
    restored = checkpoints.restore(model=weights(0), training=training)
  assert (restored.step, restored.data) == (6, {'position': 48})
  assert 'step 7' in capsys.readouterr().err
