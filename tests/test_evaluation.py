"""Metrics are scikit-learn's, and every review counts once however the last batch is padded."""

import jax
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from imdb_jax import evaluation, sharding
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.evaluation import EnsembleEvaluation, average, evaluate, summarize


def assert_same_as_sklearn(logits: np.ndarray, labels: np.ndarray) -> None:
  result = summarize(logits, labels)
  predicted = (logits > 0).astype(int)
  x = logits.astype(np.float64)
  # From logits, as scikit-learn clips probabilities: -log sigmoid(x) of positive reviews, -log sigmoid(-x) of others.
  assert result.loss == pytest.approx(-np.mean(np.where(labels == 1, log_sigmoid(x), log_sigmoid(-x))), rel=1e-12)
  assert result.num_reviews == len(labels)
  assert result.accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
  for name in ("precision", "recall", "f1"):
    expected = getattr(sklearn.metrics, f"{name}_score")(labels, predicted, zero_division=0)
    assert getattr(result, name) == pytest.approx(expected), name
  if 0 < labels.sum() < len(labels):
    assert result.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(labels, logits))
  else:
    assert result.roc_auc == 0
  counts = [result.true_negatives, result.false_positives, result.false_negatives, result.true_positives]
  assert counts == sklearn.metrics.confusion_matrix(labels, predicted, labels=[0, 1]).ravel().tolist()


def log_sigmoid(x: np.ndarray) -> np.ndarray:
  return np.where(x < 0, x, 0) - np.log1p(np.exp(-np.abs(x)))


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 1)), min_size=1, max_size=40))
def test_metrics_are_those_of_sklearn(pairs):
  """Few distinct logits, so that there are ties, and zeros, which predict a negative review."""
  logits, labels = np.array(pairs).T
  assert_same_as_sklearn(logits.astype(np.float32) / 2, labels.astype(np.int32))


@pytest.mark.parametrize("scale", [1e-3, 1, 50])
def test_metrics_of_many_reviews(scale):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 1001).astype(np.int32)
  logits = (scale * (rng.standard_normal(1001) + 0.5 * labels)).astype(np.float32)
  assert_same_as_sklearn(logits, labels)


@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.0])
def test_one_prediction_for_all(logit):
  labels = np.array([0, 1, 1, 0, 1], np.int32)
  assert_same_as_sklearn(np.full(5, logit, np.float32), labels)
  assert summarize(np.full(5, logit, np.float32), labels).roc_auc == 0.5


def test_log_loss_is_that_of_sklearn():
  logits = np.array([-2, 0.5, 3, -0.1], np.float32)
  labels = np.array([0, 1, 1, 1], np.int32)
  expected = sklearn.metrics.log_loss(labels, 1 / (1 + np.exp(-logits.astype(np.float64))))
  assert summarize(logits, labels).loss == pytest.approx(expected)


def test_certain_and_wrong_is_finite():
  assert summarize(np.array([-1e4, 1e4], np.float32), np.array([1, 0])).loss == 1e4


@pytest.mark.parametrize("scale", [1e-3, 1, 20])
def test_an_ensemble_averages_probabilities(scale):
  logits = (scale * np.random.default_rng(0).standard_normal((3, 50))).astype(np.float32)
  probabilities = np.mean(1 / (1 + np.exp(-logits.astype(np.float64))), axis=0)
  np.testing.assert_allclose(1 / (1 + np.exp(-average(logits))), probabilities, rtol=1e-12)
  # Not the sign of the mean logit: one model that is certain does not outvote two that lean the other way.
  assert average(np.array([[9.0], [-2.0], [-2.0]]))[0] < 0


def test_an_ensemble_that_is_certain_stays_finite():
  np.testing.assert_allclose(average(np.array([[1e4, 1e4], [1e4, 1.0]])), [1e4, np.log(2 * (1 + np.e) - 1)])


def mesh_of(num_devices: int) -> Mesh:
  return Mesh(np.array(jax.devices()[:num_devices]), (sharding.AXIS,))


def make_split(num_rows: int) -> TokenSplit:
  rng = np.random.default_rng(1)
  return TokenSplit(
    tokens=rng.integers(-50, 50, (num_rows, 3)).astype(np.int16),
    lengths=rng.integers(0, 4, num_rows).astype(np.int32),
    labels=rng.integers(0, 2, num_rows).astype(np.int32),
  )


def logits_of(split: TokenSplit) -> np.ndarray:
  return (split.tokens.sum(axis=1) / 8 + split.lengths - 1.5).astype(np.float32)


@jax.jit
def predict_step(params, tokens, lengths):
  """Stands for a model. Empty rows have a logit of their own, so counting one would show."""
  return tokens.astype("float32").sum(axis=1) / 8 + lengths.astype("float32") + params["bias"]


@pytest.mark.parametrize(
  ("num_rows", "batch_size", "num_devices"), [(10, 4, 1), (8, 4, 1), (3, 8, 2), (1, 1, 4), (17, 5, 3)]
)
def test_every_review_counts_once(num_rows, batch_size, num_devices):
  split, mesh, done = make_split(num_rows), mesh_of(num_devices), []
  params = {"bias": np.float32(-1.5)}
  result = evaluate(predict_step, params, split, mesh, batch_size, on_progress=done.append)
  assert result == summarize(logits_of(split), split.labels)
  assert result.num_reviews == num_rows
  assert done == sorted(set(done))
  assert done[-1] == num_rows


def test_several_seeds_are_one_ensemble():
  split, biases = make_split(17), np.array([-1.5, 0.0, 1.0], np.float32)

  def of_seeds(params, tokens, lengths):
    return jax.vmap(lambda bias: predict_step({"bias": bias}, tokens, lengths))(params["bias"])

  result = evaluate(of_seeds, {"bias": biases}, split, mesh_of(2), 5, num_seeds=3)
  logits = logits_of(split) + 1.5 + biases[:, None]
  assert isinstance(result, EnsembleEvaluation)
  assert result.seeds == [summarize(of_seed, split.labels) for of_seed in logits]
  assert result == EnsembleEvaluation(**vars(summarize(average(logits), split.labels)), seeds=result.seeds)


def test_logits_come_with_their_rows():
  split, mesh = make_split(10), mesh_of(1)
  pairs = list(evaluation.predict_logits(predict_step, {"bias": np.float32(-1.5)}, split, mesh, 4))
  rows = np.concatenate([rows for rows, _ in pairs])
  np.testing.assert_array_equal(np.sort(rows), np.arange(10))
  np.testing.assert_array_equal(np.concatenate([logits for _, logits in pairs]), logits_of(split)[rows])


def test_all_batches_have_one_shape():
  """Else the last batch would compile the model anew."""
  shapes = set()

  def record(params, tokens, lengths):
    shapes.add((tokens.shape, lengths.shape))
    return predict_step(params, tokens, lengths)

  evaluate(record, {"bias": np.float32(0)}, make_split(10), mesh_of(1), 4)
  assert shapes == {((4, 3), (4,))}


def test_a_batch_is_dispatched_before_the_one_before_is_read():
  """So that devices never wait for the host."""
  dispatched = []

  def record(params, tokens, lengths):
    dispatched.append(len(dispatched))
    return predict_step(params, tokens, lengths)

  logits = evaluation.predict_logits(record, {"bias": np.float32(0)}, make_split(10), mesh_of(1), 4)
  next(logits)
  assert len(dispatched) == 2
