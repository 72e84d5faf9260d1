"""The rows without a network. They use all words of the project's tokenizer, and all pairs of consecutive words."""

import functools
import math
import time
from typing import Any

import numpy as np
from scipy import sparse

from imdb_jax.comparison.results import Result
from imdb_jax.data.reviews import POSITIVE, Reviews
from imdb_jax.data.tokenizer import split_words
from imdb_jax.errors import UsageError


def majority(train: Reviews, validation: Reviews) -> Result:
  """Predict the share of positive training reviews; of equal shares, predict negative."""
  num_positive = int(np.sum(train.labels == POSITIVE))
  # With one more of each, no share is 0.
  logit = math.log((num_positive + 1) / (len(train) - num_positive + 1))
  return Result(logits=[logit] * len(validation), num_parameters=1)


def ngrams(train: Reviews, validation: Reviews, *, is_nb_svm: bool) -> Result:
  """Fit logistic regression on TF-IDF, or an SVM on log-count ratios; raise UsageError without scikit-learn.

  The SVM is that of Wang and Manning 2012, "Baselines and Bigrams", without their interpolation of the weights.
  """
  try:
    from sklearn import linear_model, svm
    from sklearn.feature_extraction import text
  except ImportError as error:
    raise UsageError("scikit-learn is missing: pip install 'imdb_jax[compare]'.") from error
  words: dict[str, Any] = {"ngram_range": (1, 2), "lowercase": False, "token_pattern": None}
  words["tokenizer"] = functools.partial(split_words, strip_html=True)
  # C and the logarithm of the counts were chosen on held-out reviews.
  vectorizer: Any = text.TfidfVectorizer(**words, sublinear_tf=True)
  classifier: Any = linear_model.LogisticRegression(C=30, max_iter=1000)
  if is_nb_svm:
    vectorizer, classifier = text.CountVectorizer(**words, binary=True), svm.LinearSVC(C=0.01, random_state=0)
  started = time.perf_counter()
  features, is_positive = vectorizer.fit_transform(train.texts), train.labels == POSITIVE
  scales = _log_count_ratios(features, is_positive) if is_nb_svm else np.ones(features.shape[1])
  classifier.fit(features @ sparse.diags_array(scales), is_positive)
  # In prediction, the scales are part of the weights.
  weights = scales * classifier.coef_[0]
  train_seconds = time.perf_counter() - started
  encoded = vectorizer.transform(validation.texts)
  started = time.perf_counter()
  logits = encoded @ weights + classifier.intercept_[0]
  return Result(
    predict_seconds=time.perf_counter() - started,
    logits=logits.tolist(),
    has_probabilities=not is_nb_svm,
    num_parameters=weights.size + 1,
    train_seconds=train_seconds,
  )


def _log_count_ratios(features: Any, is_positive: np.ndarray) -> np.ndarray:
  counts = [np.asarray(features[rows].sum(axis=0), np.float64).ravel() + 1 for rows in (is_positive, ~is_positive)]
  return np.log((counts[0] / counts[0].sum()) / (counts[1] / counts[1].sum()))
