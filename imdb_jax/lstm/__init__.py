"""The recurrence: one operation, several implementations, one contract.

Gates stand in the order i, f, g, o (Keras, cuDNN and Flax agree on it):

    i, f, o = gate(x W + h U + b)        g = tanh(x W + h U + b)
    c' = f c + i g                       h' = o tanh(c')

with x and h multiplied by dropout masks that are constant over time (Gal and Ghahramani 2016, arXiv:1512.05287).
"""

import jax
import jax.numpy as jnp

from imdb_jax.lstm import chunked
from imdb_jax.lstm.choice import IMPLEMENTATIONS, GateActivation, choose, implementation_of, unsupported

__all__ = ["IMPLEMENTATIONS", "GateActivation", "choose", "lstm", "num_processed", "unsupported"]


def lstm(
  inputs: jax.Array,
  kernel: jax.Array,
  recurrent_kernel: jax.Array,
  bias: jax.Array,
  *,
  input_dropout_mask: jax.Array | None = None,
  recurrent_dropout_mask: jax.Array | None = None,
  lengths: jax.Array | None = None,
  gate_activation: GateActivation = "sigmoid",
  reverse: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Runs an LSTM over time from a zero state.

  Args:
    inputs: f32[b, t, e].
    kernel: f32[e, 4h].
    recurrent_kernel: f32[h, 4h].
    bias: f32[4h].
    input_dropout_mask: f32[b, e], or f32[4, b, e] with one mask a gate; kept entries hold 1 / (1 - rate).
    recurrent_dropout_mask: f32[b, h] or f32[4, b, h], likewise.
    lengths: i32[b]; only the last lengths[b] positions are real, the ones before leave the state at zero. None: all
      are real.
    gate_activation: of i, f and o; hard_sigmoid is clip(0.2 x + 0.5, 0, 1) as in Keras 1.
    reverse: from the last position to the first.
    implementation: a name of `IMPLEMENTATIONS`, or None for the fastest that serves the call.

  Returns:
    hidden f32[b, t, h], the state after each position; zeros on positions that are not real.

  Raises:
    ValueError: shapes or dtypes break the contract, or there is no implementation of that name, or it cannot serve the
      call on the default device.
  """
  _check(inputs, kernel, recurrent_kernel, bias, input_dropout_mask, recurrent_dropout_mask, lengths)
  if gate_activation not in ("sigmoid", "hard_sigmoid"):
    raise ValueError(f"gate_activation {gate_activation!r}: must be sigmoid or hard_sigmoid")
  hidden_size = recurrent_kernel.shape[0]
  name = choose(hidden_size).name if implementation is None else implementation
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"implementation {name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
  problem = unsupported(
    name,
    hidden_size=hidden_size,
    recurrent_dropout=recurrent_dropout_mask is not None,
    gate_activation=gate_activation,
  )
  if problem is not None:
    raise ValueError(f"implementation {name!r}: {problem}")
  return implementation_of(name)(
    inputs,
    kernel,
    recurrent_kernel,
    bias,
    input_dropout_mask=input_dropout_mask,
    recurrent_dropout_mask=recurrent_dropout_mask,
    lengths=lengths,
    gate_activation=gate_activation,
    reverse=reverse,
  )


def num_processed(t: int, longest: int, implementation: str | None = None) -> int:
  """Positions that a call with `lengths` computes of t, where the longest row has `longest` real ones."""
  if implementation == "mosaic_gpu":
    return longest
  return chunked.num_processed(t, longest) if implementation in (None, "chunked") else t


def _check(inputs, kernel, recurrent_kernel, bias, input_dropout_mask, recurrent_dropout_mask, lengths) -> None:
  if inputs.dtype != jnp.float32:
    raise ValueError(f"inputs is {inputs.dtype}, must be float32")
  if inputs.ndim != 3 or recurrent_kernel.ndim != 2:
    raise ValueError(f"inputs {inputs.shape} must be [b, t, e], recurrent_kernel {recurrent_kernel.shape} [h, 4h]")
  (b, _, e), h = inputs.shape, recurrent_kernel.shape[0]
  expected = {
    "kernel": (kernel, [(e, 4 * h)]),
    "recurrent_kernel": (recurrent_kernel, [(h, 4 * h)]),
    "bias": (bias, [(4 * h,)]),
    "input_dropout_mask": (input_dropout_mask, [(b, e), (4, b, e)]),
    "recurrent_dropout_mask": (recurrent_dropout_mask, [(b, h), (4, b, h)]),
  }
  for name, (array, shapes) in expected.items():
    if array is not None and (array.shape not in shapes or array.dtype != inputs.dtype):
      raise ValueError(f"{name} is {array.dtype}{array.shape}, must be {inputs.dtype} of shape {shapes}")
  if lengths is not None and (lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
    raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}, must be integers of shape {(b,)}")
