"""The header of a run, its closing lines and its report."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from training.tiny import change, tiny

import imdb_jax
from imdb_jax.data import sources, tokens
from imdb_jax.program import Program
from imdb_jax.training.console import Console, show_header


def header(config, capsys, *, num_devices=1, step=0) -> dict[str, str]:
  """Return the lines of a header by their names."""
  data = tokens.load(sources.find(config.data, None, config.run_dir), config.data, cache_dir=config.run_dir)
  mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
  show_header(Program(config, mesh), data, step, Console())
  return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_the_header_says_what_is_trained_on_what_and_how(tmp_path, capsys):
  shown = {name: value.strip() for name, value in header(tiny(tmp_path / "run"), capsys).items()}
  # Embedding 1000 x 4, LSTM 4 x (4 + 4 + 1) x 4, head 4 + 1.
  assert shown["Parameters"] == "4,149"
  assert shown["Seeds"] == "0"
  assert shown["Devices"] == "1 x cpu (cpu) of 4, 1 process(es)"
  assert shown["Recurrence"].startswith("chunked (")
  assert shown["Precision"] == "matrix products in float32"
  assert shown["Steps"] == "4 per epoch, 2 epoch(s)"
  assert shown["Run"] == f"{tmp_path / 'run'} (new)"


def test_the_header_of_a_resumed_ensemble_on_all_devices(tmp_path, capsys):
  config = change(tiny(tmp_path, seed=3, num_seeds=2), "training", matmul_precision="bfloat16")
  shown = {name: value.strip() for name, value in header(config, capsys, num_devices=4, step=1234).items()}
  assert shown["Parameters"] == "4,149"
  assert shown["Seeds"] == "3 to 4: 2 models, one ensemble"
  assert shown["Devices"] == "4 x cpu (cpu), 1 process(es)"
  assert shown["Precision"] == "matrix products in bfloat16"
  assert shown["Run"].endswith("(resumed at step 1,234)")


@pytest.mark.usefixtures("shared_programs")
def test_the_report_names_the_best_epoch_and_all_settings(tmp_path):
  config = tiny(tmp_path / "run", epochs=3)
  result = imdb_jax.fit(config)
  text = (tmp_path / "run" / "report.md").read_text()
  assert f"Best epoch {result.best['epoch']}: val_accuracy {result.best['val_accuracy']:.4f}" in text
  assert sum(line.startswith(("| 1 |", "| 2 |", "| 3 |")) for line in text.splitlines()) == 3
  for section in config.settings().values():
    for name, value in section.items():
      assert f"{name} {value}" in text
