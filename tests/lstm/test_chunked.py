"""The fast path keeps the contract, and its compiled loops hold nothing but the recurrence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from lstm import reference
from lstm.contract import LstmContract

from imdb_jax.lstm import chunked, lstm
from imdb_jax.lstm.shared import Weights

# Five chunks. All sizes differ, so that shapes tell what an array is.
B, T, E, H = 3, 90, 11, 7
NUM_CHUNKS, CHUNK = 5, 18
LENGTHS = np.array([1, 25, 12], np.int32)


class TestChunked(LstmContract):
  implementation = "chunked"


def arrays() -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, T, E), (E, 4 * H), (H, 4 * H), (4 * H,)
  return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def value_and_grad(arrays, lengths, implementation="chunked"):
  def loss(arrays):
    hidden = lstm(*arrays, lengths=lengths, implementation=implementation)
    return jnp.sum(hidden**2), hidden

  return jax.value_and_grad(loss, has_aux=True)(arrays)


@functools.cache
def compiled(implementation: str) -> jax.stages.Compiled:
  function = functools.partial(value_and_grad, implementation=implementation)
  return jax.jit(function).lower(arrays(), LENGTHS).compile()


def computations(text: str) -> dict[str, str]:
  """Return the bodies of the computations in the text of a compiled program, by name."""
  matches = re.finditer(r"^(?:ENTRY )?%(?P<name>[\w.-]+) .*?\{\n(?P<body>.*?)^\}", text, re.M | re.S)
  return {match["name"]: match["body"] for match in matches}


def dot_shapes_by_loop(implementation: str) -> list[list[str]]:
  """Return the result shapes of the matrix products in every innermost loop."""
  text = compiled(implementation).as_text()
  bodies = computations(text)

  def reachable(name: str) -> str:
    """Return the text of a computation and of all that it calls, except the conditions of loops."""
    return bodies[name] + "".join(map(reachable, re.findall(r"(?:calls|to_apply|body)=%([\w.-]+)", bodies[name])))

  loops = map(reachable, set(re.findall(r"body=%([\w.-]+)", text)))
  return [re.findall(r"= f32\[([\d,]+)\][^=]* dot\(", loop) for loop in loops if "while(" not in loop]


def test_the_time_loops_hold_one_product_each():
  """No input projection and no gradient of a weight is computed position by position."""
  assert sorted(dot_shapes_by_loop("chunked")) == [[f"{B},{4 * H}"], [f"{B},{H}"]]


def test_the_reference_would_not_pass_that_test():
  assert any(len(products) > 1 for products in dot_shapes_by_loop("scan"))


def test_padding_that_no_row_needs_is_not_processed():
  """Otherwise a NaN there would reach every later state and gradient."""
  inputs, *weights = arrays()
  num_processed = 2 * CHUNK
  assert num_processed >= LENGTHS.max()
  run = compiled("chunked")
  found = run((inputs.at[:, : T - num_processed].set(jnp.nan), *weights), LENGTHS)
  jax.tree.map(np.testing.assert_array_equal, found, run((inputs, *weights), LENGTHS))


NUM_SHARDS = min(2, jax.device_count())


def models() -> tuple:
  """Return inputs, weights and lengths of 2 * 2 models, with rows for all shards."""
  rng = np.random.default_rng(0)
  sizes = (NUM_SHARDS * B, T, E), (E, 4 * H), (H, 4 * H), (4 * H,)
  inputs, *weights = (rng.standard_normal((2, 2, *size)).astype(np.float32) for size in sizes)
  longest = np.array([[90, 3], [0, 40]], np.int32)
  return inputs, weights, rng.integers(0, longest[:, :, None] + 1, (2, 2, NUM_SHARDS * B), np.int32)


@functools.cache
def compiled_for_models() -> jax.stages.Compiled:
  """Return the gradient for all models, under `jax.vmap` twice, each with its rows spread over devices."""
  rows = PartitionSpec("data")

  def on_device(inputs, weights, lengths):
    return jax.tree.map(lambda leaf: leaf[None], value_and_grad((inputs, *weights), lengths))

  mesh = Mesh(np.array(jax.devices()[:NUM_SHARDS]), ("data",))
  shards = jax.shard_map(on_device, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=rows, check_vma=False)
  return jax.jit(jax.vmap(jax.vmap(shards))).lower(*models()).compile()


def test_vmap_and_shards_give_the_values_of_single_calls():
  inputs, weights, lengths = models()
  found = jax.device_get(compiled_for_models()(inputs, weights, lengths))
  for index in np.ndindex(2, 2, NUM_SHARDS):
    *model, shard = index
    rows = slice(shard * B, (shard + 1) * B)
    single = inputs[*model][rows], *(weight[*model] for weight in weights)
    expected = compiled("chunked")(single, lengths[*model][rows])
    for leaf, expected_leaf in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      np.testing.assert_allclose(leaf[index], expected_leaf, rtol=1e-4, atol=1e-5)


def test_vmap_keeps_scalar_loop_bounds():
  """With bounds that differ between models, XLA would select every stored array in every turn of the loop."""
  text = compiled_for_models().as_text()
  bodies = computations(text)
  conditions = [bodies[name] for name in set(re.findall(r"condition=%([\w.-]+)", text))]
  lines = [line for condition in conditions for line in condition.splitlines() if " parameter(" not in line]
  assert len(conditions) == 4
  assert [line for line in lines if not re.search(r"= \w+\[\] ", line)] == []

  def shapes(pattern: str) -> set[tuple[int, ...]]:
    return {tuple(sorted(map(int, shape.split(",")))) for shape in re.findall(pattern, text)}

  stored = [(NUM_CHUNKS, CHUNK, B, size) for size in (4 * H, H, E)] + [(NUM_CHUNKS, B, H)]
  stored = {tuple(sorted((2, 2, *shape))) for shape in stored}
  assert stored <= shapes(r"f32\[([\d,]+)\]")
  assert stored.isdisjoint(shapes(r"= f32\[([\d,]+)\]\S* select\("))


def test_the_last_state_of_tokens_is_that_of_the_whole_padded_rows():
  """Expected from NumPy in float64, over all positions; the longest row is shorter than the row of tokens."""
  rng, t, v = np.random.default_rng(3), 12, 9
  embedding, *weights = (rng.normal(size=shape).astype(np.float32) for shape in ((v, E), (E, 4 * H), (H, 4 * H), 4 * H))
  for lengths in ([0, 0], [9, 4, 0, 1], [t, 3]):
    tokens = np.zeros((len(lengths), t), np.int16)
    for row, length in zip(tokens, lengths, strict=True):
      row[t - length :] = rng.integers(1, v, length)
    prepared = jax.jit(chunked.lookup, static_argnums=2)(embedding, Weights(*map(jnp.asarray, weights)), t)
    found = jax.jit(chunked.last_hidden)(prepared, tokens, np.array(lengths, np.int32))
    expected = reference.lstm(embedding[tokens], *weights)[:, -1]
    # Rounding of float32 over twelve positions.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
