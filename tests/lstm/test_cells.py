"""GRU and simple RNN agree with float64, and the check fails for cells with one mistake."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm import cell_reference, contract
from lstm.contract import Case

from imdb_jax.lstm import scan
from imdb_jax.lstm.shared import Masks, Weights

CELLS = {
  name: functools.partial(scan.run, cell(parent=None))
  for name, cell in {"gru": scan.GRUCell, "rnn": scan.RNNCell}.items()
}
# A case that reveals every mistake below.
HARD = {cell: Case("odd", "shared", True, True, cell=cell) for cell in CELLS}
CASES = {dataclasses.replace(case, cell=cell) for cell in CELLS for case in contract.RECIPE_CASES} | {*HARD.values()}


def call(function, *arrays, input_dropout_mask, recurrent_dropout_mask, lengths, reverse):
  inputs, *weights = arrays
  masks = Masks(input_dropout_mask, recurrent_dropout_mask)
  return function(inputs, Weights(*weights), masks, lengths, reverse=reverse)


@pytest.mark.parametrize("case", sorted(CASES, key=dataclasses.astuple), ids=lambda case: f"{case.cell}-{case}")
def test_agrees_with_float64(case):
  contract.check(functools.partial(call, CELLS[case.cell]), case)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_float64_gradients_are_those_of_the_forward_loop(cell, reverse):
  """Complex steps along random directions have no cancellation."""
  arrays, extras, cotangent = contract.arguments(Case("odd", "shared", True, cell=cell))
  gradients = cell_reference.gradients(cell, **arrays, cotangent=cotangent, reverse=reverse, **extras)
  rng = np.random.default_rng(3)
  for name, array in arrays.items():
    direction = rng.standard_normal(array.shape)
    moved = arrays | {name: array.astype(np.complex128) + 1e-30j * direction}
    hidden = cell_reference.hidden(cell, **moved, reverse=reverse, **extras)
    slope = np.sum(hidden.imag * cotangent.astype(np.float64)) / 1e-30
    np.testing.assert_allclose(np.sum(gradients[name] * direction), slope, rtol=1e-11, err_msg=name)


BOTH = (
  "input mask omitted",
  "mask applied to the output",
  "new mask at each position",
  "lengths counted from the front",
  "state kept on padding",
  "reverse ignored",
  "no bias",
  "gradient of the recurrent kernel dropped",
  "gradient through the recurrence dropped",
)
GRU_ONLY = (
  "update and reset gate swapped",
  "update gate inverted",
  "reset gate before the product",
  "reset gate omitted",
  "bias of the state outside the reset gate",
  "mask applied to the carried state",
  "mask omitted in the candidate",
)
MISTAKES = [*[("gru", mistake) for mistake in BOTH + GRU_ONLY], *[("rnn", mistake) for mistake in (*BOTH, "no tanh")]]


def faulty_state(cell, mistake, x, h, x_mask, h_mask, weights: Weights):
  """Return the next state in float32, independent of the package, with one mistake or None."""
  size, bias = h.shape[1], jnp.zeros_like(weights.bias) if mistake == "no bias" else weights.bias
  masked_h = (jax.lax.stop_gradient(h) if mistake == "gradient through the recurrence dropped" else h) * h_mask
  x = x if mistake == "input mask omitted" else x * x_mask
  recurrent = weights.recurrent_kernel
  if mistake == "gradient of the recurrent kernel dropped":
    recurrent = jax.lax.stop_gradient(recurrent)
  if cell == "rnn":
    z = x @ weights.kernel + masked_h @ recurrent + bias
    return z if mistake == "no tanh" else jnp.tanh(z)
  order = (1, 0, 2) if mistake == "update and reset gate swapped" else (0, 1, 2)
  columns = [slice(gate * size, (gate + 1) * size) for gate in order]
  (x_z, x_r, x_g), (u_z, u_r, u_g), (b_z, b_r, b_g) = (
    [array[..., part] for part in columns] for array in (x @ weights.kernel + bias[0], recurrent, bias[1])
  )
  z, r = jax.nn.sigmoid(x_z + masked_h @ u_z + b_z), jax.nn.sigmoid(x_r + masked_h @ u_r + b_r)
  state = h if mistake == "mask omitted in the candidate" else masked_h
  in_candidate = {
    "reset gate before the product": (r * state) @ u_g + b_g,
    "reset gate omitted": state @ u_g + b_g,
    "bias of the state outside the reset gate": r * (state @ u_g) + b_g,
  }.get(mistake, r * (state @ u_g + b_g))
  g = jnp.tanh(x_g + in_candidate)
  z = 1 - z if mistake == "update gate inverted" else z
  return z * (masked_h if mistake == "mask applied to the carried state" else h) + (1 - z) * g


def faulty(cell, mistake, inputs, weights: Weights, masks: Masks, lengths, *, reverse):
  b, t, _ = inputs.shape
  from_end = jnp.arange(t) if mistake == "lengths counted from the front" else t - 1 - jnp.arange(t)
  is_real = from_end[:, None] < lengths[None, :]

  def step(h, position):
    h_mask = jnp.roll(masks.recurrent, position, axis=0) if mistake == "new mask at each position" else masks.recurrent
    new_h = faulty_state(cell, mistake, inputs[:, position], h, masks.inputs, h_mask, weights)
    new_h = new_h * masks.recurrent if mistake == "mask applied to the output" else new_h
    real = is_real[position][:, None]
    h = jnp.where(real, new_h, h)
    return h, h if mistake == "state kept on padding" else jnp.where(real, h, 0)

  positions = jnp.arange(t)[::-1] if reverse and mistake != "reverse ignored" else jnp.arange(t)
  _, hidden = jax.lax.scan(step, jnp.zeros((b, weights.recurrent_kernel.shape[0])), positions)
  return (hidden if positions[0] == 0 else hidden[::-1]).swapaxes(0, 1)


def check(cell: str, mistake: str | None) -> None:
  # Operation by operation: compiling the loop for each mistake would take far longer.
  with jax.disable_jit(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    contract.check(functools.partial(call, functools.partial(faulty, cell, mistake)), HARD[cell])


@pytest.mark.parametrize(("cell", "mistake"), MISTAKES)
def test_mistake_is_caught(cell, mistake):
  with pytest.raises(AssertionError):
    check(cell, mistake)


@pytest.mark.parametrize("cell", CELLS)
def test_no_mistake_passes(cell):
  """Otherwise the test above would prove nothing."""
  check(cell, None)
