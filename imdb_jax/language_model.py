"""A language model, which predicts the next word in both directions. A classifier can start from its LSTMs.

Dai and Le 2015, "Semi-supervised Sequence Learning". The vectors of the words are output weights, too (Press and Wolf
2017). In training, the softmax is over the right word and random others (Bengio and Senecal 2008, importance sampling).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from imdb_jax.model import NO_DROPOUT, DropoutMasks, TextClassifier

# Random words per step, at most.
_SAMPLES = 2048


class LanguageModel(TextClassifier):
  """Predicts each word of a sequence from those before it, and by a second layer from those after it.

  Its answers to a sequence are the mean loss per word in nats and the share of words with the highest score, f32[b, 2].
  """

  def setup(self):
    super().setup()
    size = self.config.embedding_size
    self.queries = [nn.Dense(size, use_bias=False, kernel_init=nn.initializers.glorot_uniform()) for _ in self.layers]
    self.word_bias = self.param("word_bias", lambda key, v: _log_shares(jnp.arange(v), v), self.vocabulary_size)

  def draw(self, key: jax.Array) -> dict[str, jax.Array]:
    """Return random words i32[s], the frequent ones more often: the probability of id i is that of `_log_shares`."""
    u = jax.random.uniform(key, (min(_SAMPLES, self.vocabulary_size),))
    drawn = jnp.exp(u * math.log(self.vocabulary_size + 1)).astype(jnp.int32) - 1
    return {"sampled": jnp.minimum(drawn, self.vocabulary_size - 1)}

  def __call__(
    self,
    tokens: jax.Array,
    lengths: jax.Array,
    dropout_masks: DropoutMasks = NO_DROPOUT,
    sampled: jax.Array | None = None,
  ) -> jax.Array:
    """Return the answers to sequences int[b, t]; without `sampled` from `draw`, the softmax is over all words."""
    del lengths
    tokens, answers = tokens.astype(jnp.int32), []
    for direction, queries in enumerate(self.queries):
      read, expected = (tokens[:, :-1], tokens[:, 1:]) if direction == 0 else (tokens[:, 1:], tokens[:, :-1])
      states = queries(self.states(direction, self.embed(read), None, dropout_masks))
      answers.append(self._all_words(states, expected) if sampled is None else self._some(states, expected, sampled))
    return jnp.mean(jnp.stack(answers), axis=0)

  def predict(self, tokens: jax.Array, lengths: jax.Array, lookup: Any = None) -> jax.Array:
    """Return the answers to sequences int[b, t], over all words."""
    del lookup
    return self(tokens, lengths)

  def _some(self, states: jax.Array, expected: jax.Array, sampled: jax.Array) -> jax.Array:
    vectors = self.embedding.embedding
    right = jnp.sum(states * vectors[expected], axis=2) + self.word_bias[expected]
    others = states @ vectors[sampled].T + self.word_bias[sampled][None, None]
    others = jnp.where(sampled[None, None] == expected[:, :, None], -jnp.inf, others)
    # The rarer a word is drawn, the more words it stands for.
    weights = _log_shares(sampled, self.vocabulary_size)[None, None] + math.log(len(sampled))
    losses = jnp.logaddexp(right, jax.nn.logsumexp(others - weights, axis=2)) - right
    is_right = right > jnp.max(others, axis=2)
    return jnp.stack([jnp.mean(losses, axis=1), jnp.mean(is_right.astype(jnp.float32), axis=1)], axis=1)

  def _all_words(self, states: jax.Array, expected: jax.Array) -> jax.Array:
    vectors = self.embedding.embedding

    # The scores of a whole batch would take gigabytes.
    def answer(sequence: tuple[jax.Array, jax.Array]) -> jax.Array:
      states, expected = sequence
      scores = states @ vectors.T + self.word_bias[None]
      losses = jax.nn.logsumexp(scores, axis=1) - jnp.take_along_axis(scores, expected[:, None], axis=1)[:, 0]
      return jnp.stack([jnp.mean(losses), jnp.mean((jnp.argmax(scores, axis=1) == expected).astype(jnp.float32))])

    return jax.lax.map(answer, (states, expected))


def _log_shares(ids: jax.Array, vocabulary_size: int) -> jax.Array:
  """Return the logarithm of the share of words with these ids, by Zipf's law: ids are in the order of frequency."""
  return jnp.log(jnp.log((ids + 2) / (ids + 1)) / math.log(vocabulary_size + 1)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """The mean loss per word in nats and the share of words that come first: over all seeds, and of each."""

  loss: float
  accuracy: float
  seeds: "Sequence[Scores]" = ()


class NextWord:
  """The task of a language model: loss per word, and how often the right word comes first. See `LanguageModel`."""

  head_size, monitor = 2, "accuracy"

  def loss_weights(self, labels: np.ndarray, _wanted: str) -> np.ndarray:
    """Return ones: all words weigh the same."""
    return np.ones(len(labels))

  def sums(self, answers: jax.Array, _: jax.Array, weights: jax.Array, __: jax.Array) -> dict[str, jax.Array]:
    """Return sums over a batch, as those of `Classification`; there are neither labels nor weights of losses."""
    loss, correct = jnp.sum(answers * weights[:, None], axis=0)
    return {"loss": loss, "correct": correct, "weight": jnp.sum(weights)}

  def evaluate(self, answers: np.ndarray, labels: np.ndarray) -> Scores:
    """Return the means of answers f32[seeds, n, 2] over sequences and seeds, and those of each seed."""
    del labels
    means: Any = answers.mean(axis=1, dtype=np.float64)
    seeds = [Scores(loss=loss, accuracy=accuracy) for loss, accuracy in means.tolist()]
    loss, accuracy = means.mean(axis=0).tolist()
    return Scores(loss=loss, accuracy=accuracy, seeds=seeds)
