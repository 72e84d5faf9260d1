"""Figures of a row: means over its models, and the paired difference to another row."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imdb_jax.comparison.results import Result
from imdb_jax.task import Classification, bootstrap_interval


def correctness(results: Sequence[Result], labels: np.ndarray) -> np.ndarray:
  """Return for each review the share of the models that are right, f64[n]."""
  return np.mean([(np.array(result.logits) > 0) == (labels == 1) for result in results], axis=0)


def summarise(
  name: str, results: Sequence[Result], labels: np.ndarray, reference: Sequence[Result], is_copy: np.ndarray
) -> dict[str, Any]:
  """Return a row of the table: means over one model or more, and the sample standard deviation of their accuracies.

  `is_copy`, bool[n], marks reviews that are also among the training reviews. None is what is not defined: a spread of
  one model, a difference without reference, loss and calibration error without probabilities, an accuracy over no
  reviews, and speed if there is nothing to compute.
  """
  logits = [np.array(result.logits) for result in results]
  metrics = Classification().evaluate(np.stack(logits)[:, :, None], labels).seeds
  accuracies = [each.accuracy for each in metrics]
  is_right = correctness(results, labels)
  differences = is_right - correctness(reference, labels) if reference else None
  has_probabilities = results[0].has_probabilities
  seconds = float(np.mean([result.predict_seconds for result in results]))
  return {
    "name": name,
    "accuracies": accuracies,
    "accuracy": float(np.mean(accuracies)),
    "accuracy_without_copies": None if is_copy.all() else float(is_right[~is_copy].mean()),
    "accuracy_std": float(np.std(accuracies, ddof=1)) if len(results) > 1 else None,
    "difference": None if differences is None else float(differences.mean()),
    "interval": None if differences is None else bootstrap_interval(differences),
    "train_seconds": float(np.mean([result.train_seconds for result in results])),
    "loss": float(np.mean([each.loss for each in metrics])) if has_probabilities else None,
    "calibration_error": float(np.mean([each.calibration_error for each in metrics])) if has_probabilities else None,
    "num_parameters": results[0].num_parameters,
    "reviews_per_second": len(labels) / seconds if seconds else None,
  }
