"""Sources: which one the settings select, and where the official reviews come from."""

import functools
import shutil
import socket
import sys
from pathlib import Path

import pytest
from data.archives import COUNTS, assert_same
from homeless import make_homeless

from imdb_jax import errors
from imdb_jax.config import DataConfig
from imdb_jax.data import archive, imdb, sample, sources
from imdb_jax.data.reviews import Reviews
from imdb_jax.store import files

IMDB = DataConfig()


def load(archive: Path | None, cache_dir: Path, config: DataConfig = IMDB) -> dict[str, Reviews]:
  return sources.find(config, archive, cache_dir).load(lambda line: None)


class TestFindStore:
  def make(self, root: Path, info: str) -> Path:
    (root / sources.STORE).mkdir(parents=True)
    (root / sources.STORE / "dataset_info.json").write_text(info)
    return root / sources.STORE

  def test_none(self, tmp_path):
    (tmp_path / "file").touch()
    assert sources.find_store([tmp_path, tmp_path / "absent", tmp_path / "file"]) is None

  def test_first_wins(self, tmp_path):
    stores = [self.make(tmp_path / name, '{"fileFormat": "array_record"}') for name in "ab"]
    assert sources.find_store([tmp_path / "absent", tmp_path / "b", tmp_path / "a"]) == stores[1]

  def test_stores_that_need_tensorflow_are_skipped(self, tmp_path):
    self.make(tmp_path / "old", "{}")
    self.make(tmp_path / "tf", '{"fileFormat": "tfrecord"}')
    good = self.make(tmp_path / "good", '{"fileFormat": "array_record"}')
    assert sources.find_store([tmp_path / "old", tmp_path / "tf", tmp_path / "good"]) == good

  @pytest.mark.parametrize("info", ["{", "[]"])
  def test_damaged_store_is_found_and_left_to_its_reader(self, tmp_path, info):
    assert sources.find_store([tmp_path]) is None
    assert self.make(tmp_path, info) == sources.find_store([tmp_path])


class TestLoad:
  @pytest.fixture(autouse=True)
  def small(self, monkeypatch, tmp_path):
    """Make small archives count as complete, and hide the stores of this machine."""
    read = archive.read_archive
    monkeypatch.setattr(
      archive,
      "read_archive",
      lambda path, splits=imdb.LABELLED_SPLITS, expected=COUNTS: read(path, splits, expected=COUNTS),
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "shared"))

  @pytest.fixture
  def stores(self, tfds_imdb, monkeypatch):
    """Make small stores count as complete."""
    monkeypatch.setattr(tfds_imdb, "read_store", functools.partial(tfds_imdb.read_store, expected=COUNTS))

  @pytest.fixture
  def downloaded(self, small_archive, tmp_path, monkeypatch, no_network) -> Path:
    """A cache folder that holds only the official archive, already downloaded."""
    monkeypatch.setattr(imdb, "SHA256", files.sha256(small_archive))
    (tmp_path / "data/downloads").mkdir(parents=True)
    shutil.copy(small_archive, tmp_path / "data/downloads")
    return tmp_path / "data"

  @pytest.fixture
  def expected(self, small_archive) -> dict[str, Reviews]:
    return archive.read_archive(small_archive)

  def test_sample(self, tmp_path, no_network):
    assert_same(load(None, tmp_path / "data", DataConfig(source="sample")), sample.load())
    assert not (tmp_path / "data").exists()

  def test_named_archive_comes_first(self, expected, small_archive, tmp_path, no_network):
    assert list(expected) == ["train", "test"]
    assert_same(load(small_archive, tmp_path / "data"), expected)
    assert not (tmp_path / "data").exists()

  def test_fingerprint_of_an_archive_is_that_of_its_bytes(self, small_archive, tmp_path):
    source = sources.find(IMDB, small_archive, tmp_path)
    assert (source.name, source.fingerprint()) == (str(small_archive), files.sha256(small_archive))

  def test_download_becomes_a_store_with_all_reviews(self, stores, tfds_imdb, downloaded, expected):
    assert_same(load(None, downloaded), expected)
    store = sources.find_store([downloaded])
    assert store is not None
    assert len(tfds_imdb.read_store(store, imdb.SPLITS)["unsupervised"]) == 4
    (downloaded / "downloads/aclImdb_v1.tar.gz").unlink()
    assert_same(load(None, downloaded), expected)

  @pytest.mark.parametrize("kind", ["archive", "store", "download without tfds"])
  def test_unlabelled_reviews_come_from_the_same_place(
    self, stores, pristine, downloaded, small_archive, tmp_path, monkeypatch, kind
  ):
    if kind == "store":
      shutil.copytree(pristine, tmp_path / "shared")
    if kind == "download without tfds":
      monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    source = sources.find(IMDB, small_archive if kind == "archive" else None, downloaded)
    assert_same(
      source.load_unlabelled(lambda line: None), archive.read_archive(small_archive, ("test", "unsupervised"))
    )

  @pytest.mark.parametrize("home", [False, True])
  def test_shared_store_is_used_where_it_is(self, stores, pristine, expected, tmp_path, monkeypatch, no_network, home):
    if home:
      monkeypatch.delenv("TFDS_DATA_DIR")
      monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(pristine, tmp_path / ("tensorflow_datasets" if home else "shared"))
    assert_same(load(None, tmp_path / "data"), expected)
    assert not (tmp_path / "data").exists()

  def test_a_user_without_a_home_has_no_shared_store(self, stores, downloaded, expected, monkeypatch):
    make_homeless(monkeypatch)
    assert_same(load(None, downloaded), expected)

  def test_own_store_comes_before_the_shared_one(self, stores, pristine, expected, tmp_path, no_network):
    shutil.copytree(pristine, tmp_path / "data")
    (tmp_path / "shared" / sources.STORE).mkdir(parents=True)
    (tmp_path / "shared" / sources.STORE / "dataset_info.json").write_text("damaged")
    assert_same(load(None, tmp_path / "data"), expected)

  @pytest.mark.parametrize("missing", ["tensorflow_datasets", "array_record"])
  def test_works_without_tfds(self, downloaded, expected, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "imdb_jax.data.tfds_imdb", raising=False)
    assert_same(load(None, downloaded), expected)
    assert sources.find_store([downloaded]) is None

  def test_no_source_at_all(self, tmp_path, monkeypatch):
    with socket.socket() as unused:
      unused.bind(("127.0.0.1", 0))
      monkeypatch.setattr(imdb, "URL", f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar.gz")
      with pytest.raises(errors.DataError, match="--archive PATH"):
        load(None, tmp_path / "data")
