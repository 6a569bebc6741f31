"""The report of an evaluation: its numbers against NumPy in float64, its files, and its page."""

import base64
import csv
import html.parser
import io
import json
import re

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import custom
from nonlocal_jax.cli import report
from nonlocal_jax.data.datasets import custom_dataset
from nonlocal_jax.evaluation.calibration import Calibration
from nonlocal_jax.evaluation.comparison_page import compared, comparison_page, comparison_table
from nonlocal_jax.evaluation.details import Details
from nonlocal_jax.evaluation.evaluate import write_evaluation
from nonlocal_jax.evaluation.evaluator import Evaluation
from nonlocal_jax.evaluation.image_results import ImageCounts, ImageResults
from nonlocal_jax.evaluation.metrics import scores
from nonlocal_jax.evaluation.report import ReportFacts, write_report
from nonlocal_jax.evaluation.report_page import report_page
from nonlocal_jax.evaluation.saved import read_evaluation
from nonlocal_jax.evaluation.showcase import EACH, Example, Showcase
from nonlocal_jax.experiment import Experiment
from nonlocal_jax.inference.images import read_image
from nonlocal_jax.inference.pretrained import load
from nonlocal_jax.ops.calibration import calibration_counts
from nonlocal_jax.ops.confusion import confusion_matrices
from nonlocal_jax.protocol import EvalProtocol
from tests.test_cli import WITHOUT_EXTRAS, run_elsewhere

NASTY = '<script>alert("x")</script> & \'sky\''
CONFIG = {'name': 'park', 'eval': {'precision': 'highest'}, 'model': {'attention': 'blocks'}}


def test_confusion_matrices_of_images_and_groups(rng):
  labels = rng.choice([*range(5), 255], (3, 17, 11)).astype(np.uint8)
  predictions = rng.integers(0, 5, labels.shape).astype(np.uint8)
  groups = rng.integers(0, 2, labels.shape).astype(bool)
  found = np.asarray(
    confusion_matrices(
      *map(jnp.asarray, (predictions, labels, groups)), num_groups=2, num_classes=5
    )
  )
  expected = np.zeros((3, 2, 5, 5), np.int64)
  counted = labels != 255
  image = np.nonzero(counted)[0]
  places = (image, groups[counted].astype(int), labels[counted], predictions[counted])
  np.add.at(expected, places, 1)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('bins', [1, 15])
def test_calibration_counts_are_those_of_numpy(bins, rng):
  confidence = rng.random((2, 30, 41), np.float32) ** 0.2
  confidence[0, 0, :5] = 1
  confidence[1, 2, :5] = 0
  correct = rng.random(confidence.shape) < confidence
  counted = rng.random(confidence.shape) < 0.8
  counts, sums = map(
    np.asarray,
    calibration_counts(*map(jnp.asarray, (confidence, correct, counted)), bins=bins),
  )
  for image in range(2):
    for right in (0, 1):
      chosen = confidence[image][counted[image] & (correct[image] == right)]
      expected, _ = np.histogram(chosen, bins=bins, range=(0, 1))
      np.testing.assert_array_equal(counts[image, right], expected)
    of_image = confidence[image][counted[image]].astype(np.float64)
    expected, _ = np.histogram(of_image, bins=bins, range=(0, 1), weights=of_image)
    np.testing.assert_allclose(sums[image], expected, rtol=1e-4)


def test_the_calibration_error_is_the_mean_gap():
  found = Calibration(np.array([0, 30, 10]), np.array([0, 10, 50]), np.array([0, 18.0, 57.0]))
  # 40 pixels of accuracy 0.25 and confidence 0.45, 60 of 5/6 and 0.95.
  assert found.error == pytest.approx(0.4 * (0.45 - 0.25) + 0.6 * (0.95 - 5 / 6))
  assert found.bias == pytest.approx(0.75 - 0.6)
  np.testing.assert_allclose(found.accuracy, [np.nan, 0.25, 5 / 6])
  np.testing.assert_allclose(found.mean_confidence, [np.nan, 0.45, 0.95])
  again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
  np.testing.assert_array_equal(again.confidence, found.confidence)
  assert found.to_dict()['ECE'] == pytest.approx(100 * found.error, abs=1e-4)
  nothing = Calibration(*np.zeros((3, 4)))
  assert np.isnan([nothing.error, nothing.bias]).all()


