"""Skip-gram: the loss and gradients of the definition, the same vectors in every call, and words by their contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imdb_jax.training import skipgram


def definition(
  x: np.ndarray, y: np.ndarray, words, reviews, reach, sampled
) -> tuple[float, int, np.ndarray, np.ndarray]:
  """Return loss, number of pairs and gradients in float64, pair by pair (Mikolov et al. 2013, equation 4)."""
  loss, num_pairs, dx, dy = 0.0, 0, np.zeros_like(x), np.zeros_like(y)

  def add(word: int, other: int, sign: int, weight: float) -> None:
    nonlocal loss
    margin = sign * (x[word] @ y[other])
    slope = -sign * weight / (1 + np.exp(margin))
    loss += weight * np.log1p(np.exp(-margin))
    dx[word] += slope * y[other]
    dy[other] += slope * x[word]

  for chunk in range(len(words)):
    for i, word in enumerate(words[chunk]):
      for j, other in enumerate(words[chunk]):
        is_near = 0 < abs(i - j) <= reach[chunk, i] and reviews[chunk, i] == reviews[chunk, j]
        if is_near and word and other:
          num_pairs += 1
          add(word, other, 1, 1.0)
          for random in sampled[chunk]:
            add(word, random, -1, 5 / len(sampled[chunk]))
  return loss, num_pairs, dx, dy


def test_loss_and_gradients_are_those_of_the_definition():
  rng, v, e, b, c = np.random.default_rng(0), 20, 6, 3, 11
  x, y = rng.normal(size=(2, v, e))
  words = rng.integers(0, v, (b, c), np.int32)
  words[:, :2] = 0
  reviews = np.sort(rng.integers(0, 3, (b, c), np.int32), axis=1)
  reach, sampled = rng.integers(1, 5, (b, c), np.int32), rng.integers(1, v, (b, 7), np.int32)
  loss, num_pairs, *grads = definition(x, y, words, reviews, reach, sampled)
  vectors = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
  found, found_grads = jax.value_and_grad(skipgram.objective, has_aux=True)(vectors, words, reviews, reach, sampled)
  np.testing.assert_allclose(found, (loss, num_pairs), rtol=1e-5)
  for one, other in zip(found_grads, grads, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def corpus(n: int = 400) -> np.ndarray:
  """Return reviews of two topics: ids 1 to 20 occur together, 21 to 40 together, and 41 everywhere."""
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 21, (n, 100)) + 20 * (np.arange(n) % 2)[:, None]
  ids[rng.random(ids.shape) < 0.3] = 41
  for row in range(n):
    ids[row, : row % 101] = 0
  return ids.astype(np.int16)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
  return skipgram.fit(corpus(), 50, 16, lambda line: None)


def test_words_with_the_same_contexts_are_close_together(vectors):
  x = vectors[1:41] / np.linalg.norm(vectors[1:41], axis=1, keepdims=True)
  similarity, is_same = x @ x.T, np.arange(40)[:, None] // 20 == np.arange(40) // 20
  others = ~np.eye(40, dtype=bool)
  assert similarity[is_same & others].min() > similarity[~is_same].max()


def test_vectors_have_the_scale_of_the_others(vectors):
  assert vectors.dtype == np.float32 and vectors.shape == (50, 16)
  np.testing.assert_allclose(np.sqrt(np.mean(vectors[1:] ** 2)), 0.3, rtol=1e-5)
  assert not vectors[0].any() and not vectors[42:].any(), "padding, and words that never occur"
  assert vectors[1:42].any(axis=1).all()


def test_every_call_returns_the_same_vectors_and_reports_ten_times(vectors):
  lines = []
  np.testing.assert_array_equal(skipgram.fit(corpus(), 50, 16, lines.append), vectors)
  shown = [line for line in lines if line]
  assert 8 <= len(shown) <= 10
  assert all(line.startswith("Word vectors  step ") and line.endswith(" s left") for line in shown)


@pytest.mark.parametrize("ids", [[[0, 0]], [[0, 3]], [[1, 1], [2, 3]]])
def test_the_smallest_corpora_give_finite_vectors(ids):
  vectors = skipgram.fit(np.array(ids, np.int16), 5, 4, lambda line: None)
  assert vectors.shape == (5, 4) and np.isfinite(vectors).all()
  assert set(np.flatnonzero(vectors.any(axis=1))) == {id for row in ids for id in row if id}
