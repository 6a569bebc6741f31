"""The published datasets from their addresses, by a server on loopback, to their scores."""

import dataclasses
import functools
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from nonlocal_jax.cli import prepare
from nonlocal_jax.data import cityscapes, datasets, distributions, downloads
from nonlocal_jax.data.layouts import list_samples
from nonlocal_jax.data.transforms import decode_label
from nonlocal_jax.data.validation import read_sample
from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime import addresses
from tests import peer
from tests.dataset_archives import COUNTS, PATHS, make_set, publish, serve, serve_cityscapes
from tests.file_server import Served, file_server

ROOT = Path(__file__).parents[1]
NAMES = ('ade20k', 'voc12aug', 'cityscapes')
ADE, VOC, SBD = PATHS  # names of the archives
GTFINE, LEFT = list(COUNTS)[-2:]


@pytest.fixture
def server(monkeypatch):
  for name in (addresses.OFFLINE, 'http_proxy', 'HTTP_PROXY', 'all_proxy', cityscapes.PASSWORD):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  with file_server() as running:
    monkeypatch.setenv(addresses.MIRROR, running.address)
    yield running


@pytest.fixture(scope='session')
def sets(tmp_path_factory):
  return {name: make_set(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture
def published(sets, server, monkeypatch):
  """The small sets stand for the published ones, and are served."""
  for name, small in sets.items():
    publish(name, small, monkeypatch)
    serve(small, server)
  return sets


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The folder of the datasets where none is given."""
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  return tmp_path / 'home/datasets'


@pytest.fixture
def site(published, server, monkeypatch):
  """The site of Cityscapes, with cityscapesscripts installed; all hosts are the server."""
  monkeypatch.delenv(addresses.MIRROR)
  send = requests.Session.request

  def send_to_server(session, method, url, *arguments, **options):
    url = f'{server.address}/{url.split("/", 3)[3]}'
    return send(session, method, url, *arguments, **options)

  monkeypatch.setattr(requests.Session, 'request', send_to_server)
  package = 'cityscapesscripts.download'
  for name in ('cityscapesscripts', package):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  downloader = serve_cityscapes(published['cityscapes'], server)
  monkeypatch.setitem(sys.modules, f'{package}.downloader', downloader)
  monkeypatch.setenv(cityscapes.PASSWORD, 'secret & more')
  return server


def seen(folder):
  """The files and folders that a user sees, with all that a run left half-done."""
  names = (path.name for path in folder.iterdir())
  return sorted(name for name in names if not re.fullmatch(r'\..*\.(lock|checked)', name))


def files_of(samples):
  return {sample.id: sample.image.read_bytes() for sample in samples}


def assert_whole(name, folder, small, splits=('train', 'val')):
  for split in splits:
    samples = list_samples(datasets.PUBLISHED[name], folder, split).samples
    assert files_of(samples) == files_of(small.samples[split])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'config_name', 'peer_config'),
  [
    (
      'cityscapes_r50:769x769_40k',
      'nonlocal_r50-d8_769x769_40k_cityscapes',
      'nonlocal_r50-d8_4xb2-40k_cityscapes-769x769',
    ),
    (
      'ade20k_r50',
      'nonlocal_r50-d8_512x512_160k_ade20k',
      'nonlocal_r50-d8_4xb4-160k_ade20k-512x512',
    ),
    (
      'voc12aug_r50:512x512_20k',
      'nonlocal_r50-d8_512x512_20k_voc12aug',
      'nonlocal_r50-d8_4xb4-20k_voc12aug-512x512',
    ),
  ],
)
def test_from_the_addresses_to_the_scores_of_the_original(
  config, config_name, peer_config, site, published, home, script, program, tmp_path, capfd
):
  """Published configs on small archives, with narrow networks and small boxes and windows."""
  name = config.partition('_')[0]
  small, distribution = published[name], distributions.DISTRIBUTIONS[name]
  data_dir = tmp_path / 'tfds'
  arguments = [f'--dataset={name}', '--download', '--data-dir', data_dir]
  if name == 'cityscapes':
    arguments += ['--username=me']
  assert script(prepare, *arguments) == (None, '')
  said = capfd.readouterr().err
  assert -1 < said.index(distribution.terms) < said.index('Downloading ')
  assert 'warning' not in said
  assert f'The images are in {home}' in said
  assert seen(home) == [distribution.archives[0].folder.partition('/')[0]]  # no archives
  assert_whole(name, home, small)

  model = peer.build(peer_config, width=8)
  torch.save({'meta': {}, 'state_dict': model.state_dict()}, tmp_path / 'model.pth')
  values = {'data.data_dir': data_dir, 'model.width': 8, 'eval.scale': '(90,70)'}
  if name == 'cityscapes':
    values |= {'eval.window_crop': '(49,49)', 'eval.window_stride': '(33,33)'}
    model.test_cfg.update(crop_size=(49, 49), stride=(33, 33))
  status, message = program(
    f'--config={config}',
    *(f'--config.{key}={value}' for key, value in values.items()),
    '--mode=eval',
    f'--checkpoint={tmp_path / "model.pth"}',
    '--workdir=out',
  )
  assert (status, message) == (None, '')
  metrics = json.loads((tmp_path / 'out/metrics.json').read_text())
  assert metrics['config'] == config_name
  expected = peer.scores_of_files(
    model,
    small.samples['val'],
    box=(90, 70),
    num_classes=model.decode_head.num_classes,
    label_of=without_zero if name == 'ade20k' else lambda label: label,
  )
  assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=0.01)

  # What is prepared is not downloaded, even if the folder is gone.
  shutil.rmtree(home)
  site.requests.clear()
  assert script(prepare, *arguments) == (None, '')
  assert 'nothing is downloaded' in capfd.readouterr().err
  assert site.requests == []
  assert not home.exists()


def without_zero(label: np.ndarray) -> np.ndarray:
  """ADE20K's labels: 0 has no class, k is class k - 1, 255 stays."""
  return np.where((label == 0) | (label == 255), 255, label.astype(int) - 1)


def test_training_images_of_voc_are_those_of_mmsegmentation(published, tmp_path, monkeypatch):
  """Its own script on the unpacked folders, except for the number of images that it expects."""
  monkeypatch.syspath_prepend(str(peer.CONFIGS.parents[1] / 'tools/dataset_converters'))
  theirs = importlib.import_module('voc_aug')
  monkeypatch.setattr(theirs, 'AUG_LEN', 3)
  monkeypatch.setattr(
    theirs, 'track_parallel_progress', lambda turn, files, nproc: [*map(turn, files)]
  )
  folder = downloads.fetch_dataset('voc12aug', tmp_path)
  ours = list_samples(datasets.PUBLISHED['voc12aug'], folder, 'train').samples
  devkit = folder / 'VOCdevkit'
  monkeypatch.setattr(sys, 'argv', ['voc_aug.py', str(devkit), str(devkit / 'VOCaug')])
  theirs.main()
  lists = devkit / 'VOC2012/ImageSets/Segmentation'
  assert sorted((lists / 'trainaug.txt').read_text().split()) == sorted(s.id for s in ours)
  (augmented,) = (lists / 'aug.txt').read_text().split()
  (sample,) = (sample for sample in ours if sample.id == augmented)
  label = np.asarray(Image.open(devkit / f'VOC2012/SegmentationClassAug/{augmented}.png'))
  np.testing.assert_array_equal(decode_label(read_sample(sample).label), label)
  np.testing.assert_array_equal(
    label, np.asarray(Image.open(published['voc12aug'].samples['train'][2].label))
  )


def test_only_what_is_missing_is_downloaded(published, server, tmp_path):
  small = published['voc12aug']
  fetch = functools.partial(downloads.fetch_dataset, 'voc12aug', tmp_path)
  fetch(splits=['val'])
  assert [path for path, _ in server.requests] == [PATHS[VOC]]
  assert_whole('voc12aug', tmp_path, small, ['val'])
  assert fetch() == tmp_path
  assert fetch() == tmp_path
  assert [path for path, _ in server.requests] == [PATHS[VOC], PATHS[SBD]]
  assert_whole('voc12aug', tmp_path, small)
  # A folder of a user, wherever `list_samples` finds it.
  assert downloads.fetch_dataset('voc12aug', tmp_path / 'VOCdevkit') == tmp_path / 'VOCdevkit'
  assert len(server.requests) == 2


def test_archives_of_users_stay_and_others_on_request(published, server, tmp_path, capfd):
  archive = tmp_path / ADE
  archive.write_bytes(published['ade20k'].archives[ADE])
  downloads.fetch_dataset('ade20k', tmp_path)
  assert server.requests == []
  assert seen(tmp_path) == ['ADEChallengeData2016', ADE]
  said = capfd.readouterr().err
  assert f'{archive} stays' in said
  assert 'Terms of use' not in said  # nothing was downloaded
  downloads.fetch_dataset('voc12aug', tmp_path / 'voc', keep_archives=True)
  assert seen(tmp_path / 'voc') == ['VOCdevkit', VOC, SBD]
  archive.write_bytes(b'another file')
  shutil.rmtree(tmp_path / 'ADEChallengeData2016')
  with pytest.raises(UserError, match=r'has the md5 .* delete it, and it is downloaded anew'):
    downloads.fetch_dataset('ade20k', tmp_path)
  assert archive.read_bytes() == b'another file'


def test_terms_are_shown_before_the_first_request(published, server, tmp_path, capfd):
  server.files.clear()
  with pytest.raises(UserError, match='cannot be downloaded from'):
    downloads.fetch_dataset('ade20k', tmp_path)
  said = capfd.readouterr().err
  assert 'https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/' in said
  assert 'accepts them' in said
  assert seen(tmp_path) == []


def test_another_address_is_tried(published, server, tmp_path, capfd, monkeypatch):
  voc = distributions.DISTRIBUTIONS['voc12aug']
  first, *rest = voc.archives
  assert len(first.addresses) == 2
  moved = dataclasses.replace(first, addresses=('https://x.org/gone.tar', first.addresses[1]))
  monkeypatch.setitem(
    distributions.DISTRIBUTIONS, 'voc12aug', dataclasses.replace(voc, archives=(moved, *rest))
  )
  downloads.fetch_dataset('voc12aug', tmp_path, splits=['val'])
  assert [path for path, _ in server.requests] == ['/gone.tar', PATHS[VOC]]
  assert 'Trying another address.' in capfd.readouterr().err


def altered(name, monkeypatch, **changes):
  """Lets the first archive of a dataset have other fields, its contents too."""
  old = distributions.DISTRIBUTIONS[name]
  archive = old.archives[0]
  contents = {key: changes.pop(key) for key in list(changes) if hasattr(archive.contents, key)}
  archive = dataclasses.replace(
    archive, **changes, contents=dataclasses.replace(archive.contents, **contents)
  )
  new = dataclasses.replace(old, archives=(archive, *old.archives[1:]))
  monkeypatch.setitem(distributions.DISTRIBUTIONS, name, new)


def test_another_checksum_or_number_of_files(published, server, tmp_path, monkeypatch):
  fetch = functools.partial(downloads.fetch_dataset, 'ade20k', tmp_path / 'new')
  with monkeypatch.context() as patch:
    altered('ade20k', patch, md5='0' * 32)
    with pytest.raises(UserError, match=r'what comes has the md5 .*, not 0{32}'):
      fetch()
  assert seen(tmp_path / 'new') == []
  with monkeypatch.context() as patch:
    files = distributions.DISTRIBUTIONS['ade20k'].archives[0].contents.files
    altered('ade20k', patch, files={**files, 'images/training/*.jpg': 20_210})
    with pytest.raises(UserError, match=r'holds 3 of 20,210 ADEChallengeData2016/images/training'):
      fetch()
  assert seen(tmp_path / 'new') == ['.ADEChallengeData2016.zip.downloaded', ADE]
  assert_whole('ade20k', fetch(), published['ade20k'])  # with the archive that was downloaded
  assert len(server.requests) == 2
  assert seen(tmp_path / 'new') == ['ADEChallengeData2016']
  # A folder of a user that is not whole is neither used nor replaced.
  (gone,) = list((tmp_path / 'new').rglob('ADE_4.jpg'))
  gone.unlink()
  with pytest.raises(UserError, match=r'is there, but holds 1 of 2 .*: complete it, or move it'):
    fetch()
  assert len(server.requests) == 2


def test_lists_that_lack_an_image(sets, server, tmp_path, monkeypatch):
  """All files are there, but fewer images than were published come of it."""
  publish('voc12aug', sets['voc12aug'], monkeypatch)
  serve(sets['voc12aug'], server)
  voc = datasets.PUBLISHED['voc12aug']
  more = dataclasses.replace(voc, published_sizes={'train': 10_582, 'val': 2})
  monkeypatch.setitem(datasets.PUBLISHED, 'voc12aug', more)
  with pytest.raises(UserError, match=r'voc12aug-train in .* has 3 images .* split 10,582: move'):
    downloads.fetch_dataset('voc12aug', tmp_path)


def test_too_little_space_is_found_before_the_first_request(
  published, server, tmp_path, monkeypatch
):
  usage = types.SimpleNamespace(free=5 * 10**9)
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)
  altered('voc12aug', monkeypatch, size=3 * 10**9)
  with pytest.raises(UserError, match=r'needs 6\.0 GB in .*, where 5\.0 GB are free: .* or give a'):
    downloads.fetch_dataset('voc12aug', tmp_path)
  assert server.requests == []


def test_two_at_once_download_once(published, server, tmp_path, capfd):
  server.files[PATHS[ADE]].seconds_per_piece = 0.05
  with ThreadPoolExecutor(2) as pool:
    results = [pool.submit(downloads.fetch_dataset, 'ade20k', tmp_path) for _ in range(2)]
  assert [result.result() for result in results] == [tmp_path] * 2
  assert len(server.requests) == 1
  assert 'Another process downloads ade20k: waiting for it.' in capfd.readouterr().err
  assert_whole('ade20k', tmp_path, published['ade20k'])


SLOWLY = """
import pickle, sys, time
from pathlib import Path
import pytest
from nonlocal_jax.data import archives, downloads
from tests.dataset_archives import publish

folder = Path(sys.argv[1])
publish('ade20k', pickle.loads((folder / 'set').read_bytes()), pytest.MonkeyPatch())
copy = archives.shutil.copyfileobj

def slowly(*arguments):
  time.sleep(0.05)
  copy(*arguments)
  if (folder / 'new/.ADEChallengeData2016.partial/images').exists():
    print('halfway', flush=True)
    time.sleep(60)

archives.shutil.copyfileobj = slowly
downloads.fetch_dataset('ade20k', folder / 'new')
"""


@pytest.mark.slow
def test_killed_while_unpacking(published, server, tmp_path):
  (tmp_path / 'set').write_bytes(pickle.dumps(published['ade20k']))
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-c', SLOWLY, str(tmp_path)]
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b'halfway\n'
    process.send_signal(signal.SIGKILL)
  folder = tmp_path / 'new'
  assert (folder / '.ADEChallengeData2016.partial').is_dir()
  assert not (folder / 'ADEChallengeData2016').exists()
  assert downloads.fetch_dataset('ade20k', folder) == folder
  assert len(server.requests) == 1
  assert seen(folder) == ['ADEChallengeData2016']  # the archive was ours
  assert_whole('ade20k', folder, published['ade20k'])


def test_cityscapes_without_a_login_is_told_in_steps(published, server, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'cityscapesscripts', None)
  for username in ('', 'me'):
    with pytest.raises(UserError) as raised:
      downloads.fetch_dataset('cityscapes', tmp_path / 'new', username=username)
    for part in ('/register/', 'pip install cityscapesscripts', '--username', f'{tmp_path}/new'):
      assert part in str(raised.value)
    assert f'{GTFINE} and {LEFT} from https://www.cityscapes-dataset.com/' in str(raised.value)
  assert server.requests == []
  # The last step: archives that were put there.
  for file, data in published['cityscapes'].archives.items():
    (tmp_path / 'new' / file).write_bytes(data)
  assert_whole(
    'cityscapes', downloads.fetch_dataset('cityscapes', tmp_path / 'new'), published['cityscapes']
  )
  assert seen(tmp_path / 'new') == ['cityscapes', GTFINE, LEFT]


def fetch_cityscapes(folder):
  return downloads.fetch_dataset('cityscapes', folder, username='me')


def test_login_to_cityscapes(site, tmp_path, monkeypatch, capfd):
  site.files['POST /login'] = Served(b'wrong password')
  with pytest.raises(UserError, match='refuses the login of me: check the name'):
    fetch_cityscapes(tmp_path)
  assert site.forms == [
    ('/login', {'username': 'me', 'password': 'secret & more', 'submit': 'Login'})
  ]
  monkeypatch.delenv(cityscapes.PASSWORD)
  with pytest.raises(UserError, match='no password for the login of me: set the environment'):
    fetch_cityscapes(tmp_path)
  monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
  monkeypatch.setattr(cityscapes.getpass, 'getpass', lambda prompt: 'typed')
  site.files['POST /login'] = Served(location='/')
  fetch_cityscapes(tmp_path)
  assert [form['password'] for _, form in site.forms] == ['secret & more', 'typed']  # once
  said = capfd.readouterr()
  assert 'typed' not in said.err
  assert said.out == ''
  assert seen(tmp_path) == ['cityscapes']
  monkeypatch.setenv(addresses.OFFLINE, '1')
  with pytest.raises(UserError, match='NONLOCAL_JAX_OFFLINE is set'):
    fetch_cityscapes(tmp_path / 'other')


def test_a_folder_for_prepared_data_is_checked_before(published, server, home, script, tmp_path):
  (tmp_path / 'file').touch()
  data_dir = f'--data-dir={tmp_path}/file/data'
  status, said = script(prepare, '--dataset=ade20k', '--download', data_dir)
  assert status == 1
  assert f'data cannot be a folder, as {tmp_path}/file is a file; give another one.' in said
  assert server.requests == []
  assert not home.exists()


def test_certificates_of_cityscapes_that_are_not_there(tmp_path, monkeypatch):
  monkeypatch.delenv('https_proxy', raising=False)
  monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(tmp_path / 'none.pem'))
  with pytest.raises(requests.ConnectionError, match=r'none\.pem'):
    cityscapes._Session().get('https://127.0.0.1:9/')


