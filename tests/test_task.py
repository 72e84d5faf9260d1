"""Metrics are those of scikit-learn; an ensemble averages probabilities exactly, in log space."""

import decimal
from decimal import Decimal

import jax
import numpy as np
import pytest
import sklearn.metrics
import sklearn.utils.class_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from imdb_jax.errors import UsageError
from imdb_jax.task import Classification, Evaluation, Metrics, bootstrap_interval

TASK = Classification()


def evaluate(logits: np.ndarray, labels: np.ndarray) -> Metrics:
  """Return the metrics of one seed, from logits [n]."""
  (seed,) = TASK.evaluate(logits[None, :, None], labels).seeds
  return seed


def assert_same_as_sklearn(result: Metrics, logits: np.ndarray, labels: np.ndarray) -> None:
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
  logits, labels = logits.astype(np.float32) / 2, labels.astype(np.int32)
  assert_same_as_sklearn(evaluate(logits, labels), logits, labels)


@pytest.mark.parametrize("scale", [1e-3, 1, 50])
def test_metrics_of_many_reviews(scale):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 1001).astype(np.int32)
  logits = (scale * (rng.standard_normal(1001) + 0.5 * labels)).astype(np.float32)
  assert_same_as_sklearn(evaluate(logits, labels), logits, labels)


@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.0])
def test_one_prediction_for_all(logit):
  logits, labels = np.full(5, logit, np.float32), np.array([0, 1, 1, 0, 1], np.int32)
  assert_same_as_sklearn(evaluate(logits, labels), logits, labels)
  assert evaluate(logits, labels).roc_auc == 0.5


def test_log_loss_is_that_of_sklearn():
  logits, labels = np.array([-2, 0.5, 3, -0.1], np.float32), np.array([0, 1, 1, 1], np.int32)
  expected = sklearn.metrics.log_loss(labels, 1 / (1 + np.exp(-logits.astype(np.float64))))
  assert evaluate(logits, labels).loss == pytest.approx(expected)


def test_the_loss_of_a_certain_but_wrong_model_is_finite():
  assert evaluate(np.array([-1e4, 1e4], np.float32), np.array([1, 0])).loss == 1e4


def test_sums_of_a_batch_are_those_of_its_metrics():
  """Reviews of weight 0 do not count, and a logit of 0 predicts a negative review."""
  rng = np.random.default_rng(0)
  logits, labels = np.round(8 * rng.standard_normal(64)).astype(np.float32), rng.integers(0, 2, 64).astype(np.float32)
  weights = np.repeat(np.array([1, 0], np.float32), [50, 14])
  sums = jax.device_get(jax.jit(TASK.sums)(logits[:, None], labels, weights, np.ones_like(weights)))
  expected = evaluate(logits[:50], labels[:50].astype(np.int32))
  assert sums["weight"] == 50
  assert sums["loss"] == pytest.approx(50 * expected.loss, rel=1e-6)
  assert sums["correct"] == expected.true_negatives + expected.true_positives


