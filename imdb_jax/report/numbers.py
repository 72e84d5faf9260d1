"""The numbers behind the figures of a report."""

from collections.abc import Sequence

import numpy as np

# Standard normal quantile of a 95% interval.
_Z = 1.959963984540054


def roc(scores: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return false and true positive rates, f64[m] each, for all thresholds from the highest to the lowest.

  Both classes must occur. It is the ROC curve of Fawcett 2006, algorithm 1, with all points of equal scores as one.
  """
  hits, false_alarms = _counts(scores, is_positive)
  return np.r_[0, false_alarms / false_alarms[-1]], np.r_[0, hits / hits[-1]]


def precision_recall(scores: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return recall and precision, f64[m] each, for all thresholds from the highest to the lowest; as for `roc`."""
  hits, false_alarms = _counts(scores, is_positive)
  return hits / hits[-1], hits / (hits + false_alarms)


def _counts(scores: np.ndarray, is_positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the true and the false positives at each distinct score as the threshold, from the highest score on."""
  order = np.argsort(-scores, kind="stable")
  ends = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)
  hits = np.cumsum(is_positive[order])[ends]
  return hits, ends + 1 - hits


def reliability(confidence: np.ndarray, is_correct: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
  """Return mean confidence and accuracy of each bin of equal width that has reviews (Guo et al. 2017, figure 1)."""
  # As in the calibration error, a bin includes its upper end.
  bins = np.ceil(confidence * num_bins).astype(np.int64)
  counts = np.bincount(bins)
  is_used = counts > 0
  sums = (np.bincount(bins, values)[is_used] for values in (confidence, is_correct))
  mean, accuracy = (each / counts[is_used] for each in sums)
  return mean, accuracy


def accuracy_in_groups(is_correct: np.ndarray, groups: np.ndarray) -> list[tuple[float, float, float, int]]:
  """Return rate, low and high end of its 95% interval (Wilson 1927), and count, of each group 0, 1, ... int[n]."""
  sizes = np.bincount(groups)
  found = []
  for hits, n in zip(np.bincount(groups, is_correct).tolist(), sizes.tolist(), strict=True):
    rate, z2 = hits / n, _Z**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    found.append((rate, float(centre - half), float(centre + half), n))
  return found


def in_ranges(values: np.ndarray, num_groups: int = 5) -> tuple[Sequence[str], np.ndarray]:
  """Divide int[n] into ranges with about as many reviews each; return their names and the group of each value."""
  edges = np.unique(np.quantile(values, np.linspace(0, 1, num_groups + 1)[1:], method="higher"))
  groups = np.searchsorted(edges, values)
  names = []
  for group in range(len(edges)):
    low, high = values[groups == group].min(), values[groups == group].max()
    names.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
  return names, groups
