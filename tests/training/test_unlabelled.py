"""Word vectors from unlabelled reviews as well, and by skip-gram; a signal while they are computed loses nothing."""

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
from data.archives import COUNTS, make_members, pack
from reliability.sandbox import newest_state
from training.tiny import assert_same_end, change, tiny

import imdb_jax
from imdb_jax.config import Config, DataConfig, ModelConfig
from imdb_jax.data import archive, imdb, word_vectors
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.errors import DataError, UsageError
from imdb_jax.processes import Interrupted
from imdb_jax.training.console import Console

pytestmark = pytest.mark.slow


def config_of(run_dir: Path, source: Path | None, **model) -> Config:
  """Return the settings of a tiny run on an archive, or on the sample, that leaves word vectors as they start."""
  config = change(tiny(run_dir / "run", epochs=1), "optimizer", embedding_rate=0)
  config = change(config, "model", **({"embedding": "svd", "unlabelled": True} | model))
  if source is not None:
    config = change(config, "data", source="imdb", vocabulary_size=20)
  return change(config, "runtime", archive=source, cache_dir=run_dir / "cache")


def vectors_of(config: Config) -> np.ndarray:
  return newest_state(config.run_dir)[1].params["embedding"]["embedding"][0]


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Make small archives count as complete."""
  read = archive.read_archive
  monkeypatch.setattr(
    archive, "read_archive", lambda path, splits=imdb.LABELLED_SPLITS: read(path, splits, expected=COUNTS)
  )


@pytest.mark.parametrize("limit", [32, 2])
def test_unlabelled_reviews_change_the_vectors_but_not_the_vocabulary(tmp_path, capsys, limit):
  config = config_of(tmp_path, pack(tmp_path / "a.tar"))
  config = change(config, "data", limit=limit)
  imdb_jax.fit(config)
  reviews = archive.read_archive(tmp_path / "a.tar", imdb.SPLITS)
  train, unlabelled = (reviews[name].texts[:limit] for name in ("train", "unsupervised"))
  # "unsup" is a word of no labelled review.
  vocabulary, *_ = Vocabulary.fit(train, config.data)
  seen, length = vocabulary.encode(train + unlabelled)[0], len(train) + len(unlabelled)
  np.testing.assert_array_equal(vectors_of(config), word_vectors.svd(seen, 20, 4))
  shown = capsys.readouterr().out
  assert "Reading the unlabelled" in shown and f"Computing word vectors from {length} reviews" in shown
  assert "Warning" not in shown
  imdb_jax.fit(config)
  assert "Reading the unlabelled" not in capsys.readouterr().out, "a run that resumes does not need them"


def test_unlabelled_texts_of_the_test_set_are_counted(tmp_path, capsys):
  members = make_members()
  members["aclImdb/train/unsup/2_7.txt"] = members["aclImdb/test/pos/1_7.txt"]
  imdb_jax.fit(config_of(tmp_path, pack(tmp_path / "a.tar", members)))
  assert "Warning: 1 of the 4 unlabelled texts are also test texts" in capsys.readouterr().out


@pytest.mark.parametrize("has_archive", [False, True])
def test_a_source_without_unlabelled_reviews_is_named(tmp_path, has_archive):
  members = {name: content for name, content in make_members().items() if "unsup" not in name}
  source = pack(tmp_path / "a.tar", members) if has_archive else None
  name = str(source) if source else "the embedded sample"
  with pytest.raises(DataError, match=f"--unlabelled: {name} has no unlabelled texts, .* see --no-unlabelled"):
    imdb_jax.fit(config_of(tmp_path, source))


@pytest.mark.parametrize("is_file", [False, True])
def test_texts_of_your_own_may_be_unlabelled_too(tmp_path, capsys, is_file):
  given = [f"{word} film number {i}" for i, word in enumerate(("good", "bad") * 20)], ["yes", "no"] * 20
  test = ["a good film", "a bad film"], ["yes", "no"]
  more = ["a good and dull film", "", "a bad film", "not a good plot"]
  for name, columns in (("train", given), ("test", test), ("more", [more])):
    with (tmp_path / f"{name}.csv").open("w", newline="") as file:
      csv.writer(file).writerows([("text", "label")[: len(columns)], *zip(*columns, strict=True)])
  config = change(config_of(tmp_path, None), "data", source=str(tmp_path / "train.csv"), limit=None, vocabulary_size=20)
  config = change(config, "data", test_data=str(tmp_path / "test.csv"), unlabelled_data=str(tmp_path / "more.csv"))
  imdb_jax.fit(config, data=None if is_file else {"train": given, "test": test})
  assert "Warning: 1 of the 4 unlabelled texts are also test texts" in capsys.readouterr().out
  vocabulary = Vocabulary.load(config.run_dir / "vocab.json", config.data)
  # The order of texts does not matter to the vectors, except for rounding.
  seen = vocabulary.encode(given[0] + more)[0]
  np.testing.assert_allclose(vectors_of(config), word_vectors.svd(seen, 20, 4), atol=1e-6)


def test_a_file_of_unlabelled_texts_has_a_use():
  with pytest.raises(UsageError, match=r"--unlabelled-data /more\.csv: requires --unlabelled\.$"):
    Config(data=DataConfig(source="/a.csv", unlabelled_data="/more.csv"))


@pytest.mark.parametrize("embedding", ["random", "file"])
def test_other_word_vectors_have_no_use_for_them(embedding):
  with pytest.raises(UsageError, match=f"--unlabelled: requires --embedding svd or skipgram, not {embedding}"):
    ModelConfig(embedding=embedding, unlabelled=True)


def test_a_signal_while_vectors_are_computed_loses_nothing(tmp_path, monkeypatch, capsys):
  whole, stopped = (config_of(tmp_path / name, None, embedding="skipgram", unlabelled=False) for name in "ab")
  imdb_jax.fit(whole)
  assert "Word vectors  step" in capsys.readouterr().out
  show = Console.line

  def interrupted(console, text=""):
    show(console, text)
    if text.startswith("Word vectors  step"):
      signal.raise_signal(signal.SIGINT)

  with monkeypatch.context() as patch:
    patch.setattr(Console, "line", interrupted)
    with pytest.raises(Interrupted) as caught:
      imdb_jax.fit(stopped)
  assert (caught.value.signal, caught.value.step) == (signal.SIGINT, 0)
  shown = capsys.readouterr().out
  assert shown.count("Word vectors  step") == 1
  assert "No step is lost; the word vectors will be computed again." in shown
  imdb_jax.fit(stopped)
  assert_same_end(whole, stopped)
  np.testing.assert_allclose(np.sqrt(np.mean(vectors_of(whole)[1:] ** 2)), 0.3, rtol=1e-5)
