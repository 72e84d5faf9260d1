"""Training starts as it always has."""

import json

import jax
import numpy as np
import pytest
from training import golden


def test_the_first_losses_have_not_changed():
  path = golden.path(jax.default_backend())
  if not path.exists():
    pytest.skip(f"{path.name} has not been written: python tests/training/golden.py")
  expected = json.loads(path.read_text())
  assert len(expected) == golden.STEPS
  # Other processors round differently, and the difference grows from step to step.
  np.testing.assert_allclose(golden.losses(), expected, rtol=1e-3)
