"""Record stores, the download, and which of the sources `load` takes."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
from collections.abc import Iterator

import numpy as np
import pytest

from imdb_jax import errors
from imdb_jax.data import archive, imdb, reviews

EXPECTED = {"train/neg": 3, "train/pos": 3, "train/unsup": 4, "test/neg": 3, "test/pos": 3}


def write_archive(path: pathlib.Path, expected: dict[str, int] = EXPECTED, *, has_films: bool = True) -> pathlib.Path:
  """Each review is of another film, though two have the same text."""
  members = {}
  for kind, count in expected.items():
    split, side = kind.split("/")
    for number in range(count):
      text = f"{kind} review {number % 2}: caf\u00e9, \u201cfine\u201d <br />"
      members[f"aclImdb/{kind}/{number}_7.txt"] = text.encode()
    if has_films:
      urls = [b"http://www.imdb.com/title/tt%04d%03d/\n" % (len(members), count - number) for number in range(count)]
      members[f"aclImdb/{split}/urls_{side}.txt"] = b"".join(urls)
  with tarfile.open(path, "w:gz") as file:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
  return path


def assert_same(left: dict[str, reviews.Reviews], right: dict[str, reviews.Reviews]) -> None:
  assert list(left) == list(right) == ["train", "test", "unsupervised"]
  for split in left:
    assert left[split].texts == right[split].texts
    np.testing.assert_array_equal(left[split].labels, right[split].labels)
    np.testing.assert_array_equal(left[split].films, right[split].films)


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory) -> pathlib.Path:
  return write_archive(tmp_path_factory.mktemp("archive") / "aclImdb_v1.tar.gz")


@pytest.fixture
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("touched the network")

  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setattr(socket.socket, "connect", refuse)


def heavy_modules_after(code: str) -> str:
  """Which of the heavy modules a fresh interpreter has loaded after running `code`."""
  code += "; import sys; print(*sorted({'jax', 'tensorflow', 'tensorflow_datasets'} & sys.modules.keys()))"
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_takes_neither_tfds_nor_jax():
  assert heavy_modules_after("import imdb_jax.data.imdb") == ""


@pytest.fixture(scope="module")
def tfds_imdb():
  pytest.importorskip("array_record")
  from imdb_jax.data import tfds_imdb

  return tfds_imdb


@pytest.fixture(scope="module")
def pristine(tfds_imdb, small_archive, tmp_path_factory) -> pathlib.Path:
  """The root of a store that nobody changes."""
  root = tmp_path_factory.mktemp("pristine")
  tfds_imdb.prepare(root, small_archive, expected=EXPECTED)
  return root


class TestStore:
  @pytest.fixture
  def store(self, pristine, tmp_path) -> pathlib.Path:
    shutil.copytree(pristine, tmp_path / "root")
    return tmp_path / "root" / imdb.STORE

  @pytest.fixture
  def refusal(self, tfds_imdb):
    def refuse(path: pathlib.Path) -> str:
      with pytest.raises(errors.DataError) as caught:
        tfds_imdb.read_store(path, expected=EXPECTED)
      message = str(caught.value)
      assert "\n" not in message
      assert str(path) in message
      return message

    return refuse

  def test_holds_what_the_archive_holds(self, tfds_imdb, small_archive, tmp_path, no_network):
    path = tfds_imdb.prepare(tmp_path, small_archive, expected=EXPECTED)
    assert path == tmp_path / "imdb_reviews/plain_text/1.0.0"
    splits = tfds_imdb.read_store(path, expected=EXPECTED)
    assert_same(splits, archive.read_archive(small_archive, expected=EXPECTED))
    assert len(set(splits["train"].films)) == 6

  def test_of_an_archive_without_films_knows_none(self, tfds_imdb, tmp_path):
    path = tfds_imdb.prepare(tmp_path, write_archive(tmp_path / "a.tar.gz", has_films=False), expected=EXPECTED)
    assert tfds_imdb.read_store(path, expected=EXPECTED)["train"].films is None

  def test_without_metadata_as_the_stock_builder_leaves_it_knows_no_films(self, tfds_imdb, store):
    (store / "metadata.json").unlink()
    assert tfds_imdb.read_store(store, expected=EXPECTED)["train"].films is None

  @pytest.mark.parametrize("damage", ["of another split", "in another order", "one missing", "not whole", "no films"])
  def test_films_of_other_reviews(self, store, refusal, damage):
    metadata = json.loads((store / "metadata.json").read_text())
    train = metadata["train"]
    if damage == "of another split":
      metadata["train"] = metadata["test"]
    elif damage == "in another order":
      train["films"].reverse()
    elif damage == "one missing":
      train["films"].pop()
    elif damage == "no films":
      del train["films"]
    text = json.dumps(metadata)
    (store / "metadata.json").write_text(text[:-9] if damage == "not whole" else text)
    assert "cannot read the record store" in refusal(store)

  def test_needs_no_tensorflow(self, tfds_imdb, small_archive, tmp_path):
    prepare = f"tfds_imdb.prepare(pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(small_archive)!r}), **expected)"
    code = f"import pathlib; from imdb_jax.data import tfds_imdb; expected = {{'expected': {EXPECTED}}}"
    assert heavy_modules_after(f"{code}; tfds_imdb.read_store({prepare}, **expected)") == "tensorflow_datasets"

  def test_without_unlabelled_reviews(self, tfds_imdb, tmp_path):
    labelled = {kind: count for kind, count in EXPECTED.items() if kind != "train/unsup"}
    path = tfds_imdb.prepare(tmp_path, write_archive(tmp_path / "a.tar.gz", labelled), expected=EXPECTED)
    splits = tfds_imdb.read_store(path, expected=EXPECTED)
    assert [len(split) for split in splits.values()] == [6, 6, 0]

  def test_is_laid_out_as_the_stock_builder_does(self, store):
    info = json.loads((store / "dataset_info.json").read_text())
    assert (info["name"], info["configName"], info["version"]) == ("imdb_reviews", "plain_text", "1.0.0")
    assert [split["name"] for split in info["splits"]] == ["train", "test", "unsupervised"]
    assert (store / "label.labels.txt").read_text().split() == ["neg", "pos"]

  def test_stock_builder_reads_it(self, pristine):
    import tensorflow_datasets as tfds

    builder = tfds.builder("imdb_reviews", data_dir=pristine)
    assert type(builder).__module__.startswith("tensorflow_datasets.")
    source = builder.as_data_source(split="test")  # pyright: ignore[reportCallIssue]
    assert len(source) == 6
    assert {example["label"] for example in source} == {0, 1}

  @pytest.fixture
  def talkative(self):
    import absl.logging

    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    yield absl.logging
    absl.logging.set_verbosity(verbosity)

  def test_says_nothing(self, tfds_imdb, small_archive, tmp_path, talkative, capfd, caplog):
    tfds_imdb.read_store(tfds_imdb.prepare(tmp_path, small_archive, expected=EXPECTED), expected=EXPECTED)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert talkative.get_verbosity() == talkative.INFO

  def test_failed_preparation_leaves_no_store(self, tfds_imdb, small_archive, tmp_path, monkeypatch):
    def fail(self, split):
      yield 0, {"text": "fine", "label": 0}
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds_imdb.ImdbReviews, "_generate_examples", fail)
    with pytest.raises(errors.DataError, match="No space left on device"):
      tfds_imdb.prepare(tmp_path, small_archive, expected=EXPECTED)
    assert imdb.find_store([tmp_path]) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "array_record" in path.name]

  def test_another_process_may_finish_first(self, tfds_imdb, pristine, small_archive, tmp_path, monkeypatch):
    generate = tfds_imdb.ImdbReviews._generate_examples

    def be_late(self, split):
      yield from generate(self, split)
      shutil.copytree(pristine / imdb.STORE, tmp_path / imdb.STORE, dirs_exist_ok=True)

    monkeypatch.setattr(tfds_imdb.ImdbReviews, "_generate_examples", be_late)
    path = tfds_imdb.prepare(tmp_path, small_archive, expected=EXPECTED)
    assert len(tfds_imdb.read_store(path, expected=EXPECTED)["train"]) == 6

  def test_wrong_counts(self, tfds_imdb, store):
    with pytest.raises(errors.DataError, match=r"has 3 reviews train/neg, expected 12,500"):
      tfds_imdb.read_store(store)

  def test_missing_split(self, store, refusal):
    info = json.loads((store / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] != "train"]
    (store / "dataset_info.json").write_text(json.dumps(info))
    assert "has 0 reviews train/neg, expected 3" in refusal(store)

  @pytest.mark.parametrize("damage", ["absent", "empty", "half", "zeros", "flipped"])
  def test_damaged_shard(self, store, refusal, damage):
    (shard,) = store.glob("*-train.array_record-*")
    content = bytearray(shard.read_bytes())
    shard.unlink()
    if damage == "empty":
      content = b""
    elif damage == "half":
      content = content[: len(content) // 2]
    elif damage == "zeros":
      content = bytes(len(content))
    elif damage == "flipped":
      content[content.index(b"caf")] ^= 1
    if damage != "absent":
      shard.write_bytes(content)
    assert "cannot read the record store" in refusal(store)

  @pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"fileFormat": "array_record", "version": "9.9.9"}'])
  def test_damaged_description(self, store, refusal, content):
    (store / "dataset_info.json").write_text(content)
    refusal(store)

  def test_no_store(self, tmp_path, refusal):
    assert "dataset_info.json" in refusal(tmp_path / imdb.STORE)

  def test_store_elsewhere(self, store, refusal):
    assert "it is not a directory" in refusal(store.rename(store.with_name("2.0.0")))

  def test_format_of_tensorflow(self, store, refusal):
    info = (store / "dataset_info.json").read_text()
    (store / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    assert "format tfrecord, which only TensorFlow reads" in refusal(store)


class TestFindStore:
  def make(self, root: pathlib.Path, info: str) -> pathlib.Path:
    (root / imdb.STORE).mkdir(parents=True)
    (root / imdb.STORE / "dataset_info.json").write_text(info)
    return root / imdb.STORE

  def test_none(self, tmp_path):
    (tmp_path / "file").touch()
    assert imdb.find_store([tmp_path, tmp_path / "absent", tmp_path / "file"]) is None

  def test_first_wins(self, tmp_path):
    stores = [self.make(tmp_path / name, '{"fileFormat": "array_record"}') for name in "ab"]
    assert imdb.find_store([tmp_path / "absent", tmp_path / "b", tmp_path / "a"]) == stores[1]

  def test_stores_that_need_tensorflow_are_passed_over(self, tmp_path):
    self.make(tmp_path / "old", "{}")
    self.make(tmp_path / "tf", '{"fileFormat": "tfrecord"}')
    good = self.make(tmp_path / "good", '{"fileFormat": "array_record"}')
    assert imdb.find_store([tmp_path / "old", tmp_path / "tf", tmp_path / "good"]) == good

  @pytest.mark.parametrize("info", ["{", "[]"])
  def test_damaged_store_is_found_and_left_to_its_reader(self, tmp_path, info):
    assert imdb.find_store([tmp_path]) is None
    assert self.make(tmp_path, info) == imdb.find_store([tmp_path])


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[str]:
  """A web server on loopback; yields its address."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      content = files.get(self.path)
      self.send_response(404 if content is None else 200)
      self.end_headers()
      with contextlib.suppress(ConnectionError):  # the client may have enough
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


