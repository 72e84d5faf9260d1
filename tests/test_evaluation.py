"""Every review of a split counts once, however the last batch is padded."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from programs import config_of

from imdb_jax.config import TrainingConfig
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.evaluation import evaluate, predict
from imdb_jax.task import Classification

TASK = Classification()
# One per seed. They are the parameters of the stand-in for a model.
BIASES = np.array([-1.5, 0.0, 1.0], np.float32)


def make_split(num_rows: int) -> TokenSplit:
  rng = np.random.default_rng(1)
  return TokenSplit(
    tokens=rng.integers(-50, 50, (num_rows, 3)).astype(np.int16),
    lengths=rng.integers(0, 4, num_rows).astype(np.int32),
    labels=rng.integers(0, 2, num_rows).astype(np.int32),
  )


def logits_of(split: TokenSplit, biases=BIASES) -> np.ndarray:
  """Return the logits [seeds, n, 1] of the stand-in. Each row's own content decides, so a mix-up would show."""
  return (split.tokens.sum(axis=1) / 8 + split.lengths + biases[:, None])[:, :, None].astype(np.float32)


@jax.jit
def stand_in(params, tokens, lengths):
  # A padding row has a logit of its own, so counting one would show.
  logits = tokens.astype(jnp.float32).sum(axis=1) / 8 + lengths.astype(jnp.float32)
  return (logits[None, :] + params[:, None])[:, :, None]


def program_of(num_devices: int, function=stand_in, num_seeds: int = len(BIASES)):
  """Return what the evaluation uses of a program, around a function instead of a model."""
  config = config_of(training=TrainingConfig(num_seeds=num_seeds))
  mesh = programs.mesh_of(num_devices)
  return types.SimpleNamespace(config=config, mesh=mesh, task=TASK, prepare=lambda params: params, predict=function)


SIZES = [(10, 4, 1), (8, 4, 1), (3, 8, 2), (1, 1, 4), (17, 5, 3)]


@pytest.mark.parametrize(("num_rows", "batch_size", "num_devices"), SIZES)
def test_every_review_counts_once(num_rows, batch_size, num_devices):
  split, done = make_split(num_rows), []
  result, logits = evaluate(program_of(num_devices), BIASES, split, batch_size, on_progress=done.append)
  np.testing.assert_array_equal(logits, logits_of(split))
  assert result == TASK.evaluate(logits_of(split), split.labels)
  assert result.num_reviews == num_rows
  assert done == sorted(set(done))
  assert done[-1] == num_rows


def test_one_seed_is_an_ensemble_of_one():
  split, biases = make_split(17), BIASES[:1]
  result, _ = evaluate(program_of(2, num_seeds=1), biases, split, 5)
  assert result == TASK.evaluate(logits_of(split, biases), split.labels)
  assert len(result.seeds) == 1


def test_logits_are_in_the_order_of_the_reviews():
  """The batches are not: they hold reviews of similar length."""
  split = make_split(10)
  assert (np.diff(split.lengths) < 0).any(), "else the check proves nothing"
  np.testing.assert_array_equal(predict(program_of(1), BIASES, split, 4), logits_of(split))


def test_no_reviews_have_no_logits():
  assert predict(program_of(1), BIASES, make_split(0), 4).shape == (3, 0, 1)


def test_all_batches_have_one_shape():
  """Otherwise the last batch would compile the model anew."""
  shapes = set()

  def record(params, tokens, lengths):
    shapes.add((tokens.shape, lengths.shape))
    return stand_in(params, tokens, lengths)

  predict(program_of(1, record), BIASES, make_split(10), 4)
  assert shapes == {((4, 3), (4,))}


def test_a_batch_is_read_after_the_next_has_been_dispatched():
  """So the devices never wait for the host."""
  events = []

  def record(params, tokens, lengths):
    events.append("dispatched")
    return stand_in(params, tokens, lengths)

  predict(program_of(1, record), BIASES, make_split(10), 4, on_progress=events.append)
  assert events == ["dispatched", "dispatched", 4, "dispatched", 8, 10]
