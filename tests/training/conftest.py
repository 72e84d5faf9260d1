"""Fixtures of the training tests."""

import copy
import dataclasses
import functools

import pytest
from training.tiny import tiny

import imdb_jax
from imdb_jax import plots
from imdb_jax.config import Config, RuntimeConfig
from imdb_jax.optimizer import make_optimizer
from imdb_jax.program import Program
from imdb_jax.training import loop


@pytest.fixture(scope="session")
def programs() -> dict:
  """Compiled programs by the settings that they depend on."""
  return {}


@pytest.fixture(scope="module")
def shared_programs(programs):
  """Let runs that differ only in their folder, their saves, their output or their seed share compiled programs."""

  def shared(config, mesh, optimizer, classes, model):
    runtime = RuntimeConfig(
      **{name: getattr(config.runtime, name) for name in ("implementation", "steps_per_dispatch")}, cache_dir="."
    )
    # The first seed is an argument of the programs.
    training = dataclasses.replace(config.training, seed=0)
    key = dataclasses.replace(config, runtime=runtime, training=training), mesh, optimizer, classes, model
    if key not in programs:
      programs[key] = Program(config, mesh, optimizer, classes, model)
    program = copy.copy(programs[key])
    program.config = config
    return program

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "Program", shared)
    patch.setattr(loop, "make_optimizer", functools.cache(make_optimizer))
    yield


@pytest.fixture(scope="module")
def whole(shared_programs, tmp_path_factory) -> Config:
  """An undisturbed run."""
  config = tiny(tmp_path_factory.mktemp("runs") / "whole")
  imdb_jax.fit(config)
  return config


@pytest.fixture(autouse=True, scope="module")
def no_figures():
  """Draw no figures: they would take half of the time of these runs. tests/report and tests/commands have them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "svg", lambda figure: "")
    patch.setattr(plots, "save", lambda figure, output: None)
    yield