CONTENT = b"an archive" * 300_000


@pytest.fixture
def official(monkeypatch):
  """Makes CONTENT the official archive."""
  monkeypatch.setattr(imdb, "OFFICIAL_SIZE", len(CONTENT))
  monkeypatch.setattr(imdb, "OFFICIAL_SHA256", hashlib.sha256(CONTENT).hexdigest())


class TestDownload:
  def refusal(self, directory: pathlib.Path, **options) -> str:
    """The one line of a download that fails, within seconds and leaving nothing behind."""
    before = set(directory.rglob("*"))
    start = time.monotonic()
    with pytest.raises(errors.DataError) as caught:
      imdb.download(directory, **options)
    assert time.monotonic() - start < 5
    assert set(directory.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    for part in (imdb.OFFICIAL_URL, imdb.OFFICIAL_SHA256, f"{imdb.OFFICIAL_SIZE:,} bytes", "--archive PATH"):
      assert part in message
    return message

  def test_whole_file(self, tmp_path, monkeypatch, official):
    calls = []
    with serve({"/a.tar.gz": CONTENT}) as address:
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"{address}/a.tar.gz")
      path = imdb.download(tmp_path / "new" / "downloads", progress=lambda *call: calls.append(call))
    assert path == tmp_path / "new/downloads/a.tar.gz"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert len(calls) > 1
    assert [so_far for so_far, _ in calls] == sorted({so_far for so_far, _ in calls})

  def test_whole_file_is_not_fetched_again(self, tmp_path, official, no_network):
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(CONTENT)
    assert imdb.download(tmp_path) == tmp_path / "aclImdb_v1.tar.gz"

  def test_damaged_file_is_fetched_again(self, tmp_path, monkeypatch, official):
    (tmp_path / "a.tar.gz").write_bytes(CONTENT[:-1] + b"?")
    with serve({"/a.tar.gz": CONTENT}) as address:
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"{address}/a.tar.gz")
      assert imdb.download(tmp_path).read_bytes() == CONTENT

  @pytest.mark.parametrize(
    ("content", "reason"),
    [
      (CONTENT[:-1] + b"?", "got sha256 "),
      (CONTENT[:-1], "got only 2,999,999 bytes"),
      (CONTENT + b"?", "got more bytes"),
      (b"", "got only 0 bytes"),
    ],
  )
  def test_wrong_answer(self, tmp_path, monkeypatch, official, content, reason):
    with serve({"/a.tar.gz": content}) as address:
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"{address}/a.tar.gz")
      assert reason in self.refusal(tmp_path)

  def test_endless_answer_is_cut_off(self, tmp_path, monkeypatch, official):
    sizes = []
    with serve({"/a.tar.gz": CONTENT * 8}) as address:
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"{address}/a.tar.gz")
      self.refusal(tmp_path, progress=lambda size, total: sizes.append(size))
    assert max(sizes) < 2 * len(CONTENT)

  def test_page_that_is_gone(self, tmp_path, monkeypatch):
    with serve({}) as address:
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"{address}/a.tar.gz")
      with pytest.raises(errors.DataError, match="404") as caught:
        imdb.download(tmp_path)
    assert isinstance(caught.value.__cause__, urllib.error.HTTPError)
    assert caught.value.__cause__.closed

  def test_closed_port(self, tmp_path, monkeypatch):
    with socket.socket() as unused:
      unused.bind(("127.0.0.1", 0))
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar.gz")
      assert "Connection refused" in self.refusal(tmp_path)

  def test_black_hole(self, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # never accepts
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"http://127.0.0.1:{server.getsockname()[1]}/a.tar.gz")
      assert "(" in self.refusal(tmp_path, timeout=0.3)

  def test_connection_that_falls_silent(self, tmp_path, monkeypatch, official):
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
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"http://127.0.0.1:{server.getsockname()[1]}/a.tar.gz")
      try:
        assert "timed out" in self.refusal(tmp_path, timeout=0.3)
      finally:
        silent.set()
        thread.join()

  def test_name_resolution_that_hangs(self, tmp_path, monkeypatch):
    answered = threading.Event()

    def hang(*args, **kwargs):
      answered.wait(10)
      raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(imdb, "OFFICIAL_URL", "http://reviews.invalid/a.tar.gz")
    try:
      assert "no answer within 0.3 s" in self.refusal(tmp_path, timeout=0.3)
    finally:
      answered.set()

  def test_directory_that_cannot_be_made(self, tmp_path, no_network):
    (tmp_path / "file").touch()
    with pytest.raises(errors.DataError, match="cannot download"):
      imdb.download(tmp_path / "file" / "downloads")


