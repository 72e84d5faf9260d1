"""Arguments, padding and direction: the parts that the implementations share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Pre-activations of the gates at padding: i and o are closed exactly, so c and h stay 0, and so do all gradients.
CLOSED = (-1e4, 0.0, 0.0, -1e4)


class Weights(NamedTuple):
  """Parameters of an LSTM, with the gates in the order i, f, g, o. `scan` describes those of other cells."""

  kernel: jax.Array  # f32[e, 4h]
  recurrent_kernel: jax.Array  # f32[h, 4h]
  bias: jax.Array  # f32[4h]


class Masks(NamedTuple):
  """Dropout masks, constant over time; None means no dropout. `scan` also accepts a leading axis of 4, one per gate."""

  inputs: jax.Array | None  # f32[b, e]
  recurrent: jax.Array | None  # f32[b, h]


def known_lengths(lengths: jax.Array | None, inputs: jax.Array) -> jax.Array:
  """Return i32[b], the number of real positions of each row of inputs [b, t, e]: t where `lengths` is None."""
  b, t, _ = inputs.shape
  return jnp.full((b,), t, jnp.int32) if lengths is None else lengths.astype(jnp.int32)


def real_positions(lengths: jax.Array, t: int) -> jax.Array:
  """Return bool[b, t], true at the last lengths[b] of t positions."""
  return jnp.arange(t)[None, :] >= t - lengths[:, None]


def slopes(i, f, g, o, c_before, tanh_c):
  """Return the derivatives of the hidden state by c, and of c, c, c and the hidden state by the pre-activations."""
  dc_dh = o * (1 - tanh_c * tanh_c)
  return dc_dh, (g * (i * (1 - i)), c_before * (f * (1 - f)), i * (1 - g * g), tanh_c * (o * (1 - o)))


def in_order(x: jax.Array, reverse: bool) -> jax.Array:
  """Return [b, t, ...] in the order of processing, or bring it back from there."""
  return x[:, ::-1] if reverse else x
