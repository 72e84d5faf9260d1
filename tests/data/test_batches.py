"""Which reviews each step sees: every one once an epoch, in an order that only seed and epoch decide."""

import numpy as np
import pytest

from imdb_jax.data import batches


def rows_of(num_rows: int = 100, *, batch_size: int = 32, seed: int = 0, epoch: int = 0) -> list[np.ndarray]:
  return batches.epoch_batches(num_rows, batch_size=batch_size, seed=seed, epoch=epoch)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(100, 32), (96, 32), (5, 32), (1, 1), (7, 1), (25_000, 32)])
def test_every_review_once_an_epoch(num_rows, batch_size):
  rows = rows_of(num_rows, batch_size=batch_size)
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(num_rows))
  assert len(rows) == batches.num_batches(num_rows, batch_size)
  assert all(len(batch) == batch_size for batch in rows[:-1])
  assert 1 <= len(rows[-1]) <= batch_size


def test_article_has_782_steps_an_epoch_the_last_of_8():
  rows = rows_of(25_000)
  assert len(rows) == 782
  assert len(rows[-1]) == 8


def test_same_seed_and_epoch_give_the_same_batches():
  for first, second in zip(rows_of(seed=3, epoch=5), rows_of(seed=3, epoch=5), strict=True):
    np.testing.assert_array_equal(first, second)


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
  """The first place of many epochs goes to every review about equally often."""
  first = [batches.shuffled(10, seed=0, epoch=epoch)[0] for epoch in range(5000)]
  # Chi-squared with 9 degrees of freedom exceeds 35 once in 20,000.
  counts = np.bincount(first, minlength=10)
  assert np.sum((counts - 500) ** 2 / 500) < 35


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_all_allowed_seeds_work(seed):
  assert len(np.unique(batches.shuffled(50, seed=seed, epoch=99_999))) == 50


def test_order_is_the_published_one():
  """Never regenerate these numbers: saved runs resume by them, on every machine and NumPy version."""
  assert batches.shuffled(25_000, seed=0, epoch=0)[:8].tolist() == [24994, 24289, 10614, 7552, 9232, 5820, 9334, 23710]
  assert batches.shuffled(25_000, seed=7, epoch=3)[:8].tolist() == [22299, 8306, 2799, 1105, 5154, 24714, 20825, 10551]


LENGTHS = np.minimum(np.random.default_rng(0).lognormal(5, 0.7, 20_000), 400).astype(np.int32)


def by_length(*, seed: int = 0, epoch: int = 1) -> list[np.ndarray]:
  return batches.epoch_batches_by_length(LENGTHS, batch_size=32, seed=seed, epoch=epoch)


def test_by_length_has_every_review_once_and_batches_of_the_same_size():
  made = by_length()
  np.testing.assert_array_equal(np.sort(np.concatenate(made)), np.arange(20_000))
  assert len(made) == batches.num_batches(20_000, 32)
  assert all(len(rows) == 32 for rows in made)


def test_by_length_wastes_little_where_shuffled_batches_waste_half():
  def wasted(made):
    return 1 - LENGTHS.sum() / sum(len(rows) * LENGTHS[rows].max() for rows in made)

  assert wasted(by_length()) < 0.02
  assert wasted(rows_of(20_000)) > 0.4


def test_by_length_is_a_function_of_seed_and_epoch():
  first, again = by_length(), by_length()
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  for other in (by_length(seed=1), by_length(epoch=2)):
    together = {tuple(sorted(rows)) for rows in first} & {tuple(sorted(rows)) for rows in other}
    assert len(together) < 10, "reviews must meet others in other epochs"


def test_by_length_long_batches_do_not_follow_each_other():
  longest = [int(LENGTHS[rows].max()) for rows in by_length()]
  assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.15


def test_prediction_has_every_review_once_and_like_lengths_together():
  made = batches.prediction_batches(LENGTHS, batch_size=64)
  np.testing.assert_array_equal(np.sort(np.concatenate(made)), np.arange(20_000))
  longest = [int(LENGTHS[rows].max()) for rows in made]
  assert longest == sorted(longest)


def test_batches_are_filled_up_with_rows_that_are_none():
  filled = batches.filled([np.array([3, 1]), np.array([2])], 3, 2)
  assert filled.dtype == np.int32
  assert filled.tolist() == [[3, 1], [2, -1], [-1, -1]]
  assert batches.filled([], 1, 2).tolist() == [[-1, -1]]
