"""The numbers behind the figures of a report, against scikit-learn and closed forms."""

import itertools

import numpy as np
import pytest
from sklearn import calibration, metrics

from imdb_jax.report import numbers
from imdb_jax.task import reliability


@pytest.fixture(params=["distinct", "ties", "one of each"])
def scored(request) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(3)
  if request.param == "one of each":
    return np.array([0.2, 0.7]), np.array([True, False])
  scores, is_positive = rng.random(500), rng.random(500) < 0.3
  return (np.round(scores, 1) if request.param == "ties" else scores), is_positive


def test_the_roc_curve_is_that_of_scikit_learn(scored):
  expected = metrics.roc_curve(scored[1], scored[0], drop_intermediate=False)
  for found, wanted in zip(numbers.roc(*scored), expected[:2], strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_precision_and_recall_are_those_of_scikit_learn(scored):
  precision, recall, _ = metrics.precision_recall_curve(scored[1], scored[0])
  found_recall, found_precision = numbers.precision_recall(*scored)
  # Theirs begins with the lowest threshold, and ends with a point that no threshold has.
  np.testing.assert_allclose(found_recall, recall[:-1][::-1], atol=1e-12)
  np.testing.assert_allclose(found_precision, precision[:-1][::-1], atol=1e-12)


def test_reliability_is_that_of_scikit_learn():
  rng = np.random.default_rng(4)
  confidence = rng.uniform(0.5, 1, 1000)
  is_correct = rng.random(1000) < confidence
  accuracy, mean = calibration.calibration_curve(is_correct, confidence, n_bins=15)
  found = reliability(confidence, is_correct)
  for each, wanted in zip(found[:2], (mean, accuracy), strict=True):
    np.testing.assert_allclose(each, wanted, atol=1e-12)
  np.testing.assert_allclose(found[2], np.histogram(confidence, np.arange(7, 16) / 15)[0] / 1000, atol=1e-12)


def test_intervals_of_groups_are_those_of_scipy():
  from scipy import stats

  is_correct, groups = np.array([1, 0, 1, 1, 1, 0, 0], bool), np.array([0, 0, 0, 1, 1, 2, 2])
  found = numbers.accuracy_in_groups(is_correct, groups)
  assert found[3].tolist() == [3, 2, 2]
  for column, hits in zip(found.T, (2, 2, 0), strict=True):
    expected = stats.binomtest(hits, int(column[3])).proportion_ci(method="wilson")
    np.testing.assert_allclose(column[:3], [hits / column[3], expected.low, expected.high], atol=1e-12)


@pytest.mark.parametrize("values", [[5], [7, 7, 7], [*range(100)], [0] * 90 + [1, 2, 3], [600] * 50 + [*range(50)]])
def test_ranges_cover_all_values_without_overlap(values):
  values = np.array(values)
  names, groups = numbers.in_ranges(values)
  assert 1 <= len(names) <= 5
  assert {*groups.tolist()} == {*range(len(names))}
  ends = [(values[groups == group].min(), values[groups == group].max()) for group in range(len(names))]
  assert all(high < low for (_, high), (low, _) in itertools.pairwise(ends))
  assert names == [str(low) if low == high else f"{low}–{high}" for low, high in ends]
