"""The numbers behind the figures of a report."""

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


def accuracy_in_groups(is_correct: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Return rate, low and high end of its 95% interval (Wilson 1927) and count of each group 0, 1, ...: f64[4, k]."""
  n = np.bincount(groups)
  rate = np.bincount(groups, is_correct) / n
  centre, half = rate + _Z**2 / (2 * n), _Z * np.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
  return np.stack([rate, (centre - half) / (1 + _Z**2 / n), (centre + half) / (1 + _Z**2 / n), n])


def in_ranges(values: np.ndarray, num_groups: int = 5) -> tuple[list[str], np.ndarray]:
  """Divide int[n] into ranges with about as many reviews each; return their names and the group of each value."""
  edges = np.unique(np.quantile(values, np.linspace(0, 1, num_groups + 1)[1:], method="higher"))
  groups = np.searchsorted(edges, values)
  ends = [(values[groups == group].min(), edge) for group, edge in enumerate(edges)]
  return [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in ends], groups
