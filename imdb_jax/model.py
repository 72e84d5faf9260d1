"""The network: embedding, recurrence over time, pooling, head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imdb_jax import lstm
from imdb_jax.config import Config, ModelConfig
from imdb_jax.data import ngrams
from imdb_jax.data.tokenizer import PADDING_ID
from imdb_jax.errors import UsageError, reraise_as
from imdb_jax.lstm import chunked, scan
from imdb_jax.lstm.shared import Masks, Weights, known_lengths, real_positions

DropoutMasks = tuple[jax.Array | None, jax.Array | None]
NO_DROPOUT: DropoutMasks = (None, None)


def _lstm_bias_init(key: jax.Array, shape: tuple[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Return zeros, but ones for the forget gate (Keras's `unit_forget_bias`; Jozefowicz et al. 2015)."""
  del key
  hidden_size = shape[0] // 4
  return jnp.zeros(shape, dtype).at[hidden_size : 2 * hidden_size].set(1.0)


def _embedding_init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
  return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def draw_dropout_masks(key: jax.Array, config: ModelConfig, batch_size: int) -> DropoutMasks:
  """Draw the inverted-dropout masks of a global batch of b reviews, before it is sharded over devices.

  Returns:
    Input mask f32[b, e] and recurrent mask f32[b, d h] of d directions, or [b, 4, e] and [b, 4, d h] with one mask per
    gate. The batch is the first axis, so that the masks are sharded like the reviews. None where the rate is 0.
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
    draw(recurrent_key, config.recurrent_dropout_rate, config.directions * config.hidden_size),
  )


class RecurrentLayer(nn.Module):
  """LSTM, GRU or simple RNN with Keras's initializers; of a bag of words, the word vectors themselves.

  Attributes:
    config: cell, sizes and semantics.
    implementation: name of an implementation of the LSTM, see `imdb_jax.lstm`; the other cells run on `scan`.
    reverse: whether to read the last position first.
  """

  config: ModelConfig
  implementation: str | None = None
  reverse: bool = False

  @nn.compact
  def __call__(self, inputs: jax.Array, lengths: jax.Array | None, dropout_masks: DropoutMasks) -> jax.Array:
    """Return hidden states f32[b, t, h] of inputs f32[b, t, e]."""
    cell, hidden_size = self.config.cell, self.config.hidden_size
    if cell == "bag":
      is_real = real_positions(known_lengths(lengths, inputs), inputs.shape[1])[:, :, None]
      return jnp.where(is_real, inputs if dropout_masks[0] is None else inputs * dropout_masks[0][:, None], 0)
    columns = {"lstm": 4, "gru": 3, "rnn": 1}[cell] * hidden_size
    bias_init = _lstm_bias_init if cell == "lstm" else nn.initializers.zeros
    weights = Weights(
      self.param("kernel", nn.initializers.glorot_uniform(), (inputs.shape[-1], columns)),
      self.param("recurrent_kernel", nn.initializers.orthogonal(), (hidden_size, columns)),
      self.param("bias", bias_init, (2, columns) if cell == "gru" else (columns,)),
    )
    masks = Masks(*(mask if mask is None or mask.ndim == 2 else jnp.moveaxis(mask, 1, 0) for mask in dropout_masks))
    if cell != "lstm":
      kind = {"gru": scan.GRUCell, "rnn": scan.RNNCell}[cell]
      return scan.run(kind(parent=None), inputs, weights, masks, lengths, reverse=self.reverse)
    return lstm.lstm(
      inputs,
      *weights,
      input_dropout_mask=masks.inputs,
      recurrent_dropout_mask=masks.recurrent,
      lengths=lengths,
      gate_activation=self.config.gate_activation,
      reverse=self.reverse,
      implementation=self.implementation,
    )


class NGrams(nn.Module):
  """The linear model of `data.ngrams`, which fits the parameters before the first step; training keeps them.

  Attributes:
    n: number of words of the longest n-grams.
    head_size: k, logits per review.
  """

  n: int
  head_size: int = 1

  @nn.compact
  def __call__(self, tokens: jax.Array, presence: jax.Array | None = None) -> jax.Array:
    """Return logits f32[b, k] of tokens int[b, t].

    With the `presence` f32[b, t] of each word, from 0 to 1, that of an n-gram is the mean over its words and places.
    """
    size = () if self.head_size == 1 else (self.head_size,)
    keys = self.param("keys", nn.initializers.zeros, (ngrams.SIZE,), jnp.uint32)
    weights = self.param("weights", nn.initializers.zeros, (ngrams.SIZE, *size))
    bias = self.param("bias", nn.initializers.zeros, size)
    found = ngrams.keys_of(tokens, self.n) if presence is None else ngrams.occurrences(tokens, self.n)
    place, is_listed = ngrams.find(keys, found)
    values = jnp.where(is_listed[:, :, None], weights[place].reshape(*place.shape, self.head_size), 0)
    if presence is not None:
      values = values * self._presence_of_each(found, presence)[:, :, None]
    return jnp.sum(values, axis=1) + bias.reshape(1, self.head_size)

  def _presence_of_each(self, found: jax.Array, presence: jax.Array) -> jax.Array:
    """Return the part f32[b, n t] that each of `ngrams.occurrences` has in the presence of its n-gram."""
    earlier = [jnp.pad(presence, ((0, 0), (i, 0)))[:, : presence.shape[1]] for i in range(self.n)]
    means = jnp.concatenate([sum(earlier[:size]) / size for size in range(1, self.n + 1)], axis=1)
    find = jax.vmap(lambda *row: jnp.searchsorted(*row, side="right") - jnp.searchsorted(*row))
    return means / find(jnp.sort(found, axis=1), found).astype(means.dtype)


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
    # The attributes name the parameters: lstm and backward_lstm, gru and backward_gru, rnn and backward_rnn.
    for direction, name in enumerate(self.layers):
      setattr(self, name, RecurrentLayer(self.config, self.implementation, reverse=direction == 1))
    self.dense = nn.Dense(self.head_size, kernel_init=nn.initializers.glorot_uniform())
    self.ngrams = NGrams(self.config.ngrams, self.head_size)

  def __call__(self, tokens: jax.Array, lengths: jax.Array, dropout_masks: DropoutMasks = NO_DROPOUT) -> jax.Array:
    """Return the logits f32[b, head_size] of the network alone, which training improves.

    The tokens are int[b, t], padded at the front, and the lengths i32[b] their number in each review. The network must
    not learn beside the linear model of n-grams, whose logits are nearly perfect on the reviews that it was fitted to
    and would leave no error to learn from.
    """
    return self.head(self.encode(self.embed(tokens), lengths, dropout_masks))

  @property
  def layers(self) -> tuple[str, ...]:
    """The names of the recurrent layers."""
    return (self.config.cell, f"backward_{self.config.cell}")[: self.config.directions]

  def draw(self, key: jax.Array) -> dict[str, jax.Array]:
    """Return what a training step passes to a call besides reviews and masks; of a classifier, nothing."""
    del key
    return {}

  @property
  def has_lookup(self) -> bool:
    """Return whether `lookup` supports the model: only the last state counts, and padding is read like a word."""
    config = self.config
    is_plain = not config.mask_padding and config.directions == 1 and config.pooling == "last"
    return is_plain and self.implementation == "chunked"

  def lookup(self, params: Any, sequence_length: int) -> chunked.Lookup:
    """Return what spares `predict` padding and products of word vectors, for reviews of so many positions."""
    return chunked.lookup(params["embedding"]["embedding"], Weights(**params["lstm"]), sequence_length)

  def predict(self, tokens: jax.Array, lengths: jax.Array, lookup: chunked.Lookup | None = None) -> jax.Array:
    """Return the logits f32[b, head_size] of a batch: with `ngrams`, the mean of the network's and the linear model's.

    The first arguments are those of a call; with a `lookup`, the result is the same except for rounding.
    """
    logits = self.head(self.features(tokens, lengths, lookup))
    return (logits + self.ngrams(tokens)) / 2 if self.config.ngrams else logits

  def fade(self, tokens: jax.Array, lengths: jax.Array, presence: jax.Array) -> jax.Array:
    """Return the logits of `predict` for words with a presence f32[b, t], from 0 to 1; see also `NGrams`.

    The vector of a word is on the straight line from that of padding to its own.
    """
    padding = self.embed(jnp.full((1, 1), PADDING_ID))
    logits = self.head(self.encode(padding + presence[:, :, None] * (self.embed(tokens) - padding), lengths))
    return (logits + self.ngrams(tokens, presence)) / 2 if self.config.ngrams else logits

  def features(self, tokens: jax.Array, lengths: jax.Array, lookup: chunked.Lookup | None = None) -> jax.Array:
    """Return what the head sees of a batch, f32[b, n], see `encode`; arguments as for `predict`."""
    if lookup is not None:
      return chunked.last_hidden(lookup, tokens, lengths)
    return self.encode(self.embed(tokens), lengths)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Return word vectors f32[b, t, e] of tokens int[b, t]."""
    return self.embedding(tokens)

  def encode(self, inputs: jax.Array, lengths: jax.Array, dropout_masks: DropoutMasks = NO_DROPOUT) -> jax.Array:
    """Return one vector per review, f32[b, n], of word vectors f32[b, t, e]; n is h per direction and pooling."""
    masked_lengths = lengths if self.config.mask_padding else None
    pooled = []
    for direction in range(self.config.directions):
      hidden = self.states(direction, inputs, masked_lengths, dropout_masks)
      poolings = self.config.pooling.split("_")
      pooled += [_pool(hidden, masked_lengths, pooling, direction == 1) for pooling in poolings]
    return jnp.concatenate(pooled, axis=1)

  def states(
    self, direction: int, inputs: jax.Array, lengths: jax.Array | None, dropout_masks: DropoutMasks
  ) -> jax.Array:
    """Return the hidden states f32[b, t, h] of one direction; without lengths, all positions are real."""
    (input_mask, recurrent_masks), h = dropout_masks, self.config.hidden_size
    mask = None if recurrent_masks is None else recurrent_masks[..., direction * h : (direction + 1) * h]
    return getattr(self, self.layers[direction])(inputs, lengths, (input_mask, mask))

  def head(self, encoded: jax.Array) -> jax.Array:
    """Return logits f32[b, head_size] of encoded reviews f32[b, n]."""
    return self.dense(encoded)


