"""prepare_dataset.py and browse_dataset.py, and what main.py does with what they leave."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

from nonlocal_jax.cli import browse, prepare
from nonlocal_jax.data import transforms
from tests.image_trees import png_of, turn_into_sbd, write_tree

ROOT = Path(__file__).parents[1]
DESCRIPTION = {
  'classes': ['sky', 'sea', 'ship'],
  'palette': [[10, 20, 30], [40, 50, 60], [250, 0, 0]],
  'label_map': [0, 1, 1, 2],
}
SMALL = {
  'model.depth': 14,
  'model.width': 8,
  'train.steps': 1,
  'train.batch_size': 4,
  'train.scale': (96, 64),
  'train.crop': (48, 48),
  'eval.scale': (64, 64),
  'eval.window_crop': (),
  'eval.window_stride': (),
}


def set_fields(values):
  return [f'--config.{key}={value}' for key, value in values.items()]


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['cityscapes', 'ade20k', 'voc12aug'])
def test_benchmark_set_prepared_by_the_script_trained_on_and_evaluated(
  layout, script, program, tmp_path, capsys
):
  source, data_dir = tmp_path / 'source/VOC2012', tmp_path / 'tfds'
  samples = write_tree(layout, source)
  if layout == 'voc12aug':
    turn_into_sbd(source)
  elif layout == 'cityscapes':
    for sample in samples['val']:
      ids = np.random.default_rng(1).integers(34, size=cv2.imread(str(sample.image)).shape[:2])
      name = sample.label.name.replace('labelTrainIds', 'labelIds')
      sample.label.with_name(name).write_bytes(png_of(ids.astype(np.uint8)))
      sample.label.unlink()
  arguments = ['--dataset', layout, '--source', source, '--data-dir', data_dir]
  assert script(prepare, *arguments) == (None, '')
  printed = capsys.readouterr()
  assert f'warning: {layout}-train has 3 images; the published split has' in printed.err
  assert f'{layout}-val: 2 images in {data_dir}' in printed.out
  command = shlex.split(printed.out.splitlines()[-1])
  assert command[:4] == ['python', '-m', 'nonlocal_jax', 'train']

  # Without the source: what was prepared is found by the dataset's name.
  configured = [*command[4:], *set_fields(SMALL), '--config.init_backbone=none']
  assert program(*configured, '--workdir=run') == (None, '')
  trained = json.loads(Path('run/metrics.json').read_text())
  assert trained['step'] == 1
  assert trained['images'] == 2
  assert 0 <= trained['aAcc'] <= 100
  evaluate = ['--mode=eval', '--checkpoint=run', '--workdir=evaluated']
  assert program(*configured, *evaluate) == (None, '')
  evaluated = json.loads(Path('evaluated/metrics.json').read_text())
  assert evaluated['classes'] == trained['classes']


@pytest.fixture
def described(tmp_path):
  """A custom dataset with its description."""
  source = tmp_path / 'source'
  samples = write_tree('custom', source)
  (source / 'dataset.json').write_text(json.dumps(DESCRIPTION))
  return source, samples


def shares_of(samples, label_map):
  labels = [transforms.decode_label(sample.label.read_bytes()).ravel() for sample in samples]
  counts = np.bincount(np.concatenate(labels), minlength=256)
  return [
    int(counts[[old for old, new in enumerate(label_map) if new == k]].sum()) for k in (0, 1, 2)
  ]


def test_custom_set_is_counted_as_described(described, script, tmp_path, capsys):
  source, samples = described
  arguments = ['--dataset=custom', '--source', source, '--data-dir', tmp_path / 'tfds']
  assert script(prepare, *arguments, '--splits', 'train') == (None, '')
  printed = capsys.readouterr().out.splitlines()
  pixels = shares_of(samples['train'], DESCRIPTION['label_map'])
  rows = {words[0]: words[1] for words in map(str.split, printed) if words[1:] and '%' in words}
  expected = [f'{100 * count / sum(pixels):.2f}' for count in pixels]
  assert [rows[name] for name in DESCRIPTION['classes']] == expected
  assert printed[-1].split()[4] == '--config=custom'


def test_undescribed_custom_set_is_counted_by_value(described, script, tmp_path, capsys):
  source, _ = described
  (source / 'dataset.json').unlink()
  arguments = ['--dataset=custom', '--source', source, '--data-dir', tmp_path / 'tfds']
  assert script(prepare, *arguments) == (None, '')
  printed = capsys.readouterr().out
  assert [f'value {value} ' in printed for value in range(5)] == [True] * 4 + [False]
  assert 'Describe the label values in dataset.json in' in printed


def test_bad_samples_end_the_script_unless_left_out(described, script, tmp_path, capsys):
  source, samples = described
  samples['val'][0].image.write_bytes(b'')
  arguments = ['--dataset=custom', '--source', source, '--data-dir', tmp_path / 'tfds']
  status, said = script(prepare, *arguments)
  assert status == 1
  assert said.startswith(f'error: File {samples["val"][0].image} is not an image, or broken')
  assert script(prepare, *arguments, '--skip-bad') == (None, '')
  printed = capsys.readouterr()
  assert 'warning: Left out of custom-val: 1 bad sample.' in printed.err
  assert 'custom-val: 1 image in' in printed.out


@pytest.mark.slow
def test_after_skip_bad_the_printed_command_trains(described, script, program, tmp_path, capsys):
  source, samples = described
  (source / 'dataset.json').unlink()
  samples['train'][0].label.unlink()
  samples['val'][0].image.write_bytes(b'')
  arguments = ['--dataset=custom', '--source', source, '--data-dir', tmp_path / 'tfds']
  assert script(prepare, *arguments, '--skip-bad') == (None, '')
  command = shlex.split(capsys.readouterr().out.splitlines()[-1])
  assert program(*command[4:], *set_fields(SMALL), '--workdir=run') == (None, '')
  assert json.loads(Path('run/metrics.json').read_text())['images'] == 1
  assert 'warning: Left out of custom-train: 1 bad sample.' in capsys.readouterr().err
  # What became bad later is still told.
  samples['train'][1].label.unlink()
  status, said = program(*command[4:], *set_fields(SMALL), '--workdir=other')
  assert (status, 'custom-train has 2 bad samples' in said) == (1, True)


@pytest.mark.parametrize(
  ('values', 'count', 'warnings'),
  [
    ((0, 1, 3), 4, ['The label values are 0, 1, 3: classes are 0, 1, ... without a gap']),
    ((0, 1, 2), 3, []),
  ],
)
def test_odd_label_values_are_told_when_prepared(values, count, warnings, script, tmp_path, capsys):
  for samples in write_tree('custom', tmp_path / 'source').values():
    for sample in samples:
      h, w = cv2.imread(str(sample.image)).shape[:2]
      sample.label.write_bytes(png_of(np.resize(np.array(values, np.uint8), (h, w))))
  arguments = ['--dataset=custom', '--source', tmp_path / 'source', '--data-dir', tmp_path / 'tfds']
  assert script(prepare, *arguments) == (None, '')
  printed = capsys.readouterr()
  assert printed.out.splitlines()[-1].split()[6] == f'--config.data.num_classes={count}'
  assert ('warning' in printed.err) == bool(warnings)
  for warning in warnings:
    assert warning in printed.err


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ((0, 0, 7, 128), r'0 \([\d,]+ pixels\), (7|128) \(.* pixels\) and (7|128) \(.*\), value'),
    (
      (0, 0, 255, 128),
      r'0 \(.*\) and .*, value 128 first in .*/labels/train/.+\.png, which are no ',
    ),
    (
      (0,) * 5 + (1, 255, 255),
      r'0 \(.*\), 255 \(.*\) and 1 \(.*\), value 1 first in .*',
    ),
    (
      ([0] * 60 + [255] * 39) * 4 + list(range(50, 60)),
      r'0 \(.*\), 255 \(.*\), 5\d \(.*\) and 9 more, value 5',
    ),
  ],
)
def test_gray_levels_and_smoothed_edges_are_no_indices(values, said, script, tmp_path, capsys):
  for samples in write_tree('custom', tmp_path / 'source').values():
    for sample in samples:
      h, w = cv2.imread(str(sample.image)).shape[:2]
      sample.label.write_bytes(png_of(np.resize(np.array(values, np.uint8), (h, w))))
  source = tmp_path / 'source'
  arguments = ['--dataset=custom', '--source', source, '--data-dir', tmp_path / 'tfds']
  status, complaint = script(prepare, *arguments)
  assert status == 1
  assert re.search(f'^error: The label maps in {source} have the values {said}', complaint), (
    complaint
  )
  assert 'To train on it' not in capsys.readouterr().out
  # What the sentence names helps.
  if 7 in values:
    (source / 'classes.txt').write_text('road 0 0 0\ncar 7 7 7\ntree 128 128 128\n')
  else:
    (source / 'dataset.json').write_text('{"num_classes": 129}')
  assert script(prepare, *arguments) == (None, '')


def test_pictures_of_what_training_sees(described, script, tmp_path, capsys):
  source, samples = described
  out = tmp_path / 'pictures'
  values = {**SMALL, 'data.source_dir': source, 'data.data_dir': tmp_path / 'tfds'}
  arguments = [f'--config={ROOT}/configs/custom.py', *set_fields(values), f'--out={out}']
  assert script(browse, *arguments, '--count=6') == (None, '')
  assert sorted(path.name for path in out.iterdir()) == ['000.png', '001.png', 'labels.json']
  pixels = shares_of(samples['train'], DESCRIPTION['label_map'])
  labels = json.loads((out / 'labels.json').read_text())
  assert [entry['pixels'] for entry in labels['classes']] == pixels
  assert [entry['class'] for entry in labels['classes']] == DESCRIPTION['classes']
  for picture, rows in (('000.png', 4), ('001.png', 2)):
    image = cv2.imread(str(out / picture))[..., ::-1]
    assert image.shape[0] > 300 * rows  # crops are square
    for colour in DESCRIPTION['palette']:  # in the label maps and the legend
      assert (image == colour).all(-1).sum() > 100
  assert 'sky' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--count=0'], 'error: --count is 0; it must be at least 1.'),
    (['--config=nowhere.py'], 'error: there is no config file nowhere.py'),
    (
      [f'--config={ROOT}/configs/custom.py', '--config.train.stepz=1'],
      'error: there is no field config.',
    ),
    (
      [f'--config={ROOT}/configs/custom.py', '--config.train.steps=0'],
      'error: config.train.steps is 0; it must be a number of at least 1.',
    ),
    (
      [f'--config={ROOT}/configs/custom.py', '--config.data.data_dir=nothing_here'],
      'error: The number of classes of dataset custom',
    ),
  ],
)
def test_wrong_arguments_are_a_sentence(arguments, sentence, script, tmp_path):
  status, said = script(browse, '--out', tmp_path / 'out', *arguments)
  assert (status, said[: len(sentence)]) == (1, sentence)
  assert not (tmp_path / 'out').exists()
