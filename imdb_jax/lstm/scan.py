"""The readable reference: `nn.scan` over a plain cell. Kept plain, never optimised."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def _project(x: jax.Array, mask: jax.Array | None, weights: jax.Array) -> jax.Array:
  """Masked x [b, n] times weights [n, 4h]: [b, 4h]. With one mask a gate, each gate's columns see their own."""
  if mask is None or mask.ndim == 2:
    return (x if mask is None else x * mask) @ weights
  columns = jnp.split(weights, 4, axis=1)
  return jnp.concatenate([(x * gate_mask) @ column for gate_mask, column in zip(mask, columns, strict=True)], axis=1)


def _hard_sigmoid(x: jax.Array) -> jax.Array:
  return jnp.clip(0.2 * x + 0.5, 0.0, 1.0)


class Cell(nn.Module):
  """One position of the recurrence, see `imdb_jax.lstm`."""

  input_size: int
  hidden_size: int
  gate_activation: str

  @nn.compact
  def __call__(self, carry, x, is_real, input_mask, recurrent_mask):
    """carry: c and h, f32[b, h] each; x: f32[b, e]; is_real: bool[b, 1]. Returns the new carry and h, or zeros."""
    c, h = carry
    zeros = nn.initializers.zeros
    kernel = self.param("kernel", zeros, (self.input_size, 4 * self.hidden_size))
    recurrent_kernel = self.param("recurrent_kernel", zeros, (self.hidden_size, 4 * self.hidden_size))
    bias = self.param("bias", zeros, (4 * self.hidden_size,))
    gate = nn.sigmoid if self.gate_activation == "sigmoid" else _hard_sigmoid

    z = _project(x, input_mask, kernel) + _project(h, recurrent_mask, recurrent_kernel) + bias[None, :]
    i, f, g, o = jnp.split(z, 4, axis=1)
    new_c = gate(f) * c + gate(i) * jnp.tanh(g)
    new_h = gate(o) * jnp.tanh(new_c)

    c, h = jnp.where(is_real, new_c, c), jnp.where(is_real, new_h, h)
    return (c, h), jnp.where(is_real, h, jnp.zeros_like(h))


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
  (b, t, e), h = inputs.shape, recurrent_kernel.shape[0]
  if lengths is None:
    is_real = jnp.ones((b, t, 1), bool)
  else:
    is_real = (jnp.arange(t)[None, :] >= t - lengths[:, None])[:, :, None]
  scanned = nn.scan(
    Cell,
    variable_broadcast="params",
    split_rngs={"params": False},
    in_axes=(1, 1, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]: flax declares only int.
    out_axes=1,
    reverse=reverse,
  )
  cell = scanned(input_size=e, hidden_size=h, gate_activation=gate_activation, parent=None)
  zeros = jnp.zeros((b, h), inputs.dtype)
  params = {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
  carry_and_hidden: Any = cell.apply(
    {"params": params}, (zeros, zeros), inputs, is_real, input_dropout_mask, recurrent_dropout_mask
  )
  return carry_and_hidden[1]