def _pool(hidden: jax.Array, lengths: jax.Array | None, pooling: str, reverse: bool) -> jax.Array:
  """Reduce hidden states f32[b, t, h] to f32[b, h]; a review without tokens gives zeros."""
  lengths = known_lengths(lengths, hidden)
  if pooling == "last":
    # The last position that was read. In an empty review, it is padding.
    first = jnp.minimum(hidden.shape[1] - lengths, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0] if reverse else hidden[:, -1]
  if pooling == "mean":
    # Hidden states of padding are zeros, so the sum needs no mask.
    return jnp.sum(hidden, axis=1) / jnp.maximum(lengths, 1)[:, None].astype(hidden.dtype)
  is_real = real_positions(lengths, hidden.shape[1])[:, :, None]
  highest = jnp.max(jnp.where(is_real, hidden, -jnp.inf), axis=1)
  return jnp.where((lengths > 0)[:, None], highest, jnp.zeros_like(highest))


class OwnModel(nn.Module):
  """Any Flax module in the place of `TextClassifier`.

  Attributes:
    module: returns logits f32[b, head_size] of tokens int[b, t], padded at the front with 0, lengths i32[b] and the
      masks that `draw_dropout_masks` draws by the settings; in prediction, both masks are None.
  """

  module: nn.Module
  layers, has_lookup = (), False

  def setup(self):
    # The parameters have the names that the module gives them.
    nn.share_scope(self, self.module)

  def __call__(self, tokens: jax.Array, lengths: jax.Array, dropout_masks: DropoutMasks = NO_DROPOUT) -> jax.Array:
    """Return the logits of the module."""
    return self.module(tokens, lengths, dropout_masks)

  def draw(self, key: jax.Array) -> dict[str, Any]:
    """Return a key for `nn.Dropout`, which every device uses for its own reviews."""
    return {"rngs": {"dropout": key}}

  def predict(self, tokens: jax.Array, lengths: jax.Array, lookup: None = None) -> jax.Array:
    """Return the logits of the module."""
    return self(tokens, lengths)


def check_own_model(module: Any, config: Config, head_size: int) -> None:
  """Raise UsageError unless a module can be initialised and called as in training; nothing is computed."""
  if not isinstance(module, nn.Module):
    raise UsageError(f"model: must be an instance of a class of flax.linen.Module, not {module!r:.80}.")
  model, name = OwnModel(module), type(module).__name__
  reviews = jnp.zeros((2, config.data.sequence_length), jnp.int32), jnp.zeros(2, jnp.int32)

  def call(key: jax.Array) -> Any:
    params = model.init(key, *reviews)["params"]
    return model.apply({"params": params}, *reviews, draw_dropout_masks(key, config.model, 2), **model.draw(key))

  with reraise_as(UsageError, f"{name}: cannot be trained", Exception, "See docs/own_model.md."):
    logits = jax.eval_shape(call, jax.random.key(0))
    if logits.shape != (2, head_size):
      raise ValueError(f"the logits of two reviews have the shape {logits.shape}, not {(2, head_size)}")