def test_a_login_is_not_sent_to_a_mirror(site, tmp_path, monkeypatch):
  for mirror in (site.address, 'file:///folder'):
    monkeypatch.setenv(addresses.MIRROR, mirror)
    with pytest.raises(UserError, match=r'MIRROR is set, and your login is for https://www\.city'):
      fetch_cityscapes(tmp_path)
  assert (site.requests, site.forms) == ([], [])
  assert seen(tmp_path) == []


def test_cityscapes_goes_on_where_it_was_cut_off(site, published, tmp_path):
  path = '/file-handling/?packageID=1'
  site.files[path].cut_after = 1500
  with pytest.raises(UserError, match=r'cannot be downloaded from .*cut off.*: the same command'):
    fetch_cityscapes(tmp_path)
  assert seen(tmp_path) == [f'.{GTFINE}.downloaded', f'.{LEFT}.part', GTFINE]
  site.requests.clear()
  assert_whole('cityscapes', fetch_cityscapes(tmp_path), published['cityscapes'])
  assert [asked for asked in site.requests if asked[0].startswith('/file')] == [
    (path, 'bytes=1024-')  # 1024 are written at once
  ]
  assert seen(tmp_path) == ['cityscapes']


@pytest.mark.parametrize('left', ['whole', 'more', 'other'])
def test_parts_of_cityscapes_that_cannot_be_continued(left, site, published, tmp_path):
  data = published['cityscapes'].archives[LEFT]
  part = tmp_path / f'.{LEFT}.part' / LEFT
  part.parent.mkdir()
  part.write_bytes({'whole': data, 'more': data + b'x', 'other': b'x' * 100}[left])
  if left == 'other':
    with pytest.raises(
      UserError, match=r'cityscapesscripts cannot download \S+ \(MD5 sum .*: run the same command'
    ):
      fetch_cityscapes(tmp_path)
  assert_whole('cityscapes', fetch_cityscapes(tmp_path), published['cityscapes'])


