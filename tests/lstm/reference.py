"""The contract of the recurrence as a loop over reviews, positions and gates in NumPy float64, and its gradients.

It shares no code with the package, and processes each review separately, over its own length.
"""

from collections.abc import Iterator

import numpy as np

GATES = range(4)  # i, f, g, o


def sigmoid(z: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-z))


def hard_sigmoid(z: np.ndarray) -> np.ndarray:
  """Compute clip(0.2 z + 0.5, 0, 1) as in Keras 1. Clip by the real part, so that complex steps work."""
  y = 0.2 * z + 0.5
  return np.where(y.real <= 0, 0, np.where(y.real >= 1, 1, y))


def _activate(z: list[np.ndarray], gate_activation: str) -> tuple[np.ndarray, ...]:
  gate = {"sigmoid": sigmoid, "hard_sigmoid": hard_sigmoid}[gate_activation]
  return gate(z[0]), gate(z[1]), np.tanh(z[2]), gate(z[3])


def _gate_slope(y: np.ndarray, gate_activation: str) -> np.ndarray:
  """Return the derivative of a gate, from its value y."""
  return y * (1 - y) if gate_activation == "sigmoid" else np.where((y > 0) & (y < 1), 0.2, 0.0)


def _review_masks(mask: np.ndarray | None, row: int, size: int) -> np.ndarray:
  """Return the masks of one review, one per gate: [4, size]."""
  if mask is None:
    return np.ones((4, size))
  return np.stack([(mask[row] if mask.ndim == 2 else mask[gate, row]) for gate in GATES]).astype(np.float64)


def positions_of(t: int, length: int, reverse: bool) -> list[int]:
  real = list(range(t - length, t))
  return real[::-1] if reverse else real


def _run(inputs, kernel, recurrent_kernel, bias, masks, gate_activation, positions) -> Iterator[tuple]:
  """Yield (position, gates, c before, h before, c after, h after) for one review."""
  h_size = recurrent_kernel.shape[0]
  x_masks, h_masks = masks
  c, h = np.zeros(h_size), np.zeros(h_size)
  for position in positions:
    z = []
    for gate in GATES:
      columns = slice(gate * h_size, (gate + 1) * h_size)
      from_input = (inputs[position] * x_masks[gate]) @ kernel[:, columns]
      from_state = (h * h_masks[gate]) @ recurrent_kernel[:, columns]
      z.append(from_input + from_state + bias[columns])
    gates = _activate(z, gate_activation)
    i, f, g, o = gates
    new_c = f * c + i * g
    new_h = o * np.tanh(new_c)
    yield position, gates, c, h, new_c, new_h
    c, h = new_c, new_h


def to_float64(*arrays):
  return [array if np.iscomplexobj(array) else np.asarray(array, np.float64) for array in arrays]


def lstm(
  inputs,
  kernel,
  recurrent_kernel,
  bias,
  *,
  input_dropout_mask=None,
  recurrent_dropout_mask=None,
  lengths=None,
  gate_activation="sigmoid",
  reverse=False,
) -> np.ndarray:
  """Return hidden f64[b, t, h]; arguments as for `imdb_jax.lstm.lstm`. Complex arguments give a complex result."""
  inputs, kernel, recurrent_kernel, bias = to_float64(inputs, kernel, recurrent_kernel, bias)
  (b, t, e), h_size = inputs.shape, recurrent_kernel.shape[0]
  hidden = np.zeros((b, t, h_size), np.result_type(inputs, kernel, recurrent_kernel, bias))
  for row in range(b):
    masks = _review_masks(input_dropout_mask, row, e), _review_masks(recurrent_dropout_mask, row, h_size)
    positions = positions_of(t, t if lengths is None else int(lengths[row]), reverse)
    for position, *_, h in _run(inputs[row], kernel, recurrent_kernel, bias, masks, gate_activation, positions):
      hidden[row, position] = h
  return hidden


def gradients(
  inputs,
  kernel,
  recurrent_kernel,
  bias,
  cotangent,
  *,
  input_dropout_mask=None,
  recurrent_dropout_mask=None,
  lengths=None,
  gate_activation="sigmoid",
  reverse=False,
) -> dict[str, np.ndarray]:
  """Return the gradients f64 of sum(hidden * cotangent) for each array, by backpropagation through time."""
  inputs, kernel, recurrent_kernel, bias, cotangent = to_float64(inputs, kernel, recurrent_kernel, bias, cotangent)
  (b, t, e), h_size = inputs.shape, recurrent_kernel.shape[0]
  d_inputs, d_kernel = np.zeros_like(inputs), np.zeros_like(kernel)
  d_recurrent, d_bias = np.zeros_like(recurrent_kernel), np.zeros_like(bias)
  for row in range(b):
    x_masks, h_masks = _review_masks(input_dropout_mask, row, e), _review_masks(recurrent_dropout_mask, row, h_size)
    positions = positions_of(t, t if lengths is None else int(lengths[row]), reverse)
    masks = (x_masks, h_masks)
    tape = list(_run(inputs[row], kernel, recurrent_kernel, bias, masks, gate_activation, positions))
    dc, dh = np.zeros(h_size), np.zeros(h_size)
    for position, (i, f, g, o), c, h, new_c, _ in reversed(tape):
      dh = dh + cotangent[row, position]
      dc = dc + dh * o * (1 - np.tanh(new_c) ** 2)
      dz = (
        dc * g * _gate_slope(i, gate_activation),
        dc * c * _gate_slope(f, gate_activation),
        dc * i * (1 - g**2),
        dh * np.tanh(new_c) * _gate_slope(o, gate_activation),
      )
      dc, dh = dc * f, np.zeros(h_size)
      for gate in GATES:
        columns = slice(gate * h_size, (gate + 1) * h_size)
        d_inputs[row, position] += x_masks[gate] * (kernel[:, columns] @ dz[gate])
        dh = dh + h_masks[gate] * (recurrent_kernel[:, columns] @ dz[gate])
        d_kernel[:, columns] += np.outer(inputs[row, position] * x_masks[gate], dz[gate])
        d_recurrent[:, columns] += np.outer(h * h_masks[gate], dz[gate])
        d_bias[columns] += dz[gate]
  return {"inputs": d_inputs, "kernel": d_kernel, "recurrent_kernel": d_recurrent, "bias": d_bias}
