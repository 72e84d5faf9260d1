"""The network: embedding, LSTM over time, pooling, head."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from imdb_jax import lstm
from imdb_jax.config import ModelConfig
from imdb_jax.lstm.shared import known_lengths, real_positions

DropoutMasks = tuple[jax.Array | None, jax.Array | None]
NO_DROPOUT: DropoutMasks = (None, None)


def _bias_init(key: jax.Array, shape: tuple[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Return zeros, but ones for the forget gate (Keras's `unit_forget_bias`; Jozefowicz et al. 2015)."""
  del key
  hidden_size = shape[0] // 4
  return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1.0)


def _embedding_init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def draw_dropout_masks(key: jax.Array, config: ModelConfig, batch_size: int) -> DropoutMasks:
  """Draw the inverted-dropout masks of a global batch, before it is sharded over devices.

  Args:
    key: a typed PRNG key.
    config: sizes and rates.
    batch_size: b.

  Returns:
    Input mask f32[b, e] and recurrent mask f32[b, h], or [b, 4, e] and [b, 4, h] with one mask per gate. The batch is
    the first axis, so that the masks are sharded like the reviews. None where the rate is 0.
  """
  gates = () if config.dropout_masks == "shared" else (4,)

  def draw(key: jax.Array, rate: float, size: int) -> jax.Array | None:
    if rate == 0:
      return None
    kept = jax.random.bernoulli(key, 1 - rate, (batch_size, *gates, size))
    return jnp.where(kept, jnp.float32(1 / (1 - rate)), jnp.float32(0))

  input_key, recurrent_key = jax.random.split(key)
  return (
    draw(input_key, config.input_dropout_rate, config.embedding_size),
    draw(recurrent_key, config.recurrent_dropout_rate, config.hidden_size),
  )


class LSTM(nn.Module):
  """LSTM layer with Keras's initializers.

  Attributes:
    config: sizes and semantics.
    implementation: name of an implementation, see `imdb_jax.lstm`.
  """

  config: ModelConfig
  implementation: str | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array, lengths: jax.Array | None, dropout_masks: DropoutMasks) -> jax.Array:
    """Return hidden states f32[b, t, h] of inputs f32[b, t, e]."""
    hidden_size = self.config.hidden_size
    input_mask, recurrent_mask = (
      mask if mask is None or mask.ndim == 2 else jnp.moveaxis(mask, 1, 0) for mask in dropout_masks
    )
    return lstm.lstm(
      inputs,
      self.param("kernel", nn.initializers.glorot_uniform(), (inputs.shape[-1], 4 * hidden_size)),
      self.param("recurrent_kernel", nn.initializers.orthogonal(), (hidden_size, 4 * hidden_size)),
      self.param("bias", _bias_init, (4 * hidden_size,)),
      input_dropout_mask=input_mask,
      recurrent_dropout_mask=recurrent_mask,
      lengths=lengths,
      gate_activation=self.config.gate_activation,
      implementation=self.implementation,
    )


class TextClassifier(nn.Module):
  """The article's model and its variants: `embed`, then `encode`, then `head`.

  Attributes:
    config: sizes and semantics.
    vocabulary_size: rows of the embedding; every id must be below it.
    head_size: logits per review.
    implementation: name of an implementation of the recurrence, see `imdb_jax.lstm`.
  """

  config: ModelConfig
  vocabulary_size: int
  head_size: int = 1
  implementation: str | None = None

  def setup(self):
    self.embedding = nn.Embed(self.vocabulary_size, self.config.embedding_size, embedding_init=_embedding_init)
    self.lstm = LSTM(self.config, self.implementation)
    self.dense = nn.Dense(self.head_size, kernel_init=nn.initializers.glorot_uniform())

  def __call__(self, tokens: jax.Array, lengths: jax.Array, dropout_masks: DropoutMasks = NO_DROPOUT) -> jax.Array:
    """Return the logits of a batch.

    Args:
      tokens: int[b, t], padded at the front.
      lengths: i32[b], number of tokens of each review.
      dropout_masks: from `draw_dropout_masks`; none for prediction.

    Returns:
      f32[b, head_size].
    """
    return self.head(self.encode(self.embed(tokens), lengths, dropout_masks))

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Return word vectors f32[b, t, e] of tokens int[b, t]."""
    return self.embedding(tokens)

  def encode(self, inputs: jax.Array, lengths: jax.Array, dropout_masks: DropoutMasks = NO_DROPOUT) -> jax.Array:
    """Return one vector per review, f32[b, h], of word vectors f32[b, t, e]."""
    masked_lengths = lengths if self.config.mask_padding else None
    return _pool(self.lstm(inputs, masked_lengths, dropout_masks), masked_lengths, self.config.pooling)

  def head(self, encoded: jax.Array) -> jax.Array:
    """Return logits f32[b, head_size] of encoded reviews f32[b, h]."""
    return self.dense(encoded)


def _pool(hidden: jax.Array, lengths: jax.Array | None, pooling: str) -> jax.Array:
  """Reduce hidden states f32[b, t, h] to f32[b, h]; a review without tokens gives zeros."""
  if pooling == "last":
    return hidden[:, -1]
  lengths = known_lengths(lengths, hidden)
  if pooling == "mean":
    # Hidden states of padding are zeros, so the sum needs no mask.
    return jnp.sum(hidden, axis=1) / jnp.maximum(lengths, 1)[:, None].astype(hidden.dtype)
  is_real = real_positions(lengths, hidden.shape[1])[:, :, None]
  highest = jnp.max(jnp.where(is_real, hidden, -jnp.inf), axis=1)
  return jnp.where((lengths > 0)[:, None], highest, jnp.zeros_like(highest))
