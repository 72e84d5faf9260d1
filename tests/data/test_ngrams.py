"""The linear model of n-grams is that of its definition, whether NumPy or JAX computes it."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from imdb_jax.data import ngrams

V = 20


def random_tokens(num_reviews: int, seed: int, t: int = 12) -> np.ndarray:
  """Return ids of which small ones are frequent, with padding of every length at the front."""
  rng = np.random.default_rng(seed)
  tokens = np.minimum(rng.geometric(0.2, (num_reviews, t)), V - 1).astype(np.int16)
  for row in range(num_reviews):
    tokens[row, : row % (t + 1)] = 0
  return tokens


def labels_of(tokens: np.ndarray) -> np.ndarray:
  """Return labels that follow from single words and pairs, with some noise."""
  pairs = (tokens[:, 1:] == 1) & (tokens[:, :-1] == 2)
  noise = np.random.default_rng(0).standard_normal(len(tokens))
  return ((tokens == 3).sum(1) - (tokens == 4).sum(1) + 2 * pairs.sum(1) + 0.5 * noise > 0).astype(np.int32)


def phrases(review: np.ndarray, n: int) -> set[tuple[int, ...]]:
  """Return the n-grams of a review by their words."""
  words = [int(word) for word in review if word]
  return {tuple(words[i : i + size]) for size in range(1, n + 1) for i in range(len(words) - size + 1)}


def logits(fitted: dict[str, np.ndarray], tokens: np.ndarray, n: int) -> np.ndarray:
  place, is_listed = ngrams.find(fitted["keys"], ngrams.keys_of(tokens, n))
  return np.where(is_listed, fitted["weights"][place], 0).sum(axis=1) + fitted["bias"]


def keys(*reviews: list[int], n: int) -> list[list[int]]:
  """Return the keys of each review, without 0."""
  return [[key for key in row.tolist() if key] for row in ngrams.keys_of(np.array(reviews, np.int16), n)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_logits_are_those_of_logistic_regression_on_naive_bayes_ratios(n):
  """scikit-learn is another implementation, which knows the n-grams by their words. Other reviews have unseen ones."""
  train, others = random_tokens(100, seed=0), random_tokens(40, seed=1)
  labels = labels_of(train)
  found = sorted(set().union(*(phrases(review, n) for review in train)))
  x, z = (np.array([[p in phrases(review, n) for p in found] for review in tokens]) for tokens in (train, others))
  positive, negative = 1.0 + x[labels == 1].sum(0), 1.0 + x[labels == 0].sum(0)
  ratios = np.log(positive / positive.sum() / (negative / negative.sum()))
  expected = LogisticRegression(C=0.3, tol=1e-8, max_iter=1000).fit(x * ratios, labels)
  fitted = ngrams.fit(train, labels, n)
  # L-BFGS stops after 30 steps.
  np.testing.assert_allclose(logits(fitted, train, n), expected.decision_function(x * ratios), atol=1e-3)
  np.testing.assert_allclose(logits(fitted, others, n), expected.decision_function(z * ratios), atol=1e-3)
  assert {name: (array.shape, array.dtype) for name, array in fitted.items()} == {
    "keys": ((ngrams.SIZE,), np.uint32),
    "weights": ((ngrams.SIZE,), np.float32),
    "bias": ((), np.float32),
  }


def test_reviews_may_be_fitted_in_several_chunks(monkeypatch):
  tokens = random_tokens(100, seed=0)
  whole = ngrams.fit(tokens, labels_of(tokens), 2)
  monkeypatch.setattr(ngrams, "_CHUNK", 7)
  for name, array in ngrams.fit(tokens, labels_of(tokens), 2).items():
    np.testing.assert_array_equal(array, whole[name])


def test_the_ngrams_that_most_reviews_contain_have_a_weight(monkeypatch):
  monkeypatch.setattr(ngrams, "SIZE", 3)
  tokens = np.array([[5, 5, 5], [0, 1, 2], [3, 1, 4], [0, 2, 4], [6, 7, 2]], np.int16)
  fitted = ngrams.fit(tokens, np.array([0, 1, 0, 1, 0]), 2)
  assert fitted["keys"].tolist() == sorted(keys([1], [2], [4], n=1)[i][0] for i in range(3)), "5 is in one review only"


def test_a_repeated_ngram_counts_once():
  assert keys([5, 5, 5, 5], n=2) == keys([0, 0, 5, 5], n=2)
  assert keys([5, 6, 5, 6, 5], n=2) == keys([0, 5, 6, 5, 6], n=2)
  assert [len(found) for found in keys([5, 5, 5, 5], n=2)] == [2]


def test_the_order_of_words_matters_from_two_words_on():
  assert keys([1, 2, 3], n=1) == keys([3, 2, 1], n=1)
  assert keys([1, 2, 3], n=2) != keys([3, 2, 1], n=2)
  assert keys([1, 2, 1, 3, 1], n=2) == keys([1, 3, 1, 2, 1], n=2), "the same pairs"
  assert keys([1, 2, 1, 3, 1], n=3) != keys([1, 3, 1, 2, 1], n=3)


def test_padding_is_part_of_no_ngram():
  assert keys([0, 0, 0, 0], n=3) == [[]]
  for padding in range(4):
    assert keys([0] * padding + [7, 8], n=3) == keys([7, 8], n=3)
  assert len(keys([0, 0, 7, 8], n=3)[0]) == 3
  assert keys([7], n=3) == keys([7], n=1), "a review may be shorter than the longest n-grams"


def test_different_ngrams_have_different_keys():
  """Of 100,000 random 32-bit keys, one pair in expectation is equal."""
  words = np.arange(1, 320, dtype=np.int32)
  pairs = np.array(list(itertools.product(words, words)))
  found = np.unique(ngrams.keys_of(pairs, 2))
  assert len(found) > len(words) + len(pairs) - 10
  triples = np.array(list(itertools.product(words[::7], words[::7], words[::7])))
  assert len(np.unique(ngrams.keys_of(triples, 3))) > len(triples) + 46**2 + 46 - 10


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_jax_finds_the_same_as_numpy(dtype):
  tokens = random_tokens(50, seed=0).astype(dtype)
  fitted = ngrams.fit(tokens, labels_of(tokens), 3)
  for review in (tokens, random_tokens(50, seed=1).astype(dtype)):
    expected = ngrams.keys_of(review, 3)
    found = ngrams.keys_of(jnp.asarray(review), 3)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(
      ngrams.find(jnp.asarray(fitted["keys"]), found), ngrams.find(fitted["keys"], expected), strict=True
    ):
      np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 1, 0]])
@pytest.mark.parametrize("tokens", [[[0, 0], [0, 0], [0, 0]], [[0, 1], [1, 2], [0, 0]]])
def test_empty_reviews_and_a_single_class_give_finite_logits(tokens, labels):
  ids = np.array(tokens, np.int16)
  fitted = ngrams.fit(ids, np.array(labels), 2)
  found = logits(fitted, ids, 2)
  assert np.isfinite(found).all()
  assert found[2] == fitted["bias"], "without words, only the bias counts"


@pytest.mark.parametrize("is_balanced", [False, True])
def test_more_classes_have_a_model_each(is_balanced):
  train = random_tokens(150, seed=0)
  labels = labels_of(train) + (train == 5).any(axis=1)
  loss_weights = np.where(labels == 2, 3.0, 0.5) if is_balanced else np.ones(150)
  fitted = ngrams.fit(train, labels, 2, 3, loss_weights)
  assert fitted["weights"].shape == (ngrams.SIZE, 3)
  place, is_listed = ngrams.find(fitted["keys"], ngrams.keys_of(train, 2))
  found = np.where(is_listed[:, :, None], fitted["weights"][place], 0).sum(axis=1) + fitted["bias"]
  listed = sorted(set().union(*(phrases(review, 2) for review in train)))
  x = np.array([[p in phrases(review, 2) for p in listed] for review in train])
  for label in range(3):
    positive, negative = 1.0 + x[labels == label].sum(0), 1.0 + x[labels != label].sum(0)
    z = x * np.log(positive / positive.sum() / (negative / negative.sum()))
    expected = LogisticRegression(C=0.3, tol=1e-8, max_iter=1000).fit(z, labels == label, loss_weights)
    np.testing.assert_allclose(found[:, label], expected.decision_function(z), atol=2e-3)
