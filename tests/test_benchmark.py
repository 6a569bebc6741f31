"""The command benchmark: a tiny run, its counts, the peer beside it, on a GPU, and errors."""

import importlib.util
import json
import math
import operator
import sys
import time

import pytest
from PIL import Image

from benchmarks import compare, gpu, peer, report
from benchmarks.report import as_markdown, peak_of
from nonlocal_jax.cli import benchmark, benchmark_process
from nonlocal_jax.cli.measurements import forward_flops, measure
from nonlocal_jax.data.synthetic import write_demo_set
from nonlocal_jax.models.config import STAGE_BLOCKS, NonLocalNetConfig

MACHINE = {'jax': '0', 'backend': 'cpu', 'device': 'cpu', 'devices': 1}
TINY = ('--width=8', '--depth=14', '--classes=8', '--repeats=1')


@pytest.fixture
def in_this_process(monkeypatch):
  """Measures in this process, which has imported everything, and the same thing once."""
  found = {}

  def run_child(child, _):
    key = child.measure, json.dumps(child.options)
    if key not in found:
      found[key] = measure(child.measure, benchmark_process.started(child))
    return found[key]

  monkeypatch.setattr(benchmark, 'run_child', run_child)


@pytest.mark.slow
def test_tiny_run(in_this_process, script, tmp_path, monkeypatch, capsys):
  names = ('inference', 'training', 'network', 'non_local')
  sizes = ('--sizes', '64x96', '--train-sizes', '32x64x2', '--positions', 64, 256)
  out = tmp_path / 'out'
  assert script(benchmark, *TINY, f'--out={out}', '--only', *names, *sizes) == (None, '')

  printed = capsys.readouterr().out
  assert [path.name for path in out.iterdir()] == ['results.json']
  records = json.loads((out / 'results.json').read_text())['measurements']
  sides = [(record['section'], record['label'], record['side']) for record in records]
  assert sides == [
    ('network', '', 'ours'),
    ('inference', '64x96, highest', 'first'),
    ('inference', '64x96, highest', 'ours'),
    ('training', '32x64, batch 2, float32', 'first'),
    ('training', '32x64, batch 2, float32', 'ours'),
    ('non_local', '', 'ours'),
  ]
  for record in records:
    timed = {name: value for name, value in record.items() if name.endswith('seconds')}
    assert all(0 < seconds < 1000 for seconds in timed.values())
    assert len(timed) == {'inference': 3, 'training': 4}.get(record['section'], 0)
    assert 0 < record['peak_gib'] < 100
    assert f'{record["section"]} {record["label"]}'.strip() in printed
  assert sorted(records[0]['flops']) == ['32x64', '64x96']
  assert min(records[-1]['forward'] + records[-1]['gradient']) > 0

  monkeypatch.setattr(sys, 'argv', ['report.py', str(out)])
  report.main()
  text = (out / 'results.md').read_text()
  for part in (
    '| 64x96, highest |',
    '| 32x64, batch 2, float32 |',
    'R-14, width 8',
    '| 256 |',
    'cores',
  ):
    assert part in text
  assert 'theirs: ' not in text  # columns of what was not measured are left out
  with Image.open(out / 'scaling.png') as picture:
    assert picture.format == 'PNG'


