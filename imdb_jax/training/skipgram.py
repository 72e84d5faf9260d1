"""Word vectors from which words occur close to each other, learnt by telling neighbours from random words.

Mikolov et al. 2013, "Distributed Representations of Words and Phrases and their Compositionality": skip-gram with
negative sampling. One matrix product compares all words of a chunk of text, which share their negative samples.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imdb_jax.config import OptimizerConfig
from imdb_jax.data.word_vectors import normalized
from imdb_jax.optimizer import make_optimizer

# Neighbours of a word are at most 1 to this many words away; the number is drawn for each word.
_WINDOW = 8
# Weight of the random words per neighbour, and how many are drawn for a chunk.
_NEGATIVES, _SAMPLES = 5, 32
# The more frequent a word, the more of its occurrences are left out: all above this share, by a square root.
_SUBSAMPLING = 1e-4
_SMOOTHING = 0.75
_EPOCHS, _CHUNK, _BATCH = 4, 64, 128
# A small corpus is read more often.
_MIN_STEPS = 400
_OPTIMIZER = OptimizerConfig(learning_rate=0.02, schedule="one_cycle")
# All seeds of a run start from the same vectors.
_SEED = 0
# Of words and of neighbours, f32[v, e] each.
Vectors = tuple[jax.Array, jax.Array]


def objective(vectors: Vectors, words: jax.Array, reviews: jax.Array, reach: jax.Array, sampled: jax.Array):
  """Return the loss over all pairs of neighbours in some chunks, and the number of pairs.

  Args:
    vectors: of words and of neighbours.
    words: i32[b, c], ids in the order of the text; 0 is none.
    reviews: i32[b, c], the review of each word: neighbours are of the same.
    reach: i32[b, c], the largest distance of each word's neighbours.
    sampled: i32[b, k], random words.

  Returns:
    f32[] each. The loss is that of the paper's equation 4, with 5 times the mean over the samples.
  """
  places = np.arange(words.shape[1], dtype=np.int32)
  distance = np.abs(np.subtract.outer(places, places))[None]
  is_pair = (distance > 0) & (distance <= reach[:, :, None]) & (reviews[:, :, None] == reviews[:, None, :])
  is_pair &= (words[:, :, None] > 0) & (words[:, None, :] > 0)
  others = vectors[1][jnp.concatenate([words, sampled], axis=1)]
  scores = jnp.einsum("bce,bde->bcd", vectors[0][words], others)
  near, far = scores[:, :, : words.shape[1]], scores[:, :, words.shape[1] :]
  num_pairs = jnp.sum(is_pair, axis=2).astype(jnp.float32)
  loss = jnp.sum(jnp.where(is_pair, jax.nn.softplus(-near), 0))
  loss += _NEGATIVES * jnp.sum(num_pairs * jnp.mean(jax.nn.softplus(far), axis=2))
  return loss, jnp.sum(num_pairs)


def fit(
  tokens: np.ndarray, vocabulary_size: int, embedding_size: int, on_progress: Callable[[str | None], None]
) -> np.ndarray:
  """Return a vector for each id; 0 for words that never occur. On one machine, every call returns the same vectors.

  Args:
    tokens: int[n, t], padded at the front with 0.
    vocabulary_size: v, upper bound of the ids.
    embedding_size: e.
    on_progress: called before each step, nine times with a line of text and otherwise with None; it may raise.

  Returns:
    f32[v, e], as of `word_vectors.svd`.
  """
  rng = np.random.default_rng(_SEED)
  words, reviews = tokens[tokens > 0], np.repeat(np.arange(len(tokens), dtype=np.int32), (tokens > 0).sum(axis=1))
  counts = np.bincount(words, minlength=vocabulary_size)
  if not len(words):
    return np.zeros((vocabulary_size, embedding_size), np.float32)
  kept = np.sqrt(_SUBSAMPLING * len(words) / np.maximum(counts, 1)).astype(np.float32)
  noise = np.cumsum(counts**_SMOOTHING)
  num_chunks = 1 + int(np.minimum(kept, 1) @ counts) // _CHUNK
  batch_size = min(_BATCH, num_chunks)
  per_epoch = -(-num_chunks // batch_size)
  num_steps = per_epoch * max(_EPOCHS, -(-_MIN_STEPS // per_epoch))
  optimizer = make_optimizer(_OPTIMIZER, num_steps)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(vectors: Vectors, opt_state: optax.OptState, *batch: jax.Array):
    (loss, num_pairs), grads = jax.value_and_grad(objective, has_aux=True)(vectors, *batch)
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(vectors, updates), opt_state, loss / jnp.maximum(num_pairs, 1)

  start = (rng.random((vocabulary_size, embedding_size), np.float32) - 0.5) / embedding_size
  vectors = jnp.asarray(start), jnp.zeros_like(start)
  opt_state, loss, started = optimizer.init(vectors), 0.0, time.perf_counter()
  for first in range(0, num_steps, per_epoch):
    chunks = _chunks(words, reviews, kept, rng)
    # The number of chunks varies a little.
    order = np.resize(rng.permutation(len(chunks[0])), (per_epoch, batch_size))
    for step, rows in enumerate(order, first):
      line = None
      if step and step % -(-num_steps // 10) == 0:
        left = (time.perf_counter() - started) * (num_steps - step) / step
        line = f"Word vectors  step {step:,}/{num_steps:,}  loss {float(loss):.4f}  {left:.0f} s left"
      on_progress(line)
      reach = rng.integers(1, _WINDOW + 1, (batch_size, _CHUNK), np.int32)
      sampled = np.searchsorted(noise, noise[-1] * rng.random((batch_size, _SAMPLES)), side="right").astype(np.int32)
      vectors, opt_state, loss = train_step(vectors, opt_state, *(each[rows] for each in chunks), reach, sampled)
  return normalized(np.where(counts[:, None] > 0, vectors[0], 0))


def _chunks(words: np.ndarray, reviews: np.ndarray, kept: np.ndarray, rng: np.random.Generator):
  """Return words and reviews, i32[n, c] each, of what is left of the text when frequent words are left out."""
  is_kept = rng.random(len(words), np.float32) < kept[words]
  chunks = (array[is_kept].astype(np.int32) for array in (words, reviews))
  return tuple(np.pad(array, (0, _CHUNK - len(array) % _CHUNK)).reshape(-1, _CHUNK) for array in chunks)
