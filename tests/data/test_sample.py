"""The embedded sample: the same everywhere, split by films, and not solvable without word order."""

import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from imdb_jax.data import reviews, sample

SIZES = {"train": 4000, "test": 1000}
# `Reviews.digest` of each split. After a deliberate change of the corpus, also train the sample preset with several
# seeds: its expected accuracy belongs to this text.
DIGESTS = {
  "train": "4f80c36bc9340370a872f0d598622ba5b77ba3a1830d5b671e2f58ad0142318f",
  "test": "a070145f85ccd5016d47cb1f042461ae2d27b3c1670636c24b1ff06b0fcab17a",
}


@pytest.fixture(scope="module")
def splits() -> dict[str, reviews.Reviews]:
  return sample.load()


def tokens(text: str) -> list[str]:
  return re.sub(r'[!"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\t\n]', " ", re.sub("<[^>]+>", " ", text.lower())).split()


def test_every_load_gives_the_same_reviews(splits):
  again = sample.load()
  assert list(again) == list(splits) == list(SIZES)
  for split in splits:
    assert again[split].texts == splits[split].texts
    np.testing.assert_array_equal(again[split].labels, splits[split].labels)
    np.testing.assert_array_equal(again[split].groups, splits[split].groups)


@pytest.mark.parametrize("split", SIZES)
def test_reviews_are_the_published_ones(splits, split):
  assert splits[split].digest == DIGESTS[split], "the corpus changed: see the comment at DIGESTS"


@pytest.mark.parametrize("split", SIZES)
def test_size_and_balance(splits, split):
  labels = splits[split].labels
  assert len(splits[split]) == SIZES[split]
  assert np.bincount(labels, minlength=2).tolist() == [SIZES[split] // 2] * 2


def test_no_text_occurs_twice(splits):
  texts = splits["train"].texts + splits["test"].texts
  assert len(set(texts)) == len(texts)


def test_splits_share_no_film(splits):
  train, test = (set(splits[split].groups.tolist()) for split in ("train", "test"))
  assert len(train) == 160
  assert len(test) == 40
  assert not train & test


def test_no_title_is_in_both_splits(splits):
  train, test = (set(re.findall('"[^"]+"', " ".join(splits[split].texts))) for split in ("train", "test"))
  assert train
  assert test
  assert not train & test


@pytest.mark.parametrize("split", SIZES)
def test_every_film_has_both_labels(splits, split):
  films, labels = splits[split].groups, splits[split].labels
  assert all(0.4 < labels[films == film].mean() < 0.6 for film in np.unique(films))


@pytest.mark.parametrize("split", SIZES)
def test_lengths(splits, split):
  words = [len(text.split()) for text in splits[split].texts]
  assert min(words) >= 10
  assert max(words) <= 60
  # Whole reviews fit a model that reads 64 tokens.
  assert max(len(tokens(text)) for text in splits[split].texts) <= 64


def test_texts_look_like_reviews(splits):
  texts = splits["train"].texts
  assert 0.1 < np.mean(["<br />" in text for text in texts]) < 0.9
  for mark in (".", ",", "!", "...", "(", ":", '"', "'"):
    assert any(mark in text for text in texts), mark
  assert all(text[0].isupper() or text[0] in '"123456789' for text in texts)
  assert not any(re.search(r"[{}|]|\s{2}|[+-]", text) for text in texts), "a slot was left unfilled"


def test_vocabulary_is_small_and_known_to_train(splits):
  train, test = ({word for text in splits[split].texts for word in tokens(text)} for split in ("train", "test"))
  assert 200 < len(train) < 600
  assert test <= train


def linear_accuracies(splits: dict[str, reviews.Reviews], vectorizer, inverse_penalties) -> list[float]:
  train, test = splits["train"], splits["test"]
  train_features, test_features = vectorizer.fit_transform(train.texts), vectorizer.transform(test.texts)
  return [
    LogisticRegression(C=c, max_iter=2000).fit(train_features, train.labels).score(test_features, test.labels)
    for c in inverse_penalties
  ]


@pytest.mark.parametrize("vectorizer", [CountVectorizer, TfidfVectorizer])
def test_a_bag_of_words_knows_something_but_fails(splits, vectorizer):
  best = max(linear_accuracies(splits, vectorizer(tokenizer=tokens, token_pattern=None), (0.01, 0.1, 1, 10)))
  # Some reviews end in a rating, so the words alone beat chance.
  assert 0.55 < best < 0.75


def test_neighbouring_words_tell_more(splits):
  pairs = CountVectorizer(tokenizer=tokens, token_pattern=None, ngram_range=(1, 2))
  assert linear_accuracies(splits, pairs, (10,))[0] > 0.85