@pytest.mark.slow
def test_on_a_folder_beside_the_peer_in_a_process_of_its_own(script, tmp_path, monkeypatch):
  run_child = benchmark.run_child
  figures = {'seconds': 0.5, 'total_seconds': 4.0, 'peak_gib': 2.0, 'images': 2, 'mIoU': 1.0}

  def run_some(child, folder):
    if child.measure == 'machine' or child.side == 'theirs':
      return run_child(child, folder)
    if child.measure == 'pipeline':
      return measure('pipeline', {**child.options, 'batches': 1})
    return figures  # of the command eval

  monkeypatch.setattr(benchmark, 'run_child', run_some)
  arguments = ('--only', 'evaluation', 'folder', 'pipeline', '--limit=2', '--eval-scale=96x96')
  assert script(compare, *TINY, f'--out={tmp_path}', *arguments, '--rounds=1') == (None, '')
  results = json.loads((tmp_path / 'results.json').read_text())
  assert results['machine']['backend'] == 'cpu'
  records = results['measurements']
  assert [r['side'] for r in records] == [*2 * ('first', 'ours', 'theirs'), 'ours']
  _, ours, theirs, *_, folder, pipeline = records
  assert (folder['section'], folder['images']) == ('folder', 2)
  assert 0 < folder['seconds'] < folder['total_seconds'] < 1000
  assert 0 < theirs['seconds'] < theirs['total_seconds'] < 1000
  assert (theirs['images'], pipeline['images'], pipeline['crop']) == (2, 2, [512, 512])
  assert 0 <= theirs['mIoU'] <= 100
  assert pipeline['seconds'] > 0
  text = (tmp_path / 'results.md').read_text()
  assert '| 512x512 | 16 |' in text
  row, _ = (line.split('|') for line in text.splitlines() if line.startswith('| highest | ratio'))
  ratios = [float(cell) for cell in row[1:-1] if cell.strip() not in ('highest', 'ratio', '')]
  expected = [ours[key] / theirs[key] for key in ('total_seconds', 'seconds', 'peak_gib')]
  assert ratios == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('measure_name', ['inference', 'training', 'training in bfloat16'])
def test_times_of_the_peer(measure_name):
  options = {'classes': 8, 'width': 8, 'depth': 14, 'stage_blocks': STAGE_BLOCKS[14]}
  options |= {'repeats': 1, 'device': 'cpu', 'started': time.time(), 'size': (32, 64)}
  if measure_name == 'inference':
    figures = peer.measure_inference(precision='highest', **options)
  else:
    dtype = 'bfloat16' if 'bfloat16' in measure_name else 'float32'
    figures = peer.measure_training(batch=2, dtype=dtype, **options)
  assert 0 < figures['seconds'] < 1000
  assert 0 < figures['start_seconds'] < 1000


@pytest.mark.parametrize('size', [(64, 96), (72, 568)])
def test_operations_are_those_of_convolutions_and_attention(size):
  """The closed form leaves out what is cheap: normalisation, ReLU, softmax, pooling."""
  config = NonLocalNetConfig.from_depth(26, width=8, num_classes=19)
  expected = operations(size, STAGE_BLOCKS[26], 8, 19)
  found = forward_flops(config, size)
  assert expected < found < 1.02 * expected


