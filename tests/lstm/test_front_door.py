"""The checks of the front door, the same for every implementation."""

import jax
import numpy as np
import pytest
from lstm import contract

from imdb_jax.lstm import lstm


def good_call() -> dict[str, np.ndarray]:
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
def test_wrong_shape_is_named(name, shape):
  with pytest.raises(ValueError, match=rf"\b{name}\b"):
    lstm(**good_call() | {name: np.ones(shape, np.int32 if name == "lengths" else np.float32)})


@pytest.mark.parametrize("name", [*contract.ARRAYS, "input_dropout_mask", "recurrent_dropout_mask", "lengths"])
def test_wrong_dtype_is_named(name):
  good = good_call()
  with pytest.raises(ValueError, match=rf"^{name}\b"):
    lstm(**good | {name: good[name].astype(np.float16)})


def test_unknown_gate_activation_is_named():
  with pytest.raises(ValueError, match="gate_activation 'relu'"):
    lstm(**good_call(), gate_activation="relu")


def test_unknown_implementation_is_named_and_never_replaced():
  with pytest.raises(ValueError, match="implementation 'abacus': must be one of mosaic_gpu, chunked, scan"):
    lstm(**good_call(), implementation="abacus")


ONLY_SCAN = {
  "one mask per gate": {"input_dropout_mask": np.ones((4, 2, 5), np.float32)},
  "one mask per gate for the state": {"recurrent_dropout_mask": np.ones((4, 2, 2), np.float32)},
  "hard_sigmoid": {"gate_activation": "hard_sigmoid"},
}


@pytest.mark.parametrize("settings", ONLY_SCAN.values(), ids=ONLY_SCAN)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "chunked"])
def test_named_implementation_refuses_what_only_scan_computes(implementation, settings):
  with pytest.raises(ValueError, match=rf"{implementation}.*; only scan computes (one mask per gate|hard_sigmoid)"):
    lstm(**good_call() | settings, implementation=implementation)


@pytest.mark.parametrize("settings", ONLY_SCAN.values(), ids=ONLY_SCAN)
def test_scan_is_the_default_for_what_only_scan_computes(settings):
  call = good_call() | settings
  programs = [jax.make_jaxpr(lambda name=name: lstm(**call, implementation=name))() for name in (None, "scan")]
  assert str(programs[0]) == str(programs[1])


def test_good_call_of_the_error_tests_is_good():
  assert jax.eval_shape(lstm, **good_call()).shape == (2, 3, 2)
