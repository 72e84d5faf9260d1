"""The contract's checks fail for implementations with one mistake; and the float64 reference itself is right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm import contract, reference
from lstm.contract import Case

# A mistake, and the settings that reveal it. All need several positions.
RECIPE_MISTAKES = {
  "input and forget gate swapped": {},
  "cell gate and output gate swapped": {},
  "forget gate omitted": {},
  "no tanh on the output": {},
  "no bias": {},
  "gradient of the recurrent kernel dropped": {},
  "gradient through the recurrence dropped": {},
  "mask applied to c": {"masks": "shared"},
  "mask applied to the output": {"masks": "shared"},
  "input mask omitted": {"masks": "shared"},
  "new mask at each position": {"masks": "shared"},
  "lengths counted from the front": {"with_lengths": True},
  "lengths ignored": {"with_lengths": True},
  "state kept on padding": {"with_lengths": True, "reverse": True},
  "reverse ignored": {"reverse": True},
  "output of reverse in the order of its steps": {"reverse": True},
}
MISTAKES = RECIPE_MISTAKES | {
  "masks of the gates in another order": {"masks": "per_gate"},
  "one mask for all gates": {"masks": "per_gate"},
  "hard sigmoid of Keras 3": {"gate_activation": "hard_sigmoid"},
}


def case_for(mistake: str, precision: contract.Precision = "float32") -> Case:
  """Return a case that has what the mistake needs, of one shape, so that operations are compiled once."""
  cases, shape = (contract.ALL_CASES, "odd") if precision == "float32" else (contract.KERNEL_CASES, "kernel_two_blocks")
  needs = MISTAKES[mistake]
  assert any(needs.items() <= dataclasses.asdict(case).items() for case in cases), "the contract has no such case"
  return Case(shape, **needs)


def faulty_lstm(
  mistake,
  inputs,
  kernel,
  recurrent_kernel,
  bias,
  *,
  input_dropout_mask,
  recurrent_dropout_mask,
  lengths,
  gate_activation,
  reverse,
):
  """Compute an LSTM in float32, independent of the package, with one mistake or None."""
  (b, t, e), h_size = inputs.shape, recurrent_kernel.shape[0]

  def four_masks(mask, size):
    if mask is None:
      return jnp.ones((4, b, size))
    masks = jnp.broadcast_to(mask, (4, b, size)) if mask.ndim == 3 else jnp.stack([mask] * 4)
    if mistake == "masks of the gates in another order":
      return masks[::-1]
    return jnp.stack([masks[0]] * 4) if mistake == "one mask for all gates" else masks

  x_masks, h_masks = four_masks(input_dropout_mask, e), four_masks(recurrent_dropout_mask, h_size)
  if mistake == "input mask omitted":
    x_masks = jnp.ones_like(x_masks)
  if mistake == "gradient of the recurrent kernel dropped":
    recurrent_kernel = jax.lax.stop_gradient(recurrent_kernel)
  if mistake == "no bias":
    bias = jnp.zeros_like(bias)

  weights = jnp.concatenate([kernel, recurrent_kernel]).reshape(e + h_size, 4, h_size).swapaxes(0, 1)

  def gate(z):
    if gate_activation == "sigmoid":
      return jax.nn.sigmoid(z)
    return jnp.clip(z / 6 + 0.5 if mistake == "hard sigmoid of Keras 3" else 0.2 * z + 0.5, 0, 1)

  lengths = jnp.full(b, t) if lengths is None or mistake == "lengths ignored" else lengths
  from_end = jnp.arange(t) if mistake == "lengths counted from the front" else t - 1 - jnp.arange(t)
  is_real = from_end[:, None] < lengths[None, :]

  def step(carry, position):
    c, h = carry
    x = inputs[:, position]
    state = jax.lax.stop_gradient(h) if mistake == "gradient through the recurrence dropped" else h
    masks = jnp.roll(h_masks, position, axis=1) if mistake == "new mask at each position" else h_masks
    z = jnp.concatenate([x * x_masks, state * masks], axis=2) @ weights + bias.reshape(4, 1, h_size)
    order = {"input and forget gate swapped": (1, 0, 2, 3), "cell gate and output gate swapped": (0, 1, 3, 2)}
    i, f, g, o = (z[k] for k in order.get(mistake, range(4)))
    kept = c * recurrent_dropout_mask if mistake == "mask applied to c" else c
    new_c = (kept if mistake == "forget gate omitted" else gate(f) * kept) + gate(i) * jnp.tanh(g)
    new_h = gate(o) * (new_c if mistake == "no tanh on the output" else jnp.tanh(new_c))
    if mistake == "mask applied to the output":
      new_h = new_h * recurrent_dropout_mask
    real = is_real[position][:, None]
    c, h = jnp.where(real, new_c, c), jnp.where(real, new_h, h)
    return (c, h), h if mistake == "state kept on padding" else jnp.where(real, h, 0)

  positions = jnp.arange(t)[::-1] if reverse and mistake != "reverse ignored" else jnp.arange(t)
  _, hidden = jax.lax.scan(step, (jnp.zeros((b, h_size)), jnp.zeros((b, h_size))), positions)
  if reverse and mistake not in ("reverse ignored", "output of reverse in the order of its steps"):
    hidden = hidden[::-1]
  return hidden.swapaxes(0, 1)


def check(mistake: str | None, case: Case, precision: contract.Precision = "float32") -> None:
  # Operation by operation: compiling the loop for each mistake would take far longer.
  with jax.disable_jit(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    contract.check(functools.partial(faulty_lstm, mistake), case, precision)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(mistake):
  with pytest.raises(AssertionError):
    check(mistake, case_for(mistake))


@pytest.mark.parametrize("mistake", RECIPE_MISTAKES)
def test_mistake_of_a_kernel_is_caught(mistake):
  with pytest.raises(AssertionError):
    check(mistake, case_for(mistake, "bfloat16"), "bfloat16")


@pytest.mark.parametrize("case", sorted(set(map(case_for, MISTAKES)), key=str), ids=str)
def test_no_mistake_passes(case):
  """Otherwise the tests above would prove nothing."""
  check(None, case)


@pytest.mark.parametrize("gate_activation", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("masks", ["none", "shared", "per_gate"])
@pytest.mark.parametrize("reverse", [False, True])
def test_float64_gradients_are_those_of_the_forward_loop(gate_activation, masks, reverse):
  """Complex steps along random directions have no cancellation."""
  arrays, extras, cotangent = contract.arguments(Case("odd", masks, True, reverse, gate_activation))
  settings = extras | {"gate_activation": gate_activation, "reverse": reverse}
  gradients = reference.gradients(**arrays, cotangent=cotangent, **settings)
  rng = np.random.default_rng(3)
  for name, array in arrays.items():
    direction = rng.standard_normal(array.shape)
    moved = arrays | {name: array.astype(np.complex128) + 1e-30j * direction}
    slope = np.sum(reference.lstm(**moved, **settings).imag * cotangent.astype(np.float64)) / 1e-30
    np.testing.assert_allclose(np.sum(gradients[name] * direction), slope, rtol=1e-11, err_msg=name)
