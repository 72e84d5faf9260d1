"""NVIDIA's cuDNN through `jax.experimental.rnn`, for calls without recurrent dropout, which cuDNN does not know.

float32, or TensorFloat-32 where `jax_default_matmul_precision` allows it. Each call waits for the host once, and
`jax.vmap` cannot batch it.
"""

import jax
import jax.numpy as jnp
from jax.experimental import rnn


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
  del recurrent_dropout_mask, gate_activation
  (b, t, e), h = inputs.shape, recurrent_kernel.shape[0]
  lengths = jnp.full((b,), t, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
  if input_dropout_mask is not None and input_dropout_mask.ndim == 3:
    # One mask a gate: each gate's columns see inputs of their own, side by side.
    inputs = jnp.concatenate([inputs * mask[:, None] for mask in input_dropout_mask], axis=2)
    gates = jnp.split(kernel, 4, axis=1)
    kernel = jax.scipy.linalg.block_diag(*gates)
    e = 4 * e
  elif input_dropout_mask is not None:
    inputs = inputs * input_dropout_mask[:, None]

  # cuDNN wants what is real at the front.
  back = (jnp.arange(t)[None, :] + t - lengths[:, None]) % t
  turned = inputs[:, ::-1] if reverse else jnp.take_along_axis(inputs, back[:, :, None], axis=1)
  weights = jnp.concatenate([kernel.T.reshape(-1), recurrent_kernel.T.reshape(-1), bias, jnp.zeros_like(bias)])
  zeros = jnp.zeros((1, b, h), inputs.dtype)
  hidden, *_ = jax.tree.leaves(
    rnn.lstm(
      turned,
      zeros,
      zeros,
      weights,
      # It refuses empty rows.
      jnp.maximum(lengths, 1),
      input_size=e,
      hidden_size=h,
      num_layers=1,
      dropout=0.0,
      bidirectional=False,
    )
  )
  hidden = jnp.where((jnp.arange(t)[None, :] < lengths[:, None])[:, :, None], hidden, 0)
  if reverse:
    return hidden[:, ::-1]
  return jnp.take_along_axis(hidden, ((jnp.arange(t)[None, :] - t + lengths[:, None]) % t)[:, :, None], axis=1)
