"""Paired differences and their intervals, against closed forms and scipy."""

import numpy as np
import pytest
from scipy import special, stats

from imdb_jax.comparison import statistics
from imdb_jax.comparison.results import Result

RNG = np.random.default_rng(7)


def test_the_interval_is_that_of_scipy_and_of_the_normal_distribution():
  differences = RNG.choice([-1.0, 0.0, 1.0], p=(0.05, 0.85, 0.1), size=5000)
  low, high = statistics.bootstrap_interval(differences)
  other = stats.bootstrap((differences,), np.mean, n_resamples=2000, method="percentile", rng=1).confidence_interval
  half = 1.96 * differences.std() / np.sqrt(5000)
  # The ends of 2,000 resamples are within 6% of the half width (three standard errors of such a quantile).
  assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.07 * half)
  assert (low, high) == pytest.approx((other.low, other.high), abs=0.12 * half)
  assert statistics.bootstrap_interval(differences) == [low, high]


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
  covered = 0
  for _ in range(100):
    low, high = statistics.bootstrap_interval(RNG.choice([-1.0, 0.0, 1.0], p=(0.1, 0.7, 0.2), size=200))
    covered += low <= 0.1 <= high
  # 95 are expected; fewer than 87 have a probability below 0.1%.
  assert covered >= 87


def result(*logits: float, **others) -> Result:
  return Result(logits=list(logits), **others)


LABELS = np.array([1, 1, 0, 0])


def test_seeds_are_averaged_review_by_review():
  seeds = [result(1.0, -1.0, -1.0, 1.0), result(1.0, 1.0, -1.0, 1.0)]
  assert statistics.correctness(seeds, LABELS).tolist() == [1, 0.5, 1, 0]
  row = statistics.summarise("row", seeds, LABELS, [result(1.0, 1.0, 1.0, 1.0)])
  assert row["accuracies"] == [0.5, 0.75]
  assert row["accuracy"] == 0.625
  assert row["accuracy_std"] == pytest.approx(0.25 / np.sqrt(2))
  assert row["difference"] == 0.125
  assert row["interval"][0] < 0.125 < row["interval"][1]


def test_a_row_differs_from_itself_by_exactly_nothing():
  seeds = [result(*RNG.standard_normal(4).tolist()) for _ in range(3)]
  row = statistics.summarise("row", seeds, LABELS, seeds)
  assert (row["difference"], row["interval"]) == (0, [0, 0])


def test_costs_and_losses_are_means_over_the_seeds():
  times = [{"train_seconds": 1.0, "predict_seconds": 0.5}, {"train_seconds": 3.0, "predict_seconds": 1.5}]
  seeds = [result(x, x, x, x, num_parameters=7, **seconds) for x, seconds in zip((0.0, 1.0), times, strict=True)]
  row = statistics.summarise("row", seeds, LABELS, [])
  # Half of the reviews are positive.
  assert row["loss"] == pytest.approx((np.log(2) + (np.log1p(np.e) + np.log1p(1 / np.e)) / 2) / 2)
  assert row["calibration_error"] == pytest.approx((0 + special.expit(1) - 0.5) / 2)
  assert (row["train_seconds"], row["reviews_per_second"], row["num_parameters"]) == (2, 4, 7)


def test_what_is_not_defined_is_none():
  row = statistics.summarise("row", [result(1.0, 1.0, 1.0, 1.0, has_probabilities=False)], LABELS, [])
  undefined = {name for name, value in row.items() if value is None}
  assert undefined == {
    *("accuracy_std", "difference", "interval", "loss", "calibration_error", "reviews_per_second"),
  }
