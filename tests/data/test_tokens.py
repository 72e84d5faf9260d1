"""Reviews to arrays, and the cache: it serves what it should, and never anything stale or damaged."""

import dataclasses
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imdb_jax.config import DataConfig
from imdb_jax.data import archive, imdb, reviews, sample, tokens
from imdb_jax.errors import DataError, UsageError

CONFIG = DataConfig(vocabulary_size=20, sequence_length=6)
COUNTS = {"train/neg": 6, "train/pos": 6, "test/neg": 3, "test/pos": 3}


def make_splits(prefix: str = "") -> dict[str, reviews.Reviews]:
  """A small corpus, two reviews a film; each split has words of its own."""
  splits = {}
  for split, num_rows in (("train", 60), ("test", 20)):
    texts = [f"{prefix} film {'good' if row % 2 else 'bad'} {split} word{row % 7} {row}" for row in range(num_rows)]
    labels = [row % 2 for row in range(num_rows)]
    splits[split] = reviews.canonical(texts, labels, [row // 2 for row in range(num_rows)])
  return splits


def assert_same(left: tokens.TokenData, right: tokens.TokenData) -> None:
  assert left.vocabulary == right.vocabulary
  for name in ("train", "validation", "test"):
    for field in ("tokens", "lengths", "labels"):
      first, second = getattr(getattr(left, name), field), getattr(getattr(right, name), field)
      assert first.dtype == second.dtype
      np.testing.assert_array_equal(first, second)


# --- encode ---


def test_arrays_hold_the_reviews():
  splits = make_splits()
  data = tokens.encode(CONFIG, splits)
  assert (len(data.train), len(data.test)) == (60, 20)
  for split, encoded in (("train", data.train), ("test", data.test)):
    np.testing.assert_array_equal(encoded.labels, splits[split].labels)
    assert encoded.labels.dtype == encoded.lengths.dtype == np.int32
    assert encoded.tokens.dtype == np.int16
    for row, text in enumerate(splits[split].texts):
      ids = data.vocabulary.ids(text)
      assert encoded.tokens[row].tolist() == [0] * (6 - len(ids)) + ids
      assert encoded.lengths[row] == len(ids)


def test_test_reviews_cannot_change_the_vocabulary():
  splits = make_splits()
  others = splits | {"test": make_splits("other words altogether")["test"]}
  first, second = tokens.encode(CONFIG, splits), tokens.encode(CONFIG, others)
  assert first.vocabulary == second.vocabulary
  np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
  assert "test" not in first.vocabulary.words


def test_held_out_reviews_cannot_change_the_vocabulary():
  config = dataclasses.replace(CONFIG, validation="split", validation_fraction=0.3, vocabulary_size=1000)
  splits = make_splits()
  rest, held = tokens.hold_out(splits["train"], 0.3)
  words = set(tokens.encode(config, splits).vocabulary.words)
  assert words == {word for text in rest.texts for word in text.lower().split()}
  assert not {word for text in held.texts for word in text.split() if word.isdigit()} & words


@pytest.mark.parametrize("validation", ["test", "split"])
def test_order_of_the_source_makes_no_difference(validation):
  config = dataclasses.replace(CONFIG, validation=validation)
  splits = make_splits()
  backwards = {
    name: reviews.canonical(split.texts[::-1], split.labels[::-1].tolist(), split.films[::-1].tolist())
    for name, split in splits.items()
  }
  assert tokens.encode(config, splits).digest() == tokens.encode(config, backwards).digest()


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("field", ["tokens", "lengths", "labels"])
def test_digest_tells_every_array(name, field):
  data = tokens.encode(CONFIG, make_splits())
  array = getattr(getattr(data, name), field).copy()
  array.flat[-1] ^= 1
  changed = dataclasses.replace(data, **{name: dataclasses.replace(getattr(data, name), **{field: array})})
  assert changed.digest() != data.digest()


def test_digest_tells_the_vocabulary():
  data = tokens.encode(CONFIG, make_splits())
  vocabulary = dataclasses.replace(data.vocabulary, words=data.vocabulary.words[::-1])
  assert dataclasses.replace(data, vocabulary=vocabulary).digest() != data.digest()


def test_validation_is_the_test_split_unless_held_out():
  data = tokens.encode(CONFIG, make_splits())
  assert data.validation is data.test
  held = tokens.encode(dataclasses.replace(CONFIG, validation="split", validation_fraction=0.25), make_splits())
  assert len(held.train) + len(held.validation) == 60
  assert len(held.test) == 20


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_held_out_films_are_disjoint_and_the_right_share(fraction):
  train = sample.load()["train"]
  rest, held = tokens.hold_out(train, fraction)
  assert not set(rest.films) & set(held.films)
  assert sorted(rest.texts + held.texts) == sorted(train.texts)
  # A film has 25 reviews, so the share is right to one film.
  assert abs(len(held) - fraction * len(train)) <= 25
  assert 0.3 < held.labels.mean() < 0.7


def test_hold_out_without_films_is_refused():
  train = dataclasses.replace(sample.load()["train"], films=None)
  with pytest.raises(DataError, match=r"--validation split .* --archive"):
    tokens.hold_out(train, 0.1)


def test_hold_out_is_the_same_each_time_and_keeps_the_order():
  train = sample.load()["train"]
  (rest, held), (_, again) = tokens.hold_out(train, 0.1), tokens.hold_out(train, 0.1)
  assert held.texts == again.texts
  for part in (rest, held):
    places = [train.texts.index(text) for text in part.texts[:100]]
    assert places == sorted(places)


def test_limit_takes_the_first_reviews_of_each_split():
  data, whole = tokens.encode(dataclasses.replace(CONFIG, limit=30), make_splits()), make_splits()
  assert (len(data.train), len(data.test)) == (30, 20)
  np.testing.assert_array_equal(data.train.labels, whole["train"].labels[:30])
  words = {word for text in whole["train"].texts[:30] for word in text.split()}
  assert set(data.vocabulary.words) <= words


def test_empty_split_is_refused():
  config = dataclasses.replace(CONFIG, validation="split", validation_fraction=0.999)
  with pytest.raises(UsageError, match="--validation-fraction"):
    tokens.encode(config, make_splits())


# --- gather ---


def test_gather_pads_with_empty_rows_of_weight_0():
  split = tokens.encode(CONFIG, make_splits()).train
  examples = split.gather(np.array([5, 2]), 4)
  np.testing.assert_array_equal(examples["tokens"], [*split.tokens[[5, 2]], [0] * 6, [0] * 6])
  np.testing.assert_array_equal(examples["lengths"], [*split.lengths[[5, 2]], 0, 0])
  np.testing.assert_array_equal(examples["labels"], [*split.labels[[5, 2]], 0, 0])
  np.testing.assert_array_equal(examples["weights"], [1, 1, 0, 0])
  dtypes = {name: array.dtype for name, array in examples.items()}
  assert dtypes == {"tokens": np.int16, "lengths": np.int32, "labels": np.float32, "weights": np.float32}


# --- load and its cache ---


def write_archive(path: Path, word: str = "fine") -> Path:
  """Two reviews of a film, one of each side."""
  members = {}
  for kind, count in COUNTS.items():
    split, side = kind.split("/")
    members[f"aclImdb/{split}/urls_{side}.txt"] = b"".join(b"/title/tt%d/\n" % number for number in range(count))
    for number in range(count):
      members[f"aclImdb/{kind}/{number}_7.txt"] = f"{kind} review {number} is {word}".encode()
  with tarfile.open(path, "w:gz") as file:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
  return path


@pytest.fixture
def source(tmp_path, monkeypatch):
  """A small archive in place of the official one, and a count of how often it is read."""
  read_archive, readings = archive.read_archive, []

  def read(path):
    readings.append(path)
    return read_archive(path, expected=COUNTS)

  monkeypatch.setattr(archive, "read_archive", read)
  return write_archive(tmp_path / "small.tar.gz"), readings


@pytest.fixture
def cache_dir(tmp_path) -> Path:
  return tmp_path / "cache"


def entries(cache_dir: Path) -> list[Path]:
  return sorted((cache_dir / "tokens").iterdir())


def without_stores(monkeypatch):
  """No prepared store, no tensorflow-datasets, no network."""

  def refuse(*args, **kwargs):
    raise DataError("no source")

  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  monkeypatch.setattr(imdb, "load", refuse)


def test_sample_needs_neither_source_nor_cache(monkeypatch, cache_dir):
  without_stores(monkeypatch)
  config = dataclasses.replace(CONFIG, data="sample")
  data = tokens.load(config, cache_dir=cache_dir)
  assert (len(data.train), len(data.test)) == (4000, 1000)
  assert not cache_dir.exists()


@pytest.mark.parametrize("validation", ["test", "split"])
def test_second_load_does_not_read_the_source(source, cache_dir, validation):
  path, readings = source
  config = dataclasses.replace(CONFIG, validation=validation, validation_fraction=0.3)
  first_lines, second_lines = [], []
  first = tokens.load(config, archive=path, cache_dir=cache_dir, report=first_lines.append)
  second = tokens.load(config, archive=path, cache_dir=cache_dir, report=second_lines.append)
  assert len(readings) == 1
  assert_same(first, second)
  assert (len(first.train), len(first.test)) == ((12, 6) if validation == "test" else (len(first.train), 6))
  assert any("Reading" in line for line in first_lines)
  assert any("not the texts of the official" in line for line in first_lines)
  assert not second_lines
  assert [entry.name[0] != "." for entry in entries(cache_dir)] == [True], "something temporary was left"


@pytest.mark.parametrize(
  "changes",
  [
    {"vocabulary_size": 10},
    {"sequence_length": 3},
    {"limit": 4},
    {"strip_html": False},
    {"validation": "split"},
    {"validation_fraction": 0.2},
  ],
)
def test_other_settings_have_an_entry_of_their_own(source, cache_dir, changes):
  path, readings = source
  tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  config = dataclasses.replace(CONFIG, **changes)
  data = tokens.load(config, archive=path, cache_dir=cache_dir)
  assert len(readings) == 2
  assert_same(data, tokens.encode(config, archive.read_archive(path)))


def test_changed_archive_is_read_again(source, cache_dir):
  path, readings = source
  before = tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  write_archive(path, "dull")
  after = tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  assert len(readings) == 2
  assert "fine" in before.vocabulary.words
  assert "dull" in after.vocabulary.words


def test_same_archive_under_another_name_is_not_read_again(source, cache_dir):
  path, readings = source
  tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  tokens.load(CONFIG, archive=path.rename(path.with_name("moved.tar.gz")), cache_dir=cache_dir)
  assert len(readings) == 1


def test_another_process_may_fill_the_cache_first(source, cache_dir, monkeypatch):
  path, readings = source
  replace = Path.replace

  def be_late(whole, entry):
    shutil.copytree(whole, entry)
    return replace(whole, entry)

  with monkeypatch.context() as patch:
    patch.setattr(Path, "replace", be_late)
    data = tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  assert_same(tokens.load(CONFIG, archive=path, cache_dir=cache_dir), data)
  assert len(readings) == 1
  assert len(entries(cache_dir)) == 1, "something temporary was left"


def flip(path: Path, place: float) -> None:
  content = bytearray(path.read_bytes())
  content[int(place * len(content))] ^= 0xFF
  path.write_bytes(content)


def set_in_directory(path: Path, offset: int, value: int) -> None:
  """Sets a byte of the first entry in the zip's directory."""
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\x01\x02") + offset] = value
  path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])