def exact_ensemble(logits: np.ndarray) -> list[float]:
  """Return log(mean p / mean(1 - p)) over the first axis, in as many digits as the most certain logit needs."""
  with decimal.localcontext(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
    columns = [[Decimal(float(x)) for x in column] for column in logits.T]
    ratios = [sum(1 / (1 + (-x).exp()) for x in xs) / sum(1 / (1 + x.exp()) for x in xs) for xs in columns]
    return [float(ratio.ln()) for ratio in ratios]


@pytest.mark.parametrize("num_seeds", [1, 2, 3])
@pytest.mark.parametrize("scale", [1e-6, 1, 30, 1e4])
def test_an_ensemble_averages_probabilities(num_seeds, scale):
  logits = (scale * np.random.default_rng(0).standard_normal((num_seeds, 40))).astype(np.float32)
  # The most certain models, in agreement and in conflict.
  logits[:, :2], logits[0, 1] = 3 * scale, -3 * scale
  found = TASK.ensemble(logits[:, :, None])
  assert (found.shape, found.dtype) == ((40, 1), np.float64)
  np.testing.assert_allclose(found[:, 0], exact_ensemble(logits), rtol=1e-14, atol=1e-15)
  expected = np.mean(1 / (1 + np.exp(-logits.clip(-700, 700).astype(np.float64))), axis=0)
  found = TASK.probabilities(logits[:, :, None])
  np.testing.assert_allclose(found, np.stack([1 - expected, expected], axis=1), rtol=1e-6, atol=1e-15)
  np.testing.assert_allclose(found[:, 1], expected, rtol=1e-6, atol=1e-38)


def test_one_certain_model_does_not_outvote_two():
  """Averaging logits instead of probabilities would let it."""
  assert TASK.ensemble(np.array([9.0, -2.0, -2.0]).reshape(3, 1, 1))[0, 0] < 0


def test_evaluation_has_the_metrics_of_the_ensemble_and_of_each_seed():
  rng = np.random.default_rng(1)
  labels, logits = rng.integers(0, 2, 50).astype(np.int32), rng.standard_normal((3, 50, 1)).astype(np.float32)
  result = TASK.evaluate(logits, labels)
  assert_same_as_sklearn(result, TASK.ensemble(logits)[:, 0], labels)
  assert result.seeds == [evaluate(seed[:, 0], labels) for seed in logits]
  assert len({seed.loss for seed in (result, *result.seeds)}) == 4


def test_an_ensemble_of_one_has_the_metrics_of_its_seed():
  rng = np.random.default_rng(2)
  labels, logits = rng.integers(0, 2, 500).astype(np.int32), rng.standard_normal((1, 500, 1)).astype(np.float32)
  logits[0, :100] = logits[0, :100].round()
  result = TASK.evaluate(logits, labels)
  assert result == Evaluation(**{**vars(result.seeds[0]), "loss": result.loss}, seeds=result.seeds)
  assert result.loss == pytest.approx(result.seeds[0].loss, rel=1e-14)


def test_the_calibration_error_of_equal_confidences_is_their_distance_to_the_accuracy():
  # 90% sure of both classes, and right in 8 of 10 cases.
  logits = np.log(9) * np.array([1, 1, 1, 1, 1, -1, -1, -1, -1, -1])
  labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1])
  assert evaluate(logits, labels).calibration_error == pytest.approx(0.1, abs=1e-12)
  for labels, error in (([1, 0], 0), ([0, 1], 1)):
    assert evaluate(np.array([40.0, -800.0]), np.array(labels)).calibration_error == pytest.approx(error, abs=1e-12)
  assert evaluate(np.zeros(4), np.array([0, 1, 0, 1])).calibration_error == 0


def test_the_calibration_error_is_the_mean_over_15_bins():
  rng = np.random.default_rng(7)
  logits, labels = 2 * rng.standard_normal(500), rng.integers(2, size=500)
  expected = 0.0
  for number in range(15):
    inside = []
    for probability, label in zip(special.expit(logits), labels, strict=True):
      confidence = max(probability, 1 - probability)
      if number / 15 < confidence <= (number + 1) / 15:
        inside.append(((probability > 0.5) == (label == 1), confidence))
    if inside:
      expected += abs(np.mean([right for right, _ in inside]) - np.mean([sure for _, sure in inside])) * len(inside)
  assert evaluate(logits, labels).calibration_error == pytest.approx(expected / 500, abs=1e-12)


def test_calibration_finds_the_temperature_that_was_hidden():
  """Labels are drawn with the probabilities of logits; the model is given three times these logits."""
  rng = np.random.default_rng(0)
  honest = rng.normal(0, 2, 20_000)
  labels = (rng.random(20_000) < special.expit(honest)).astype(np.int32)
  logits = (3 * honest).astype(np.float32)[None, :, None]
  temperature = TASK.calibrate(logits, labels)
  assert temperature == pytest.approx(3, rel=0.05)
  before, after = (TASK.evaluate(logits, labels, each) for each in (1.0, temperature))
  assert after.loss < before.loss
  assert after.calibration_error < 0.01 < 0.05 < before.calibration_error
  assert after.accuracy == before.accuracy
  np.testing.assert_allclose(
    TASK.probabilities(logits, temperature)[:, 1], special.expit(logits[0, :, 0] / temperature), 1e-5
  )


