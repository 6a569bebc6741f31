"""The documentation: its examples run on tiny data, and the names in it exist."""

import json
import os
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from jupyter_client.manager import AsyncKernelManager
from PIL import Image

import nonlocal_jax
from nonlocal_jax.cli.main import COMMANDS
from nonlocal_jax.recipes import base_config, fields_of
from nonlocal_jax.weights.released import RELEASED, best_release

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / 'tests/data/converted_of_2026_11'
README = (ROOT / 'README.md').read_text()


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


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # readers have no simulated devices
  monkeypatch.chdir(tmp_path)  # where its kernel starts
  notebook = nbformat.read(ROOT / 'docs/own_data.ipynb', as_version=4)
  # Sockets in the folder: free ports may be taken by somebody else before the kernel opens them.
  kernel = AsyncKernelManager(kernel_name='python3', transport='ipc')
  nbclient.NotebookClient(notebook, km=kernel, timeout=1200).execute(cleanup_kc=True)
  text = ''.join(
    output.text
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if output.output_type == 'stream' and output.name == 'stdout'
  )
  assert 'weights sum to 1.000' in text
  times = re.search(r'gets ([\d.]+) times the weight', text)
  assert times
  assert float(times[1]) > 2  # pixels of a shape look at the disc that decides its class
  metrics = json.loads((tmp_path / 'runs/shapes/metrics.json').read_text())
  assert metrics['mIoU'] > 60  # without the non-local block about 33
  assert (tmp_path / 'runs/shapes/report.html').stat().st_size > 100_000


def pages() -> list[Path]:
  return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def test_the_readme_lists_the_published_scores():
  rows = re.findall(
    r'^\| `(\w+:\w+)` \| (\d+)x(\d+), ([\d,]+) \| ([\d.]+) \| ([\d.]*) ?\| not yet',
    README,
    re.MULTILINE,
  )
  expected = [
    (
      model.recipe,
      *map(str, model.crop),
      f'{model.steps:,}',
      f'{model.miou:.2f}',
      f'{model.miou_ms_flip:.2f}' if model.miou_ms_flip else '',
    )
    for model in RELEASED
    if not model.replaced
  ]
  assert len(rows) == 16
  assert sorted(rows) == sorted(expected)
  first = {}  # the row that a name without a variant stands for
  for recipe, *_ in rows:
    first.setdefault(recipe.partition(':')[0], recipe)
  assert all(best_release(*_parts(name)).recipe == recipe for name, recipe in first.items())


def _parts(name: str) -> tuple[str, int]:
  dataset, _, depth = name.rpartition('_r')
  return dataset, int(depth)


def test_the_readme_lists_the_commands():
  listed = re.findall(r'^\| `nonlocal-jax ([\w-]+)` \| `python', README, re.MULTILINE)
  assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize('page', pages(), ids=lambda page: page.name)
def test_fields_of_the_config_exist(page):
  known = set(fields_of(base_config()))
  text = page.read_text()
  named = set(re.findall(r'--config\.([a-z_]+\.[a-z_]+)', text))
  if page.name == 'mmsegmentation.md':  # whose second table leaves out '--config.'
    options = text[text.index('## Options of a config') : text.index('## What differs')]
    named |= set(re.findall(r'`((?:train|eval|data|optimizer|checkpoint)\.[a-z_]+)', options))
  assert named - {'a.b', 'train.csv', 'eval.csv'} <= known  # an example, and files
