"""Means and paired differences of a row, against closed forms."""

import numpy as np
import pytest
from scipy import special

from imdb_jax.comparison import table
from imdb_jax.comparison.results import Result

RNG = np.random.default_rng(7)


def result(*logits: float, **others) -> Result:
  return Result(logits=list(logits), **others)


LABELS = np.array([1, 1, 0, 0])
NO_COPIES = np.zeros(4, bool)


def test_seeds_are_averaged_review_by_review():
  seeds = [result(1.0, -1.0, -1.0, 1.0), result(1.0, 1.0, -1.0, 1.0)]
  assert table.correctness(seeds, LABELS).tolist() == [1, 0.5, 1, 0]
  row = table.summarise("row", seeds, LABELS, [result(1.0, 1.0, 1.0, 1.0)], NO_COPIES)
  assert row["accuracies"] == [0.5, 0.75]
  assert row["accuracy"] == 0.625
  assert row["accuracy_std"] == pytest.approx(0.25 / np.sqrt(2))
  assert row["difference"] == 0.125
  assert row["interval"][0] < 0.125 < row["interval"][1]


def test_a_row_differs_from_itself_by_exactly_nothing():
  seeds = [result(*RNG.standard_normal(4).tolist()) for _ in range(3)]
  row = table.summarise("row", seeds, LABELS, seeds, NO_COPIES)
  assert (row["difference"], row["interval"]) == (0, [0, 0])


def test_costs_and_losses_are_means_over_the_seeds():
  times = [{"train_seconds": 1.0, "predict_seconds": 0.5}, {"train_seconds": 3.0, "predict_seconds": 1.5}]
  seeds = [result(x, x, x, x, num_parameters=7, **seconds) for x, seconds in zip((0.0, 1.0), times, strict=True)]
  row = table.summarise("row", seeds, LABELS, [], NO_COPIES)
  # Half of the reviews are positive.
  assert row["loss"] == pytest.approx((np.log(2) + (np.log1p(np.e) + np.log1p(1 / np.e)) / 2) / 2)
  assert row["calibration_error"] == pytest.approx((0 + special.expit(1) - 0.5) / 2)
  assert (row["train_seconds"], row["reviews_per_second"], row["num_parameters"]) == (2, 4, 7)


def test_reviews_that_were_trained_on_can_be_left_out():
  seeds = [result(1.0, -1.0, -1.0, 1.0), result(1.0, 1.0, -1.0, 1.0)]
  row = table.summarise("row", seeds, LABELS, [], np.array([True, False, False, True]))
  assert (row["accuracy"], row["accuracy_without_copies"]) == (0.625, 0.75)


def test_what_is_not_defined_is_none():
  svm = result(1.0, 1.0, 1.0, 1.0, has_probabilities=False)
  row = table.summarise("row", [svm], LABELS, [], ~NO_COPIES)
  undefined = {name for name, value in row.items() if value is None}
  assert undefined == {
    *("accuracy_std", "difference", "interval", "loss", "calibration_error", "reviews_per_second"),
    "accuracy_without_copies",
  }