def operations(size, stage_blocks, width, classes):
  """2 * products of a forward pass to logits at stride 8, without those with padding."""
  total = 0

  def convolve(size, channels, out_channels, edge, *, stride=1, dilation=1):
    nonlocal total
    out = tuple(-(-side // stride) for side in size)
    taps = 1
    for side, out_side in zip(size, out, strict=True):
      offsets = [dilation * (tap - edge // 2) for tap in range(edge)]
      places = (stride * i + offset for i in range(out_side) for offset in offsets)
      taps *= sum(0 <= place < side for place in places)
    total += 2 * taps * channels * out_channels
    return out

  size = convolve(size, 3, width // 2, 3, stride=2)
  for channels in (width // 2, width):
    size = convolve(size, width // 2, channels, 3)
  size = tuple(-(-side // 2) for side in size)  # max pooling
  channels = width
  for stage, blocks in enumerate(stage_blocks):
    planes = width * 2**stage
    for block in range(blocks):
      stride = (1, 2, 1, 1)[stage] if block == 0 else 1
      # The first block of a stage has the dilation of the stage before (contract_dilation).
      dilation = ((1, 1, 1, 2) if block == 0 else (1, 1, 2, 4))[stage]
      convolve(size, channels, planes, 1)
      if block == 0:
        convolve(size, channels, 4 * planes, 1, stride=stride)
      size = convolve(size, planes, planes, 3, stride=stride, dilation=dilation)
      convolve(size, planes, 4 * planes, 1)
      channels = 4 * planes
  inner = channels // 4
  convolve(size, channels, inner, 3)
  for _ in range(3):  # g, theta, phi
    convolve(size, inner, inner // 2, 1)
  total += 2 * 2 * math.prod(size) ** 2 * (inner // 2)
  convolve(size, inner // 2, inner, 1)
  convolve(size, inner, inner, 3)
  convolve(size, channels + inner, inner, 3)
  convolve(size, inner, classes, 1)
  return total


def test_plan_on_a_gpu(script, tmp_path, monkeypatch):
  children = []

  def run_child(child, folder):
    if child.measure == 'machine':
      return {**MACHINE, 'backend': 'gpu'}
    children.append((child, benchmark_process.environment_of(child, folder)))
    return {'error': 'not measured'}

  monkeypatch.setattr(benchmark, 'run_child', run_child)
  monkeypatch.delenv('JAX_PLATFORMS')
  arguments = ('--only', 'training', '--rounds=1', f'--out={tmp_path}')
  assert script(compare, *arguments)[0] == 1
  network, *training = children
  # The operations, of which only CPUs tell, are for the shares of the peak.
  assert (network[0].measure, network[1]['JAX_PLATFORMS']) == ('network', 'cpu')
  assert all('JAX_PLATFORMS' not in environment for _, environment in training)
  options = [child.options for child, _ in training]
  assert {option['dtype'] for option in options} == {'float32', 'bfloat16'}
  assert ([512, 512], 4, 20) in [(o['size'], o['batch'], o['repeats']) for o in options]
  assert {child.options.get('device') for child, _ in training} == {None, 'cuda'}


@pytest.fixture
def measured_on_a_gpu(monkeypatch, tmp_path):
  """Runs benchmarks/gpu.py without a GPU; returns the measurements that it asked for."""
  monkeypatch.setattr(gpu, '_FOLDER_IMAGES', 2)

  def run(*arguments, figures=None):
    asked = []

    def run_child(child, folder, *, timeout=None):
      if child.measure == 'machine':
        return {**MACHINE, 'backend': 'gpu', 'device': 'NVIDIA H100 80GB HBM3'}
      assert 0 < timeout <= 1000
      asked.append((child.section, child.label, child.side))
      return figures or {'seconds': 0.5, 'total_seconds': 4.0, 'images': 2, 'peak_gib': 1.0}

    monkeypatch.setattr(gpu, 'run_child', run_child)
    gpu.main([f'--out={tmp_path}', '--budget-seconds=1000', *arguments])
    return asked

  return run


def test_measurements_on_a_gpu_are_within_the_budget_and_merged(measured_on_a_gpu, tmp_path):
  parts = ('--only', 'step', 'prediction', 'folder')
  asked = measured_on_a_gpu(*parts)
  step = ('training', '512x512, batch 4, float32')
  assert asked[:2] == [(*step, 'first'), (*step, 'theirs')]
  assert {section for section, _, _ in asked} == {'training', 'inference', 'folder'}
  path = tmp_path / 'nvidia_h100_80gb_hbm3.json'
  before = json.loads(path.read_text())

  # A step of ours takes up to 75 seconds; MMSegmentation's half of that.
  assert measured_on_a_gpu('--only', 'step', '--budget-seconds=60', figures={'seconds': 0.25}) == [
    (section, label, side)
    for section, label, side in asked
    if section == 'training' and side == 'theirs'
  ]
  after = json.loads(path.read_text())
  key = operator.itemgetter('section', 'label', 'side')
  assert sorted(map(key, after)) == sorted(map(key, before))
  again = {key(record): record['seconds'] for record in after}
  assert again[(*step, 'theirs')] == 0.25
  assert again[(*step, 'first')] == 0.5
  text = path.with_suffix('.md').read_text()
  assert '| 512x512, batch 4, float32 | 0.5 | 1 | 0.25 | 2 |' in text
  assert '| 1024x2048, highest | 0.5 |' in text


def test_speed_on_a_gpu():
  machine = {**MACHINE, 'date': '2026-01-01', 'processor': 'P', 'cores': 16}
  machine |= {'backend': 'gpu', 'device': 'NVIDIA H100 80GB HBM3'}
  settings = {'depth': 50, 'width': 64, 'classes': 150}
  options = {'size': [512, 512], 'depth': 50, 'precision': 'highest'}
  cost = {'seconds': 0.02, 'peak_gib': 1.0, 'start_seconds': 9.0, 'compile_seconds': 5.0}
  flops = {'parameters': 1, 'flops': {'512x512': 1e12}}
  training = [
    {
      'section': 'training',
      'label': f'512x512, batch 4, {dtype}',
      'side': 'ours',
      'options': {**options, 'batch': 4, 'dtype': dtype},
      **cost,
    }
    for dtype in ('float32', 'bfloat16')
  ]
  records = [
    {'section': 'network', 'label': '', 'side': 'ours', **flops},
    {'section': 'inference', 'label': '512x512', 'side': 'ours', 'options': options, **cost},
    *training,
    {'section': 'compile', 'label': '', 'side': 'ours', 'error': 'out of memory'},
  ]
  lines = as_markdown(machine, settings, records).splitlines()
  inference, wide, narrow = (line for line in lines if line.startswith('| 512x512') and '%' in line)
  assert '| 50 | 50 | 74.7% of 66.9 (float32) | 21.37 (ADE20K images' in inference
  assert '| 200 | 600 | 121.3% of 494.7 (TF32) | 9.1 GB (ADE20K) |' in wide
  assert '| 200 | 600 | 60.6% of 989.4 (bfloat16) | 9.1 GB (ADE20K) |' in narrow
  assert 'out of memory' in lines[-1]


@pytest.mark.parametrize(
  ('device', 'arithmetic', 'peak'),
  [
    ('Tesla V100-SXM2-16GB', 'float32', (15.7, 'float32')),
    ('Tesla V100-SXM2-16GB', 'bfloat16', None),
    ('NVIDIA A100-SXM4-80GB', 'float32', (156, 'TF32')),
    ('NVIDIA A100-SXM4-80GB', 'highest', (19.5, 'float32')),
    ('NVIDIA A100-SXM4-80GB', 'default', (156, 'TF32')),
    ('NVIDIA H100 PCIe', 'bfloat16', (756, 'bfloat16')),
    ('another', 'highest', None),
  ],
)
def test_peak_is_that_of_the_arithmetic(device, arithmetic, peak):
  assert peak_of(device, arithmetic) == peak


def test_errors(script, tmp_path, monkeypatch):
  found = script(benchmark, f'--data={tmp_path}')
  assert found == (
    1,
    'error: --data needs --num-classes, the number of classes in its label files.',
  )
  assert 'There is no file' in script(benchmark, f'--checkpoint={tmp_path / "none.pth"}')[1]
  assert script(benchmark, '--sizes', '64')[0] == 2
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert script(compare, f'--out={tmp_path}') == (
    1,
    'error: MMSegmentation is missing: pip install -r requirements-dev.txt.',
  )


def test_a_measurement_that_fails_is_told(script, tmp_path, monkeypatch):
  def run_child(child, _):
    return {'error': 'no memory'} if child.section == 'network' else MACHINE

  monkeypatch.setattr(benchmark, 'run_child', run_child)
  found = script(compare, f'--out={tmp_path}', '--only', 'network')
  assert found[0] == 1
  assert '1 of 1 measurements failed' in found[1]
  assert 'no memory' in (tmp_path / 'results.md').read_text()


@pytest.mark.slow
def test_checks_of_a_gpu_run_the_commands(tmp_path):
  """On a CPU everything that they compare has to be equal."""
  data = tmp_path / 'demo'
  write_demo_set(data, train=4, val=2)
  fields = (
    '--config.model.depth=14',
    '--config.data.num_classes=8',
    '--config.train.steps=2',
    '--config.train.batch_size=4',
    '--config.train.crop=(64, 64)',
    '--config.train.scale=(96, 96)',
    '--config.eval.scale=(96, 96)',
    '--config.model.width=8',
  )
  checks = gpu.Checks(data, fields, tmp_path, platform='cpu')
  assert 0 <= checks.curve('float32')['mIoU'] <= 100
  assert checks.pixels(['default']) == {'pixels': 2 * 192 * 192, 'default': 1.0}
  stopped = checks.deterministic('--config.model.width=8')
  assert 5 <= stopped['stopped_at'] < 12
  assert stopped['arrays_with_the_same_bits'] == stopped['arrays'] > 10
