"""The download: whole and official, or one clear line within seconds and nothing left behind."""

import contextlib
import hashlib
import http.server
import os
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdb_jax import errors
from imdb_jax.data import imdb
from imdb_jax.data.imdb import download


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[str]:
  """Serve files on loopback and yield the server's address."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      content = files.get(self.path)
      self.send_response(404 if content is None else 200)
      self.end_headers()
      with contextlib.suppress(ConnectionError):  # The client may have read enough.
        self.wfile.write(content or b"")

    def log_message(self, format, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()


CONTENT = b"an archive" * 1_200_000


@pytest.fixture
def official(monkeypatch):
  """Make CONTENT the official archive."""
  monkeypatch.setattr(imdb, "SIZE", len(CONTENT))
  monkeypatch.setattr(imdb, "SHA256", hashlib.sha256(CONTENT).hexdigest())


@contextlib.contextmanager
def server_with(content: bytes, monkeypatch) -> Iterator[None]:
  with serve({"/a.tar.gz": content}) as address:
    monkeypatch.setattr(imdb, "URL", f"{address}/a.tar.gz")
    yield


def refusal(directory: Path, *, timeout: float = 10, report=lambda line: None) -> str:
  """Return the line of a download that fails, within seconds and leaving nothing behind."""
  before = set(directory.rglob("*"))
  start = time.monotonic()
  with pytest.raises(errors.DataError) as caught:
    download(directory, report, timeout=timeout)
  assert time.monotonic() - start < 5
  assert set(directory.rglob("*")) == before
  message = str(caught.value)
  assert "\n" not in message
  for part in (imdb.URL, imdb.SHA256, f"{imdb.SIZE:,} bytes", "--archive PATH"):
    assert part in message
  return message


def test_whole_file(tmp_path, monkeypatch, official):
  lines = []
  with server_with(CONTENT, monkeypatch):
    path = download(tmp_path / "new" / "downloads", lines.append)
  assert path == tmp_path / "new/downloads/a.tar.gz"
  assert path.read_bytes() == CONTENT
  assert list(path.parent.iterdir()) == [path]
  assert lines == ["Downloaded 10 of 11 MiB", "Downloaded 11 of 11 MiB"]


def test_whole_file_is_not_downloaded_again(tmp_path, official, no_network):
  (tmp_path / "aclImdb_v1.tar.gz").write_bytes(CONTENT)
  assert download(tmp_path, lambda line: None) == tmp_path / "aclImdb_v1.tar.gz"


def test_damaged_file_is_downloaded_again(tmp_path, monkeypatch, official):
  (tmp_path / "a.tar.gz").write_bytes(CONTENT[:-1] + b"?")
  with server_with(CONTENT, monkeypatch):
    assert download(tmp_path, lambda line: None).read_bytes() == CONTENT


def test_a_file_of_a_terabyte_is_downloaded_again_without_hashing_it(tmp_path, monkeypatch, official):
  (tmp_path / "a.tar.gz").touch()
  os.truncate(tmp_path / "a.tar.gz", 2**40)
  with server_with(CONTENT, monkeypatch):
    assert download(tmp_path, lambda line: None).read_bytes() == CONTENT


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (CONTENT[:-1] + b"?", "got 12,000,000 bytes with sha256 "),
    (CONTENT[:-1], "got 11,999,999 bytes"),
    (CONTENT + b"?", "got 12,000,001 bytes"),
    (b"", "got 0 bytes"),
  ],
)
def test_wrong_answer(tmp_path, monkeypatch, official, content, reason):
  with server_with(content, monkeypatch):
    assert reason in refusal(tmp_path)


def test_endless_answer_is_cut_off(tmp_path, monkeypatch, official):
  lines = []
  with server_with(CONTENT * 4, monkeypatch):
    refusal(tmp_path, report=lines.append)
  assert lines == ["Downloaded 10 of 11 MiB"]


def test_missing_page(tmp_path, monkeypatch):
  with serve({}) as address:
    monkeypatch.setattr(imdb, "URL", f"{address}/a.tar.gz")
    with pytest.raises(errors.DataError, match="404") as caught:
      download(tmp_path, lambda line: None)
  assert isinstance(caught.value.__cause__, urllib.error.HTTPError)
  assert caught.value.__cause__.closed


def test_closed_port(tmp_path, monkeypatch):
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    monkeypatch.setattr(imdb, "URL", f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar.gz")
    assert "Connection refused" in refusal(tmp_path)


def test_server_that_never_answers(tmp_path, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as server:  # It never accepts.
    monkeypatch.setattr(imdb, "URL", f"http://127.0.0.1:{server.getsockname()[1]}/a.tar.gz")
    assert "timed out" in refusal(tmp_path, timeout=0.1)


def test_connection_that_falls_silent(tmp_path, monkeypatch, official):
  silent = threading.Event()

  def answer(server):
    connection, _ = server.accept()
    with connection:
      connection.recv(2**16)
      connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT[:1000])
      silent.wait(10)

  with socket.create_server(("127.0.0.1", 0)) as server:
    thread = threading.Thread(target=answer, args=(server,))
    thread.start()
    monkeypatch.setattr(imdb, "URL", f"http://127.0.0.1:{server.getsockname()[1]}/a.tar.gz")
    try:
      assert "timed out" in refusal(tmp_path, timeout=0.2)
    finally:
      silent.set()
      thread.join()


def test_directory_that_cannot_be_made(tmp_path, no_network):
  (tmp_path / "file").touch()
  with pytest.raises(errors.DataError, match="cannot download"):
    download(tmp_path / "file" / "downloads", lambda line: None)
