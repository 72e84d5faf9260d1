"""The readable reference: `nn.scan` over a cell: LSTM, GRU or simple RNN. Kept plain, never optimised."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from imdb_jax.lstm.shared import Masks, Weights, real_positions

_GATES = {"sigmoid": nn.sigmoid, "hard_sigmoid": lambda x: jnp.clip(0.2 * x + 0.5, 0.0, 1.0)}


def scan(
  cell: nn.Module, carry: Any, inputs: jax.Array, lengths: jax.Array | None, *constants: Any, reverse: bool = False
) -> Any:
  """Run a cell over time.

  Args:
    cell: a bound module, such as Flax's recurrent cells: called with a carry, inputs [b, e] and the constants, it
      returns the new carry and an output.
    carry: state at the start, a tree of arrays [b, ...].
    inputs: f32[b, t, e].
    lengths: i32[b]; only the last lengths[b] positions are real, the others leave the carry as it is. None: all are.
    *constants: further arguments of the cell, the same at every position.
    reverse: process the last position first.

  Returns:
    The outputs of all positions, a tree of arrays [b, t, ...]; zeros at positions that are not real.
  """

  def step(cell: nn.Module, carry: Any, x: jax.Array, is_real: jax.Array) -> tuple[Any, Any]:
    def select(new: jax.Array, old: jax.Array) -> jax.Array:
      return jnp.where(is_real.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    new_carry, output = cell(carry, x, *constants)
    zeros = jax.tree.map(jnp.zeros_like, output)
    return jax.tree.map(select, new_carry, carry), jax.tree.map(select, output, zeros)

  over_time = nn.scan(
    step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1, reverse=reverse
  )
  b, t, _ = inputs.shape
  is_real = jnp.ones((b, t), bool) if lengths is None else real_positions(lengths, t)
  return over_time(cell, carry, inputs, is_real)[1]


class LSTMCell(nn.Module):
  """One position of the LSTM, see `imdb_jax.lstm`. The caller brings the weights."""

  gate_activation: str

  def __call__(self, carry, x, weights: Weights, masks: Masks):
    """Return the new carry and h, from the carry (c, h), f32[b, h] each, and x f32[b, e]."""
    c, h = carry
    z = _project(x, masks.inputs, weights.kernel) + _project(h, masks.recurrent, weights.recurrent_kernel)
    i, f, g, o = jnp.split(z + weights.bias[None, :], 4, axis=1)
    gate = _GATES[self.gate_activation]
    c = gate(f) * c + gate(i) * jnp.tanh(g)
    h = gate(o) * jnp.tanh(c)
    return (c, h), h


class GRUCell(nn.Module):
  """One position of a GRU as in cuDNN and Keras (`reset_after=True`), with the gates in the order z, r, g.

  z, r = sigmoid(x W + b_x + h U + b_h)    g = tanh(x W + b_x + r (h U + b_h))    h' = z h + (1 - z) g
  """

  def __call__(self, carry, x, weights: Weights, masks: Masks):
    """Return the new carry and h, from the carry (h,), f32[b, h], and x f32[b, e]."""
    (h,) = carry
    from_x = _project(x, masks.inputs, weights.kernel) + weights.bias[None, 0]
    from_h = _project(h, masks.recurrent, weights.recurrent_kernel) + weights.bias[None, 1]
    (z_x, r_x, g_x), (z_h, r_h, g_h) = jnp.split(from_x, 3, axis=1), jnp.split(from_h, 3, axis=1)
    z, r = nn.sigmoid(z_x + z_h), nn.sigmoid(r_x + r_h)
    h = z * h + (1 - z) * jnp.tanh(g_x + r * g_h)
    return (h,), h


class RNNCell(nn.Module):
  """One position of a simple RNN: h' = tanh(x W + h U + b)."""

  def __call__(self, carry, x, weights: Weights, masks: Masks):
    """Return the new carry and h, from the carry (h,), f32[b, h], and x f32[b, e]."""
    (h,) = carry
    z = _project(x, masks.inputs, weights.kernel) + _project(h, masks.recurrent, weights.recurrent_kernel)
    h = jnp.tanh(z + weights.bias[None, :])
    return (h,), h


def _project(x: jax.Array, mask: jax.Array | None, weights: jax.Array) -> jax.Array:
  """Return masked x [b, n] times weights [n, m]; a mask [4, b, n] has one mask for each quarter of the columns."""
  if mask is None or mask.ndim == 2:
    return (x if mask is None else x * mask) @ weights
  columns = jnp.split(weights, 4, axis=1)
  return jnp.concatenate([(x * gate_mask) @ column for gate_mask, column in zip(mask, columns, strict=True)], axis=1)


def run(
  cell: nn.Module, inputs: jax.Array, weights: Weights, masks: Masks, lengths: jax.Array | None, *, reverse: bool
) -> jax.Array:
  """Run a cell of this module over time from a zero state; otherwise as `imdb_jax.lstm.lstm`.

  Kernels have 4h columns for an LSTM, 3h for a GRU, whose bias is f32[2, 3h] of x and of h, and h for a simple RNN. The
  cell has no parent: otherwise it would become a part of the module that calls this function.
  """
  zeros = jnp.zeros((inputs.shape[0], weights.recurrent_kernel.shape[0]), inputs.dtype)
  carry = (zeros, zeros) if isinstance(cell, LSTMCell) else (zeros,)
  return nn.apply(lambda cell: scan(cell, carry, inputs, lengths, weights, masks, reverse=reverse), cell)({})
