"""Downloads from a real server on loopback, which serves files well and badly."""

import hashlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from nonlocal_jax.errors import UserError
from nonlocal_jax.runtime import addresses, download
from nonlocal_jax.runtime.files import cache_folder
from tests.file_server import file_server

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
PATH = '/weights/v0.5/model.pth'


@pytest.fixture
def server():
  with file_server() as running:
    yield running


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
  monkeypatch.setattr(download, '_PAUSES', (0, 0, 0, 0))
  for name in (addresses.MIRROR, addresses.OFFLINE, 'http_proxy', 'HTTP_PROXY', 'all_proxy'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('no_proxy', '')


def fetch(address, folder, **checks):
  """Downloads with the usual check; returns the contents."""
  checks = checks or {'sha256': SHA256[:8]}
  return download.download(address, folder=folder, **checks).read_bytes()


def names_in(folder):
  """Names of the files that are not hidden."""
  return sorted(path.name for path in folder.iterdir() if not path.name.startswith('.'))


def leave_part(server, folder, **how):
  """Downloads the first 100,000 bytes of `PATH` and fails; the server recovers afterwards."""
  address = server.serve(PATH, DATA, cut_after=100_000, cuts=100, **how)
  server.files[PATH].cut_after = 100_000
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(download, '_PAUSES', ())
    with pytest.raises(UserError, match='cut off'):
      fetch(address, folder)
  assert names_in(folder) == ['model.pth.part']
  server.files[PATH].cuts = 0
  server.requests.clear()
  return address


def test_whole_file(server, tmp_path, capfd):
  address = server.serve(PATH, DATA)
  assert fetch(address, tmp_path / 'new', sha256=SHA256, length=len(DATA)) == DATA
  assert names_in(tmp_path / 'new') == ['model.pth']
  said = capfd.readouterr().err
  assert f'Downloading {address} to {tmp_path / "new" / "model.pth"}' in said
  assert '300k/300k' in said


def test_a_file_that_is_there_is_not_asked_for(server, tmp_path):
  address = server.serve(PATH, DATA)
  for _ in range(3):
    assert fetch(address, tmp_path) == DATA
  assert len(server.requests) == 1


def test_a_file_is_read_once_to_be_checked(server, tmp_path, monkeypatch):
  (tmp_path / 'model.pth').write_bytes(DATA)  # by hand
  hashed = []
  digest = hashlib.file_digest

  def counting(file, name):
    hashed.append(name)
    return digest(file, name)

  monkeypatch.setattr(hashlib, 'file_digest', counting)
  for _ in range(3):
    assert fetch('http://127.0.0.1:9/model.pth', tmp_path) == DATA
  assert hashed == ['sha256']
  (tmp_path / 'model.pth').write_bytes(OTHER)
  with pytest.raises(UserError, match=r'model\.pth has the sha256 \w{8}\.\.\., not \w{8}: delete'):
    fetch('http://127.0.0.1:9/model.pth', tmp_path)
  assert (tmp_path / 'model.pth').read_bytes() == OTHER  # of the user


def test_connections_that_break_are_continued(server, tmp_path, capfd):
  address = server.serve(PATH, DATA, cut_after=100_000, cuts=3)
  assert fetch(address, tmp_path) == DATA
  starts = [int(re.findall(r'\d+', asked or '0')[0]) for _, asked in server.requests]
  assert starts[0] == 0
  assert starts == sorted(set(starts))  # each attempt goes on from the one before
  assert len(starts) == 4
  assert 'cut off; trying again' in capfd.readouterr().err


def test_attempts_are_limited(server, tmp_path):
  address = server.serve(PATH, DATA, cut_after=0, cuts=1000)
  with pytest.raises(UserError, match='cut off'):
    fetch(address, tmp_path)
  assert len(server.requests) == 5


def test_a_part_is_resumed(server, tmp_path):
  address = leave_part(server, tmp_path)
  have = (tmp_path / 'model.pth.part').stat().st_size
  assert 0 < have <= 100_000
  assert fetch(address, tmp_path) == DATA
  assert server.requests == [(PATH, f'bytes={have}-')]
  assert names_in(tmp_path) == ['model.pth']


def test_a_complete_part_needs_no_more_bytes(server, tmp_path):
  address = leave_part(server, tmp_path)
  (tmp_path / 'model.pth.part').write_bytes(DATA)
  assert fetch(address, tmp_path) == DATA
  assert server.requests == [(PATH, f'bytes={len(DATA)}-')]


@pytest.mark.parametrize('tag', [None, ''], ids=['tag', 'no tag'])
def test_a_server_that_ignores_ranges_starts_over(server, tmp_path, tag):
  address = leave_part(server, tmp_path, tag=tag)
  server.files[PATH].ranges = False
  assert fetch(address, tmp_path) == DATA


def test_a_file_that_changed_between_parts_is_not_mixed(server, tmp_path):
  address = leave_part(server, tmp_path)
  server.files[PATH].data = OTHER
  assert fetch(address, tmp_path, sha256=hashlib.sha256(OTHER).hexdigest()) == OTHER


def test_a_server_that_does_not_tell_of_changes_is_asked_again(server, tmp_path, capfd):
  address = leave_part(server, tmp_path, tag='')
  server.files[PATH].data = OTHER
  assert fetch(address, tmp_path, sha256=hashlib.sha256(OTHER).hexdigest()) == OTHER
  assert len(server.requests) == 2
  assert 'downloading it anew' in capfd.readouterr().err


def test_a_part_that_nothing_vouches_for_is_not_used(server, tmp_path):
  address = leave_part(server, tmp_path, tag='')
  assert fetch(address, tmp_path, length=len(DATA)) == DATA
  assert server.requests == [(PATH, None)]


def test_a_part_of_another_address_is_not_used(server, tmp_path):
  leave_part(server, tmp_path)
  address = server.serve('/elsewhere/model.pth', OTHER, tag='"same"')
  server.files[PATH].tag = '"same"'
  assert fetch(address, tmp_path, sha256=hashlib.sha256(OTHER).hexdigest()) == OTHER


@pytest.mark.parametrize(
  ('checks', 'message'),
  [
    ({'sha256': '00000000'}, rf'what comes has the sha256 {SHA256[:8]}\.\.\., not 00000000'),
    ({'sha256': '0' * 64}, 'its sha256 is 0{64}'),
    ({'md5': '0' * 32}, 'its md5 is 0{32}'),
    ({'length': 5}, 'it has 300,000 bytes there, not 5'),
  ],
)
def test_another_file_than_expected_is_not_kept(server, tmp_path, checks, message):
  with pytest.raises(UserError, match=message):
    fetch(server.serve(PATH, DATA), tmp_path, **checks)
  assert names_in(tmp_path) == []
  assert len(server.requests) == 1


def test_sha256_of_the_wrong_case_and_md5(server, tmp_path):
  address = server.serve(PATH, DATA)
  md5 = hashlib.md5(DATA).hexdigest()
  assert fetch(address, tmp_path, sha256=SHA256.upper(), md5=md5.upper()) == DATA


def test_an_address_that_does_not_exist(server, tmp_path):
  address = f'{server.address}{PATH}'
  with pytest.raises(UserError) as caught:
    fetch(address, tmp_path)
  assert str(caught.value) == (
    f'model.pth cannot be downloaded from {address} (the server answers 404 Not Found): '
    f'put it at {tmp_path / "model.pth"}; its sha256 begins with {SHA256[:8]}.'
  )
  assert names_in(tmp_path) == []
  assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(server, tmp_path):
  address = server.serve(PATH, DATA, status=503, failures=2)
  assert fetch(address, tmp_path) == DATA
  assert len(server.requests) == 3


def test_redirects(server, tmp_path):
  server.serve('/elsewhere/model.pth', DATA)
  address = server.serve(PATH, b'', location='/elsewhere/model.pth')
  assert fetch(address, tmp_path) == DATA
  server.serve(PATH, b'', location=PATH)
  with pytest.raises(UserError, match='redirects in a circle'):
    fetch(address, tmp_path / 'other')


def test_no_length_and_a_wrong_encoding(server, tmp_path):
  how = {'says_length': False, 'headers': {'Content-Encoding': 'x-gzip'}}
  assert fetch(server.serve('/a.tgz', DATA, **how), tmp_path) == DATA


def test_a_server_that_stops_sending(server, tmp_path, monkeypatch):
  monkeypatch.setattr(addresses, '_SECONDS', (1, 0.3))
  address = server.serve(PATH, DATA, seconds_per_piece=1.5)
  monkeypatch.setattr(download, '_PAUSES', (0,))
  with pytest.raises(UserError, match=r'\(no answer within 0.3 seconds\)'):
    fetch(address, tmp_path)
  assert len(server.requests) == 2


def test_without_a_network(tmp_path):
  address = f'http://127.0.0.1:9{PATH}'  # nobody listens
  started = time.monotonic()
  with pytest.raises(UserError) as caught:
    fetch(address, tmp_path)
  assert f'{address} (Connection refused): put it at {tmp_path}' in str(caught.value)
  with pytest.raises(UserError, match=r'name or service|name resolution|not known'):
    fetch('http://no-such-host.invalid/model.pth', tmp_path)
  assert time.monotonic() - started < 20  # no attempts that cannot succeed


def test_offline(server, tmp_path, monkeypatch):
  monkeypatch.setenv(addresses.OFFLINE, '1')
  with pytest.raises(UserError, match=r'\(NONLOCAL_JAX_OFFLINE is set\): put it at'):
    fetch(server.serve(PATH, DATA), tmp_path)
  assert server.requests == []
  (tmp_path / 'model.pth').write_bytes(DATA)
  assert fetch('http://example.org/model.pth', tmp_path) == DATA


def test_mirrors(server, tmp_path, monkeypatch):
  server.serve(PATH, DATA)
  monkeypatch.setenv(addresses.MIRROR, f'{server.address}/')
  assert fetch(f'https://example.org{PATH}', tmp_path / 'http') == DATA

  folder = tmp_path / 'a folder'
  (folder / PATH[1:]).parent.mkdir(parents=True)
  (folder / PATH[1:]).write_bytes(DATA)
  monkeypatch.setenv(addresses.MIRROR, folder.as_uri())
  monkeypatch.setenv(addresses.OFFLINE, '1')  # a folder is no network
  assert fetch(f'https://example.org{PATH}', tmp_path / 'file') == DATA
  (folder / PATH[1:]).unlink()
  missing = rf'the mirror of https://example.org{PATH}, \(No such .*\): see to NONLOCAL_JAX_MIRROR'
  with pytest.raises(UserError, match=missing):
    fetch(f'https://example.org{PATH}', tmp_path / 'none')
  wrong_ones = ['example.org:80', 'file://host/folder', 'ftp://example.org', 'http://[::1']
  wrong_ones += ['http://host:port', 'http://host:99999', 'http://:80', 'http://host/?a=b']
  for wrong in wrong_ones:
    monkeypatch.setenv(addresses.MIRROR, wrong)
    with pytest.raises(UserError, match=r'NONLOCAL_JAX_MIRROR is .* set it to http://HOST:PORT or'):
      fetch(f'https://example.org{PATH}', tmp_path / 'wrong')


def test_the_password_of_a_mirror_is_not_told(server, tmp_path, monkeypatch, capfd):
  mirror = server.address.replace('http://', 'http://me:secret@')
  monkeypatch.setenv(addresses.MIRROR, mirror)
  server.serve(PATH, DATA, cut_after=100_000, cuts=1)
  assert fetch(f'https://example.org{PATH}', tmp_path) == DATA
  assert server.requests[1] == (PATH, 'bytes=65536-')  # the part is known to be of the mirror
  server.files.clear()
  with pytest.raises(UserError, match=r'\(the server answers 404 Not Found\)') as raised:
    fetch(f'https://example.org{PATH}', tmp_path / 'none')
  said = capfd.readouterr().err
  assert f'Downloading {server.address}{PATH}' in said
  assert 'secret' not in f'{said}{raised.value}'
  left = (path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())
  assert not any(b'secret' in data for data in left)


def test_certificates_that_are_not_there(tmp_path, monkeypatch):
  monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(tmp_path / 'none.pem'))
  with pytest.raises(UserError, match=r'cannot be downloaded from .*/none\.pem\): put it at'):
    fetch('https://127.0.0.1:9/a.pth', tmp_path / 'here')


