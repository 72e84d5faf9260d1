"""NVIDIA's cuDNN through `jax.experimental.rnn`, for calls without recurrent dropout, which cuDNN lacks.

Computes in float32, or in TensorFloat-32 where `jax_default_matmul_precision` allows it. Each call waits for the host
once, and `jax.vmap` cannot batch it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from imdb_jax.lstm.shared import Masks, Weights, known_lengths


def lstm(inputs: jax.Array, weights: Weights, masks: Masks, lengths: jax.Array | None, *, reverse: bool) -> jax.Array:
  """Compute `imdb_jax.lstm.lstm` without recurrent dropout."""
  (b, t, e), h = inputs.shape, weights.recurrent_kernel.shape[0]
  lengths = known_lengths(lengths, inputs)
  if masks.inputs is not None:
    inputs = inputs * masks.inputs[:, None]

  # cuDNN expects the real positions at the front.
  positions = jnp.arange(t)[None, :]
  to_front, to_back = (positions + t - lengths[:, None]) % t, (positions - t + lengths[:, None]) % t
  inputs = inputs[:, ::-1] if reverse else jnp.take_along_axis(inputs, to_front[:, :, None], axis=1)
  # cuDNN takes all parameters as one vector, with a second bias.
  kernels = weights.kernel.T.reshape(-1), weights.recurrent_kernel.T.reshape(-1)
  zeros = jnp.zeros((1, b, h), inputs.dtype)
  parameters = jnp.concatenate([*kernels, weights.bias, jnp.zeros_like(weights.bias)])
  sizes: Any = {"input_size": e, "hidden_size": h, "num_layers": 1, "dropout": 0.0, "bidirectional": False}
  # cuDNN refuses empty rows.
  hidden, *_ = jax.tree.leaves(rnn.lstm(inputs, zeros, zeros, parameters, jnp.maximum(lengths, 1), **sizes))
  hidden = jnp.where((positions < lengths[:, None])[:, :, None], hidden, 0)
  return hidden[:, ::-1] if reverse else jnp.take_along_axis(hidden, to_back[:, :, None], axis=1)
