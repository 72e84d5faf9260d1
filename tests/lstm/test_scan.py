"""The readable reference keeps the contract, with every setting, and scans any cell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from lstm import contract
from lstm.contract import LstmContract

from imdb_jax.lstm.scan import scan

INPUTS = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
LENGTHS = np.array([0, 1, 4, 6], np.int32)


class TestScan(LstmContract):
  implementation = "scan"
  # There is no batching rule of ours to test.
  test_vmap_computes_models_of_different_lengths = None

  @pytest.mark.parametrize("case", contract.ALL_CASES, ids=str)
  def test_agrees_with_float64(self, case):
    contract.check(self.call, case)


class Counter(nn.Module):
  """A cell with two leaves of state and of output, none of which has the shape or dtype of the other."""

  @nn.compact
  def __call__(self, carry, x, step):
    carry = {"count": carry["count"] + step, "sum": carry["sum"] + x[:, :, None]}
    return carry, (carry["count"], carry["sum"])


@pytest.mark.parametrize(("reverse", "lengths"), [(True, LENGTHS), (False, None)])
def test_scan_of_a_flax_cell_gives_the_states_of_each_row_by_itself(reverse, lengths):
  cell = nn.GRUCell(features=5, recurrent_kernel_init=nn.initializers.normal())
  carry, apply = np.zeros((4, 5), np.float32), jax.jit(cell.apply)
  run = functools.partial(scan, carry=carry, inputs=INPUTS, lengths=lengths, reverse=reverse)
  hidden, variables = jax.jit(nn.init_with_output(run, cell))(jax.random.key(0))
  for row in range(4):
    state, length = carry[:1], 6 if lengths is None else lengths[row]
    positions = list(range(6 - length, 6))
    for position in reversed(positions) if reverse else positions:
      state, _ = apply(variables, state, INPUTS[row : row + 1, position])
      np.testing.assert_allclose(hidden[row, position], state[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(hidden[row, : 6 - length], 0)


def test_scan_serves_state_and_outputs_of_any_structure():
  start = {"count": jnp.zeros(4, jnp.int32), "sum": jnp.zeros((4, 3, 1))}
  count, total = nn.apply(lambda cell: scan(cell, start, INPUTS, LENGTHS, 10), Counter())({})
  np.testing.assert_array_equal(count[2], [0, 0, 10, 20, 30, 40])
  np.testing.assert_array_equal(count[:, -1], 10 * LENGTHS)
  is_real = np.arange(6) >= 6 - LENGTHS[:, None]
  expected = np.cumsum(np.where(is_real[:, :, None], INPUTS, 0), axis=1)
  np.testing.assert_allclose(total, expected[..., None], rtol=1e-5, atol=1e-6)
