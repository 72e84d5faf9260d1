"""GRU and simple RNN as loops over reviews, positions and gates in NumPy float64, and their gradients.

Weights and gates are those of Keras 3: a GRU has the gates z, r, g, a bias [2, 3h] of inputs and state, and the reset
gate r after the product with the recurrent kernel. A mask multiplies x or h only where a kernel multiplies it next.
"""

from collections.abc import Iterator

import numpy as np
from lstm.reference import positions_of, sigmoid, to_float64


def _columns(array: np.ndarray, gate: int, h_size: int) -> np.ndarray:
  return array[..., gate * h_size : (gate + 1) * h_size]


def _gru_step(x, h, masked_h, kernel, recurrent_kernel, bias) -> tuple:
  """Return z, r, g, the part of the state in g before the reset gate, and the new h; x is masked already."""
  from_x, from_h = [], []
  for gate in range(3):
    from_x.append(x @ _columns(kernel, gate, len(h)) + _columns(bias[0], gate, len(h)))
    from_h.append(masked_h @ _columns(recurrent_kernel, gate, len(h)) + _columns(bias[1], gate, len(h)))
  z, r = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
  g = np.tanh(from_x[2] + r * from_h[2])
  return z, r, g, from_h[2], z * h + (1 - z) * g


def _rnn_step(x, h, masked_h, kernel, recurrent_kernel, bias) -> tuple:
  del h
  return (np.tanh(x @ kernel + masked_h @ recurrent_kernel + bias),)


_STEPS = {"gru": _gru_step, "rnn": _rnn_step}


def _run(cell, arrays, row, extras, reverse) -> Iterator[tuple]:
  """Yield (position, x mask, h mask, h before, values of the step with the new h last) for one review."""
  inputs, *weights = arrays
  (_, t, e), h_size = inputs.shape, weights[1].shape[0]
  x_mask, h_mask = (
    np.ones(size) if extras[name] is None else extras[name][row].astype(np.float64)
    for name, size in (("input_dropout_mask", e), ("recurrent_dropout_mask", h_size))
  )
  lengths, h = extras["lengths"], np.zeros(h_size)
  for position in positions_of(t, t if lengths is None else int(lengths[row]), reverse):
    values = _STEPS[cell](inputs[row, position] * x_mask, h, h * h_mask, *weights)
    yield position, x_mask, h_mask, h, values
    h = values[-1]


def hidden(cell, inputs, kernel, recurrent_kernel, bias, *, reverse, **extras) -> np.ndarray:
  """Return f64[b, t, h]; arguments as for `reference.lstm`. Complex arguments give a complex result."""
  arrays = to_float64(inputs, kernel, recurrent_kernel, bias)
  (b, t, _), h_size = inputs.shape, recurrent_kernel.shape[0]
  found = np.zeros((b, t, h_size), np.result_type(*arrays))
  for row in range(b):
    for position, _, _, _, values in _run(cell, arrays, row, extras, reverse):
      found[row, position] = values[-1]
  return found


def gradients(cell, inputs, kernel, recurrent_kernel, bias, cotangent, *, reverse, **extras) -> dict[str, np.ndarray]:
  """Return the gradients f64 of sum(hidden * cotangent) for each array, by backpropagation through time."""
  *arrays, cotangent = to_float64(inputs, kernel, recurrent_kernel, bias, cotangent)
  names = ("inputs", "kernel", "recurrent_kernel", "bias")
  grads = {name: np.zeros_like(array) for name, array in zip(names, arrays, strict=True)}
  for row in range(len(arrays[0])):
    dh = np.zeros(recurrent_kernel.shape[0])
    for position, x_mask, h_mask, h, values in reversed(list(_run(cell, arrays, row, extras, reverse))):
      dh = dh + cotangent[row, position]
      if cell == "gru":
        z, r, g, state_in_g, _ = values
        dg = dh * (1 - z) * (1 - g**2)
        dz, dr = dh * (h - g) * z * (1 - z), dg * state_in_g * r * (1 - r)
        # By the pre-activations of inputs and of state; only in g they differ.
        d_from_x, d_from_h = np.concatenate([dz, dr, dg]), np.concatenate([dz, dr, dg * r])
        grads["bias"] += np.stack([d_from_x, d_from_h])
        carried = dh * z
      else:
        d_from_x = d_from_h = dh * (1 - values[0] ** 2)
        grads["bias"] += d_from_x
        carried = 0
      grads["kernel"] += np.outer(arrays[0][row, position] * x_mask, d_from_x)
      grads["recurrent_kernel"] += np.outer(h * h_mask, d_from_h)
      grads["inputs"][row, position] += x_mask * (arrays[1] @ d_from_x)
      dh = carried + h_mask * (arrays[2] @ d_from_h)
  return grads
