"""Reviews to arrays: what is encoded, what is held out, and what identifies the result."""

import dataclasses

import numpy as np
import pytest

from imdb_jax.config import DataConfig
from imdb_jax.data import reviews, sample, tokens
from imdb_jax.data.tokenizer import Vocabulary
from imdb_jax.data.tokens import TokenData, TokenSplit
from imdb_jax.errors import DataError, UsageError

CONFIG = DataConfig(vocabulary_size=20, sequence_length=6)


def make_splits(prefix: str = "") -> dict[str, reviews.Reviews]:
  """Return a small corpus, two reviews per group; each split has words of its own."""
  splits = {}
  for split, num_rows in (("train", 60), ("test", 20)):
    texts = [f"{prefix} film {'good' if row % 2 else 'bad'} {split} word{row % 7} {row}" for row in range(num_rows)]
    labels = [row % 2 for row in range(num_rows)]
    splits[split] = reviews.canonical(texts, labels, [row // 2 for row in range(num_rows)])
  return splits


@pytest.fixture(scope="module")
def train() -> reviews.Reviews:
  return sample.load()["train"]


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
    name: reviews.canonical(split.texts[::-1], split.labels[::-1].tolist(), split.groups[::-1].tolist())
    for name, split in splits.items()
  }
  assert tokens.encode(config, splits).digest == tokens.encode(config, backwards).digest


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("field", ["tokens", "lengths", "labels"])
def test_digest_depends_on_every_array(name, field):
  data = tokens.encode(CONFIG, make_splits())
  array = getattr(getattr(data, name), field).copy()
  array.flat[-1] ^= 1
  changed = dataclasses.replace(data, **{name: dataclasses.replace(getattr(data, name), **{field: array})})
  assert changed.digest != data.digest


def test_digest_depends_on_the_vocabulary():
  data = tokens.encode(CONFIG, make_splits())
  vocabulary = dataclasses.replace(data.vocabulary, words=data.vocabulary.words[::-1])
  assert dataclasses.replace(data, vocabulary=vocabulary).digest != data.digest


def test_digest_is_the_published_one():
  """Runs record the digest, and are only resumed with equal data. Never regenerate it."""
  data = tokens.encode(DataConfig(source="sample", vocabulary_size=1000, sequence_length=64), sample.load())
  assert data.digest == "0ebf9793cd531d682f90add43f684a2f72dfa7bff8092f80d37663b05bb183f5"


def test_validation_is_the_test_split_unless_held_out():
  data = tokens.encode(CONFIG, make_splits())
  assert data.validation is data.test
  held = tokens.encode(dataclasses.replace(CONFIG, validation="split", validation_fraction=0.25), make_splits())
  assert len(held.train) + len(held.validation) == 60
  assert len(held.test) == 20


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_held_out_films_are_disjoint_and_the_right_share(train, fraction):
  rest, held = tokens.hold_out(train, fraction)
  assert not set(rest.groups) & set(held.groups)
  assert sorted(rest.texts + held.texts) == sorted(train.texts)
  # A film has 25 reviews, so the share is exact to one film.
  assert abs(len(held) - fraction * len(train)) <= 25
  assert 0.3 < held.labels.mean() < 0.7


def test_hold_out_without_groups_is_refused(train):
  with pytest.raises(DataError, match=r"--validation split .* --archive"):
    tokens.hold_out(dataclasses.replace(train, groups=None), 0.1)


def test_hold_out_is_the_same_each_time_and_keeps_the_order(train):
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


def test_batch_is_filled_with_empty_rows():
  split = tokens.encode(CONFIG, make_splits()).train
  found, lengths = split.batch(np.array([5, 2]), 4)
  np.testing.assert_array_equal(found, [*split.tokens[[5, 2]], [0] * 6, [0] * 6])
  np.testing.assert_array_equal(lengths, [*split.lengths[[5, 2]], 0, 0])
  assert (found.dtype, lengths.dtype) == (np.int16, np.int32)


def test_sequences_join_texts_with_a_zero_before_each(monkeypatch):
  monkeypatch.setattr(tokens, "_SEQUENCE", 4)
  monkeypatch.setattr(tokens, "_MAX_VALIDATION", 1)

  def split(*rows: list[int]) -> TokenSplit:
    array = np.array(rows, np.int16)
    return TokenSplit(
      tokens=array, lengths=(array > 0).sum(axis=1, dtype=np.int32), labels=np.ones(len(rows), np.int32)
    )

  train, test = split([0, 1, 2], [3, 4, 5], [0, 0, 0]), split([6, 7, 8], [1, 2, 3])
  data = TokenData(train=train, validation=test, test=test, vocabulary=Vocabulary(config=DataConfig(), words=()))
  found = tokens.sequences(data, np.array([[0, 9, 8], [0, 0, 7]], np.int16))
  # The last words, 0 and 7, fill no sequence.
  assert found.train.tokens.tolist() == [[0, 1, 2, 0], [3, 4, 5, 0], [0, 9, 8, 0]]
  assert found.train.lengths.tolist() == [4, 4, 4] and not found.train.labels.any()
  assert found.validation.tokens.tolist() == [[0, 6, 7, 8]]
