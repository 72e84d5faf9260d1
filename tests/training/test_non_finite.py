"""Runs whose only update overflows: loss and gradients are finite, and no later step would show the damage."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from training.tiny import change, tiny

import imdb_jax
from imdb_jax import devices
from imdb_jax.errors import DivergenceError
from imdb_jax.program import Program

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(autouse=True)
def huge_moments(monkeypatch):
  """Let runs start with moments of the optimizer that make the first update infinite."""
  init = Program.init

  def patched(program, fitted=None):
    state = init(program, fitted)
    mu = jax.tree.map(lambda leaf: np.full(leaf.shape, 3e37, np.float32), state.params)
    mu = devices.put(mu, devices.replicated(program.mesh))
    return dataclasses.replace(state, opt_state=optax.tree.set(state.opt_state, mu=mu))

  monkeypatch.setattr(Program, "init", patched)


def test_the_run_stops_and_saves_nothing(tmp_path):
  with pytest.raises(DivergenceError, match=r"^Step 1 is not finite \(seed 0: gradients or parameters\)\. No check"):
    imdb_jax.fit(change(tiny(tmp_path, epochs=1), "data", limit=10))
  assert not list(tmp_path.glob("checkpoints/*"))