def test_proxies(server, tmp_path, monkeypatch):
  server.serve(PATH, DATA)
  monkeypatch.setenv('http_proxy', server.address)
  assert fetch(f'http://example.org{PATH}', tmp_path) == DATA
  assert server.requests == [(f'http://example.org{PATH}', None)]
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  assert fetch(f'{server.address}{PATH}', tmp_path / 'direct') == DATA
  assert server.requests[1:] == [(PATH, None)]
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
  with pytest.raises(UserError, match=r'\(the proxy: Connection refused\)'):
    fetch(f'http://example.org{PATH}', tmp_path / 'none')


def test_a_proxy_whose_package_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'socks', None)
  monkeypatch.setitem(sys.modules, 'urllib3.contrib.socks', None)
  monkeypatch.setenv('http_proxy', 'socks5://127.0.0.1:9')
  with pytest.raises(UserError, match=r"pip install 'requests\[socks\]'\)"):
    fetch(f'http://example.org{PATH}', tmp_path)


def test_a_link_that_leads_nowhere_stays(server, tmp_path):
  (tmp_path / 'model.pth').symlink_to('unmounted/model.pth')
  with pytest.raises(UserError, match=r'model\.pth is a link that leads nowhere'):
    fetch(server.serve(PATH, DATA), tmp_path)
  assert (tmp_path / 'model.pth').is_symlink()


