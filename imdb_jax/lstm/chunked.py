"""The fast path on every backend without a kernel: a custom gradient that walks time in chunks.

What autodiff of a scan pays for and this does not:

- The products that do not depend on the state (the input projection; the gradients of kernel, recurrent kernel,
  bias and inputs) are large products, one a chunk. The time loop holds one small product a step.
- A chunk's arrays stay in the cache between the loop that makes them and the product that uses them.
- One tanh runs over all four gates, because sigmoid(z) = tanh(z / 2) / 2 + 1 / 2 and the inner factor goes into the
  weights.
- The state is never selected by a mask: at positions that are not real the gates i and o are closed, which leaves
  the state at zero, exactly.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Long enough for large products, short enough for the cache, and the grain at which padding costs nothing.
_CHUNK = 20
# Closes a gate, whatever the state adds: sigmoid and hard sigmoid are 0 there, exactly, with zero slope.
_CLOSED = -1e4


class _Weights(NamedTuple):
  kernel: jax.Array
  recurrent_kernel: jax.Array
  bias: jax.Array


class _Masks(NamedTuple):
  inputs: jax.Array | None
  recurrent: jax.Array | None


def _project(x: jax.Array, mask: jax.Array | None, weights: jax.Array) -> jax.Array:
  """Masked x [..., b, n] times weights [n, 4h]: [..., b, 4h]; mask [b, n], or [4, b, n] with one a gate."""
  if mask is not None and mask.ndim == 3:
    columns = jnp.split(weights, 4, axis=1)
    return jnp.concatenate([_project(x, m, column) for m, column in zip(mask, columns, strict=True)], axis=-1)
  if mask is not None:
    x = x * jnp.broadcast_to(mask, x.shape)
  return x @ weights


def _unproject(dz: jax.Array, mask: jax.Array | None, transposed: jax.Array) -> jax.Array:
  """The transpose of `_project` in x: dz [..., b, 4h] and the transposed weights [4h, n] give [..., b, n]."""
  if mask is not None and mask.ndim == 3:
    parts = zip(jnp.split(dz, 4, axis=-1), mask, jnp.split(transposed, 4), strict=True)
    return functools.reduce(jnp.add, (_unproject(part, m, rows) for part, m, rows in parts))
  dx = dz @ transposed
  return dx if mask is None else dx * jnp.broadcast_to(mask, dx.shape)


def _weight_gradient(x: jax.Array, mask: jax.Array | None, dz: jax.Array) -> jax.Array:
  """The gradient of `_project` in its weights, [n, 4h], summed over all positions."""
  if mask is not None and mask.ndim == 3:
    parts = zip(mask, jnp.split(dz, 4, axis=-1), strict=True)
    return jnp.concatenate([_weight_gradient(x, m, part) for m, part in parts], axis=1)
  if mask is not None:
    x = x * jnp.broadcast_to(mask, x.shape)
  rows, columns = x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1])
  return jax.lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))


def _per_gate(values: tuple[float, float, float, float], size: int) -> jax.Array:
  """One value a gate, as a row over the columns of the gates: f32[1, 4h]."""
  return jnp.repeat(jnp.array(values, jnp.float32), size)[None, :]


def _activate(z: jax.Array, gate_activation: str) -> jax.Array:
  """Gates f32[b, 4h] from what the scaled weights give."""
  h = z.shape[-1] // 4
  if gate_activation == "sigmoid":
    return jnp.tanh(z) * _per_gate((0.5, 0.5, 1.0, 0.5), h) + _per_gate((0.5, 0.5, 0.0, 0.5), h)
  is_tanh = _per_gate((0.0, 0.0, 1.0, 0.0), h) > 0
  return jnp.where(is_tanh, jnp.tanh(z), jnp.clip(z + 0.5, 0.0, 1.0))


def _slope(gate: jax.Array, gate_activation: str) -> jax.Array:
  """Derivative of i, f or o by its unscaled pre-activation, from its value."""
  if gate_activation == "sigmoid":
    return gate * (1 - gate)
  return jnp.where((gate > 0) & (gate < 1), jnp.float32(0.2), jnp.float32(0))


def _scale(weights: _Weights, gate_activation: str) -> _Weights:
  """Weights with the factor inside the gate activations multiplied in."""
  inner = 0.5 if gate_activation == "sigmoid" else 0.2
  factors = _per_gate((inner, inner, 1.0, inner), weights.recurrent_kernel.shape[0])
  return _Weights(weights.kernel * factors, weights.recurrent_kernel * factors, weights.bias * factors[0])


def _in_chunks(x: jax.Array, num_chunks: int) -> jax.Array:
  """[b, t, n] -> [chunks, chunk, b, n]."""
  b, t, n = x.shape
  return x.reshape(b, num_chunks, t // num_chunks, n).transpose(1, 2, 0, 3)


def _from_chunks(x: jax.Array) -> jax.Array:
  """[chunks, chunk, b, n] -> [b, t, n]."""
  chunks, chunk, b, n = x.shape
  return x.transpose(2, 0, 1, 3).reshape(b, chunks * chunk, n)


def _at(arrays, k: jax.Array):
  """Chunk k of every array."""
  return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, k, keepdims=False), arrays)


def _put(arrays, values, k: jax.Array):
  """The arrays with chunk k set to the values."""
  return jax.tree.map(lambda array, value: jax.lax.dynamic_update_index_in_dim(array, value, k, 0), arrays, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _recurrence(x, weights: _Weights, masks: _Masks, is_real, bounds, gate_activation: str):
  """The chunks from bounds[0] up to bounds[1]; the others hold nothing real.

  x f32[chunks, chunk, b, e] -> hidden f32[chunks, chunk, b, h]; is_real bool[chunks, chunk, b], or None.
  """
  return _forward(x, weights, masks, is_real, bounds, gate_activation)[0]


def _forward(x, weights: _Weights, masks: _Masks, is_real, bounds, gate_activation: str):
  scaled = _scale(weights, gate_activation)
  num_chunks, chunk_size, b, _ = x.shape
  h = weights.recurrent_kernel.shape[0]

  def step(carry, projected):
    c, hidden = carry
    z = projected + _project(hidden, masks.recurrent, scaled.recurrent_kernel)
    gates = _activate(z, gate_activation)
    i, f, g, o = jnp.split(gates, 4, axis=1)
    c = f * c + i * g
    hidden = o * jnp.tanh(c)
    return (c, hidden), (gates, c, hidden)

  closed = _per_gate((_CLOSED, 0.0, 0.0, _CLOSED), h)[None]

  def chunk(k, carry):
    state, stored = carry
    projected = _project(_at(x, k), masks.inputs, scaled.kernel) + scaled.bias[None, None, :]
    if is_real is not None:
      projected = jnp.where(_at(is_real, k)[:, :, None], projected, closed)
    after, (gates, c, hidden) = jax.lax.scan(step, state, projected)
    return after, _put(stored, (state, gates, c, hidden), k)

  def buffer(*shape):
    return jnp.zeros((num_chunks, *shape), x.dtype)

  start = jnp.zeros((b, h), x.dtype), jnp.zeros((b, h), x.dtype)
  per_chunk = buffer(b, h), buffer(b, h)
  per_step = buffer(chunk_size, b, 4 * h), buffer(chunk_size, b, h), buffer(chunk_size, b, h)
  _, stored = jax.lax.fori_loop(bounds[0], bounds[1], chunk, (start, (per_chunk, *per_step)))
  return stored[-1], (x, weights, masks, bounds, stored)


def _backward(gate_activation: str, residuals, d_hidden):
  x, weights, masks, (first, end), stored = residuals
  kernel_t, recurrent_t = weights.kernel.T, weights.recurrent_kernel.T
  slope = functools.partial(_slope, gate_activation=gate_activation)

  def step(carry, at):
    dc, dh = carry
    d_hidden, through_tanh, f, (to_i, to_f, to_g, to_o) = at
    dh = dh + d_hidden
    dc = dc + dh * through_tanh
    dz = jnp.concatenate([dc * to_i, dc * to_f, dc * to_g, dh * to_o], axis=1)
    return (dc * f, _unproject(dz, masks.recurrent, recurrent_t)), dz

  def chunk(count, carry):
    state, d_weights, dx = carry
    k = end - 1 - count
    x_k, d_hidden_k, ((c_start, hidden_start), gates, c, hidden) = _at((x, d_hidden, stored), k)
    c_before = jnp.concatenate([c_start[None], c[:-1]])
    hidden_before = jnp.concatenate([hidden_start[None], hidden[:-1]])
    # All that does not depend on the gradients that come back through time, for the whole chunk at once.
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    tanh_c = jnp.tanh(c)
    to_gates = g * slope(i), c_before * slope(f), i * (1 - g * g), tanh_c * slope(o)
    through_tanh = o * (1 - tanh_c * tanh_c)
    state, dz = jax.lax.scan(step, state, (d_hidden_k, through_tanh, f, to_gates), reverse=True)
    d_chunk = _Weights(
      _weight_gradient(x_k, masks.inputs, dz),
      _weight_gradient(hidden_before, masks.recurrent, dz),
      jnp.sum(dz, axis=(0, 1)),
    )
    return state, jax.tree.map(jnp.add, d_weights, d_chunk), _put(dx, _unproject(dz, masks.inputs, kernel_t), k)

  zeros = jnp.zeros(d_hidden.shape[2:], x.dtype)
  start = (zeros, zeros), jax.tree.map(jnp.zeros_like, weights), jnp.zeros_like(x)
  _, d_weights, dx = jax.lax.fori_loop(0, end - first, chunk, start)
  return dx, d_weights, None, None, None


_recurrence.defvjp(_forward, _backward)


def _chunks(t: int) -> tuple[int, int]:
  """How many chunks t positions make, and of how many positions each; the first is filled up with padding."""
  num_chunks = math.ceil(t / _CHUNK)
  return num_chunks, math.ceil(t / num_chunks)


def num_processed(t: int, longest: int) -> int:
  """Positions of t that are computed where the longest row has `longest` real ones."""
  _, chunk_size = _chunks(t)
  return math.ceil(longest / chunk_size) * chunk_size


def lstm(
  inputs: jax.Array,
  kernel: jax.Array,
  recurrent_kernel: jax.Array,
  bias: jax.Array,
  *,
  input_dropout_mask: jax.Array | None,
  recurrent_dropout_mask: jax.Array | None,
  lengths: jax.Array | None,
  gate_activation: str,
  reverse: bool,
) -> jax.Array:
  """See `imdb_jax.lstm.lstm`."""
  b, t, _ = inputs.shape
  num_chunks, chunk_size = _chunks(t)
  padding = num_chunks * chunk_size - t
  first, end, is_real = 0, num_chunks, None
  if padding or lengths is not None:
    lengths = jnp.full((b,), t, jnp.int32) if lengths is None else lengths
    inputs = jnp.pad(inputs, ((0, 0), (padding, 0), (0, 0)))
    is_real = jnp.arange(t + padding)[:, None] >= t + padding - lengths[None, :]
    # Whole chunks of padding cost nothing: the number of turns is known when the batch is.
    num_real = -(-jnp.max(lengths) // chunk_size)
    first, end = (0, num_real) if reverse else (num_chunks - num_real, num_chunks)
  if reverse:
    inputs, is_real = inputs[:, ::-1], None if is_real is None else is_real[::-1]
  hidden = _from_chunks(
    _recurrence(
      _in_chunks(inputs, num_chunks),
      _Weights(kernel, recurrent_kernel, bias),
      _Masks(input_dropout_mask, recurrent_dropout_mask),
      None if is_real is None else is_real.reshape(num_chunks, chunk_size, b),
      (first, end),
      gate_activation,
    )
  )
  return hidden[:, ::-1][:, padding:] if reverse else hidden[:, padding:]
