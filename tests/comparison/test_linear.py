"""The linear models, against scikit-learn's own pipelines and closed forms."""

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
