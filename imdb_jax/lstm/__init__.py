"""The recurrence: one operation, several implementations, one contract.

The gates are in the order i, f, g, o, as in Keras, cuDNN and Flax:

    i, f, o = gate(x W + h U + b)        g = tanh(x W + h U + b)
    c' = f c + i g                       h' = o tanh(c')

Dropout masks multiply x and h; they are constant over time (Gal and Ghahramani 2016, arXiv:1512.05287).
"""

import jax
import jax.numpy as jnp

from imdb_jax.lstm import choice, scan
from imdb_jax.lstm.choice import IMPLEMENTATIONS, Call, Choice, choose, recurrent_precision, unsupported
from imdb_jax.lstm.shared import Masks, Weights

__all__ = ["IMPLEMENTATIONS", "Call", "Choice", "choose", "lstm", "recurrent_precision", "unsupported"]


def lstm(
  inputs: jax.Array,
  kernel: jax.Array,
  recurrent_kernel: jax.Array,
  bias: jax.Array,
  *,
  input_dropout_mask: jax.Array | None = None,
  recurrent_dropout_mask: jax.Array | None = None,
  lengths: jax.Array | None = None,
  gate_activation: choice.GateActivation = "sigmoid",
  reverse: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Run an LSTM over time from a zero state.

  Args:
    inputs: f32[b, t, e].
    kernel: f32[e, 4h].
    recurrent_kernel: f32[h, 4h].
    bias: f32[4h].
    input_dropout_mask: f32[b, e], or f32[4, b, e] with one mask per gate; kept entries hold 1 / (1 - rate).
    recurrent_dropout_mask: f32[b, h] or f32[4, b, h], likewise.
    lengths: i32[b]; only the last lengths[b] positions are real, and the state stays 0 before them. None: all are real.
    gate_activation: activation of i, f and o; hard_sigmoid is clip(0.2 x + 0.5, 0, 1) as in Keras 1.
    reverse: process the last position first.
    implementation: one of `IMPLEMENTATIONS`, or None for the fastest that supports the call on the first local device,
      at whatever precision it computes (see `recurrent_precision`).

  Returns:
    hidden f32[b, t, h], the state after each position; zeros at positions that are not real.

  Raises:
    ValueError: shapes or dtypes break the contract, or the implementation is unknown or does not support the call on
      the first local device.
  """
  weights, masks = Weights(kernel, recurrent_kernel, bias), Masks(input_dropout_mask, recurrent_dropout_mask)
  _check(inputs, weights, masks, lengths)
  if gate_activation not in ("sigmoid", "hard_sigmoid"):
    raise ValueError(f"gate_activation {gate_activation!r}: must be sigmoid or hard_sigmoid")
  call = Call(
    hidden_size=recurrent_kernel.shape[0],
    per_gate_masks=any(mask is not None and mask.ndim == 3 for mask in masks),
    gate_activation=gate_activation,
  )
  name = choose(call).name if implementation is None else implementation
  problem = unsupported(name, call)
  if problem is not None:
    raise ValueError(f"implementation {name!r}: {problem}")
  if name == "scan":
    return scan.run(scan.LSTMCell(gate_activation, parent=None), inputs, weights, masks, lengths, reverse=reverse)
  return choice.implementation_of(name)(inputs, weights, masks, lengths, reverse=reverse)


def _check(inputs: jax.Array, weights: Weights, masks: Masks, lengths: jax.Array | None) -> None:
  kernel, recurrent_kernel, bias = weights
  if inputs.dtype != jnp.float32:
    raise ValueError(f"inputs is {inputs.dtype}, must be float32")
  if inputs.ndim != 3 or recurrent_kernel.ndim != 2:
    raise ValueError(f"inputs {inputs.shape} must be [b, t, e], recurrent_kernel {recurrent_kernel.shape} [h, 4h]")
  (b, _, e), h = inputs.shape, recurrent_kernel.shape[0]
  expected = {
    "kernel": (kernel, [(e, 4 * h)]),
    "recurrent_kernel": (recurrent_kernel, [(h, 4 * h)]),
    "bias": (bias, [(4 * h,)]),
    "input_dropout_mask": (masks.inputs, [(b, e), (4, b, e)]),
    "recurrent_dropout_mask": (masks.recurrent, [(b, h), (4, b, h)]),
  }
  for name, (array, shapes) in expected.items():
    if array is not None and (array.shape not in shapes or array.dtype != inputs.dtype):
      raise ValueError(f"{name} is {array.dtype}{array.shape}, must be {inputs.dtype} of shape {shapes}")
  if lengths is not None and (lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
    raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}, must be integers of shape {(b,)}")
