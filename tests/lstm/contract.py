"""The contract of the recurrence as a test class. Every implementation inherits it; see `test_scan.py`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np
import pytest
from lstm import cell_reference, reference

from imdb_jax.lstm import lstm

ARRAYS = ("inputs", "kernel", "recurrent_kernel", "bias")
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one call: b reviews, t positions, e inputs, h hidden units."""

  b: int
  t: int
  e: int
  h: int


# Corner cases: single rows and positions, and sizes that no block size divides.
SHAPES = {
  "one_of_each": Shape(b=1, t=1, e=1, h=1),
  "one_step": Shape(b=3, t=1, e=5, h=4),
  "one_row": Shape(b=1, t=9, e=4, h=6),
  "odd": Shape(b=5, t=7, e=9, h=3),
  "long": Shape(b=2, t=61, e=8, h=16),
}
# The same for kernels, whose hidden sizes are whole blocks.
KERNEL_SHAPES = {
  "kernel_one_of_each": Shape(b=1, t=1, e=1, h=64),
  "kernel_two_tiles": Shape(b=17, t=3, e=5, h=64),
  "kernel_two_blocks": Shape(b=3, t=3, e=4, h=128),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One call: the name of a shape and a value for each setting."""

  shape: str
  masks: str = "none"  # none, shared, per_gate; shared_inputs without recurrent dropout
  with_lengths: bool = False
  reverse: bool = False
  gate_activation: str = "sigmoid"
  cell: str = "lstm"

  def __str__(self) -> str:
    padding = "lengths" if self.with_lengths else "whole"
    direction = "backward" if self.reverse else "forward"
    return f"{self.shape}-{self.masks}-{padding}-{direction}-{self.gate_activation}"

  @property
  def sizes(self) -> Shape:
    return (SHAPES | KERNEL_SHAPES)[self.shape]

  @property
  def settings(self) -> dict[str, Any]:
    return {"reverse": self.reverse} | ({"gate_activation": self.gate_activation} if self.cell == "lstm" else {})


def cases(
  shapes: Iterable[str], masks: tuple[str, ...], gate_activations: tuple[str, ...] = ("sigmoid",)
) -> list[Case]:
  """Return few cases in which every two values of different settings meet: compiling all of them takes minutes."""

  def pairs(combination: tuple) -> set:
    return set(itertools.combinations(enumerate(combination), 2))

  combinations = list(itertools.product(shapes, masks, (False, True), (False, True), gate_activations))
  missing, chosen = set().union(*map(pairs, combinations)), []
  while missing:
    best = max(combinations, key=lambda combination: len(pairs(combination) & missing))
    chosen.append(Case(*best))
    missing -= pairs(best)
  return chosen


# What the fast implementations compute, and what `scan` does.
RECIPE_CASES = cases(SHAPES, ("none", "shared"))
ALL_CASES = cases(SHAPES, ("none", "shared", "per_gate"), ("sigmoid", "hard_sigmoid"))
KERNEL_CASES = cases(KERNEL_SHAPES, ("none", "shared"))


def arguments(case: Case, model: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray | None], np.ndarray]:
  """Return the four arrays, masks and lengths, and a cotangent of hidden; the same on each call.

  Every model has its own arguments, and longer reviews than the next model.
  """
  shape = case.sizes
  columns = {"lstm": 4, "gru": 3, "rnn": 1}[case.cell] * shape.h
  rng = np.random.default_rng(7 + model)

  def draw(*size: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(size)).astype(np.float32)

  arrays = {
    "inputs": draw(shape.b, shape.t, shape.e),
    # The hidden state is below 1, so U is larger: mistakes in its terms must show. Some hard sigmoids saturate.
    "kernel": draw(shape.e, columns, scale=1 / np.sqrt(shape.e)),
    "recurrent_kernel": draw(shape.h, columns, scale=2 / np.sqrt(shape.h)),
    "bias": draw(2, columns) if case.cell == "gru" else draw(columns),
  }
  extras: dict[str, np.ndarray | None] = dict.fromkeys(("input_dropout_mask", "recurrent_dropout_mask", "lengths"))
  if case.masks != "none":
    gates = (4,) if case.masks == "per_gate" else ()
    for name, size in (("input_dropout_mask", shape.e), ("recurrent_dropout_mask", shape.h)):
      kept = rng.random((*gates, shape.b, size)) < 0.6
      extras[name] = (kept / 0.6).astype(np.float32)
    if case.masks == "shared_inputs":
      extras["recurrent_dropout_mask"] = None
  if case.with_lengths:
    # Several reviews range from none to all positions. One or two reviews leave positions that none needs.
    lengths = {1: [max(shape.t - 1, 0)], 2: [1, 2 * shape.t // 3]}.get(shape.b, np.linspace(0, shape.t, shape.b))
    lengths = (np.array(lengths) / (1 + model)).astype(np.int32)
    # Whatever leaks from padding must show.
    arrays["inputs"][np.arange(shape.t) < shape.t - lengths[:, None]] = 1e3
    extras["lengths"] = lengths
  return arrays, extras, draw(shape.b, shape.t, shape.h)


@functools.cache
def expected(case: Case, model: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Return hidden and all gradients in float64."""
  arrays, extras, cotangent = arguments(case, model)
  settings = arrays | extras | case.settings
  if case.cell == "lstm":
    return reference.lstm(**settings), reference.gradients(**settings, cotangent=cotangent)
  hidden = cell_reference.hidden(case.cell, **settings)
  return hidden, cell_reference.gradients(case.cell, **settings, cotangent=cotangent)


def tolerance(case: Case, expected: np.ndarray) -> float:
  """Rounding of float32, grown with the root of the number of terms that are summed in one value."""
  shape = case.sizes
  num_terms = shape.b * shape.t * (shape.e + shape.h)
  return 2 * float(np.finfo(np.float32).eps) * np.sqrt(num_terms) * max(1.0, float(np.abs(expected).max()))


# Relative norm, where products round their operands to bfloat16: five times its rounding, 2^-9.
BFLOAT16_TOLERANCE = 1e-2


def assert_close(found: jax.Array, expected: np.ndarray, case: Case, precision: Precision, name: str) -> None:
  if precision == "float32":
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(case, expected), err_msg=name)
    return
  distance = np.linalg.norm(np.asarray(found, np.float64) - expected)
  assert distance <= BFLOAT16_TOLERANCE * np.linalg.norm(expected), name