def change_manifest(entry: Path, change: Callable[[dict], dict]) -> None:
  path = entry / "manifest.json"
  path.write_text(json.dumps(change(json.loads(path.read_text()))))


DAMAGES = {
  "arrays absent": lambda entry: (entry / "arrays.npz").unlink(),
  "arrays empty": lambda entry: truncate(entry / "arrays.npz", 0),
  "arrays cut short": lambda entry: truncate(entry / "arrays.npz", 0.5),
  "arrays without their first byte": lambda entry: flip(entry / "arrays.npz", 0),
  "a byte of the arrays": lambda entry: flip(entry / "arrays.npz", 0.1),
  "another byte of the arrays": lambda entry: flip(entry / "arrays.npz", 0.5),
  "arrays of an unknown compression": lambda entry: set_in_directory(entry / "arrays.npz", 10, 99),
  "arrays that claim to be encrypted": lambda entry: set_in_directory(entry / "arrays.npz", 8, 1),
  "arrays are pickled": lambda entry: np.savez(entry / "arrays.npz", train_tokens=np.array([{}], object)),
  "a split missing": lambda entry: np.savez(entry / "arrays.npz", train_tokens=np.zeros(1)),
  "arrays changed as a whole": lambda entry: np.savez(
    entry / "arrays.npz", **(dict(np.load(entry / "arrays.npz")) | {"test_labels": np.ones(6, np.int32)})
  ),
  "an array more": lambda entry: np.savez(
    entry / "arrays.npz", **(dict(np.load(entry / "arrays.npz")) | {"more": np.zeros(1)})
  ),
  "arrays that claim to unpack to 4 GB": lambda entry: set_in_directory(entry / "arrays.npz", 27, 0xFF),
  "vocabulary absent": lambda entry: (entry / "vocab.json").unlink(),
  "vocabulary cut short": lambda entry: truncate(entry / "vocab.json", 0.5),
  "vocabulary changed": lambda entry: (entry / "vocab.json").write_text(
    (entry / "vocab.json").read_text().replace("review", "sequel")
  ),
  "manifest absent": lambda entry: (entry / "manifest.json").unlink(),
  "manifest cut short": lambda entry: truncate(entry / "manifest.json", 0.5),
  "manifest not an object": lambda entry: (entry / "manifest.json").write_text("[]"),
  "manifest deeply nested": lambda entry: (entry / "manifest.json").write_text("[" * 100_000),
  "manifest without digest": lambda entry: (entry / "manifest.json").write_text("{}"),
  "manifest with an unknown key": lambda entry: change_manifest(entry, lambda manifest: manifest | {"colour": 1}),
  "manifest without a key": lambda entry: change_manifest(entry, lambda manifest: {"digest": manifest["digest"]}),
  "manifest larger than 1 MiB": lambda entry: (entry / "manifest.json").write_text(
    (entry / "manifest.json").read_text() + " " * 2**20
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_told_and_made_again(source, cache_dir, damage):
  path, readings = source
  expected = tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  (entry,) = entries(cache_dir)
  DAMAGES[damage](entry)
  lines = []
  assert_same(tokens.load(CONFIG, archive=path, cache_dir=cache_dir, report=lines.append), expected)
  assert len(readings) == 2
  assert any("damaged" in line for line in lines)
  # And the new entry is whole.
  assert_same(tokens.load(CONFIG, archive=path, cache_dir=cache_dir), expected)
  assert len(readings) == 2


def test_arrays_larger_than_any_config_allows_are_not_opened(source, cache_dir, monkeypatch):
  path, readings = source
  tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  (entry,) = entries(cache_dir)
  monkeypatch.setattr(tokens, "_MAX_ARRAYS_BYTES", (entry / "arrays.npz").stat().st_size - 1)
  lines = []
  tokens.load(CONFIG, archive=path, cache_dir=cache_dir, report=lines.append)
  assert len(readings) == 2
  assert any("arrays.npz is no file of at most" in line for line in lines)


def load_as_official(monkeypatch, path: Path, cache_dir: Path, config: DataConfig = CONFIG) -> tokens.TokenData:
  splits = archive.read_archive(path)
  digests = {name: reviews.content_digest(splits[name]) for name in ("train", "test")}
  monkeypatch.setattr(imdb, "OFFICIAL_CONTENT", digests)
  lines = []
  data = tokens.load(config, archive=path, cache_dir=cache_dir, report=lines.append)
  assert not any("not the texts of the official" in line for line in lines)
  return data


def test_official_arrays_serve_without_archive_and_tfds(source, cache_dir, monkeypatch):
  path, _ = source
  expected = load_as_official(monkeypatch, path, cache_dir)
  path.unlink()
  without_stores(monkeypatch)
  lines = []
  assert_same(tokens.load(CONFIG, cache_dir=cache_dir, report=lines.append), expected)
  assert not lines


def test_official_arrays_of_other_settings_do_not_serve(source, cache_dir, monkeypatch):
  path, _ = source
  load_as_official(monkeypatch, path, cache_dir)
  without_stores(monkeypatch)
  with pytest.raises(DataError, match="no source"):
    tokens.load(dataclasses.replace(CONFIG, sequence_length=5), cache_dir=cache_dir)


def test_other_arrays_do_not_pass_for_the_official_ones(source, cache_dir, monkeypatch):
  path, _ = source
  tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  without_stores(monkeypatch)
  with pytest.raises(DataError, match="no source"):
    tokens.load(CONFIG, cache_dir=cache_dir)


HELD_OUT = dataclasses.replace(CONFIG, validation="split", validation_fraction=0.3)


def test_reviews_without_films_are_not_cached_beside_those_with(source, cache_dir, monkeypatch):
  path, _ = source
  splits = {name: dataclasses.replace(split, films=None) for name, split in archive.read_archive(path).items()}
  with monkeypatch.context() as patch:
    patch.setattr(imdb, "load", lambda *args, **kwargs: splits)
    with pytest.raises(DataError, match="--archive"):
      tokens.load(HELD_OUT, cache_dir=cache_dir)
  expected = load_as_official(monkeypatch, path, cache_dir, HELD_OUT)
  without_stores(monkeypatch)
  assert_same(tokens.load(HELD_OUT, cache_dir=cache_dir), expected)


@pytest.mark.parametrize("config", [CONFIG, HELD_OUT], ids=["test", "split"])
def test_only_parts_that_were_held_out_in_format_1_are_made_again(source, cache_dir, monkeypatch, config):
  path, readings = source
  with monkeypatch.context() as patch:
    patch.setattr(tokens, "_FORMATS", {"test": 1, "split": 1})
    load_as_official(monkeypatch, path, cache_dir, config)
  num_readings = len(readings)
  tokens.load(config, archive=path, cache_dir=cache_dir)
  assert len(readings) == num_readings + (config == HELD_OUT)


def test_parts_that_were_held_out_in_format_1_do_not_serve_without_archive(source, cache_dir, monkeypatch):
  path, _ = source
  with monkeypatch.context() as patch:
    patch.setattr(tokens, "_FORMATS", {"test": 1, "split": 1})
    load_as_official(monkeypatch, path, cache_dir, HELD_OUT)
  without_stores(monkeypatch)
  with pytest.raises(DataError, match="no source"):
    tokens.load(HELD_OUT, cache_dir=cache_dir)


def test_damaged_entries_do_not_hide_the_official_one(source, cache_dir, monkeypatch):
  path, _ = source
  expected = load_as_official(monkeypatch, path, cache_dir)
  without_stores(monkeypatch)
  honest = (entries(cache_dir)[0] / "manifest.json").read_text()
  large, unknown = honest + " " * 2**20, json.dumps(json.loads(honest) | {"colour": 1})
  for number, content in enumerate(("", "[]", "null", '{"official": true}', "[" * 100_000, large, unknown)):
    (cache_dir / "tokens" / f"00{number}").mkdir()
    (cache_dir / "tokens" / f"00{number}" / "manifest.json").write_text(content)
  assert_same(tokens.load(CONFIG, cache_dir=cache_dir), expected)


def test_manifest_tells_what_made_the_entry(source, cache_dir):
  path, _ = source
  data = tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  (entry,) = entries(cache_dir)
  manifest = json.loads((entry / "manifest.json").read_text())
  assert manifest["settings"] == dataclasses.asdict(CONFIG)
  assert manifest["official"] is False
  assert manifest["digest"] == data.digest()


def test_unwritable_cache_is_named(source, tmp_path):
  path, _ = source
  blocked = tmp_path / "blocked"
  blocked.write_text("a file where the folder should be")
  with pytest.raises(DataError, match="--cache-dir"):
    tokens.load(CONFIG, archive=path, cache_dir=blocked)


def test_a_file_in_place_of_an_entry_is_named(source, cache_dir):
  path, _ = source
  tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
  (entry,) = entries(cache_dir)
  shutil.rmtree(entry)
  entry.touch()
  with pytest.raises(DataError, match="--cache-dir"):
    tokens.load(CONFIG, archive=path, cache_dir=cache_dir)
