"""The fast path on every backend without a kernel: a custom gradient that walks through time in chunks.

What makes it faster than the automatic gradient of a scan:

- Products that do not depend on the state (the input projection; the gradients of kernel, recurrent kernel, bias and
  inputs) are large products, one per chunk. The time loop holds one small product per position.
- The arrays of a chunk stay in the cache between the loop that writes them and the product that reads them.
- One tanh runs over all four gates: sigmoid(z) = tanh(z / 2) / 2 + 1 / 2, and the inner factor goes into the weights.
- The state needs no select at padding: gates i and o are closed there, which keeps the state at exactly 0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from imdb_jax.lstm.shared import CLOSED, Masks, Weights, in_order, known_lengths, real_positions, slopes

# Positions per chunk: enough for large products, few enough for the cache. Padding is skipped in whole chunks.
_CHUNK = 20


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Return x [..., b, n] times mask [b, n]."""
  return x if mask is None else x * jnp.broadcast_to(mask, x.shape)


def _weight_gradient(x: jax.Array, dz: jax.Array) -> jax.Array:
  """Return the gradient [n, 4h] of the weights of a product of x [..., n], summed over all positions and rows."""
  rows, columns = x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1])
  return jax.lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))


def _per_gate(values: tuple[float, float, float, float], size: int) -> jax.Array:
  """Return one value per gate as a row over the gates' columns, f32[1, 4h]."""
  return jnp.repeat(jnp.array(values, jnp.float32), size)[None, :]


def _activate(z: jax.Array) -> jax.Array:
  """Return the gates f32[b, 4h] of pre-activations that were computed with scaled weights."""
  h = z.shape[-1] // 4
  return jnp.tanh(z) * _per_gate((0.5, 0.5, 1.0, 0.5), h) + _per_gate((0.5, 0.5, 0.0, 0.5), h)


def _in_chunks(x: jax.Array, num_chunks: int) -> jax.Array:
  """Return [b, t, n] as [chunks, chunk, b, n]."""
  b, t, n = x.shape
  return x.reshape(b, num_chunks, t // num_chunks, n).transpose(1, 2, 0, 3)


def _at(arrays, k: jax.Array):
  """Return chunk k of every array."""
  return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, k, keepdims=False), arrays)


def _put(arrays, values, k: jax.Array):
  """Return the arrays with the values as chunk k."""
  return jax.tree.map(lambda array, value: jax.lax.dynamic_update_index_in_dim(array, value, k, 0), arrays, values)


@jax.custom_vjp
def _recurrence(x, weights: Weights, masks: Masks, is_real, bounds):
  """Return hidden f32[chunks, chunk, b, h] of x f32[chunks, chunk, b, e] and is_real bool[chunks, chunk, b, 1] or None.

  The bounds are the first chunk to process and the one after the last; the others hold nothing real and give zeros.
  """
  return _forward(x, weights, masks, is_real, bounds)[0]


def _scaled(weights: Weights) -> Weights:
  """Return weights with the factor inside the tanh of each gate, see `_activate`."""
  inner = _per_gate((0.5, 0.5, 1.0, 0.5), weights.recurrent_kernel.shape[0])
  return Weights(weights.kernel * inner, weights.recurrent_kernel * inner, weights.bias * inner[0])


def _step(c, z):
  """Return the gates f32[b, 4h] and the state c and h, f32[b, h] each, of scaled pre-activations f32[b, 4h]."""
  gates = _activate(z)
  i, f, g, o = jnp.split(gates, 4, axis=1)
  c = f * c + i * g
  return gates, c, o * jnp.tanh(c)


def _forward(x, weights: Weights, masks: Masks, is_real, bounds):
  (num_chunks, chunk_size, b, _), h = x.shape, weights.recurrent_kernel.shape[0]
  scaled = _scaled(weights)

  def step(carry, projected):
    c, hidden = carry
    gates, c, hidden = _step(c, projected + _masked(hidden, masks.recurrent) @ scaled.recurrent_kernel)
    return (c, hidden), (gates, c, hidden)

  closed = _per_gate(CLOSED, h)[None]

  def chunk(k, carry):
    state, stored = carry
    projected = _masked(_at(x, k), masks.inputs) @ scaled.kernel + scaled.bias[None, None, :]
    if is_real is not None:
      projected = jnp.where(_at(is_real, k), projected, closed)
    after, (gates, c, hidden) = jax.lax.scan(step, state, projected)
    return after, _put(stored, (state, gates, c, hidden), k)

  def buffer(*shape):
    return jnp.zeros((num_chunks, *shape), x.dtype)

  zeros = jnp.zeros((b, h), x.dtype)
  per_chunk = buffer(b, h), buffer(b, h)
  per_step = buffer(chunk_size, b, 4 * h), buffer(chunk_size, b, h), buffer(chunk_size, b, h)
  _, stored = jax.lax.fori_loop(bounds[0], bounds[1], chunk, ((zeros, zeros), (per_chunk, *per_step)))
  return stored[-1], (x, weights, masks, bounds, stored)


