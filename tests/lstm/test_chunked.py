"""The fast path keeps the contract, and its time loop holds nothing but the recurrence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm.contract import LstmContract

from imdb_jax.lstm import lstm, num_processed

B, T, E, H = 3, 90, 5, 7


class TestChunked(LstmContract):
  implementation = "chunked"


def arrays() -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, T, E), (E, 4 * H), (H, 4 * H), (4 * H,)
  return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def dot_shapes_by_loop(implementation: str) -> list[list[str]]:
  """For every innermost loop of the compiled gradient: the result shapes of its matrix products."""

  def loss(*arrays):
    return jnp.sum(lstm(*arrays, implementation=implementation)[:, -1])

  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays()).compile().as_text()
  computations = {
    match["name"]: match["body"]
    for match in re.finditer(r"^(?:ENTRY )?%(?P<name>[\w.-]+) .*?\{\n(?P<body>.*?)^\}", text, re.M | re.S)
  }

  def reachable(name: str) -> str:
    """The text of a computation and of all that it calls, but for the conditions of loops."""
    body = computations[name]
    return body + "".join(map(reachable, re.findall(r"(?:calls|to_apply|body)=%([\w.-]+)", body)))

  loops = map(reachable, set(re.findall(r"body=%([\w.-]+)", text)))
  return [re.findall(r"= f32\[([\d,]+)\][^=]* dot\(", loop) for loop in loops if "while(" not in loop]


def test_the_time_loops_hold_one_product_each():
  """No input projection, and no gradient of a weight, is computed step by step."""
  loops = sorted(dot_shapes_by_loop("chunked"))
  assert loops == [[f"{B},{4 * H}"], [f"{B},{H}"]]


def test_the_reference_would_not_pass_that_test():
  assert any(len(products) > 1 for products in dot_shapes_by_loop("scan"))


def test_padding_that_no_row_needs_is_not_processed():
  """A NaN there would reach every later state and gradient if it were."""
  lengths = jnp.array([1, 25, 12])
  longest = num_processed(T, 25)
  assert 25 <= longest < 2 * 25
  assert num_processed(T, T) == T
  inputs, *weights = arrays()

  def run(inputs):
    def loss(inputs, *weights):
      hidden = lstm(inputs, *weights, lengths=lengths, implementation="chunked")
      return jnp.sum(hidden**2), hidden

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(inputs, *weights)

  (_, hidden), grads = run(inputs.at[:, : T - longest].set(jnp.nan))
  (_, expected), expected_grads = run(inputs)
  np.testing.assert_array_equal(hidden, expected)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_array_equal(grad, expected_grad)


@pytest.mark.parametrize("longest", [0, 1, 19, 20, 21, 90])
def test_processed_positions_cover_the_longest_row(longest):
  processed = num_processed(T, longest)
  assert longest <= processed < longest + 20
  assert num_processed(T, longest, "scan") == T