def check(
  call: Callable[..., jax.Array], case: Case, precision: Precision = "float32", num_models: int | None = None
) -> None:
  """Compare a jitted `call` and its gradients with float64.

  Args:
    call: takes the arguments of `imdb_jax.lstm.lstm` except the implementation, and gate_activation for LSTMs only.
    case: what to call it with.
    precision: precision of the recurrent products.
    num_models: compute so many models under `jax.vmap`.

  Raises:
    AssertionError: a value differs by more than the tolerance, or a position that is not real holds anything but 0.
  """

  def run(arrays, extras, cotangent):
    def hidden(arrays):
      return call(*(arrays[name] for name in ARRAYS), **extras, **case.settings)

    hidden, vjp = jax.vjp(hidden, arrays)
    return hidden, vjp(cotangent)[0]

  models = [arguments(case, model) for model in range(num_models or 1)]
  with jax.default_matmul_precision("float32"):
    if num_models is None:
      results = [jax.jit(run)(*models[0])]
    else:
      together = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *values: np.stack(values), *models))
      results = [jax.tree.map(lambda values, model=model: values[model], together) for model in range(num_models)]
  for model, (hidden, grads) in enumerate(results):
    assert hidden.dtype == np.float32
    expected_hidden, expected_grads = expected(case, model)
    assert_close(hidden, expected_hidden, case, precision, "hidden")
    lengths = models[model][1]["lengths"]
    if lengths is not None:
      padding = np.arange(case.sizes.t) < case.sizes.t - lengths[:, None]
      assert not np.asarray(hidden)[padding].any(), "positions that are not real must hold exact zeros"
    for name in ARRAYS:
      assert_close(grads[name], expected_grads[name], case, precision, f"gradient of {name}")


class LstmContract:
  """Tests for every implementation. A subclass names the implementation, and may replace cases and precision."""

  implementation: str | None = None
  precision: Precision = "float32"

  def call(self, *args, **kwargs) -> jax.Array:
    return lstm(*args, implementation=self.implementation, **kwargs)

  @pytest.mark.parametrize("case", RECIPE_CASES, ids=str)
  def test_agrees_with_float64(self, case):
    check(self.call, case, self.precision)

  @pytest.mark.parametrize("reverse", [False, True])
  def test_vmap_computes_models_of_different_lengths(self, reverse):
    """One model needs several chunks that the other does not."""
    check(self.call, Case("long", "shared", True, reverse), self.precision, num_models=2)
