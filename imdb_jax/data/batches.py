"""Which reviews go into which batch: a pure function of (seed, epoch), so resuming needs only the step number."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """The reviews of one step.

  Attributes:
    rows: int64[b], positions in the split.
    length: positions that the step processes, counted from a review's end.
  """

  rows: np.ndarray
  length: int


def num_batches(num_rows: int, batch_size: int) -> int:
  """Batches of an epoch; the last may be smaller."""
  return math.ceil(num_rows / batch_size)


def shuffled(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
  """A permutation of range(num_rows).

  It is the rank of Philox's raw output, whose stream NumPy promises never to change; a Generator's
  `permutation` carries no such promise.
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
  return np.argsort(bits, kind="stable")


def epoch_batches(num_rows: int, *, sequence_length: int, batch_size: int, seed: int, epoch: int) -> list[Batch]:
  """The batches of an epoch in their order; every row is in exactly one."""
  order = shuffled(num_rows, seed=seed, epoch=epoch)
  starts = range(0, num_rows, batch_size)
  return [Batch(rows=order[start : start + batch_size], length=sequence_length) for start in starts]
