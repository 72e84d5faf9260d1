"""Fixtures of the storage tests: one tiny run, trained once."""

import shutil
from pathlib import Path

import pytest
from training.tiny import tiny

import imdb_jax
from imdb_jax.config import Config


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
  """The folder of a finished run of 2 epochs and 8 steps. Nobody changes it."""
  config = tiny(tmp_path_factory.mktemp("finished") / "run")
  imdb_jax.fit(config)
  return config.run_dir


@pytest.fixture
def run(finished, tmp_path) -> Config:
  """The settings of a copy of the finished run."""
  config = tiny(tmp_path / "run")
  shutil.copytree(finished, config.run_dir)
  return config
