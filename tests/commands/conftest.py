"""Fixtures of the command tests: a trained run, and calls of commands in this process."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.processes import Server

from imdb_jax import cli

pytest.register_assert_rewrite("running")

from running import TINY, Call, Result, run  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
  """A run that nobody changes."""
  run_dir = tmp_path_factory.mktemp("commands") / "run"
  code, stdout, stderr = run("train", *TINY, "--run-dir", run_dir)
  assert (code, stderr) == (0, "")
  assert "Compiled in" in stdout
  assert "Epoch 2/2" in stdout
  return run_dir


@pytest.fixture(scope="session")
def other_run(tmp_path_factory) -> Path:
  """A run on the same reviews with a smaller vocabulary, shorter reviews and another seed, which nobody changes."""
  run_dir = tmp_path_factory.mktemp("commands") / "other_run"
  changes = ("--vocabulary-size", "60", "--sequence-length", "16", "--seed", "1")
  code, _, stderr = run("train", *TINY, *changes, "--run-dir", run_dir)
  assert (code, stderr) == (0, "")
  return run_dir


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
  """Starts scripts sooner than an interpreter, which has to import JAX first."""
  with contextlib.closing(Server()) as server:
    yield server


@pytest.fixture
def call(monkeypatch, capsys) -> Call:
  """Run a command in this process, as a script does, or as `imdb-jax` if that is the name."""

  def call(name: str, *arguments: str | Path) -> Result:
    script = "imdb-jax" if name == "imdb-jax" else f"scripts/{name}.py"
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    handler = signal.getsignal(signal.SIGINT)
    capsys.readouterr()
    code = 0
    try:
      if name == "imdb-jax":
        cli.main()
      else:
        cli.run(name)
    except SystemExit as leaving:
      code = leaving.code or 0
    finally:
      signal.signal(signal.SIGINT, handler)
    assert isinstance(code, int)
    return code, *capsys.readouterr()

  return call
