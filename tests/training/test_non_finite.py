"""Runs whose only update overflows: loss and gradients are finite, and no later step would show the damage."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from programs import mesh_of
from training.tiny import change, final_state, tiny

import imdb_jax
from imdb_jax import devices
from imdb_jax.config import Config
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


def one_step(run_dir, non_finite: str) -> Config:
  config = change(tiny(run_dir, epochs=1), "data", limit=10)
  return change(config, "optimizer", non_finite=non_finite)


def test_the_run_stops_and_saves_nothing(tmp_path):
  with pytest.raises(DivergenceError, match=r"^Step 1 is not finite \(seed 0: gradients or parameters\)\. No check"):
    imdb_jax.fit(one_step(tmp_path, "stop"))
  assert not list(tmp_path.glob("checkpoints/*"))


def test_the_update_is_skipped_on_request(tmp_path, capsys):
  config = one_step(tmp_path, "skip")
  imdb_jax.fit(config)
  assert "Step 1 is not finite (seed 0: gradients or parameters): its update was skipped" in capsys.readouterr().out
  state = final_state(tmp_path)
  initial = dataclasses.replace(Program(config, mesh_of(1)).init(), step=np.ones(1, np.int32))
  expected = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(initial)}
  assert state.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(state[name], leaf, err_msg=name)
