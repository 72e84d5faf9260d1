"""Which reviews go into which batch: a pure function of (seed, epoch), so resuming needs only the step number.

A batch is an int64 array of rows of a split.
"""

import math
from collections.abc import Sequence

import numpy as np

# Batches of a window that is sorted by length: more waste fewer positions, but mix fewer lengths.
_WINDOW = 200


def num_batches(num_rows: int, batch_size: int) -> int:
  """Batches of an epoch; one may be smaller."""
  return math.ceil(num_rows / batch_size)


def shuffled(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
  """A permutation of range(num_rows).

  It is the rank of Philox's raw output, whose stream NumPy promises never to change; a Generator's
  `permutation` carries no such promise.
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
  return np.argsort(bits, kind="stable")


def _cut(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
  return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def epoch_batches(num_rows: int, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
  """The batches of an epoch in their order; every row is in exactly one, and the last may be smaller."""
  return _cut(shuffled(num_rows, seed=seed, epoch=epoch), batch_size)


def epoch_batches_by_length(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
  """The batches of an epoch, each of reviews of similar length; every row is in exactly one, and one may be smaller.

  The reviews are shuffled, then sorted within windows of many batches, then the batches are shuffled: a review meets
  others each epoch, and long batches do not follow each other.

  Args:
    lengths: int[n], real positions of each review.
    batch_size: rows of a batch.
    seed: of the run.
    epoch: of the run.
  """
  order = shuffled(len(lengths), seed=seed, epoch=epoch)
  made = []
  for window in _cut(order, _WINDOW * batch_size):
    made += _cut(window[np.argsort(lengths[window], kind="stable")], batch_size)
  return [made[i] for i in shuffled(len(made), seed=seed, epoch=epoch)]


def filled(batches: Sequence[np.ndarray], num_batches: int, batch_size: int) -> np.ndarray:
  """Batches as int32[num_batches, batch_size], with -1 where there is no row."""
  rows = np.full((num_batches, batch_size), -1, np.int32)
  for i, batch in enumerate(batches):
    rows[i, : len(batch)] = batch
  return rows


def prediction_batches(lengths: np.ndarray, *, batch_size: int) -> list[np.ndarray]:
  """All rows once, those of similar length together."""
  return _cut(np.argsort(lengths, kind="stable"), batch_size)
