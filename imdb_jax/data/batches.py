"""Order of the reviews: a pure function of seed and epoch, so that the step number is enough to resume."""

import math
from collections.abc import Sequence

import numpy as np

# Batches per window that is sorted by length. Larger windows waste fewer positions but mix fewer lengths.
_WINDOW = 200


def shuffled(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
  """Return a permutation of range(num_rows).

  It ranks the raw output of Philox, which NumPy promises never to change. NumPy makes no such promise for
  `Generator.permutation`.
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
  return np.argsort(bits, kind="stable")


def epoch_rows(
  lengths: np.ndarray, *, seeds: Sequence[int], epoch: int, batch_size: int, by_length: bool
) -> np.ndarray:
  """Return the batches of an epoch. For each seed, every review is in exactly one batch.

  With `by_length`, the reviews are shuffled, sorted by length within windows of many batches, and cut into batches,
  which are shuffled. So each epoch combines other reviews, and long batches are spread over the epoch.

  The lengths int[n] are the real positions of each review. A batch has n rows if `batch_size` is more.

  Returns:
    int32[num_batches, num_seeds, batch_size], rows of the split; -1 where a smaller batch has no row.
  """
  size, count = min(batch_size, len(lengths)), math.ceil(len(lengths) / batch_size)
  rows = np.full((count, len(seeds), size), -1, np.int32)
  for i, seed in enumerate(seeds):
    order, places = shuffled(len(lengths), seed=seed, epoch=epoch), np.arange(count)
    if by_length:
      windows = _cut(order, _WINDOW * size)
      order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
      places = shuffled(count, seed=seed, epoch=epoch)
    cut = _cut(order, size)
    for row, place in zip(rows[:, i], places, strict=True):
      row[: len(cut[place])] = cut[place]
  return rows


def prediction_batches(lengths: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
  """Return batches of all rows, each once, with reviews of similar length together."""
  return _cut(np.argsort(lengths, kind="stable"), batch_size)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
  return [rows[start : start + size] for start in range(0, len(rows), size)]