def test_the_showcase_keeps_few_images_and_the_right_ones(rng):
  values = rng.permutation(60) / 60
  values[7] = np.nan
  doubts = np.where(rng.random(60) < 0.5, rng.permutation(60) / 60, 0)
  showcase = Showcase()
  for index, (value, doubt) in enumerate(zip(values.tolist(), doubts.tolist(), strict=True)):
    if showcase.wants(index, mean_iou=value, contradicted=doubt):
      label = np.full((640, 320), index, np.uint8)
      showcase.keep(index, Example(np.zeros((64, 32, 3), np.uint8), label, label, label))
    assert len(showcase.examples) <= 3 * EACH
  order = np.argsort(values)[:-1]  # NaN comes last
  expected = {*order[:EACH].tolist(), *order[-EACH:].tolist(), *np.argsort(-doubts)[:EACH].tolist()}
  assert set(showcase.examples) == expected
  for index, example in showcase.examples.items():
    assert [array.shape[:2] for array in example] == [(320, 160)] * 4
    assert (example.truth == index).all()


@pytest.fixture(scope='module')
def evaluated(photos, peer_checkpoint, tmp_path_factory):
  """An evaluation of three images with its report, and one without; workdirs and results."""
  folder = tmp_path_factory.mktemp('evaluated')
  config = custom.get_config()
  config.data.source_dir, config.data.data_dir = str(photos), str(folder / 'prepared')
  config.data.num_classes, config.data.ignore_labels = 19, (20,)
  config.model.width, config.eval.scale, config.eval.shapes = 8, (96, 72), 1
  found = {}
  for name, wanted in (('plain', False), ('full', True)):
    config.eval.report = wanted
    experiment = Experiment.from_config(config)
    found[name] = experiment.evaluate(peer_checkpoint, folder / name)
  return folder, found


@pytest.mark.slow
def test_images_and_calibration_are_those_of_numpy(evaluated, photos, peer_checkpoint):
  """From the classes and confidences of `predict`, counted in float64."""
  folder, found = evaluated
  assert found['plain'].details is None
  names = {path.name for path in (folder / 'plain').iterdir()}
  assert names == {'metrics.json', 'predictions.png'}
  details = found['full'].details
  model = load(peer_checkpoint)
  model = model.with_protocol(EvalProtocol(scale=(96, 72)))
  confusion = np.zeros((19, 19), np.int64)
  levels, rights = [], []
  for place, name in enumerate(details.images.names):
    labels, confidence = model.predict(
      read_image(photos / f'images/val/{name}.png'), return_confidence=True
    )
    truth = cv2.imread(str(photos / f'labels/val/{name}.png'), cv2.IMREAD_UNCHANGED)
    assert details.images.sizes[place].tolist() == list(truth.shape)
    counted = truth < 19
    truth, labels, confidence = (array[counted] for array in (truth, labels, confidence))
    np.add.at(confusion, (truth, labels), 1)
    with np.errstate(invalid='ignore'):
      iou = [
        ((truth == c) & (labels == c)).sum() / np.float64(((truth == c) | (labels == c)).sum())
        for c in range(19)
      ]
    np.testing.assert_allclose(details.images.iou[place], iou, atol=2e-3)  # ties at rounding
    assert details.images.mean_iou[place] == pytest.approx(np.nanmean(iou), abs=1e-3)
    assert details.images.accuracy[place] == pytest.approx((truth == labels).mean(), abs=1e-3)
    assert details.images.confidence[place] == pytest.approx(confidence.mean(), abs=1e-3)
    sure = (confidence >= 0.9) & (truth != labels)
    assert details.images.contradicted[place] == pytest.approx(sure.sum(), abs=5)
    levels.append(confidence.astype(np.float64))
    rights.append(truth == labels)
  level, right = np.concatenate(levels), np.concatenate(rights)
  bins = np.minimum((level * 15).astype(int), 14)
  gaps = [abs(level[bins == b].sum() - right[bins == b].sum()) for b in range(15)]
  assert details.calibration.error == pytest.approx(sum(gaps) / len(level), abs=5e-4)
  assert details.calibration.pixels.sum() == len(level) == confusion.sum()
  assert np.abs(found['full'].confusion - confusion).sum() < 2e-3 * confusion.sum()
  np.testing.assert_array_equal(found['full'].confusion, found['plain'].confusion)


