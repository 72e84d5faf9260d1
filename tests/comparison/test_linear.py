"""The linear models, against scikit-learn's own pipelines and closed forms; fastText, against what it was told."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from comparison.few import few_reviews
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from imdb_jax.comparison import linear
from imdb_jax.data.reviews import canonical
from imdb_jax.data.tokenizer import split_words
from imdb_jax.errors import UsageError

TRAIN, TEST = few_reviews()["train"], few_reviews()["test"]


def plain(texts: tuple[str, ...]) -> list[str]:
  """Return texts as words with a space between them."""
  return [" ".join(split_words(text, strip_html=True)) for text in texts]


def test_the_majority_has_the_log_odds_of_the_training_labels():
  result = linear.majority(canonical(list("abcd"), [1, 1, 1, 0]), canonical(list("xyz"), [0, 1, 1]))
  assert result.logits == pytest.approx([np.log(4 / 2)] * 3)
  assert linear.majority(canonical(list("ab"), [1, 1]), TEST).logits[0] == pytest.approx(np.log(3))


def test_tfidf_is_a_pipeline_of_scikit_learn():
  pipeline = make_pipeline(
    TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"[^ ]+"),
    LogisticRegression(C=30, max_iter=1000),
  ).fit(plain(TRAIN.texts), TRAIN.labels)
  result = linear.ngrams(TRAIN, TEST, is_nb_svm=False)
  # The solver stops when a gradient is below 1e-4.
  np.testing.assert_allclose(result.logits, pipeline.decision_function(plain(TEST.texts)), rtol=0.01, atol=0.01)
  assert result.num_parameters == len(pipeline[0].vocabulary_) + 1
  assert result.has_probabilities
  assert result.train_seconds > 0
  assert result.predict_seconds > 0


def test_nb_svm_scales_binary_ngrams_by_their_log_count_ratios():
  vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"[^ ]+", binary=True)
  features = vectorizer.fit_transform(plain(TRAIN.texts)).toarray().astype(np.float64)
  p, q = (1 + features[TRAIN.labels == label].sum(axis=0) for label in (1, 0))
  ratios = np.log(p / p.sum()) - np.log(q / q.sum())
  svm = LinearSVC(C=0.01, random_state=0).fit(features * ratios, TRAIN.labels)
  expected = svm.decision_function(vectorizer.transform(plain(TEST.texts)).toarray() * ratios)
  result = linear.ngrams(TRAIN, TEST, is_nb_svm=True)
  np.testing.assert_allclose(result.logits, expected, rtol=0.01, atol=0.01)
  assert not result.has_probabilities


def test_fasttext_learns_a_line_per_review_and_its_probabilities_become_log_odds(monkeypatch):
  """Without the library, which has to be compiled; the module in its place answers as it does."""
  seen = {}

  class Model:
    def predict(self, lines: list[str]):
      assert lines == plain(TEST.texts)
      # The more likely label of each, and its probability, which rounds to more than 1.
      return [["__label__1"], ["__label__0"]] * 30, [np.array([0.75]), np.array([1.00001])] * 30

    def get_input_matrix(self):
      return np.zeros((5, 100))

    def get_output_matrix(self):
      return np.zeros((2, 100))

  def train_supervised(path: str, **settings):
    seen["lines"] = Path(path).read_text(encoding="utf-8").splitlines()
    return Model()

  monkeypatch.setitem(sys.modules, "fasttext", types.SimpleNamespace(train_supervised=train_supervised))
  result = linear.fasttext(TRAIN, TEST)
  lines = zip(TRAIN.labels, plain(TRAIN.texts), strict=True)
  assert seen["lines"] == [f"__label__{label} {text}" for label, text in lines]
  np.testing.assert_allclose(result.logits, [np.log(3), np.log(1e-6 / (1 - 1e-6))] * 30)
  assert result.num_parameters == 700
  assert result.train_seconds > 0


def test_without_fasttext_its_row_says_so(monkeypatch):
  monkeypatch.setitem(sys.modules, "fasttext", None)
  with pytest.raises(UsageError, match=r"^fastText is missing: pip install fasttext-wheel\.$"):
    linear.fasttext(TRAIN, TEST)