def test_the_cache_folder_cannot_be_made(server, tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'file'))
  with pytest.raises(UserError, match=r'Not a directory; set NONLOCAL_JAX_HOME to another folder'):
    fetch(server.serve(PATH, DATA), tmp_path / 'file/weights')
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))  # the folder is another one
  with pytest.raises(UserError, match=r'Not a directory\.$'):
    fetch(server.serve(PATH, DATA), tmp_path / 'file/weights')


def test_space_is_checked_before(server, tmp_path, monkeypatch):
  usage = types.SimpleNamespace(free=10_000_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(
    UserError, match=r'model\.pth needs 0\.3 MB in .*, and 67\.1 MB to spare, where 10'
  ):
    fetch(server.serve(PATH, DATA), tmp_path)
  assert names_in(tmp_path) == []


def test_a_full_disk(server, tmp_path):
  address = server.serve(PATH, DATA)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
  try:
    with pytest.raises(UserError, match=r'model\.pth\.part cannot be written \(File too large\): '):
      fetch(address, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert names_in(tmp_path) == ['model.pth.part']
  assert fetch(address, tmp_path) == DATA  # with more room
  assert server.requests[1:] == [(PATH, 'bytes=150000-')]


PROGRAM = """
import pathlib, sys
from nonlocal_jax.runtime.download import download
address, folder, sha256 = sys.argv[1:]
download(address, folder=pathlib.Path(folder), sha256=sha256)
"""


@pytest.mark.slow
def test_a_second_process_waits_and_continues_what_a_killed_one_began(server, tmp_path):
  address = server.serve(PATH, DATA, seconds_per_piece=2)
  command = [sys.executable, '-c', PROGRAM, address, str(tmp_path), SHA256]
  part = tmp_path / 'model.pth.part'
  with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
    wait_until(lambda: part.exists())
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as second:
      assert second.stderr is not None
      line = second.stderr.readline()
      assert line == 'Another process downloads model.pth: waiting for it.\n'
      server.files[PATH].seconds_per_piece = 0.05
      wait_until(lambda: part.stat().st_size > 0)
      first.send_signal(signal.SIGKILL)
      server.files[PATH].seconds_per_piece = 0
      assert second.wait(60) == 0
  assert (tmp_path / 'model.pth').read_bytes() == DATA
  assert names_in(tmp_path) == ['model.pth']
  assert [path for path, _ in server.requests] == [PATH, PATH]
  assert re.fullmatch(r'bytes=[1-9]\d+-', server.requests[1][1])


def wait_until(holds):
  """Waits a minute at most."""
  deadline = time.monotonic() + 60
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_folder_of_others(server, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'Folder .*file/below cannot be made: Not a directory'):
    fetch(server.serve(PATH, DATA), tmp_path / 'file' / 'below')


def test_cache_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('NONLOCAL_JAX_HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
  assert cache_folder() == tmp_path / 'home'
  monkeypatch.delenv('NONLOCAL_JAX_HOME')
  assert cache_folder() == tmp_path / 'caches' / 'nonlocal_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache_folder() == tmp_path / '.cache' / 'nonlocal_jax'
