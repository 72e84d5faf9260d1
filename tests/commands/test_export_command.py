"""`export` writes a folder that answers as `predict` does."""

import json
import subprocess
import sys

import pytest
from running import ROOT, assert_one_clear_line

from imdb_jax.prediction import Classifier

TEXTS = ("A dull plot, a disaster.", "A wonderful film", "")


def test_a_run_leaves_the_house(call, trained, tmp_path):
  """It is used without this package and without JAX."""
  code, stdout, stderr = call("export", trained, "--output", tmp_path / "model", "--platform", "cpu")
  assert (code, stdout, stderr) == (0, f"{tmp_path / 'model'}\n", "")
  assert {path.name for path in tmp_path.rglob("*")} == {
    "model", "classes.json", "config.json", "model.json", "model.safetensors", "vocab.json",
  }  # fmt: skip
  _, stdout, _ = call("predict", trained, "--platform", "cpu", "--json", *TEXTS)
  expected = [json.loads(line)["probabilities"]["positive"] for line in stdout.splitlines()]
  without = "import sys, runpy; sys.modules |= dict.fromkeys(['jax', 'imdb_jax']); del sys.argv[0];"
  code = f"{without} runpy.run_path(sys.argv[0], run_name='__main__')"
  example = [sys.executable, "-c", code, ROOT / "examples" / "predict_numpy.py"]
  done = subprocess.run([*example, tmp_path / "model", *TEXTS], capture_output=True, text=True, check=True, timeout=60)
  found = [float(line.split("'positive': ")[1].split("}")[0]) for line in done.stdout.splitlines()]
  assert found == pytest.approx(expected, abs=1e-4)


def test_stablehlo_is_written(call, trained, tmp_path):
  pytest.importorskip("flatbuffers")
  code, stdout, _ = call(
    "export", trained, "--format", "stablehlo", "--output", tmp_path / "model", "--platform", "cpu"
  )
  assert (code, stdout) == (0, f"{tmp_path / 'model'}\n")
  assert (tmp_path / "model" / "model.stablehlo").stat().st_size > 1000


def test_a_folder_that_exists_ends_the_command(call, trained, tmp_path):
  assert_one_clear_line(call("export", trained, "--output", tmp_path, "--platform", "cpu"), 2, str(tmp_path), "exists")
  assert_one_clear_line(call("export", trained), 2, "--output")
  assert not [*tmp_path.iterdir()]


def test_a_run_is_not_taken_for_an_export(trained):
  with pytest.raises(Exception, match=r"model\.json"):
    Classifier.from_safetensors(trained)
