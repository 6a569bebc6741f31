"""Writes `metrics.json`: the scores of an evaluation and everything they depend on."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import re
import resource
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

import nonlocal_jax
from nonlocal_jax.data.datasets import Dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.metrics import distinct_names, scores, undefined_reasons
from nonlocal_jax.protocol import EvalProtocol
from nonlocal_jax.runtime.devices import describe
from nonlocal_jax.runtime.files import parse_object, sealed, unsealed, write_whole
from nonlocal_jax.runtime.parallel import platform_of

METRICS = 'metrics.json'
# Largest difference in percentage points from the published mIoU; MMSegmentation's own retests of
# Cityscapes models differ by up to 0.1.
_TOLERANCES = {'ade20k': 0.02, 'voc12aug': 0.02, 'cityscapes': 0.1}
_DEPENDENCIES = ('jax', 'jaxlib', 'flax', 'numpy', 'opencv-python-headless')
_LIST_OF_NUMBERS = re.compile(r'\[\n([\s\d.,eE+-]*)\]')  # strings in JSON have no line breaks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFacts:
  """What the scores of an evaluation depend on.

  Attributes:
    config: The whole config, JSON-serializable, with its 'name'.
    protocol: How images were tested.
    images: The number of images.
    checkpoint: The file or directory of the weights; None after training.
    sha256: The hex digest of the .pth file that the weights came from; None if there was none.
    step: The training step of the weights; None if they are not from a training run.
    published: The published mIoU of these weights under this protocol, in percent; None if there is
      none.
    not_comparable: What the test of the published mIoU did otherwise, see
      `evaluate.differences_from_published`.
    more_scores: Whether to report Dice, Fscore, Precision and Recall as well.
  """

  config: Mapping[str, Any]
  protocol: EvalProtocol
  images: int
  checkpoint: str | None = None
  sha256: str | None = None
  step: int | None = None
  published: float | None = None
  not_comparable: tuple[str, ...] = ()
  more_scores: bool = False


def write_report(
  workdir: Path,
  confusion: np.ndarray,
  dataset: Dataset,
  facts: ReportFacts,
  *,
  seconds: float,
  more: Mapping[str, Any] | None = None,
) -> None:
  """Writes `metrics.json`: scores in percent, null where undefined, and what they depend on.

  An existing report is replaced atomically.

  Args:
    workdir: The output directory, created if it does not exist.
    confusion: (classes, classes) integers, rows by label, columns by prediction.
    dataset: The dataset that was evaluated.
    facts: What the scores depend on.
    seconds: The duration of the evaluation.
    more: Fields of the report that others made, see `saved.details_files`.

  Raises:
    UserError: If the file cannot be written.
  """
  more_scores, published = facts.more_scores, facts.published
  found = scores(confusion)
  summary = {name: round(value, 4) for name, value in found.summary(more=more_scores).items()}
  columns = found.by_class(more=more_scores)
  classes = {
    name: {
      score: round(100 * float(value), 4) for score, value in zip(columns, values, strict=True)
    }
    for name, *values in zip(distinct_names(dataset.classes), *columns.values(), strict=True)
  }
  report = {
    'config': facts.config['name'],
    'checkpoint': facts.checkpoint,
    'sha256': facts.sha256,
    'step': facts.step,
    'dataset': dataset.name,
    'images': facts.images,
    **summary,
    'published': None if published is None else _compare(summary['mIoU'], published, dataset.name),
    'not_comparable': list(facts.not_comparable),
    'protocol': facts.protocol.to_dict(),
    'classes': classes,
    'palette': [list(color) for color in dataset.palette],
    'undefined': undefined_reasons(confusion, dataset.classes, more=more_scores),
    **(more or {}),
    'command': _command(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'seconds': round(seconds, 3),
    'peak_memory_gib': peak_memory_gib(),
    'devices': describe(jax.devices()[0].device_kind, jax.device_count(), jax.process_count()),
    'platform': platform_of(),
    'versions': _versions(),
    'decoder': decoder(),
    'config_values': facts.config,
    'confusion': confusion.tolist(),  # rows by label, columns by prediction
  }
  write_whole(workdir / METRICS, _as_json(sealed(_defined(report))))


def read_report(workdir: Path) -> dict[str, Any]:
  """Reads the `metrics.json` in a folder.

  Raises:
    UserError: If there is none, or it is damaged, also by its checksum.
  """
  path = workdir / METRICS
  try:
    return unsealed(parse_object(path.read_bytes()))
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error}): evaluate again.') from error


def peak_memory_gib() -> dict[str, float | None]:
  """Returns the peak memory of this process so far.

  Returns:
    GiB on the 'host' and on the first 'device'; None if the backend does not report it.
  """
  status = Path('/proc/self/status')
  if status.exists():
    (kilobytes,) = re.findall(r'VmHWM:\s*(\d+)', status.read_text())
    host = int(kilobytes) / 2**20
  else:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS
  of_device = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
  return {
    'host': round(host, 3),
    'device': None if of_device is None else round(of_device / 2**30, 3),
  }


def published_line(measured: float, published: float, dataset_name: str) -> str:
  """Compares a measured mIoU with the published one, both rounded to two decimals.

  Args:
    measured: The measured mIoU in percent.
    published: The published mIoU in percent.
    dataset_name: 'cityscapes', 'ade20k' or 'voc12aug'; other datasets have no tolerance.

  Returns:
    A line such as 'mIoU 40.73, published 40.75, difference -0.02 (within 0.02)'.
  """
  found = _compare(measured, published, dataset_name)
  line = f'mIoU {measured:.2f}, published {published:.2f}, difference {found["difference"]:+.2f}'
  if found['tolerance'] is None:
    return line
  return f'{line} ({"within" if found["agrees"] else "more than"} {found["tolerance"]})'


def _compare(measured: float, published: float, dataset_name: str) -> dict[str, Any]:
  difference = round(round(measured, 2) - published, 2)
  tolerance = _TOLERANCES.get(dataset_name)
  return {
    'mIoU': published,
    'difference': difference,
    'tolerance': tolerance,
    'agrees': None if tolerance is None else abs(difference) <= tolerance,
  }


def _command() -> str:
  """Returns the command line of this program."""
  program, *arguments = sys.argv
  name = Path(program).name
  if name == '__main__.py':
    return shlex.join(['python', '-m', Path(program).parent.name, *arguments])
  return shlex.join(([name] if name == 'nonlocal-jax' else ['python', name]) + arguments)


def decoder() -> str:
  """Returns what decodes JPEG files, whose gray levels depend on its version."""
  lines = (line.partition(':') for line in cv2.getBuildInformation().splitlines())
  jpeg = next((value.strip() for name, _, value in lines if name.strip() == 'JPEG'), 'unknown')
  return f'OpenCV {cv2.__version__}, JPEG by {jpeg}'


def _versions() -> dict[str, str | None]:
  """Returns the versions of Python and its packages; None for a package that is not installed."""
  versions: dict[str, str | None] = {
    'nonlocal_jax': nonlocal_jax.__version__,
    'python': platform.python_version(),
  }
  for name in _DEPENDENCIES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # OpenCV has several packages
      versions[name] = None
  return versions


def _as_json(report: Mapping[str, Any]) -> str:
  """Returns indented JSON with each list of numbers, such as a row of a matrix, on one line."""
  text = json.dumps(report, indent=2, allow_nan=False)
  return _LIST_OF_NUMBERS.sub(lambda match: f'[{" ".join(match[1].split())}]', text) + '\n'


def _defined(value: Any) -> Any:
  """Replaces each NaN and infinity, which JSON does not have, with None."""
  if isinstance(value, Mapping):
    return {key: _defined(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_defined(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
