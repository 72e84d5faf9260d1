"""The commands work for a user without a home: only what is downloaded or encoded needs a cache folder."""

import os
import subprocess
import sys

import pytest
from homeless import make_homeless

# The defaults are evaluated at import.
HELP = """
import pwd, sys
pwd.getpwuid = {}.__getitem__
from imdb_jax import cli
sys.argv = ["imdb-jax", sys.argv[1], "--help"]
cli.main()
"""


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "prepare"])
def test_help(command):
  environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
  done = subprocess.run([sys.executable, "-c", HELP, command], env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


def test_a_run_of_the_sample_can_be_used(trained, tmp_path, monkeypatch, call):
  make_homeless(monkeypatch)
  monkeypatch.chdir(tmp_path)
  assert call("predict", trained, "--platform", "cpu", "a film")[0] == 0
  assert call("evaluate", trained, "--platform", "cpu")[0] == 0
  assert not list(tmp_path.iterdir())
