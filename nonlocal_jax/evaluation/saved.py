"""The files of an evaluation: written when it is done, and read again for reports."""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nonlocal_jax.data.datasets import Dataset, custom_dataset
from nonlocal_jax.errors import UserError
from nonlocal_jax.evaluation.calibration import Calibration
from nonlocal_jax.evaluation.details import Details
from nonlocal_jax.evaluation.image_results import ImageResults
from nonlocal_jax.evaluation.report import METRICS, read_report
from nonlocal_jax.evaluation.showcase import Panels, pictures_file, read_pictures

PER_IMAGE = 'metrics_per_image.csv'
PICTURES = 'report_pictures.zip'


@dataclasses.dataclass(frozen=True)
class SavedEvaluation:
  """What the files of an evaluation hold.

  Attributes:
    folder: Where they are.
    metrics: `metrics.json`.
    classes: The name of each class, all different.
    palette: The RGB color of each class, in [0, 255].
    confusion: (classes, classes) int64, rows by label, columns by prediction.
    calibration: How confident the predictions were; None if that is not known.
    images: The results of each image; None if they are not there.
    pictures: Encoded pictures of some images, by their index.
  """

  folder: Path
  metrics: Mapping[str, Any]
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  confusion: np.ndarray
  calibration: Calibration | None
  images: ImageResults | None
  pictures: Mapping[int, Panels]


def details_files(details: Details, dataset: Dataset) -> tuple[dict[str, bytes], dict[str, Any]]:
  """Makes the files of the results of each image, as CSV, and of pictures of some.

  Args:
    details: What to write.
    dataset: Names the classes and gives their colors.

  Returns:
    The files' contents by name, and the fields for `metrics.json`, with their checksums.
  """
  pictures = {
    index: example.encoded(dataset.palette) for index, example in details.examples.items()
  }
  files = {
    PER_IMAGE: details.images.to_csv(dataset.classes).encode(),
    PICTURES: pictures_file(pictures),
  }
  mean_iou = details.images.mean_iou
  defined = mean_iou[~np.isnan(mean_iou)]
  return files, {
    'mIoU_of_images': round(100 * float(defined.mean()), 4) if defined.size else None,
    'calibration': details.calibration.to_dict(),
    'files': {name: zlib.crc32(data) for name, data in files.items()},
  }


def read_evaluation(workdir: Path) -> SavedEvaluation:
  """Reads the files of an evaluation, also those of earlier versions, which wrote fewer.

  Raises:
    UserError: If there is no evaluation, or a file is damaged or belongs to another one.
  """
  if not (workdir / METRICS).is_file():
    raise UserError(
      f'{workdir} holds no evaluation ({METRICS} is missing): run nonlocal-jax eval with '
      f'--workdir={workdir} first.'
    )
  metrics = read_report(workdir)
  try:
    confusion = np.array(metrics['confusion'], np.int64)
    classes, palette = tuple(metrics['classes']), metrics.get('palette')
    if not classes or confusion.shape != (len(classes), len(classes)):
      raise ValueError('its confusion matrix does not fit its classes')
    colors = custom_dataset(len(classes)).palette if palette is None else palette
    calibration = metrics.get('calibration')
    saved = SavedEvaluation(
      folder=workdir,
      metrics=metrics,
      classes=classes,
      palette=tuple((int(r), int(g), int(b)) for r, g, b in colors),
      confusion=confusion,
      calibration=None if calibration is None else Calibration.from_dict(calibration),
      images=None,
      pictures={},
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{workdir / METRICS} is not that of an evaluation ({error!r}): evaluate again.'
    ) from error
  table, pictures = (_intact(workdir / name, metrics) for name in (PER_IMAGE, PICTURES))
  try:
    return dataclasses.replace(
      saved,
      images=None if table is None else ImageResults.from_csv(table.decode(), classes),
      pictures={} if pictures is None else read_pictures(pictures),
    )
  except ValueError as error:
    raise UserError(f'Results in {workdir} cannot be read ({error}): evaluate again.') from error


def _intact(path: Path, metrics: Mapping[str, Any]) -> bytes | None:
  """Reads a file that an evaluation wrote, if it did and the file is still there."""
  checksum = (metrics.get('files') or {}).get(path.name)
  if checksum is None or not path.exists():
    return None
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error
  if zlib.crc32(data) != checksum:
    raise UserError(
      f'{path} is not as the evaluation wrote it (its checksum differs): remove it to do without, '
      'or evaluate again.'
    )
  return data
