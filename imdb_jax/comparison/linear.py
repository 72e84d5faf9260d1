"""The rows from other libraries. They use all words of the project's tokenizer, and all pairs of consecutive words."""

import functools
import importlib
import math
import tempfile
import time
from typing import Any

import numpy as np
from scipy import sparse, special

from imdb_jax.comparison.results import Result
from imdb_jax.data.ngrams import log_count_ratios
from imdb_jax.data.reviews import POSITIVE, Reviews
from imdb_jax.data.tokenizer import split_words
from imdb_jax.devices import num_cores
from imdb_jax.errors import UsageError, reraise_as


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
  with reraise_as(UsageError, "scikit-learn is missing: pip install 'imdb_jax[compare]'", ImportError):
    from sklearn import linear_model, svm
    from sklearn.feature_extraction import text
  words: dict[str, Any] = {"ngram_range": (1, 2), "lowercase": False, "token_pattern": None}
  words["tokenizer"] = functools.partial(split_words, strip_html=True)
  # C and the logarithm of the counts were chosen on held-out reviews.
  vectorizer: Any = text.TfidfVectorizer(**words, sublinear_tf=True)
  classifier: Any = linear_model.LogisticRegression(C=30, max_iter=1000)
  if is_nb_svm:
    vectorizer, classifier = text.CountVectorizer(**words, binary=True), svm.LinearSVC(C=0.01, random_state=0)
  started = time.perf_counter()
  features, is_positive = vectorizer.fit_transform(train.texts), train.labels == POSITIVE
  scales = log_count_ratios(features, is_positive) if is_nb_svm else np.ones(features.shape[1])
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


def fasttext(train: Reviews, validation: Reviews) -> Result:
  """Train fastText (Joulin et al. 2017): a bag of vectors of words and pairs. Raise UsageError without it."""
  try:
    trainer: Any = importlib.import_module("fasttext")
  except ImportError as error:
    raise UsageError("fastText is missing: pip install fasttext-wheel.") from error
  texts, held_out = (
    [" ".join(split_words(text, strip_html=True)) for text in reviews.texts] for reviews in (train, validation)
  )
  started = time.perf_counter()
  with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
    file.writelines(f"__label__{label} {text}\n" for label, text in zip(train.labels, texts, strict=True))
    file.flush()
    # Chosen on held-out reviews.
    model = trainer.train_supervised(file.name, lr=0.5, epoch=5, wordNgrams=2, thread=num_cores(), verbose=0)
  train_seconds = time.perf_counter() - started
  started = time.perf_counter()
  labels, probabilities = model.predict(held_out)
  predict_seconds = time.perf_counter() - started
  p = np.clip([float(each[0]) for each in probabilities], 1e-6, 1 - 1e-6)
  is_positive = np.array([each[0] == f"__label__{POSITIVE}" for each in labels])
  return Result(
    predict_seconds=predict_seconds,
    logits=np.where(is_positive, special.logit(p), -special.logit(p)).tolist(),
    num_parameters=model.get_input_matrix().size + model.get_output_matrix().size,
    train_seconds=train_seconds,
  )
