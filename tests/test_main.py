"""The program from the command line: evaluation, and one sentence for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import main
from nonlocal_jax.data.layouts import Sample
from tests import peer

ROOT = Path(main.__file__).parent


def custom(source: Path, **settings: object) -> list[str]:
  """Flags of the custom config."""
  values = {'data.source_dir': source, 'data.data_dir': source.parent / 'prepared', **settings}
  config = f'--config={ROOT}/configs/custom.py'
  return [config, *(f'--config.{key}={value}' for key, value in values.items())]


DEMO = f'--config={ROOT}/configs/demo.py'
MATCHING = {'data.num_classes': 19, 'data.ignore_labels': '(20,)', 'model.width': 8}


def test_evaluation_of_a_file_equals_the_original(
  program, photos, peer_checkpoint, peer_model, tmp_path, capsys
):
  arguments = custom(photos, **MATCHING, **{'eval.scale': '(96,72)'})
  status, message = program(*arguments, '--mode=eval', f'--checkpoint={peer_checkpoint}')
  assert (status, message) == (None, '')
  metrics = json.loads((tmp_path / 'runs/custom/metrics.json').read_text())
  samples = [
    Sample('', photos / f'images/val/{i}.png', photos / f'labels/val/{i}.png') for i in range(3)
  ]
  expected = peer.scores_of_files(
    peer_model,
    samples,
    box=(96, 72),
    num_classes=19,
    label_of=lambda label: np.where(label == 20, 255, label),
  )
  assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=0.01)
  assert f'mIoU {metrics["mIoU"]:.2f}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['stray'], "'stray' is no flag; options start with --"),
    (['--mode=fly'], 'mode'),
    (['--chekpoint=x'], 'there is no option --chekpoint; the nearest is --checkpoint'),
    (
      ['--config=nonlocal_r50-d8_4xb4-80k_ade20k-512x512'],
      'is a released model; the name of its config is ade20k_r50:512x512_80k.',
    ),
    (['--config=ade20k_r11'], "there is no config 'ade20k_r11'; the nearest is ade20k_r101"),
    (['--config=ade20k_r50:20k'], "no variant '20k' was published"),
    (['--config=demo:20k'], 'config demo has no variants'),
    (['--distributed=yes'], "'yes' is neither true nor false"),
    (['--config.model.width=1'], 'config.model.width is 1; it must be a number of at least 2'),
    (['--config=configs/none.py'], 'there is no config file configs/none.py'),
    (
      [f'--config={ROOT}/configs/ade20k_r50:80k', '--config.eval.shapes=1'],
      'there is no config file',
    ),
    (['--mode=eval'], 'eval needs --checkpoint'),
    (['--checkpoint=x.pth'], 'There is no x.pth: give a .pth file'),
    (['--new_classifier'], '--new_classifier is for the network of a --checkpoint; give one'),
    (['--match-classes'], '--match_classes is for the network of a --checkpoint; give one'),
    (
      ['--match_classes', '--new_classifier', '--checkpoint=x.pth'],
      '--match_classes those of new ones only: give one of the two.',
    ),
    (
      [DEMO, '--config.train.dtype=float16'],
      'dtype is float16; it must be float32 or bfloat16',
    ),
    ([DEMO, '--config.train.batch_norm=local'], 'it must be global or per_device or frozen'),
    (
      [DEMO, '--config.train.ema_decay=1.0'],
      'ema_decay is 1.0; it must be a number in [0, 1)',
    ),
    ([DEMO, '--config.train.class_weights=(1.0,)'], 'class_weights has 1 weights, but there are 8'),
    ([DEMO, '--config.optimizer.schedule=v2'], 'optimizer.schedule is v2; it must be v0 or v1'),
    ([f'--config={ROOT}/configs/ade20k_r50.py:20k'], "no variant '20k' was published"),
    (
      [
        f'--config={ROOT}/configs/ade20k_r50.py',
        '--config.data.data_dir=/nowhere',
        '--config.init_backbone=none',
      ],
      'ade20k-train was not prepared in /nowhere: give the folder of its images as source_dir',
    ),
    (
      [DEMO, '--config.model.dept=50'],
      'there is no field config.model.dept; the nearest is config.model.depth',
    ),
    ([DEMO, '--config.model.depth=deep'], 'depth'),
    (
      [DEMO, '--config.model.attention=fast'],
      'attention is fast; it must be blocks or cudnn or flash',
    ),
    (
      [DEMO, '--config.model.attention=cudnn'],
      'config.model.attention is cudnn, which needs an NVIDIA GPU, and this program runs on cpu',
    ),
    (
      [DEMO, '--config.model.attention=cudnn', '--mode=eval', '--checkpoint=x.pth'],
      'config.model.attention is cudnn, which needs an NVIDIA GPU, and this program runs on cpu',
    ),
    (
      [DEMO, '--config.model.attention=cudnn', '--config.model.non_local=False'],
      'attention is cudnn; it must be blocks without the non-local block',
    ),
    ([DEMO, '--config.model.depth=51'], 'depth is 51; it must be'),
    ([DEMO, '--config.data.num_classes=9'], 'demo has 8 classes'),
    ([DEMO, '--config.train.steps=0'], 'train.steps is 0; it must'),
    ([DEMO, '--config.train.crop=(0,9)'], 'train.crop is (0, 9); it'),
    ([DEMO, '--config.eval.scale=(9,)'], 'eval.scale is (9,); it'),
    (
      [DEMO, '--config.eval.window_crop=(9,9)'],
      'eval.window_stride is (); it must be given together with config.eval.window_crop',
    ),
    (
      [DEMO, '--config.eval.window_crop=(9,9)', '--config.eval.window_stride=(9,10)'],
      'eval.window_stride is (9, 10); it must be at most config.eval.window_crop',
    ),
    (
      custom(Path('/nowhere'), **{'data.num_classes': 300}),
      'data.num_classes is 300; it must be from 2 to 255',
    ),
    (
      custom(Path('/nowhere'), **{'data.num_classes': 3, 'data.ignore_labels': '(256,)'}),
      'data.ignore_labels is (256,); it must be whole numbers from 0 to 255',
    ),
    (
      [f'--config={ROOT}/configs/custom.py', '--config.data.data_dir=/nowhere'],
      'The number of classes of dataset custom is not known',
    ),
    (
      [f'--config={ROOT}/configs/custom.py', '--config.data.dataset=coco'],
      "config.data.dataset is 'coco'; it must be one of cityscapes, ade20k, voc12aug, demo, custom",
    ),
    (
      [f'--config={ROOT}/configs/ade20k_r50.py', '--config.data.reduce_zero_label=False'],
      'config.data.reduce_zero_label is False, but the label files of ade20k are to be read with',
    ),
    (
      [f'--config={ROOT}/configs/voc12aug_r50.py', '--config.data.classes=("a", "b")'],
      'Dataset voc12aug has 2 class names but 21 colors: give one for each',
    ),
    (
      [f'--config={ROOT}/configs/voc12aug_r50.py', '--config.data.label_map=(0, 2)'],
      'leading to 0, 1, ... without a gap, or to 255 for none',
    ),
    (
      custom(Path('/nowhere'), **MATCHING),
      'no folder /nowhere',
    ),
  ],
)
def test_mistakes_on_the_command_line(program, tmp_path, arguments, message):
  status, said = program(*arguments)
  assert status not in (0, None)
  assert message in said
  assert len(said.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def bad_sets(photos: Path, root: Path):
  """Folders with one thing wrong each, and what is said of it."""
  images, labels = sorted((photos / 'images/val').iterdir()), photos / 'labels/val'
  for name, message in (
    ('no_val', r'There is no folder .*images/val'),
    ('empty', r'images/val holds no images'),
    ('no_label', r'1\.png has no label map: expected .*labels/val/1\.png'),
    ('broken_label', r'labels/val/1\.png is cut off or broken'),
    ('small_label', r'labels/val/1\.png is 5x4 pixels but its image .*1\.png is 64x72'),
  ):
    folder = root / name
    for kind in ('images', 'labels'):
      (folder / kind / ('val' if name != 'no_val' else 'train')).mkdir(parents=True)
    if name not in ('no_val', 'empty'):
      for image in images:
        (folder / 'images/val' / image.name).write_bytes(image.read_bytes())
        data = (labels / image.name).read_bytes()
        (folder / 'labels/val' / image.name).write_bytes(data)
    label = folder / 'labels/val/1.png'
    if name == 'no_label':
      label.unlink()
    elif name == 'broken_label':
      label.write_bytes(label.read_bytes()[:60])
    elif name == 'small_label':
      cv2.imwrite(str(label), np.zeros((4, 5), np.uint8))
    yield folder, message


def test_bad_folders(program, photos, peer_checkpoint, tmp_path_factory, tmp_path):
  for folder, message in bad_sets(photos, tmp_path_factory.mktemp('bad')):
    status, said = program(
      *custom(folder, **MATCHING), '--mode=eval', f'--checkpoint={peer_checkpoint}'
    )
    assert status == 1
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_label_outside_the_classes(program, photos, peer_checkpoint, tmp_path):
  arguments = custom(photos, **{**MATCHING, 'data.ignore_labels': '()'})
  status, said = program(*arguments, '--mode=eval', f'--checkpoint={peer_checkpoint}')
  assert status == 1
  assert re.search(r'Label value 20 .*labels/val/0\.png\) is none of the 19 classes 0', said)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      {'model.depth': 101},
      'holds R-50, width 8, 19 classes, but the config describes R-101, width 8',
    ),
    ({'data.num_classes': 21}, 'but the config describes R-50, width 8, 21 classes'),
    ({'model.width': 16}, 'but the config describes R-50, width 16, 19 classes'),
  ],
)
def test_checkpoint_of_another_network(
  program, photos, peer_checkpoint, settings, message, tmp_path
):
  arguments = custom(photos, **{**MATCHING, **settings})
  status, said = program(*arguments, '--mode=eval', f'--checkpoint={peer_checkpoint}')
  assert status == 1
  assert message in said
  assert not list(tmp_path.iterdir())


def test_files_that_are_no_checkpoints(program, photos, tmp_path_factory, tmp_path):
  folder = tmp_path_factory.mktemp('files')
  (folder / 'text.pth').write_text('hello')
  torch.save({'state_dict': {}}, folder / 'empty.pth')
  for path in (folder / 'none.pth', folder / 'text.pth', folder / 'empty.pth', folder):
    status, said = program(*custom(photos, **MATCHING), '--mode=eval', f'--checkpoint={path}')
    assert status == 1
    assert str(path) in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_exit_status_1(tmp_path):
  """From outside: no traceback, nothing on the other stream, nothing left."""
  result = subprocess.run(
    [sys.executable, ROOT / 'main.py', '--mode=eval'], capture_output=True, text=True, cwd=tmp_path
  )
  assert result.returncode == 1
  assert re.fullmatch(r'error: eval needs --checkpoint: .*\n', result.stderr)
  assert not list(tmp_path.iterdir())
