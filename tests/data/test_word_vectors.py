"""Word vectors are those of the definition, the same in every call, and put words of one kind close together."""

import numpy as np
import pytest

from imdb_jax.config import DataConfig
from imdb_jax.data import sample, tokens
from imdb_jax.data.word_vectors import read, svd
from imdb_jax.errors import UsageError


def random_tokens(n: int, t: int, v: int) -> np.ndarray:
  """Return ids of which small ones are frequent, with padding of every length at the front."""
  rng = np.random.default_rng(0)
  found = np.minimum(rng.geometric(0.2, (n, t)), v - 1).astype(np.int16)
  for row in range(n):
    found[row, : row % (t + 1)] = 0
  return found


def expected(ids: np.ndarray, v: int, e: int) -> np.ndarray:
  """Return the vectors by their definition, pair by pair, up to the sign of each column."""
  counts = np.zeros((v, v))
  for review in ids:
    words = [word for word in review if word]
    for i, word in enumerate(words):
      for j in range(max(i - 5, 0), min(i + 6, len(words))):
        if i != j:
          counts[word, words[j]] += (6 - abs(i - j)) / 5
  of_words = counts.sum(1)
  smoothed = of_words**0.75
  with np.errstate(divide="ignore", invalid="ignore"):
    information = np.log(counts / of_words[:, None] / (smoothed / smoothed.sum())[None, :])
  left, values, _ = np.linalg.svd(np.maximum(np.nan_to_num(information, nan=0, neginf=0), 0))
  vectors = left[:, :e] * np.sqrt(values[:e])
  return vectors * 0.3 / np.sqrt(np.mean(vectors[1:] ** 2))


@pytest.mark.parametrize("v", [20, 300])
def test_vectors_are_those_of_the_definition(v):
  ids, e = random_tokens(60, 12, 20), 6
  found, wanted = svd(ids, v, e), expected(ids, v, e)
  assert found.dtype == np.float32
  signs = np.sign((found * wanted).sum(0))
  np.testing.assert_allclose(found * signs, wanted, rtol=1e-4, atol=1e-5)
  assert not found[0].any(), "padding has no vector"


def test_every_call_returns_the_same_vectors():
  ids = random_tokens(60, 12, 20)
  np.testing.assert_array_equal(svd(ids, 20, 6), svd(ids, 20, 6))


@pytest.mark.parametrize(("v", "e"), [(20, 30), (2, 4)])
def test_a_small_vocabulary_fills_what_it_can(v, e):
  vectors = svd(random_tokens(60, 12, v), v, e)
  assert vectors.shape == (v, e)
  assert np.isfinite(vectors).all()
  assert vectors[1:, : v // 2].any() == (v > 2), "a single word has no neighbours to tell it from"


def test_words_that_never_occur_have_no_vector():
  ids = random_tokens(60, 12, 20)
  vectors = svd(ids, 25, 6)
  assert not vectors[20:].any()
  assert np.isfinite(vectors).all()


def test_words_of_one_kind_are_close_together():
  config = DataConfig(source="sample", vocabulary_size=1000, sequence_length=64)
  data = tokens.encode(config, sample.load())
  vectors = svd(data.train.tokens, 1000, 32)
  ids = {word: i for i, word in enumerate(data.vocabulary.words, start=1)}

  def similarity(one: str, other: str) -> float:
    x, y = vectors[ids[one]], vectors[ids[other]]
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

  assert similarity("dull", "charming") > similarity("dull", "the") + 0.2


@pytest.mark.parametrize("header", ["", "4 2\n"])
def test_a_file_gives_the_words_that_it_has(tmp_path, header):
  path = tmp_path / "vectors.txt"
  path.write_text(f"{header}good 1 -2.5\nunknown 3 4\nnew york 7 8\ncafé 1e-3 0\n", encoding="utf-8")
  vectors = read(path, ["bad", "café", "good", "new"], 6, 2)
  np.testing.assert_array_equal(vectors, np.array([[0, 0], [0, 0], [1e-3, 0], [1, -2.5], [0, 0], [0, 0]], np.float32))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"good 1 2\nbad 1\n", "line 2 is not a word and 2 numbers; see --embedding-size"),
    (b"3 3\ngood 1 2 3\n", "line 2 is not a word and 2 numbers"),
    (b"bad 1 2\ngood 1 nan\n", "line 2: a number is not finite"),
    (b"bad 1 2\ngood 1 1e300\n", "line 2: a number is not finite"),
    (b"good 1 2\nodd 3 4\ngood 5 6\n", "line 3: the word 'good' occurs twice"),
    (b"good one two\n", "could not convert"),
    (b"\xff\xfe 1 2\n", "has none of the 2 words of the vocabulary"),
    (b"", "has none of the 2 words"),
    (b"good 1 " + b"2" * 2**20, "line 1 is not a word and 2 numbers"),
  ],
)
def test_a_damaged_file_of_vectors_is_one_clear_line(tmp_path, content, message):
  path = tmp_path / "vectors.txt"
  path.write_bytes(content)
  with pytest.raises(UsageError, match=message) as error:
    read(path, ["good", "bad"], 3, 2)
  assert "--word-vectors" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_of_vectors_is_named(tmp_path):
  with pytest.raises(UsageError, match=r"--word-vectors .*absent\.txt: .*No such file"):
    read(tmp_path / "absent.txt", ["good"], 2, 2)
