"""`evaluate`, and what it shares with `predict`: restoring a run."""

import json

import numpy as np
import pytest
from running import TINY, assert_one_clear_line, copy_of, history

from imdb_jax.data import sample


def test_evaluation_agrees_with_training(trained, call):
  code, stdout, _ = call("evaluate", trained, "--step", "latest", "--json", "--platform", "cpu")
  assert code == 0
  result, last = json.loads(stdout), history(trained)[-1]
  assert result["num_reviews"] == 200
  assert result["accuracy"] == last["val_accuracy"]
  assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
  cells = ("true_negatives", "false_positives", "false_negatives", "true_positives")
  assert sum(result[cell] for cell in cells) == 200


def test_the_installed_command_shows_the_same_for_people(trained, call):
  code, stdout, _ = call("imdb-jax", "evaluate", trained, "--platform", "cpu")
  assert code == 0
  shown = dict(line.rsplit(maxsplit=1) for line in stdout.splitlines())
  assert shown["num reviews"] == "200"
  best = max(line["val_accuracy"] for line in history(trained) if line["kind"] == "epoch")
  assert shown["accuracy"] == f"{best:.4f}"
  (interval,) = [line for line in stdout.splitlines() if line.startswith("accuracy interval")]
  _, _, low, _, high, level = interval.split()
  # 200 reviews: a standard error is 3.5 points at most.
  assert best - 0.08 < float(low) < best < float(high) < best + 0.08
  assert level == "(95%)"


def test_several_runs_are_evaluated_as_one_ensemble(trained, other_run, call):
  """Their probabilities come from `predict`, their metrics from NumPy."""
  reviews = sample.load()["test"].take(range(200))
  runs, probabilities = (trained, other_run), []
  for run_dir in runs:
    code, stdout, _ = call("predict", run_dir, "--json", "--platform", "cpu", *reviews.texts)
    assert code == 0
    probabilities.append([json.loads(line)["probabilities"]["positive"] for line in stdout.splitlines()])
  p = np.mean(probabilities, axis=0)
  code, stdout, _ = call("evaluate", trained, "--with", other_run, "--json", "--platform", "cpu")
  assert code == 0
  result = json.loads(stdout)
  assert result["accuracy"] == np.mean((p > 0.5) == (reviews.labels == 1))
  assert result["loss"] == pytest.approx(-np.mean(np.log(np.where(reviews.labels == 1, p, 1 - p))), rel=1e-5)
  low, high = result["accuracy_interval"]
  assert low < result["accuracy"] < high
  assert [run["run_dir"] for run in result["runs"]] == list(map(str, runs))
  for run_dir, member, own in zip(runs, result["runs"], probabilities, strict=True):
    assert member["accuracy"] == np.mean((np.array(own) > 0.5) == (reviews.labels == 1))
    _, stdout, _ = call("evaluate", run_dir, "--json", "--platform", "cpu")
    alone = json.loads(stdout)
    assert member == {name: alone[name] for name in member}
  code, stdout, _ = call("evaluate", trained, "--with", other_run, "--platform", "cpu")
  shown = dict(line.rsplit(maxsplit=1) for line in stdout.splitlines())
  for name, metrics in {"accuracy": result, **{f"accuracy, {run['run_dir']}": run for run in result["runs"]}}.items():
    assert shown[name] == f"{metrics['accuracy']:.4f}"


@pytest.mark.slow
def test_runs_on_different_reviews_are_no_ensemble(trained, tmp_path, call):
  run_dir = tmp_path / "fewer"
  code, _, stderr = call("train", *TINY, "--limit", "100", "--epochs", "1", "--run-dir", run_dir)
  assert code == 0, stderr
  result = call("evaluate", trained, "--with", run_dir, "--platform", "cpu")
  assert_one_clear_line(result, 3, f"{run_dir}: the reviews of this split are not those of the first run")


def test_no_run_and_no_checkpoint(tmp_path, trained, call):
  assert_one_clear_line(call("evaluate", tmp_path), 2, "not a run directory")
  assert_one_clear_line(call("evaluate", trained, "--step", "3", "--platform", "cpu"), 4, "no step 3", "14")
  assert_one_clear_line(call("evaluate", trained, "--step", "last"), 2, "--step 'last'", "best, latest or a number")


@pytest.mark.parametrize(
  ("section", "name", "exit_code", "words"),
  [
    ("model", "embedding_size", 4, ("embedding", "config and vocabulary require")),
    ("data", "vocabulary_size", 2, ("vocab.json", "300")),
  ],
)
def test_a_config_that_does_not_fit_the_rest_of_the_run(section, name, exit_code, words, trained, tmp_path, call):
  copy = copy_of(trained, tmp_path)
  config = json.loads((copy / "config.json").read_text())
  config[section][name] = 300
  (copy / "config.json").write_text(json.dumps(config))
  assert_one_clear_line(call("predict", copy, "good", "--platform", "cpu"), exit_code, *words)


def test_a_damaged_config(trained, tmp_path, call):
  copy = copy_of(trained, tmp_path)
  config = json.loads((copy / "config.json").read_text())
  config["model"]["hidden_size"] = "4; rm -rf /"
  (copy / "config.json").write_text(json.dumps(config))
  assert_one_clear_line(call("predict", copy, "good"), 2, "config.json", "--hidden-size", "whole number")


def test_other_reviews_than_those_of_training_are_refused(trained, tmp_path, call):
  copy = copy_of(trained, tmp_path)
  provenance = json.loads((copy / "provenance.json").read_text())
  (copy / "provenance.json").write_text(json.dumps(provenance | {"data_digest": "0" * 64}))
  assert_one_clear_line(call("evaluate", copy, "--platform", "cpu"), 3, "not the reviews", "--archive")