def _backward(residuals, d_hidden):
  x, weights, masks, (first, end), stored = residuals
  kernel_t, recurrent_t = weights.kernel.T, weights.recurrent_kernel.T

  def step(carry, at):
    dc, dh = carry
    d_hidden, dc_dh, f, (dc_di, dc_df, dc_dg, dh_do) = at
    dh = dh + d_hidden
    dc = dc + dh * dc_dh
    dz = jnp.concatenate([dc * dc_di, dc * dc_df, dc * dc_dg, dh * dh_do], axis=1)
    return (dc * f, _masked(dz @ recurrent_t, masks.recurrent)), dz

  def chunk(count, carry):
    state, d_weights, dx = carry
    k = end - 1 - count
    x_k, d_hidden_k, ((c_start, hidden_start), gates, c, hidden) = _at((x, d_hidden, stored), k)
    c_before = jnp.concatenate([c_start[None], c[:-1]])
    hidden_before = jnp.concatenate([hidden_start[None], hidden[:-1]])
    # Everything that does not depend on later gradients, for the whole chunk at once.
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    dc_dh, to_gates = slopes(i, f, g, o, c_before, jnp.tanh(c))
    state, dz = jax.lax.scan(step, state, (d_hidden_k, dc_dh, f, to_gates), reverse=True)
    d_chunk = Weights(
      _weight_gradient(_masked(x_k, masks.inputs), dz),
      _weight_gradient(_masked(hidden_before, masks.recurrent), dz),
      jnp.sum(dz, axis=(0, 1)),
    )
    return state, jax.tree.map(jnp.add, d_weights, d_chunk), _put(dx, _masked(dz @ kernel_t, masks.inputs), k)

  zeros = jnp.zeros(d_hidden.shape[2:], x.dtype)
  start = (zeros, zeros), jax.tree.map(jnp.zeros_like, weights), jnp.zeros_like(x)
  _, d_weights, dx = jax.lax.fori_loop(0, end - first, chunk, start)
  return dx, d_weights, None, None, None


_recurrence.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _longest(lengths: jax.Array) -> jax.Array:
  """Return the largest length; under `jax.vmap` the largest of all models, as one scalar.

  With bounds that differ between models, XLA would select every carried array in every turn of the loop.
  """
  return jnp.max(lengths)


@_longest.def_vmap
def _longest_of_all(axis_size, in_batched, lengths):
  del axis_size, in_batched
  # The result is not batched. An outer `jax.vmap` applies this rule again.
  return _longest(lengths.reshape(-1)), False


def lstm(inputs: jax.Array, weights: Weights, masks: Masks, lengths: jax.Array | None, *, reverse: bool) -> jax.Array:
  """Compute `imdb_jax.lstm.lstm` for shared masks and sigmoid gates."""
  t = inputs.shape[1]
  num_chunks = math.ceil(t / _CHUNK)
  chunk_size = math.ceil(t / num_chunks)
  padding = num_chunks * chunk_size - t
  first, end, is_real = 0, num_chunks, None
  if padding or lengths is not None:
    lengths = known_lengths(lengths, inputs)
    inputs = jnp.pad(inputs, ((0, 0), (padding, 0), (0, 0)))
    is_real = _in_chunks(in_order(real_positions(lengths, t + padding), reverse)[:, :, None], num_chunks)
    # Chunks without a real position are skipped.
    num_real = -(-_longest(lengths) // chunk_size)
    first, end = (0, num_real) if reverse else (num_chunks - num_real, num_chunks)
  x = _in_chunks(in_order(inputs, reverse), num_chunks)
  hidden = _recurrence(x, weights, masks, is_real, (first, end)).transpose(2, 0, 1, 3)
  return in_order(hidden.reshape(len(inputs), t + padding, -1), reverse)[:, padding:]


class Lookup(NamedTuple):
  """An LSTM over tokens, prepared for `last_hidden`."""

  projected: jax.Array  # f32[v, 4h], scaled x W + b of each token
  recurrent_kernel: jax.Array  # f32[h, 4h], scaled
  states: tuple[jax.Array, jax.Array]  # c and h after 0 to t padding tokens, f32[t + 1, h] each


def lookup(embedding: jax.Array, weights: Weights, t: int) -> Lookup:
  """Prepare an LSTM over word vectors f32[v, e], of which the first one is padding, for at most t positions."""
  scaled = _scaled(weights)
  projected = embedding @ scaled.kernel + scaled.bias[None]

  def step(state, _):
    _, *after = _step(state[0], projected[:1] + state[1] @ scaled.recurrent_kernel)
    return tuple(after), state

  zeros = jnp.zeros((1, scaled.recurrent_kernel.shape[0]), embedding.dtype)
  last, before = jax.lax.scan(step, (zeros, zeros), length=t)
  states = jax.tree.map(lambda each, end: jnp.concatenate([each[:, 0], end]), before, last)
  return Lookup(projected, scaled.recurrent_kernel, states)


def last_hidden(prepared: Lookup, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
  """Return the hidden state after the last position, f32[b, h]: that of `lstm` without lengths, except for rounding.

  The tokens are int[b, t], padded at the front with 0, and the lengths i32[b] their number in each row. The state after
  k padding tokens is the same for every row. So the loop starts where the longest row does.
  """
  first, by_position = tokens.shape[1] - jnp.max(lengths), tokens.T

  def step(position, state):
    x = jnp.take(prepared.projected, jax.lax.dynamic_index_in_dim(by_position, position, keepdims=False), axis=0)
    return tuple(_step(state[0], x + state[1] @ prepared.recurrent_kernel)[1:])

  start = jax.tree.map(lambda each: jnp.broadcast_to(each[first], (len(tokens), each.shape[1])), prepared.states)
  return jax.lax.fori_loop(first, tokens.shape[1], step, start)[1]
