"""The contract of the recurrence as a test class. Every implementation inherits it; see `test_scan.py`."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from lstm import reference

from imdb_jax.lstm import lstm, shapes

ARRAYS = ("inputs", "kernel", "recurrent_kernel", "bias")


@dataclasses.dataclass(frozen=True)
class Case:
  """One call: a name of `shapes.CONTRACT` and a value for each setting."""

  shape: str
  masks: str  # none, shared, per_gate
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


CASES = [
  Case(*values)
  for values in _pairwise(
    tuple(shapes.CONTRACT), ("none", "shared", "per_gate"), (False, True), (False, True), ("sigmoid", "hard_sigmoid")
  )
]


def arguments(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray | None], np.ndarray]:
  """The four arrays, the masks and lengths, and a cotangent of hidden; the same on each call."""
  shape = shapes.CONTRACT[case.shape]
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
    gates = () if case.masks == "shared" else (4,)
    for name, size in (("input_dropout_mask", shape.e), ("recurrent_dropout_mask", shape.h)):
      kept = rng.random((*gates, shape.b, size)) < 0.6
      extras[name] = (kept / 0.6).astype(np.float32)
  if case.with_lengths:
    # Of one review all positions but one, of more a spread that begins with none and ends with all.
    lengths = np.linspace(0, shape.t, shape.b) if shape.b > 1 else np.array([max(shape.t - 1, 0)])
    extras["lengths"] = lengths.astype(np.int32)
  return arrays, extras, draw(shape.b, shape.t, shape.h)


def tolerance(case: Case, expected: np.ndarray) -> float:
  """Rounding of float32, grown with the root of the number of terms that are summed in one value."""
  shape = shapes.CONTRACT[case.shape]
  num_terms = shape.b * shape.t * (shape.e + shape.h)
  return 2 * float(np.finfo(np.float32).eps) * np.sqrt(num_terms) * max(1.0, float(np.abs(expected).max()))


def check(call: Callable[..., jax.Array], case: Case) -> None:
  """Compares a jitted `call` and its gradients with float64.

  Args:
    call: takes what `imdb_jax.lstm.lstm` takes, but for the implementation.
    case: what to call it with.

  Raises:
    AssertionError: a value differs by more than `tolerance`, or a position that is not real holds anything but 0.
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
  np.testing.assert_allclose(hidden, expected, rtol=0, atol=tolerance(case, expected), err_msg="hidden")
  if extras["lengths"] is not None:
    t = expected.shape[1]
    padding = np.arange(t) < t - extras["lengths"][:, None]
    assert not np.asarray(hidden)[padding].any(), "positions that are not real must hold exact zeros"
  for name, expected in reference.gradients(**arrays, cotangent=cotangent, **extras, **settings).items():
    np.testing.assert_allclose(
      grads[name], expected, rtol=0, atol=tolerance(case, expected), err_msg=f"gradient of {name}"
    )


class LstmContract:
  """What an implementation must do. A subclass names it."""

  implementation: str | None = None

  def call(self, *args, **kwargs) -> jax.Array:
    return lstm(*args, implementation=self.implementation, **kwargs)

  @pytest.mark.parametrize("case", CASES, ids=str)
  def test_agrees_with_float64(self, case):
    check(self.call, case)

  def test_what_stands_on_padding_makes_no_difference(self):
    arrays, extras, _ = arguments(Case("odd", "none", True, False, "sigmoid"))
    t = arrays["inputs"].shape[1]
    padding = np.arange(t) < t - extras["lengths"][:, None]
    others = arrays | {"inputs": np.where(padding[:, :, None], np.float32(1e3), arrays["inputs"])}
    run = jax.jit(self.call)
    np.testing.assert_array_equal(run(**arrays, **extras), run(**others, **extras))

  @pytest.mark.parametrize(
    ("name", "shape"),
    [
      ("inputs", (2, 3)),
      ("kernel", (4, 8)),
      ("kernel", (5, 12)),
      ("recurrent_kernel", (2,)),
      ("recurrent_kernel", (2, 12)),
      ("bias", (1, 8)),
      ("bias", (2,)),
      ("input_dropout_mask", (2, 2)),
      ("input_dropout_mask", (3, 2, 5)),
      ("recurrent_dropout_mask", (2, 5)),
      ("recurrent_dropout_mask", (2, 4, 2)),
      ("lengths", (3,)),
      ("lengths", (2, 1)),
    ],
  )
  def test_wrong_shape_is_named(self, name, shape):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
      self.call(**self._good_call() | {name: np.ones(shape, np.int32 if name == "lengths" else np.float32)})

  @pytest.mark.parametrize("name", [*ARRAYS[1:], "input_dropout_mask", "recurrent_dropout_mask", "lengths"])
  def test_wrong_dtype_is_named(self, name):
    good = self._good_call()
    with pytest.raises(ValueError, match=rf"^{name}\b"):
      self.call(**good | {name: good[name].astype(np.float16)})

  def test_unknown_gate_activation_is_named(self):
    with pytest.raises(ValueError, match="gate_activation 'relu'"):
      self.call(**self._good_call(), gate_activation="relu")

  def test_unknown_implementation_is_named_and_never_replaced(self):
    with pytest.raises(ValueError, match="implementation 'abacus'"):
      lstm(**self._good_call(), implementation="abacus")

  def test_good_call_of_the_error_tests_is_good(self):
    assert jax.eval_shape(self.call, **self._good_call()).shape == (2, 3, 2)

  @staticmethod
  def _good_call() -> dict[str, np.ndarray]:
    b, t, e, h = 2, 3, 5, 2
    sizes = {
      "inputs": (b, t, e),
      "kernel": (e, 4 * h),
      "recurrent_kernel": (h, 4 * h),
      "bias": (4 * h,),
      "input_dropout_mask": (b, e),
      "recurrent_dropout_mask": (b, h),
    }
    arrays = {name: np.ones(size, np.float32) for name, size in sizes.items()}
    return arrays | {"lengths": np.ones(b, np.int32)}
