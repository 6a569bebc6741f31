"""pyproject.toml is the one list of dependencies; the core imports without the extras."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nonlocal_jax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def read_requirements(name: str) -> list[str]:
  """The lines of a requirements file, without comments and references to other files."""
  lines = (ROOT / name).read_text().splitlines()
  return [line for line in lines if line and not line.startswith(('#', '-'))]


def by_name(requirements: Iterable[str]) -> dict[str, Requirement]:
  """Requirements by their normalised names."""
  parsed = map(Requirement, requirements)
  return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def imported_packages(paths: Iterable[Path]) -> set[str]:
  """Top-level names that files import anywhere, without the standard library's."""
  names = set()
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names.add(node.module.split('.')[0])
  return names - sys.stdlib_module_names


def all_requirements() -> list[str]:
  """The requirements of the core and of all extras but those for accelerators."""
  *train, plot = EXTRAS['train']
  assert plot == 'nonlocal-jax[plot]'
  assert EXTRAS['all'] == [f'nonlocal-jax[{name}]' for name in ('train', 'export', 'demo')]
  return [*PROJECT['dependencies'], *train, *EXTRAS['plot'], *EXTRAS['export'], *EXTRAS['demo']]


def test_requirements_txt_says_the_same():
  assert read_requirements('requirements.txt') == all_requirements()


def test_no_package_is_listed_twice():
  needed = all_requirements()
  assert len(by_name(needed)) == len(needed)


def test_tested_versions_lie_in_the_ranges():
  of_services = [*EXTRAS['wandb'], *EXTRAS['mlflow']]
  needed = by_name([*read_requirements('requirements.txt'), *of_services])
  tested = by_name(read_requirements('constraints.txt'))
  assert needed.keys() <= tested.keys()
  for name, requirement in needed.items():
    (version,) = (pin.version for pin in tested[name].specifier)
    assert requirement.specifier.contains(version), f'{requirement}, tested with {version}'


def test_every_import_is_declared():
  of_services = [*EXTRAS['wandb'], *EXTRAS['mlflow']]
  declared = by_name([*read_requirements('requirements.txt'), *of_services]).keys()
  distributions = importlib.metadata.packages_distributions()
  imported = imported_packages([*(ROOT / 'nonlocal_jax').rglob('*.py'), ROOT / 'main.py'])
  for name in imported - {'nonlocal_jax', 'configs'}:
    candidates = {canonicalize_name(found) for found in distributions[name]}
    assert candidates & declared, f'{name} is imported but not declared'


def test_version():
  assert PROJECT['dynamic'] == ['version']
  assert re.fullmatch(r'\d+\.\d+\.\d+', nonlocal_jax.__version__)
  for name in ('CHANGELOG.md', 'CITATION.cff'):
    assert nonlocal_jax.__version__ in (ROOT / name).read_text(), name


def test_the_core_imports_without_the_extras():
  """As with the core dependencies alone: load, predict, draw; what needs an extra names it."""
  extras = ['array_record', 'clu', 'grain', 'matplotlib', 'pyarrow', 'tensorboardX']
  extras += ['tensorflow_datasets', 'tensorflow', 'torch', 'onnx', 'onnxruntime', 'safetensors']
  extras += ['starlette', 'uvicorn', 'wandb', 'mlflow']
  program = f"""
import sys
sys.modules.update(dict.fromkeys({extras}))  # None: an import of it fails
import nonlocal_jax
import numpy as np
model = nonlocal_jax.load('tests/data/converted_of_2026_11')
label = model.predict(np.zeros((20, 30, 3), np.uint8))
from nonlocal_jax.cli import convert, predict
from nonlocal_jax.evaluation import pictures
options = dict(classes=model.classes, palette=model.palette)
image = np.zeros((20, 30, 3), np.uint8)
assert pictures.overlay(image, label, **options).shape[1] > 30
try:
  pictures.comparison([(image, label, label)], **options)
except nonlocal_jax.UserError as error:
  print(error)
"""
  result = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert "pip install '.[plot]'" in result.stdout
