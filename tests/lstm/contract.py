"""The contract of the recurrence as a test class. Every implementation inherits it; see `test_scan.py`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Literal

import jax
import numpy as np
import pytest
from lstm import reference

from imdb_jax.lstm import lstm, shapes

SHAPES = shapes.CONTRACT | shapes.KERNEL
ARRAYS = ("inputs", "kernel", "recurrent_kernel", "bias")
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Case:
  """One call: a name of `SHAPES` and a value for each setting."""

  shape: str
  masks: str  # none, shared, per_gate; shared_inputs and per_gate_inputs without recurrent dropout
  with_lengths: bool
  reverse: bool
  gate_activation: str

  def __str__(self) -> str:
    padding = "lengths" if self.with_lengths else "whole"
    direction = "backward" if self.reverse else "forward"
    return f"{self.shape}-{self.masks}-{padding}-{direction}-{self.gate_activation}"


def _pairwise(*factors: tuple) -> list[tuple]:
  """Few combinations in which every two values of different factors meet: compiling all of them takes minutes."""

  def pairs(combination: tuple) -> set:
    return set(itertools.combinations(enumerate(combination), 2))

  combinations = list(itertools.product(*factors))
  missing, chosen = set().union(*map(pairs, combinations)), []
  while missing:
    best = max(combinations, key=lambda combination: len(pairs(combination) & missing))
    chosen.append(best)
    missing -= pairs(best)
  return chosen


def _cases(names: Iterable[str]) -> list[Case]:
  settings = ("none", "shared", "per_gate"), (False, True), (False, True), ("sigmoid", "hard_sigmoid")
  return [Case(*values) for values in _pairwise(tuple(names), *settings)]


CASES, KERNEL_CASES = _cases(shapes.CONTRACT), _cases(shapes.KERNEL)


def arguments(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray | None], np.ndarray]:
  """The four arrays, the masks and lengths, and a cotangent of hidden; the same on each call."""
  shape = SHAPES[case.shape]
  rng = np.random.default_rng(7)

  def draw(*size: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(size)).astype(np.float32)

  arrays = {
    "inputs": draw(shape.b, shape.t, shape.e),
    # The hidden state is below 1, so U is larger: mistakes in its terms must show. Some hard sigmoids saturate.
    "kernel": draw(shape.e, 4 * shape.h, scale=1 / np.sqrt(shape.e)),
    "recurrent_kernel": draw(shape.h, 4 * shape.h, scale=2 / np.sqrt(shape.h)),
    "bias": draw(4 * shape.h),
  }
  extras: dict[str, np.ndarray | None] = dict.fromkeys(("input_dropout_mask", "recurrent_dropout_mask", "lengths"))
  if case.masks != "none":
    gates = () if case.masks.startswith("shared") else (4,)
    for name, size in (("input_dropout_mask", shape.e), ("recurrent_dropout_mask", shape.h)):
      kept = rng.random((*gates, shape.b, size)) < 0.6
      extras[name] = (kept / 0.6).astype(np.float32)
    if case.masks.endswith("_inputs"):
      extras["recurrent_dropout_mask"] = None
  if case.with_lengths:
    # Of one review all positions but one, of more a spread that begins with none and ends with all.
    lengths = np.linspace(0, shape.t, shape.b) if shape.b > 1 else np.array([max(shape.t - 1, 0)])
    extras["lengths"] = lengths.astype(np.int32)
  return arrays, extras, draw(shape.b, shape.t, shape.h)


def tolerance(case: Case, expected: np.ndarray) -> float:
  """Rounding of float32, grown with the root of the number of terms that are summed in one value."""
  shape = SHAPES[case.shape]
  num_terms = shape.b * shape.t * (shape.e + shape.h)
  return 2 * float(np.finfo(np.float32).eps) * np.sqrt(num_terms) * max(1.0, float(np.abs(expected).max()))


# Of a norm, where products round their operands to bfloat16: five times its rounding, 2^-9.
BFLOAT16_TOLERANCE = 1e-2


def assert_close(found: jax.Array, expected: np.ndarray, case: Case, precision: Precision, name: str) -> None:
  if precision == "float32":
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(case, expected), err_msg=name)
    return
  distance = np.linalg.norm(np.asarray(found, np.float64) - expected)
  assert distance <= BFLOAT16_TOLERANCE * np.linalg.norm(expected), name


def check(call: Callable[..., jax.Array], case: Case, precision: Precision = "float32") -> None:
  """Compares a jitted `call` and its gradients with float64.

  Args:
    call: takes what `imdb_jax.lstm.lstm` takes, but for the implementation.
    case: what to call it with.
    precision: of the recurrent products.

  Raises:
    AssertionError: a value differs by more than the tolerance, or a position that is not real holds anything but 0.
  """
  arrays, extras, cotangent = arguments(case)
  settings = {"gate_activation": case.gate_activation, "reverse": case.reverse}

  @jax.jit
  def run(arrays, extras, cotangent):
    hidden, vjp = jax.vjp(lambda arrays: call(*(arrays[name] for name in ARRAYS), **extras, **settings), arrays)
    return hidden, vjp(cotangent)[0]

  with jax.default_matmul_precision("float32"):
    hidden, grads = run(arrays, extras, cotangent)
  assert hidden.dtype == np.float32
  expected = reference.lstm(**arrays, **extras, **settings)
  assert_close(hidden, expected, case, precision, "hidden")
  if extras["lengths"] is not None:
    t = expected.shape[1]
    padding = np.arange(t) < t - extras["lengths"][:, None]
    assert not np.asarray(hidden)[padding].any(), "positions that are not real must hold exact zeros"
  for name, expected in reference.gradients(**arrays, cotangent=cotangent, **extras, **settings).items():
    assert_close(grads[name], expected, case, precision, f"gradient of {name}")


class LstmContract:
  """What an implementation must do. A subclass names it."""

  implementation: str | None = None
  padded_shape = "odd"

  def call(self, *args, **kwargs) -> jax.Array:
    return lstm(*args, implementation=self.implementation, **kwargs)

  @pytest.mark.parametrize("case", CASES, ids=str)
  def test_agrees_with_float64(self, case):
    check(self.call, case)

  def test_what_stands_on_padding_makes_no_difference(self):
    arrays, extras, _ = arguments(Case(self.padded_shape, "none", True, False, "sigmoid"))
    t = arrays["inputs"].shape[1]
    padding = np.arange(t) < t - extras["lengths"][:, None]
    others = arrays | {"inputs": np.where(padding[:, :, None], np.float32(1e3), arrays["inputs"])}
    run = jax.jit(self.call)
    np.testing.assert_array_equal(run(**arrays, **extras), run(**others, **extras))
