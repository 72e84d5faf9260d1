"""Record stores: they hold what the archive holds, and damaged ones end in one clear line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import absl.logging
import pytest
from data.archives import COUNTS, assert_same, make_members, pack

from imdb_jax import errors
from imdb_jax.data import archive, imdb
from imdb_jax.data.sources import STORE, find_store


@pytest.fixture
def store(pristine, tmp_path) -> Path:
  shutil.copytree(pristine, tmp_path / "root")
  return tmp_path / "root" / STORE


@pytest.fixture
def refusal(tfds_imdb):
  def refuse(path: Path) -> str:
    with pytest.raises(errors.DataError) as caught:
      tfds_imdb.read_store(path, expected=COUNTS)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "--archive" in message
    return message

  return refuse


def test_holds_what_the_archive_holds(tfds_imdb, small_archive, tmp_path, no_network):
  path = tfds_imdb.prepare(tmp_path, small_archive, expected=COUNTS)
  assert path == tmp_path / "imdb_reviews/plain_text/1.0.0"
  for splits in (imdb.SPLITS, imdb.LABELLED_SPLITS):
    found = tfds_imdb.read_store(path, splits, expected=COUNTS)
    assert_same(found, archive.read_archive(small_archive, splits, expected=COUNTS))
    assert len(set(found["train"].groups)) == 6


def test_without_films(tfds_imdb, tmp_path, store):
  members = {name: content for name, content in make_members().items() if "urls" not in name}
  path = tfds_imdb.prepare(tmp_path, pack(tmp_path / "a.gz", members), expected=COUNTS)
  assert tfds_imdb.read_store(path, expected=COUNTS)["train"].groups is None
  # The stock builder writes no metadata.
  (store / "metadata.json").unlink()
  assert tfds_imdb.read_store(store, expected=COUNTS)["train"].groups is None


@pytest.mark.parametrize("damage", ["of another split", "in another order", "one missing", "cut short", "no films"])
def test_films_of_other_reviews_are_refused(store, refusal, damage):
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
  (store / "metadata.json").write_text(text[:-9] if damage == "cut short" else text)
  assert "cannot read the record store" in refusal(store)


def test_needs_no_tensorflow(tfds_imdb, small_archive, tmp_path):
  prepare = f"tfds_imdb.prepare(pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(small_archive)!r}), **expected)"
  code = f"""import pathlib, sys
from imdb_jax.data import tfds_imdb
expected = {{"expected": {COUNTS}}}
tfds_imdb.read_store({prepare}, **expected)
print(*sorted({{"jax", "tensorflow", "tensorflow_datasets"}} & sys.modules.keys()))"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "tensorflow_datasets"


def test_without_unlabelled_reviews(tfds_imdb, tmp_path):
  labelled = {kind: count for kind, count in COUNTS.items() if kind != "train/unsup"}
  path = tfds_imdb.prepare(tmp_path, pack(tmp_path / "a.gz", make_members(labelled)), expected=COUNTS)
  splits = tfds_imdb.read_store(path, imdb.SPLITS, expected=COUNTS)
  assert [len(split) for split in splits.values()] == [6, 6, 0]


def test_layout_is_that_of_the_stock_builder(store):
  info = json.loads((store / "dataset_info.json").read_text())
  assert (info["name"], info["configName"], info["version"]) == ("imdb_reviews", "plain_text", "1.0.0")
  assert [split["name"] for split in info["splits"]] == ["train", "test", "unsupervised"]
  assert (store / "label.labels.txt").read_text().split() == ["neg", "pos"]


def test_stock_builder_reads_it(pristine):
  import tensorflow_datasets as tfds

  builder = tfds.builder("imdb_reviews", data_dir=pristine)
  assert type(builder).__module__.startswith("tensorflow_datasets.")
  source = builder.as_data_source(split="test")  # pyright: ignore[reportCallIssue]
  assert len(source) == 6
  assert {example["label"] for example in source} == {0, 1}


@pytest.fixture
def talkative():
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.INFO)
  yield absl.logging
  absl.logging.set_verbosity(verbosity)


def test_says_nothing(tfds_imdb, small_archive, tmp_path, talkative, capfd, caplog):
  tfds_imdb.read_store(tfds_imdb.prepare(tmp_path, small_archive, expected=COUNTS), expected=COUNTS)
  assert capfd.readouterr() == ("", "")
  assert caplog.records == []
  assert talkative.get_verbosity() == talkative.INFO


def test_failed_preparation_leaves_no_store(tfds_imdb, small_archive, tmp_path, monkeypatch):
  def fail(self, split):
    yield 0, {"text": "fine", "label": 0}
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tfds_imdb.ImdbReviews, "_generate_examples", fail)
  with pytest.raises(errors.DataError, match="No space left on device"):
    tfds_imdb.prepare(tmp_path, small_archive, expected=COUNTS)
  assert find_store([tmp_path]) is None
  assert not [path for path in tmp_path.rglob("*") if path.is_file() and "array_record" in path.name]


def test_wrong_counts(tfds_imdb, store):
  with pytest.raises(errors.DataError, match=r"test/neg has 3 reviews, expected 12,500"):
    tfds_imdb.read_store(store)


def test_missing_split(store, refusal):
  info = json.loads((store / "dataset_info.json").read_text())
  info["splits"] = [split for split in info["splits"] if split["name"] != "train"]
  (store / "dataset_info.json").write_text(json.dumps(info))
  assert "train/neg has 0 reviews, expected 3" in refusal(store)


@pytest.mark.parametrize("damage", ["absent", "empty", "half", "zeros", "flipped"])
def test_damaged_shard(store, refusal, damage):
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
def test_damaged_description(store, refusal, content):
  (store / "dataset_info.json").write_text(content)
  refusal(store)


def test_no_store(tmp_path, refusal):
  assert "dataset_info.json" in refusal(tmp_path / STORE)


def test_store_elsewhere(store, refusal):
  assert "it is not a directory" in refusal(store.rename(store.with_name("2.0.0")))


def test_format_of_tensorflow(store, refusal):
  info = (store / "dataset_info.json").read_text()
  (store / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
  assert "format tfrecord, which only TensorFlow reads" in refusal(store)
