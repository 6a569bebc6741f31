"""An HTTP server on loopback that serves files in memory, well or badly."""

import contextlib
import dataclasses
import hashlib
import http.server
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping


@dataclasses.dataclass
class Served:
  """How a path is answered.

  Attributes:
    data: The file.
    status: Of the answer, where it is an error.
    failures: How many requests are answered with `status` before the file; None for all.
    location: Where a redirect leads; '' for none.
    cut_after: Bytes after which the connection is closed, in the first `cuts` answers.
    cuts: See `cut_after`.
    seconds_per_piece: Pause before each 4,096 bytes.
    ranges: Whether parts are served; otherwise each answer is the whole file.
    tag: The ETag; None for a hash of the data, '' for none.
    says_length: Whether the answer has a Content-Length.
    headers: More headers.
  """

  data: bytes = b''
  status: int = 200
  failures: int | None = None
  location: str = ''
  cut_after: int | None = None
  cuts: int = 1
  seconds_per_piece: float = 0
  ranges: bool = True
  tag: str | None = None
  says_length: bool = True
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class FileServer:
  """The running server.

  Attributes:
    files: The answers by path; may be changed at any time.
    requests: The path and the Range of each request so far, in their order.
    forms: The path and the fields of each form that was posted.
    address: E.g. 'http://127.0.0.1:40000'.
  """

  def __init__(self, address: str):
    """Creates a server without files."""
    self.files: dict[str, Served] = {}
    self.requests: list[tuple[str, str | None]] = []
    self.forms: list[tuple[str, dict[str, str]]] = []
    self.address = address

  def serve(self, path: str, data: bytes, **how) -> str:
    """Serves a file; returns its address."""
    self.files[path] = Served(data, **how)
    return f'{self.address}{path}'


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
  """Runs a server in threads of this process."""
  httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  httpd.daemon_threads = True
  server = FileServer(f'http://127.0.0.1:{httpd.server_address[1]}')
  httpd.files = server  # type: ignore[attr-defined]
  thread = threading.Thread(target=httpd.serve_forever, kwargs={'poll_interval': 0.02})
  thread.start()
  try:
    yield server
  finally:
    httpd.shutdown()
    thread.join()
    httpd.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  server: 'http.server.ThreadingHTTPServer'

  def handle(self) -> None:
    """Answers requests until the client leaves."""
    with contextlib.suppress(ConnectionError):
      super().handle()

  def do_GET(self) -> None:
    server: FileServer = self.server.files  # type: ignore[attr-defined]
    asked = self.headers.get('Range')
    # A proxy is asked for the whole address.
    path = re.sub(r'^http://[^/]+', '', self.path)
    server.requests.append((self.path, asked))
    served = server.files.get(path, Served(status=404))
    if served.location:
      self._answer(302, {'Location': served.location}, b'')
    elif served.status != 200 and (served.failures is None or served.failures > 0):
      if served.failures is not None:
        served.failures -= 1
      self._answer(served.status, {}, b'An error of the server.')
    else:
      self._send(served, asked)

  def do_POST(self) -> None:
    """Records a form; answers as `files` says for the path after 'POST '."""
    server: FileServer = self.server.files  # type: ignore[attr-defined]
    body = self.rfile.read(int(self.headers['Content-Length'])).decode()
    server.forms.append((self.path, dict(urllib.parse.parse_qsl(body))))
    served = server.files.get(f'POST {self.path}', Served(status=404))
    if served.location:
      self._answer(302, {'Location': served.location}, b'')
    else:
      self._answer(served.status, {}, served.data)

  def _send(self, served: Served, asked: str | None) -> None:
    tag = served.tag
    if tag is None:
      tag = f'"{hashlib.sha256(served.data).hexdigest()[:16]}"'
    headers = {'ETag': tag} if tag else {}
    if served.ranges:
      headers['Accept-Ranges'] = 'bytes'
    match = re.fullmatch(r'bytes=(\d+)-', asked or '') if served.ranges else None
    if self.headers.get('If-Range', tag) != tag:
      match = None
    total = len(served.data)
    if match is None:
      self._answer(200, headers, served.data, served)
    elif int(match[1]) >= total:
      self._answer(416, {**headers, 'Content-Range': f'bytes */{total}'}, b'')
    else:
      start = int(match[1])
      headers['Content-Range'] = f'bytes {start}-{total - 1}/{total}'
      self._answer(206, headers, served.data[start:], served)

  def _answer(
    self, status: int, headers: Mapping[str, str], body: bytes, served: Served | None = None
  ) -> None:
    served = served or Served()
    self.send_response(status)
    for name, value in {**headers, **served.headers}.items():
      self.send_header(name, value)
    if served.says_length:
      self.send_header('Content-Length', str(len(body)))
    else:
      self.close_connection = True
    self.end_headers()
    if served.cut_after is not None and served.cuts > 0:
      served.cuts -= 1
      body = body[: served.cut_after]
      self.close_connection = True
    with contextlib.suppress(ConnectionError):  # the client may leave
      for start in range(0, len(body), 4096):
        time.sleep(served.seconds_per_piece)
        self.wfile.write(body[start : start + 4096])

  def log_message(self, format: str, *args) -> None:
    """Says nothing."""