@pytest.mark.parametrize(
  ('how', 'sentence'),
  [
    ({'location': '/login'}, r'cityscapesscripts cannot .* \(the login has ended\)'),
    ({'status': 500}, r'cannot be downloaded from https://www\.cityscapes-.*\(status 500\)'),
  ],
)
def test_a_site_of_cityscapes_that_fails(how, sentence, site, tmp_path):
  site.files['/file-handling/?packageID=0'] = Served(**how)
  with pytest.raises(UserError, match=sentence) as raised:
    fetch_cityscapes(tmp_path)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--dataset=custom', '--download'], '--download is for the published datasets'),
    (['--dataset=ade20k'], '--source is required, or --download'),
    (['--dataset=ade20k', '--source=', '--download'], 'argument --source: the path is empty'),
    (['--dataset=ade20k', '--source=x', '--data-dir='], 'argument --data-dir: the path is empty'),
    (['--dataset=ade20k', '--source=x', '--username=me'], '--username need --download'),
    (['--dataset=ade20k', '--source=x', '--keep-archives'], '--username need --download'),
    (['--dataset=ade20k', '--download', '--username=me'], '--username is a login for cityscapes'),
    (['--dataset=ade20k', '--source=gs://b/x', '--download'], 'needs a folder as --source'),
  ],
)
def test_options_that_do_not_fit_together(arguments, sentence, script):
  status, said = script(prepare, *arguments)
  assert status == 2
  assert sentence in said


def test_facts_of_the_published_archives():
  """By the issues of their authors: numbers of images, and that nothing lacks a checksum."""
  found = {
    archive.file: archive
    for name in NAMES
    for archive in distributions.DISTRIBUTIONS[name].archives
  }
  assert list(found) == list(COUNTS)
  for file, path in PATHS.items():
    archive = found[file]
    assert len(archive.sha256) == 64 or len(archive.md5) == 32
    for address in archive.addresses:
      assert re.fullmatch(rf'https?://[a-z0-9.]+{re.escape(path)}', address)
  assert [sum(archive.contents.files.values()) for archive in found.values()] == [
    2 * (20_210 + 2_000),
    17_125 + 1_464 + 1_449 + 2,
    8_498 + 2_857 + 2,
    2_975 + 500,
    2_975 + 500,
  ]