class TestLoad:
  @pytest.fixture(autouse=True)
  def small(self, monkeypatch, tmp_path):
    """Small archives count as complete, and no store of this machine is seen."""
    read = functools.partial(archive.read_archive, expected=EXPECTED)
    monkeypatch.setattr(archive, "read_archive", lambda path, expected=EXPECTED: read(path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "shared"))

  @pytest.fixture
  def stores(self, tfds_imdb, monkeypatch):
    """Small stores count as complete."""
    monkeypatch.setattr(tfds_imdb, "read_store", functools.partial(tfds_imdb.read_store, expected=EXPECTED))

  @pytest.fixture
  def downloaded(self, small_archive, tmp_path, monkeypatch, no_network) -> pathlib.Path:
    """A data directory with nothing but the official archive, already downloaded."""
    monkeypatch.setattr(imdb, "OFFICIAL_SHA256", archive.fingerprint(small_archive))
    (tmp_path / "data/downloads").mkdir(parents=True)
    shutil.copy(small_archive, tmp_path / "data/downloads")
    return tmp_path / "data"

  def test_named_archive_comes_first(self, small_archive, tmp_path, no_network):
    assert_same(imdb.load(small_archive, tmp_path / "data"), archive.read_archive(small_archive))
    assert not (tmp_path / "data").exists()

  def test_download_becomes_a_store_and_stays_one(self, stores, downloaded, small_archive):
    first = imdb.load(None, downloaded)
    assert_same(first, archive.read_archive(small_archive))
    assert imdb.find_store([downloaded]) is not None
    (downloaded / "downloads/aclImdb_v1.tar.gz").unlink()
    assert_same(imdb.load(None, downloaded), first)

  @pytest.mark.parametrize("home", [False, True])
  def test_shared_store_is_used_where_it_is(
    self, stores, pristine, small_archive, tmp_path, monkeypatch, no_network, home
  ):
    if home:
      monkeypatch.delenv("TFDS_DATA_DIR")
      monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(pristine, tmp_path / ("tensorflow_datasets" if home else "shared"))
    assert_same(imdb.load(None, tmp_path / "data"), archive.read_archive(small_archive))
    assert not (tmp_path / "data").exists()

  def test_own_store_goes_before_the_shared_one(self, stores, pristine, tmp_path, no_network):
    shutil.copytree(pristine, tmp_path / "data")
    (tmp_path / "shared" / imdb.STORE).mkdir(parents=True)
    (tmp_path / "shared" / imdb.STORE / "dataset_info.json").write_text("damaged")
    assert len(imdb.load(None, tmp_path / "data")["train"]) == 6

  @pytest.mark.parametrize("missing", ["tensorflow_datasets", "array_record"])
  def test_works_without_tfds(self, downloaded, small_archive, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "imdb_jax.data.tfds_imdb", raising=False)
    assert_same(imdb.load(None, downloaded), archive.read_archive(small_archive))
    assert imdb.find_store([downloaded]) is None

  def test_no_source_at_all(self, tmp_path, monkeypatch):
    with socket.socket() as unused:
      unused.bind(("127.0.0.1", 0))
      monkeypatch.setattr(imdb, "OFFICIAL_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar.gz")
      with pytest.raises(errors.DataError, match="--archive PATH"):
        imdb.load(None, tmp_path / "data")
