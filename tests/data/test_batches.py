"""The order of the reviews: each exactly once per epoch, and a function of seed and epoch only."""

import hashlib

import numpy as np
import pytest

from imdb_jax.data import batches

LENGTHS = np.minimum(np.random.default_rng(0).lognormal(5, 0.7, 20_000), 400).astype(np.int32)


def rows_of(
  lengths: np.ndarray = LENGTHS[:100], *, seed: int = 0, epoch: int = 0, batch_size: int = 32, by_length: bool = False
) -> list[np.ndarray]:
  """Return the batches of one seed, without the places that have no row."""
  rows = batches.epoch_rows(lengths, seeds=[seed], epoch=epoch, batch_size=batch_size, by_length=by_length)
  return [batch[batch >= 0] for batch in rows[:, 0]]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(100, 32), (96, 32), (5, 32), (1, 1), (7, 1), (20_000, 32)])
def test_every_review_once_per_epoch(num_rows, batch_size, by_length):
  rows = rows_of(LENGTHS[:num_rows], batch_size=batch_size, by_length=by_length)
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(num_rows))
  assert len(rows) == -(-num_rows // batch_size)
  sizes = sorted(map(len, rows))
  assert sizes[1:] == [batch_size] * (len(rows) - 1)
  assert 1 <= sizes[0] <= batch_size


def test_article_has_782_steps_per_epoch_the_last_of_8():
  rows = rows_of(np.zeros(25_000, np.int32))
  assert len(rows) == 782
  assert len(rows[-1]) == 8


def test_places_without_a_row_are_minus_1_and_at_the_end():
  rows = batches.epoch_rows(LENGTHS[:5], seeds=[0], epoch=0, batch_size=3, by_length=False)
  assert rows.dtype == np.int32
  assert (rows[:, 0] >= 0).tolist() == [[True] * 3, [True, True, False]]


def test_batches_are_no_larger_than_the_split():
  assert batches.epoch_rows(LENGTHS[:5], seeds=[0], epoch=0, batch_size=32, by_length=False).shape == (1, 1, 5)


@pytest.mark.parametrize("by_length", [False, True])
def test_seeds_beside_each_other_are_those_of_single_runs(by_length):
  arguments = {"epoch": 2, "batch_size": 32, "by_length": by_length}
  together = batches.epoch_rows(LENGTHS[:100], seeds=range(3, 6), **arguments)
  assert together.shape == (4, 3, 32)
  for i, seed in enumerate(range(3, 6)):
    np.testing.assert_array_equal(together[:, i : i + 1], batches.epoch_rows(LENGTHS[:100], seeds=[seed], **arguments))


def test_global_random_state_is_neither_used_nor_changed():
  orders = []
  for seed in (1, 2):
    np.random.seed(seed)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    orders.append(np.concatenate(rows_of()))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
  np.testing.assert_array_equal(*orders)


def test_seeds_and_epochs_give_other_orders():
  orders = [np.concatenate(rows_of(seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
  orders.append(np.arange(100))
  assert len({order.tobytes() for order in orders}) == 17, "(seed, epoch) must not be (epoch, seed) either"
  # Unrelated orders share about one place in a hundred.
  shared = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
  assert max(shared) < 0.1


def test_orders_are_uniform():
  """Each review is first about equally often."""
  first = [batches.shuffled(10, seed=0, epoch=epoch)[0] for epoch in range(5000)]
  # Chi-squared with 9 degrees of freedom exceeds 35 once in 20,000.
  counts = np.bincount(first, minlength=10)
  assert np.sum((counts - 500) ** 2 / 500) < 35


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_all_allowed_seeds_work(seed):
  assert len(np.unique(batches.shuffled(50, seed=seed, epoch=99_999))) == 50


def test_order_is_the_published_one():
  """Never regenerate these numbers: saved runs depend on them when they resume, on every machine and NumPy version."""
  assert batches.shuffled(25_000, seed=0, epoch=0)[:8].tolist() == [24994, 24289, 10614, 7552, 9232, 5820, 9334, 23710]
  assert batches.shuffled(25_000, seed=7, epoch=3)[:8].tolist() == [22299, 8306, 2799, 1105, 5154, 24714, 20825, 10551]
  lengths = np.arange(1000, dtype=np.int32) % 400
  digests = []
  for by_length in (False, True):
    rows = batches.epoch_rows(lengths, seeds=[7], epoch=3, batch_size=3, by_length=by_length)
    digests.append(hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest())
  assert digests == [
    "b01e7e834cbff5ca0b079e4fee6512374cb1a26e24696da13066f20282eb514e",
    "5874bef6c09f3f6dd4634424d820e9bbb6a5102c8740a45d9ff786b50f5bcf2b",
  ]


def test_by_length_wastes_little_where_shuffled_batches_waste_half():
  def wasted(made):
    return 1 - LENGTHS.sum() / sum(len(rows) * LENGTHS[rows].max() for rows in made)

  assert wasted(rows_of(LENGTHS, by_length=True)) < 0.02
  assert wasted(rows_of(LENGTHS)) > 0.4


def test_by_length_is_a_function_of_seed_and_epoch():
  first, again = rows_of(LENGTHS, epoch=1, by_length=True), rows_of(LENGTHS, epoch=1, by_length=True)
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  for seed, epoch in ((1, 1), (0, 2)):
    other = rows_of(LENGTHS, seed=seed, epoch=epoch, by_length=True)
    together = {tuple(sorted(rows)) for rows in first} & {tuple(sorted(rows)) for rows in other}
    assert len(together) < 10, "each epoch must combine other reviews"


def test_by_length_spreads_long_batches_over_the_epoch():
  longest = [int(LENGTHS[rows].max()) for rows in rows_of(LENGTHS, by_length=True)]
  assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.15


def test_prediction_has_every_review_once_and_similar_lengths_together():
  made = batches.prediction_batches(LENGTHS, batch_size=64)
  np.testing.assert_array_equal(np.sort(np.concatenate(made)), np.arange(20_000))
  longest = [int(LENGTHS[rows].max()) for rows in made]
  assert longest == sorted(longest)
