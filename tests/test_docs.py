"""The examples of the documentation run, one after the other, on tiny data."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nonlocal_jax

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / 'tests/data/converted_of_2026_11'


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Weights and a folder of four photos whose classes can be told by their brightness."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(WEIGHTS, tmp_path / 'converted')
  rng = np.random.default_rng(0)
  for kind in ('images', 'labels'):
    (tmp_path / 'photos' / kind).mkdir(parents=True)
  for index in range(4):
    label = rng.integers(0, 3, (4, 6), np.uint8).repeat(16, 0).repeat(16, 1)
    noise = rng.integers(0, 40, (64, 96, 3), np.uint8)
    image = (label[..., None] * 100 + noise).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / f'photos/images/{index}.jpg')
    Image.fromarray(label).save(tmp_path / f'photos/labels/{index}.png')
  return tmp_path


def code_blocks(path: Path) -> list[str]:
  """The Python code of a Markdown file."""
  return re.findall(r'^```python\n(.*?)^```$', path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_examples_of_the_python_api_run(folder):
  blocks = code_blocks(ROOT / 'docs/python_api.md')
  assert len(blocks) == 11
  names = {}
  for number, block in enumerate(blocks):
    exec(compile(block, f'python_api.md, block {number}', 'exec'), names)
  assert names['larger'].shape == names['smaller'].shape == (64, 96)
  assert names['probabilities'].shape == (64, 96, 19)
  assert names['nats'].shape == names['unsure'].shape == (64, 96)
  assert names['classes'].shape == names['likely'].shape == (64, 96, 3)
  assert names['labels'].shape == (4, 64, 96)  # those of the folder, the last so called
  assert names['weights'].sum() == pytest.approx(1, abs=1e-5)
  assert names['over'].shape == (64, 96)
  assert names['stage4'].shape == (1, 8, 12, 64)
  assert names['logits'].shape == (1, 64, 96, 19)
  assert names['outputs']['classes'].shape == names['outputs']['confidence'].shape == (4, 64, 96)
  assert nonlocal_jax.load('weights.safetensors').classes == names['model'].classes
  assert names['y'].shape == (1, 8, 12, 64)
  assert float(names['loss']) < 1.4 * np.log(3)  # of both heads, better than by chance
  tuned = nonlocal_jax.load('tuned')
  assert tuned.classes == ('sky', 'sea', 'ship')
  expected = names['tuned'].predict('photos/images/1.jpg')
  np.testing.assert_array_equal(tuned.predict('photos/images/1.jpg'), expected)
