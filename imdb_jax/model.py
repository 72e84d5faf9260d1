"""Embedding, LSTM over time, pooling, one logit."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from imdb_jax import lstm
from imdb_jax.config import Config, ModelConfig
from imdb_jax.errors import UsageError

DropoutMasks = tuple[jax.Array | None, jax.Array | None]


def _keras_bias_init(key: jax.Array, shape: tuple[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Zeros, but ones for the forget gate (`unit_forget_bias`; Jozefowicz et al. 2015)."""
  del key
  hidden_size = shape[0] // 4
  return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1.0)


def _embedding_init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def draw_dropout_masks(key: jax.Array, config: ModelConfig, batch_size: int) -> DropoutMasks:
  """Draws the inverted-dropout masks of a global batch, before it is spread over devices.

  Args:
    key: a typed PRNG key.
    config: sizes and rates.
    batch_size: b.

  Returns:
    input mask f32[b, e] and recurrent mask f32[b, h], or [b, 4, e] and [b, 4, h] with one mask a gate; the batch
    stands first, so that the masks are sharded like the reviews. None where the rate is 0.
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
  """The parameters of an LSTM, initialised as Keras does, and the recurrence over them."""

  config: ModelConfig
  implementation: str | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array, lengths: jax.Array | None, dropout_masks: DropoutMasks) -> jax.Array:
    """inputs f32[b, t, e] -> hidden f32[b, t, h]."""
    hidden_size = self.config.hidden_size
    input_mask, recurrent_mask = (
      mask if mask is None or mask.ndim == 2 else jnp.moveaxis(mask, 1, 0) for mask in dropout_masks
    )
    return lstm.lstm(
      inputs,
      self.param("kernel", nn.initializers.glorot_uniform(), (inputs.shape[-1], 4 * hidden_size)),
      self.param("recurrent_kernel", nn.initializers.orthogonal(), (hidden_size, 4 * hidden_size)),
      self.param("bias", _keras_bias_init, (4 * hidden_size,)),
      input_dropout_mask=input_mask,
      recurrent_dropout_mask=recurrent_mask,
      lengths=lengths,
      gate_activation=self.config.gate_activation,
      implementation=self.implementation,
    )


class SentimentLSTM(nn.Module):
  """The article's model and its variants.

  Attributes:
    config: sizes and semantics.
    vocabulary_size: rows of the embedding; every id must be below it.
    implementation: of the recurrence, see `imdb_jax.lstm`.
  """

  config: ModelConfig
  vocabulary_size: int
  implementation: str | None = None

  @classmethod
  def of_run(cls, config: Config) -> "SentimentLSTM":
    """The model that the settings of a run describe, with the implementation that serves it here.

    Raises:
      UsageError: the named implementation cannot.
    """
    name, model = config.runtime.implementation, config.model
    if name == "auto":
      name = lstm.choose(model.hidden_size).name
    problem = lstm.unsupported(
      name,
      hidden_size=model.hidden_size,
      recurrent_dropout=model.recurrent_dropout_rate > 0,
      gate_activation=model.gate_activation,
      several_models=config.training.num_seeds > 1,
    )
    if problem is not None:
      raise UsageError(f"--implementation {name}: {problem}.")
    return cls(model, config.dataset.vocabulary_size, name)

  @nn.compact
  def __call__(self, tokens: jax.Array, lengths: jax.Array, dropout_masks: DropoutMasks = (None, None)) -> jax.Array:
    """Logits of a batch; positive means a positive review.

    Args:
      tokens: int[b, t], padded at the front.
      lengths: i32[b], real positions of each review.
      dropout_masks: from `draw_dropout_masks`, or None each for prediction.

    Returns:
      f32[b].
    """
    embedding = nn.Embed(
      self.vocabulary_size, self.config.embedding_size, embedding_init=_embedding_init, name="embedding"
    )
    real_lengths = lengths if self.config.mask_padding else None
    hidden = LSTM(self.config, self.implementation, name="lstm")(embedding(tokens), real_lengths, dropout_masks)
    pooled = _pool(hidden, real_lengths, self.config.pooling)
    return nn.Dense(1, kernel_init=nn.initializers.glorot_uniform(), name="dense")(pooled)[:, 0]


def _pool(hidden: jax.Array, lengths: jax.Array | None, pooling: str) -> jax.Array:
  """hidden f32[b, t, h] -> f32[b, h] over the real positions; zeros for a review without any."""
  if pooling == "last":
    return hidden[:, -1]
  b, t, _ = hidden.shape
  if lengths is None:
    lengths = jnp.full((b,), t, jnp.int32)
  if pooling == "mean":
    # Positions that are not real hold zeros, so the sum needs no mask.
    return jnp.sum(hidden, axis=1) / jnp.maximum(lengths, 1)[:, None].astype(hidden.dtype)
  is_real = (jnp.arange(t)[None, :] >= t - lengths[:, None])[:, :, None]
  highest = jnp.max(jnp.where(is_real, hidden, -jnp.inf), axis=1)
  return jnp.where((lengths > 0)[:, None], highest, jnp.zeros_like(highest))