def test_a_few_right_answers_do_not_make_the_model_certain():
  """The loss alone has no minimum: it would make every probability 0 or 1."""
  labels = np.arange(24, dtype=np.int32) % 2
  logits = np.where(labels == 1, 3.0, -3.0).astype(np.float32)[None, :, None]
  temperature = TASK.calibrate(logits, labels)
  assert 0.5 < temperature < 1
  # The slope of the loss and that of the prior, with the standard deviation 0.5, cancel.
  x = 3 / temperature
  assert 24 * x / (1 + np.exp(x)) == pytest.approx(-np.log(temperature) / 0.25, rel=1e-3)


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], [1, 0]])
def test_calibration_of_perfect_or_useless_answers_is_bounded(labels):
  logits = np.array([[[4.0], [3.0]]], np.float32)
  assert 0.05 <= TASK.calibrate(logits, np.array(labels, np.int32)) <= 20


def test_the_interval_is_that_of_scipy_and_of_the_normal_distribution():
  rng = np.random.default_rng(7)
  differences = rng.choice([-1.0, 0.0, 1.0], p=(0.05, 0.85, 0.1), size=5000)
  low, high = bootstrap_interval(differences)
  other = stats.bootstrap((differences,), np.mean, n_resamples=2000, method="percentile", rng=1).confidence_interval
  half = 1.96 * differences.std() / np.sqrt(5000)
  # The ends of 2,000 resamples are within 6% of the half width (three standard errors of such a quantile).
  assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.07 * half)
  assert (low, high) == pytest.approx((other.low, other.high), abs=0.12 * half)
  assert bootstrap_interval(differences) == [low, high]


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
  rng, covered = np.random.default_rng(8), 0
  for _ in range(100):
    low, high = bootstrap_interval(rng.choice([-1.0, 0.0, 1.0], p=(0.1, 0.7, 0.2), size=200))
    covered += low <= 0.1 <= high
  # 95 are expected; fewer than 87 have a probability below 0.1%.
  assert covered >= 87


def test_the_interval_of_an_accuracy_is_binomial():
  """A resample has a right answer with the probability of the accuracy, 25,000 times."""
  labels = np.arange(25_000) % 2
  found = evaluate(np.where(np.arange(25_000) < 2_000, 1 - 2.0 * labels, 2.0 * labels - 1), labels)
  # Three standard errors of such a quantile of 2,000 draws.
  assert found.accuracy_interval == pytest.approx(stats.binom.ppf((0.025, 0.975), 25_000, 0.92) / 25_000, abs=3e-4)
  assert evaluate(np.ones(3), np.ones(3, np.int32)).accuracy_interval == [1, 1]


