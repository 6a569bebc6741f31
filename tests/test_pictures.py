"""Pictures of predictions stay small, whatever the shape of an image."""

import numpy as np
import pytest

from nonlocal_jax.evaluation.pictures import comparison


@pytest.mark.parametrize(
  ('size', 'most'), [((100, 200), 500), ((40_000, 10), 1500), ((1, 40_000), 500)]
)
def test_a_row_is_at_most_three_times_as_tall_as_wide(size, most):
  image = np.full((*size, 3), 90, np.uint8)
  label = np.zeros(size, np.uint8)
  palette = [(200, 0, 0), (0, 0, 200)]
  picture = comparison([(image, label, label + 1)], classes=['a', 'b'], palette=palette)
  height, width, _ = picture.shape
  assert width == 990
  assert height < most
  colors = {tuple(color) for color in np.unique(picture.reshape(-1, 3), axis=0).tolist()}
  assert {(200, 0, 0), (0, 0, 200)} <= colors  # also in the legend
  if min(size) > 1:
    columns = (picture[50 : height - 60] == (200, 0, 0)).all(-1).any(0).nonzero()[0]
    assert len(columns)
    assert width // 3 - 10 < columns.min() <= columns.max() < 2 * width // 3 + 10
