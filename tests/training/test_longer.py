"""A run ends early when it no longer improves, and may be told to go on for longer."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from training.test_resume import death_in, signal_before, train_until_stopped
from training.tiny import assert_same_end, change, lines, tiny

import imdb_jax
from imdb_jax import evaluation
from imdb_jax.config import Config
from imdb_jax.errors import UsageError
from imdb_jax.store import files, metrics_log, run_directory
from imdb_jax.training.metrics import Recorder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]

# Validation accuracy after each epoch.
ACCURACIES = (0.6, 0.8, 0.8, 0.7, 0.9, 0.5, 0.5, 0.5)


@pytest.fixture
def accuracies(monkeypatch):
  """Replace the accuracy that a run measures after an epoch."""
  evaluate = evaluation.evaluate

  def chosen(program, *arguments):
    path = program.config.run_dir / "metrics.jsonl"
    epoch = sum(line["kind"] == "epoch" for line in map(json.loads, path.read_text().splitlines()))
    result, logits = evaluate(program, *arguments)
    return dataclasses.replace(result, accuracy=ACCURACIES[epoch]), logits

  monkeypatch.setattr(evaluation, "evaluate", chosen)


def patient(run_dir: Path, patience: int | None, epochs: int = 8) -> Config:
  return tiny(run_dir, epochs=epochs, early_stopping=patience)


def bytes_of(run_dir: Path) -> dict[Path, bytes]:
  return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def copied(config: Config, run_dir: Path, **training) -> Config:
  """Copy a run, and return its settings with others in the section of training."""
  shutil.copytree(config.run_dir, run_dir)
  return change(change(config, "runtime", run_dir=run_dir), "training", **training)


def test_the_epoch_after_which_a_run_ends_is_the_first_without_a_better_one_for_so_long():
  rng = np.random.default_rng(0)
  for _ in range(300):
    values, patience = rng.integers(0, 6, 12), int(rng.integers(1, 5))
    history = [{"epoch": epoch, "val_accuracy": value / 6} for epoch, value in enumerate(values, start=1)]
    # argmax returns the first of equals.
    ends = [n for n in range(1, 13) if n - 1 - np.argmax(values[:n]) >= patience]
    found = metrics_log.early_end(history, patience)
    assert (found["epoch"] if found else None) == (ends[0] if ends else None)
    assert metrics_log.early_end(history, None) is None


@pytest.mark.usefixtures("accuracies")
def test_a_run_without_a_better_epoch_ends_early_and_says_why(tmp_path, capsys):
  result = imdb_jax.fit(patient(tmp_path, 2))
  assert [line["val_accuracy"] for line in result.history] == [0.6, 0.8, 0.8, 0.7]
  # The first of equals.
  assert result.best["epoch"] == 2
  assert imdb_jax.Classifier.load(tmp_path).step == 8
  reason = "Stopped early, after epoch 4 of 8: none was better than epoch 2 (--early-stopping 2).\n"
  assert reason in capsys.readouterr().out
  assert reason in (tmp_path / "report.md").read_text()
  before = bytes_of(tmp_path)
  imdb_jax.fit(patient(tmp_path, 2))
  shown = capsys.readouterr().out
  assert "Nothing is left to train" in shown
  assert reason in shown
  assert "Compiled" not in shown
  after = bytes_of(tmp_path)
  assert [path.name for path in after if after[path] != before.get(path)] == ["provenance.json"]


@pytest.mark.usefixtures("accuracies")
def test_a_run_that_ends_with_its_last_epoch_has_not_stopped_early(tmp_path, capsys):
  imdb_jax.fit(patient(tmp_path, 2, epochs=4))
  assert "Stopped early" not in capsys.readouterr().out + (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("accuracies")
def test_a_stopped_run_ends_after_the_same_epoch_with_the_same_bits(tmp_path):
  undisturbed, config = (patient(tmp_path / name, 2) for name in ("undisturbed", "stopped"))
  imdb_jax.fit(undisturbed)
  with signal_before(Recorder, "record_steps", signal.SIGTERM, at_call=10):
    assert train_until_stopped(config).step == 10
  # After the last epoch's line has been written, and before its state is saved.
  with death_in(files, "write_manifest"):
    imdb_jax.fit(config)
  with signal_before(Recorder, "flush", signal.SIGTERM, at_call=2):
    assert train_until_stopped(config).step == 16
  imdb_jax.fit(config)
  assert_same_end(undisturbed, config)


@pytest.mark.usefixtures("accuracies")
def test_a_signal_during_the_epoch_that_ends_the_run_comes_too_late(tmp_path):
  with signal_before(Recorder, "record_epoch", signal.SIGTERM, at_call=4):
    result = imdb_jax.fit(patient(tmp_path, 2))
  assert result.late_signal == signal.SIGTERM
  assert len(result.history) == 4


@pytest.mark.usefixtures("accuracies")
def test_with_more_patience_a_run_goes_on_and_with_too_little_it_is_refused(tmp_path):
  undisturbed, config = patient(tmp_path / "undisturbed", 3), patient(tmp_path / "run", 2)
  imdb_jax.fit(undisturbed)
  assert sum(line["kind"] == "epoch" for line in lines(undisturbed.run_dir)) == 8
  imdb_jax.fit(config)
  imdb_jax.fit(patient(tmp_path / "run", 3))
  assert_same_end(undisturbed, config)
  before = run_directory.load_config(config.run_dir)
  with pytest.raises(UsageError, match=r"^--early-stopping 2: the run has gone on after epoch 4"):
    imdb_jax.fit(config)
  assert run_directory.load_config(config.run_dir) == before


@pytest.fixture(scope="module")
def longer(shared_programs, tmp_path_factory) -> Config:
  """An undisturbed run of four epochs."""
  config = tiny(tmp_path_factory.mktemp("runs") / "longer", epochs=4)
  imdb_jax.fit(config)
  return config


def test_a_finished_run_goes_on_for_more_epochs(whole, longer, tmp_path, capsys):
  config = copied(whole, tmp_path / "run", epochs=4)
  imdb_jax.fit(config)
  assert "Changed training.epochs: 2 -> 4\n" in capsys.readouterr().out
  assert_same_end(longer, config)
  assert run_directory.load_config(config.run_dir, config.runtime) == config
  first, last = files.read_json(config.run_dir / "provenance.json")["starts"]
  assert (first.get("changed"), last["changed"], last["step"]) == (None, ["training.epochs: 2 -> 4"], 8)
  assert len((config.run_dir / "history.csv").read_text().splitlines()) == 1 + 4
  with pytest.raises(UsageError, match=r"^--epochs 2: the run in .* has --epochs 4, which can only be raised\.$"):
    imdb_jax.fit(change(config, "training", epochs=2))


def test_an_unfinished_run_goes_on_for_more_epochs_also_after_a_kill_while_they_are_saved(longer, tmp_path):
  config = tiny(tmp_path / "run")
  with signal_before(Recorder, "record_steps", signal.SIGINT, at_call=6):
    train_until_stopped(config)
  config = change(config, "training", epochs=4)
  write = files.write_json

  def die(path, value):
    if path.name == "config.json":
      raise KeyboardInterrupt
    write(path, value)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(files, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
      imdb_jax.fit(config)
  imdb_jax.fit(config)
  assert_same_end(longer, config)


def test_a_schedule_over_all_epochs_allows_no_more_of_them(tmp_path):
  config = change(tiny(tmp_path / "run"), "optimizer", schedule="one_cycle")
  imdb_jax.fit(config)
  before = bytes_of(config.run_dir)
  with pytest.raises(UsageError, match=r"^--epochs 4: the run in .* has --epochs 2, over which --schedule one_cycle"):
    imdb_jax.fit(change(config, "training", epochs=4))
  assert bytes_of(config.run_dir) == before
  # The patience has nothing to do with the schedule.
  imdb_jax.fit(change(config, "training", early_stopping=5))


def test_with_other_settings_as_well_all_of_them_are_named(whole, tmp_path):
  config = copied(whole, tmp_path / "run", epochs=4, batch_size=7)
  with pytest.raises(UsageError, match=r"\(training\.epochs: 2 -> 4; training\.batch_size: 10 -> 7\)"):
    imdb_jax.fit(config)