class _Parsed(html.parser.HTMLParser):
  """What a page holds, and whether its tags are closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.sources, self.text = [], [], [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [value for name, value in attrs if name in ('src', 'href')]
    if tag not in ('meta', 'img', 'br'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


@pytest.mark.slow
def test_the_page_of_an_evaluation_needs_no_other_file(evaluated):
  folder, found = evaluated
  text = (folder / 'full/report.html').read_text()
  parsed = _Parsed(text)
  words = ' '.join(parsed.text)
  metrics = json.loads((folder / 'full/metrics.json').read_text())
  for wanted in (
    f'mIoU {metrics["mIoU"]:.2f} %',
    'Calibration',
    'Labels that look wrong',
    'class 18',
  ):
    assert wanted in words
  for fact in ('checkpoint', 'sha256', 'devices', 'decoder', 'command'):
    assert metrics[fact] is None or metrics[fact] in words
  assert metrics['calibration']['ECE'] == pytest.approx(
    100 * found['full'].details.calibration.error
  )
  assert 'script' not in parsed.tags
  assert 'link' not in parsed.tags
  assert len(parsed.sources) > 4 * 3  # at least four pictures of each of the three images
  for source in parsed.sources:
    kind, _, data = source.partition(';base64,')
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
      assert kind == f'data:{Image.MIME[picture.format]}'
  with (folder / 'full/metrics_per_image.csv').open() as file:
    rows = list(csv.DictReader(file))
  images = found['full'].details.images
  assert [row['image'] for row in rows] == list(images.names)
  np.testing.assert_allclose([float(row['mIoU']) for row in rows], 100 * images.mean_iou, atol=1e-4)


@pytest.mark.slow
def test_the_command_writes_the_same_page_again(evaluated, script, capsys, tmp_path):
  folder, _ = evaluated
  page = folder / 'full/report.html'
  before = page.read_text()
  page.unlink()
  assert script(report, folder / 'full') == (None, '')
  assert page.read_text() == before
  assert capsys.readouterr().out == f'{page}\n'
  out = tmp_path / 'elsewhere.html'
  assert script(report, folder / 'full', f'--out={out}') == (None, '')
  assert out.read_text() == before
  # Of an evaluation without details, what is known.
  assert script(report, folder / 'plain', f'--out={out}') == (None, '')
  assert 'The confidence of predictions is not known.' in out.read_text()


def made_up(folder, classes=('sky', 'tree', 'lake'), *, seed=0, name='park', images=30):
  """An evaluation of random labels and predictions; returns its folder."""
  rng = np.random.default_rng(seed)
  dataset = custom_dataset(classes=classes, name=name)
  counts = ImageCounts([(40, 60)] * images, len(classes))
  showcase, total = Showcase(), np.zeros((len(classes),) * 2, np.int64)
  for index in range(images):
    confusion = rng.integers(0, 40, (1, 2, len(classes), len(classes)))
    confusion[:, :, range(len(classes)), range(len(classes))] *= 5
    values, doubts = counts.add([index], confusion, confusion.sum(axis=(1, 2, 3)) * 0.8)
    total += confusion.sum(axis=(0, 1))
    if showcase.wants(index, mean_iou=float(values[0]), contradicted=float(doubts[0])):
      label = rng.integers(0, len(classes), (40, 60)).astype(np.uint8)
      image = rng.integers(0, 256, (40, 60, 3), np.uint8)
      showcase.keep(index, Example(image, label, label[::-1].copy(), label * 80))
  pixels = rng.integers(0, 1000, (2, 15))
  calibration = Calibration(*pixels, pixels.sum(axis=0) * (np.arange(15) + 0.5) / 15)
  names = [f'{NASTY} {index}' for index in range(images)]
  details = Details(counts.results(names), calibration, showcase.examples)
  evaluation = Evaluation(total, scores(total), [], 2.0, details)
  facts = ReportFacts(config=CONFIG, protocol=EvalProtocol(), images=images, checkpoint=NASTY)
  picture = (np.zeros((4, 4, 3), np.uint8), *np.zeros((2, 4, 4), np.uint8))
  evaluation.examples.append(picture)
  write_evaluation(folder, evaluation, dataset, facts)
  return folder


def test_names_are_escaped(tmp_path):
  folder = made_up(tmp_path / 'run', (NASTY, '&amp;', '=1+1'), name=NASTY)
  text = (folder / 'report.html').read_text()
  parsed = _Parsed(text)
  assert 'script' not in parsed.tags
  assert sum(NASTY in data for data in parsed.text) > 20
  assert '&amp;amp;' in text
  saved = read_evaluation(folder)
  assert saved.classes == (NASTY, '&amp;', '=1+1')
  assert saved.images.names[3] == f'{NASTY} 3'


def test_results_of_images_are_read_as_they_were_written(rng):
  counts = ImageCounts([(4, 5), (6, 7), (1, 1)], 3)
  confusions = rng.integers(0, 9, (2, 2, 3, 3))
  confusions[1, :, 2] = confusions[1, :, :, 2] = 0
  counts.add([2, 0], confusions, np.array([7.0, 3.0]))
  written = counts.results(['a,"b"', 'c\nd', ''])
  assert written.pairs[1].tolist() == [-1, -1]
  assert np.isnan(written.iou[0, 2])
  assert np.isnan(written.mean_iou[1])
  read = ImageResults.from_csv(written.to_csv(['x', 'x', 'y']), ['x', 'x', 'y'])
  assert read.names == written.names
  for name in ('sizes', 'labeled', 'contradicted', 'pairs'):
    np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
  for name in ('iou', 'accuracy', 'confidence'):
    np.testing.assert_allclose(getattr(read, name), getattr(written, name), atol=1e-6)


def test_two_runs_are_compared_class_by_class(tmp_path, script, capsys):
  a, b = made_up(tmp_path / 'a'), made_up(tmp_path / 'b', seed=1)
  out = tmp_path / 'both.html'
  assert script(report, a, b, f'--out={out}') == (None, '')
  printed = capsys.readouterr().out
  comparison = compared(read_evaluation(a), read_evaluation(b))
  expected = [
    scores(np.array(json.loads((folder / 'metrics.json').read_text())['confusion'])).iou
    for folder in (a, b)
  ]
  np.testing.assert_array_equal(comparison.iou, expected)
  gain = 100 * (expected[1] - expected[0])
  for place, name in enumerate(('sky', 'tree', 'lake')):
    first, second = (100 * iou[place] for iou in expected)
    assert re.search(
      rf'^{name} +{first:.2f} +{second:.2f} +\{gain[place]:+.2f}$', printed, re.MULTILINE
    )
  assert printed.startswith(f'A: {a}\nB: {b}\nclass')
  assert printed.endswith(f'{out}\n')
  words = ' '.join(_Parsed(out.read_text()).text)
  assert 'Of 30 images in both' in words
  assert f'{gain[0]:+.2f}' in words
  assert script(report, a, a) == (None, '')
  assert 'ECE' in comparison_table(comparison)
  assert comparison_page(comparison) == out.read_text()


@pytest.mark.parametrize(
  ('damage', 'sentence'),
  [
    (
      lambda a, b: (a / 'metrics.json').unlink(),
      '{a} holds no evaluation (metrics.json is missing)',
    ),
    (lambda a, b: (a / 'metrics.json').write_text('{'), '{a}/metrics.json cannot be read ('),
    (
      lambda a, b: (a / 'metrics.json').write_text('{"mIoU": 3}'),
      "{a}/metrics.json is not that of an evaluation (KeyError('confusion')): evaluate again.",
    ),
    (
      lambda a, b: (a / 'metrics_per_image.csv').write_text('image\n'),
      '{a}/metrics_per_image.csv is not as the evaluation wrote it (its checksum differs): remove',
    ),
    (
      lambda a, b: (a / 'report_pictures.zip').write_bytes(b'PK'),
      '{a}/report_pictures.zip is not as the evaluation wrote it (its checksum differs): remove',
    ),
    (
      lambda a, b: made_up(b, ('sky', 'tree', 'sea')),
      '{a} and {b} were evaluated on different classes (only the first has lake, only the second '
      'has sea): compare runs with the same ones.',
    ),
    (
      lambda a, b: made_up(b, ('sky', 'lake', 'tree')),
      '{a} and {b} were evaluated on different classes (the same names in another order): compare',
    ),
  ],
)
def test_runs_that_cannot_be_reported_are_a_sentence(damage, sentence, tmp_path, script):
  a, b = made_up(tmp_path / 'a'), made_up(tmp_path / 'b')
  damage(a, b)
  out = tmp_path / 'out.html'
  status, said = script(report, a, b, f'--out={out}')
  assert status == 1
  assert said.startswith(f'error: {sentence.format(a=a, b=b)}')
  assert '\n' not in said
  assert not out.exists()


def test_files_that_were_removed_are_done_without(tmp_path, script):
  folder = made_up(tmp_path / 'run')
  (folder / 'report_pictures.zip').unlink()
  assert script(report, folder) == (None, '')
  assert '<img' not in (folder / 'report.html').read_text()
  (folder / 'metrics_per_image.csv').unlink()
  assert script(report, folder) == (None, '')
  assert 'metrics_per_image.csv) are not there' in (folder / 'report.html').read_text()


def test_the_core_installation_is_enough(tmp_path):
  folder = made_up(tmp_path / 'run')
  result = run_elsewhere(tmp_path, 'report', str(folder), program=WITHOUT_EXTRAS)
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout == f'{folder}/report.html\n'


def test_other_pages_are_never_replaced(tmp_path, script, capsys):
  folder = made_up(tmp_path / 'run')
  theirs = tmp_path / 'theirs.html'
  theirs.write_text('<p>mine</p>')
  status, said = script(report, folder, f'--out={theirs}')
  assert (status, said) == (
    1,
    f'error: {theirs} exists and is no report of nonlocal-jax: move it away.',
  )
  status, said = script(report, folder, f'--out={tmp_path / "x.txt"}')
  assert (status, 'must end in .html' in said) == (2, True)
  (folder / 'report.html').write_text('<p>mine</p>')
  capsys.readouterr()
  made_up(folder, seed=3)
  assert 'No report was written: ' in capsys.readouterr().err
  assert (folder / 'report.html').read_text() == '<p>mine</p>'


def test_scores_alone_make_a_page(tmp_path):
  """Also of an evaluation in which nothing is labeled."""
  dataset = custom_dataset(classes=['sky', 'tree'], name='park')
  facts = ReportFacts(config=CONFIG, protocol=EvalProtocol(), images=0, step=3)
  write_report(tmp_path, np.zeros((2, 2), np.int64), dataset, facts, seconds=0)
  text = report_page(read_evaluation(tmp_path))
  words = ' '.join(_Parsed(text).text)
  assert 'No pixel is wrong.' in words
  assert 'Absent from labels and predictions' in words