class TestThreeClasses:
  NAMES = ("a", "b", "c")
  TASK = Classification(NAMES)

  def make(self, seeds: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = rng.choice(3, 300, p=[0.6, 0.3, 0.1]).astype(np.int32)
    return (2 * rng.standard_normal((seeds, 300, 3)) + np.eye(3)[labels]).astype(np.float32), labels

  def test_metrics_are_those_of_sklearn(self):
    logits, labels = self.make()
    result = self.TASK.evaluate(logits, labels, temperature=2.0)
    for found, x in zip((result, *result.seeds), (None, *logits), strict=True):
      probabilities = special.softmax(logits.astype(np.float64), axis=2).mean(axis=0)
      probabilities = probabilities**0.5 / (probabilities**0.5).sum(axis=1, keepdims=True)
      if x is not None:
        probabilities = special.softmax(x.astype(np.float64), axis=1)
      predicted = probabilities.argmax(axis=1)
      assert found.accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
      assert found.loss == pytest.approx(sklearn.metrics.log_loss(labels, probabilities, labels=[0, 1, 2]), rel=1e-9)
      assert found.confusion_matrix == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
      for average in ("macro", None):
        figures = sklearn.metrics.precision_recall_fscore_support(labels, predicted, average=average)
        for name, expected in zip(("precision", "recall", "f1", "num_reviews"), figures, strict=True):
          if average is None:
            assert [each[name] for each in found.by_class or []] == pytest.approx(expected.tolist())
          elif name != "num_reviews":
            assert getattr(found, name) == pytest.approx(expected)
      assert [each["class"] for each in found.by_class or []] == list(self.NAMES)
      assert found.roc_auc is None
    np.testing.assert_allclose(
      self.TASK.probabilities(logits), special.softmax(logits.astype(np.float64), axis=2).mean(axis=0), 1e-6
    )

  def test_a_class_that_is_never_predicted_counts_as_zero(self):
    logits = np.array([[[3, 0, 0], [3, 0, 0]]], np.float32)
    result = self.TASK.evaluate(logits, np.array([0, 1], np.int32))
    assert (result.precision, result.recall, result.f1) == pytest.approx((1 / 6, 1 / 3, 2 / 9))

  def test_certain_models_are_averaged_in_log_space(self):
    logits = np.array([[[0, 3000, 0]], [[0, 1000, 0]]], np.float32)
    found = self.TASK.ensemble(logits)
    # log((exp(-3000) + exp(-1000)) / 2) of the first class.
    np.testing.assert_allclose(found, [[-1000 - np.log(2), 0, -1000 - np.log(2)]], rtol=1e-12)

  def test_sums_of_a_batch_are_those_of_its_metrics(self):
    logits, labels = self.make(1)
    weights = np.repeat(np.array([1, 0], np.float32), [200, 100])
    sums = jax.device_get(jax.jit(self.TASK.sums)(logits[0], labels, weights, np.ones_like(weights)))
    expected = self.TASK.evaluate(logits[:, :200], labels[:200])
    assert sums["loss"] == pytest.approx(200 * expected.loss, rel=1e-6)
    assert (sums["weight"], sums["correct"]) == (200, pytest.approx(200 * expected.accuracy))

  def test_calibration_finds_the_temperature_that_was_hidden(self):
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, (20_000, 3))
    labels = (special.softmax(honest, axis=1).cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    temperature = self.TASK.calibrate((3 * honest).astype(np.float32)[None], labels)
    assert temperature == pytest.approx(3, rel=0.05)
    assert self.TASK.evaluate(3 * honest[None], labels, temperature).calibration_error < 0.01


def test_classes_may_have_weights_by_name():
  task, labels = Classification(("a=b", "c", "d")), np.array([0, 2, 1, 0])
  np.testing.assert_array_equal(task.loss_weights(labels, "none"), [1, 1, 1, 1])
  np.testing.assert_array_equal(task.loss_weights(labels, "d=2.5,a=b=0"), [0, 2.5, 1, 0])


@pytest.mark.parametrize("wanted", ["", "c", "c=", "c=-1", "c=nan", "c=1e3", "e=1", "c=1,", "c=1;d=2", "Balanced"])
def test_other_weights_are_refused_in_one_line_that_names_the_classes(wanted):
  task = Classification(("c", "d\n"))
  with pytest.raises(UsageError, match=r"^--class-weights .* none, balanced, or NAME=WEIGHT.* \(c, d.+\)\.$"):
    task.loss_weights(np.array([0, 1]), wanted)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c"), ("a", "b", "c", "unseen")])
def test_balanced_losses_are_those_of_sklearn(names):
  rng, size = np.random.default_rng(0), min(len(names), 3)
  task, labels = Classification(names), rng.choice(size, 100, p=[0.7, 0.2, 0.1] if size == 3 else [0.8, 0.2])
  logits = rng.standard_normal((100, task.head_size)).astype(np.float32)
  weights = sklearn.utils.class_weight.compute_sample_weight("balanced", labels)
  balanced = task.loss_weights(labels, "balanced")
  np.testing.assert_allclose(balanced, weights)
  assert np.mean(balanced) == pytest.approx(1)
  sums = task.sums(logits, labels.astype(np.int32), np.ones(100, np.float32), weights.astype(np.float32))
  probabilities = task.probabilities(logits[None])
  expected = sklearn.metrics.log_loss(labels, probabilities, sample_weight=weights, labels=range(len(names)))
  assert sums["loss"] / sums["weight"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_exported_programs_compute_probabilities_from_the_mean_over_the_seeds(num_classes):
  """With the temperature applied to the logarithm of the mean, in float32 and without overflow."""
  task = Classification(("a", "b", "c")[:num_classes])
  logits = np.random.default_rng(0).normal(0, 30, (4, 50, task.head_size)).astype(np.float32)
  x = np.concatenate([np.zeros_like(logits), logits], axis=2) if num_classes == 2 else logits
  mean = special.softmax(x.astype(np.float64), axis=2).mean(axis=0)
  expected = special.softmax(np.log(mean) / 1.7, axis=1)
  np.testing.assert_allclose(jax.nn.softmax(task.traced_ensemble(jax.device_put(logits)) / 1.7), expected, atol=1e-6)
