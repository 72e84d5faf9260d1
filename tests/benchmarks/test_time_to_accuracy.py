"""The benchmark of training time: turns, summaries, and runs of both sides on the same reviews."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from imdb_jax.data import reviews, sources, tokens
from imdb_jax.presets import preset

# Each test starts processes that compile and train.
pytestmark = pytest.mark.slow

ARGUMENTS = ("--limit", "24", "--sequence-length", "6")


@pytest.fixture
def time_to_accuracy(module):
  return module("time_to_accuracy")


def finished(time_to_accuracy, system: str, *histories: list[tuple[float, float]]) -> list:
  """Return finished runs from training seconds and test accuracies of their epochs; each evaluation takes a second."""
  runs = []
  for seed, history in enumerate(histories):
    runs.append(time_to_accuracy.new_run(system, seed, len(history)) | {"compile_seconds": 2.0})
    for seconds, accuracy in history:
      epoch = {"training_seconds": seconds, "evaluation_seconds": 1.0, "test_accuracy": accuracy}
      runs[-1]["epochs"].append(epoch)
  return runs


def test_turns_are_spread_evenly(time_to_accuracy):
  turns = time_to_accuracy.turns
  assert turns({"keras": 4, "ours": 2}) == ["keras", "ours", "keras", "keras", "ours", "keras"]
  assert turns({"ours": 3, "keras": 1}) == ["ours", "ours", "keras", "ours"]


def test_the_target_is_reached_at_the_end_of_the_first_epoch_that_has_it(time_to_accuracy):
  (run,) = finished(time_to_accuracy, "fast", [(10, 0.80), (11, 0.88), (12, 0.86), (13, 0.89)])
  assert time_to_accuracy.epochs_to(0.88, run) == (run["epochs"][:2], True)
  assert time_to_accuracy.epochs_to(0.90, run) == (run["epochs"], False)


def test_a_summary_has_the_seconds_to_the_target_and_the_last_accuracy(time_to_accuracy):
  runs = finished(time_to_accuracy, "fast", [(10, 0.90), (20, 0.87)], [(10, 0.80), (20, 0.91), (30, 0.89)])
  row = time_to_accuracy.summarize("fast", runs, 0.9)
  assert (row["seeds"], row["reached"]) == (2, 2)
  # 10 and 30 seconds; the standard deviation has n - 1 in its denominator.
  assert row["training_seconds"] == {"mean": 20, "std": pytest.approx(200**0.5), "n": 2}
  assert row["evaluation_seconds"]["mean"] == 1.5
  assert row["compile_seconds"] == {"mean": 2, "std": 0, "n": 2}
  assert row["last_accuracy"]["mean"] == pytest.approx(0.88), "of the last epoch, not of the best"


def test_a_run_that_misses_the_target_counts_as_a_whole(time_to_accuracy):
  fast = finished(time_to_accuracy, "fast", [(10, 0.90), (10, 0.91)])
  keras = finished(time_to_accuracy, "keras-jax", [(100, 0.80), (140, 0.85)])
  row = time_to_accuracy.summary(["fast", "keras-jax"], fast + keras, 0.9)[1]
  assert (row["seeds"], row["reached"]) == (1, 0)
  assert row["training_seconds"] == {"mean": 240, "std": None, "n": 1}
  assert row["ratio_to_fast"] == 24
  rows = time_to_accuracy.summary(["fast", "keras-jax"], fast + keras, 0.95)
  assert [row["ratio_to_fast"] for row in rows] == [None, None], "ours has missed it, too"


def test_an_interrupted_run_counts_only_if_it_has_reached_the_target(time_to_accuracy):
  runs = finished(time_to_accuracy, "keras-jax", [(100, 0.80), (100, 0.90)])
  runs[0]["num_epochs"] = 10
  row = time_to_accuracy.summarize("keras-jax", runs, 0.9)
  assert (row["reached"], row["training_seconds"]["mean"], row["last_accuracy"]) == (1, 200, None)
  row = time_to_accuracy.summarize("keras-jax", runs, 0.95)
  assert (row["seeds"], row["training_seconds"]) == (0, None)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
  """A cache of 24 encoded reviews per split, which pass for the official ones."""
  splits = {}
  for name in ("train", "test"):
    texts = [f"{name} film {'good' if row % 2 else 'bad'} {row}" for row in range(24)]
    splits[name] = reviews.canonical(texts, [row % 2 for row in range(24)], list(range(24)))
  folder = tmp_path_factory.mktemp("cache")
  # Keras reads the data of the article.
  for name in ("article", "fast"):
    data = dataclasses.replace(preset(name).data, limit=24, sequence_length=6)
    official = sources.find(data, None, folder)
    source = dataclasses.replace(official, content=reviews.content(splits), load=lambda report: splits)
    tokens.load(source, data, cache_dir=folder)
  return folder


def test_both_sides_train_to_the_end_in_turns_on_the_same_reviews(run, cache_dir, tmp_path):
  done = run(
    "time_to_accuracy.py",
    *(
      "--systems",
      "fast",
      "keras-jax",
      "--cache-dir",
      cache_dir,
      *ARGUMENTS,
      "--platform",
      "cpu",
      "--num-devices",
      "1",
    ),
    *("--seeds", "1", "--epochs", "2", "--keras-epochs", "2", "--target", "1", "--bench-python", sys.executable),
    *("--json", tmp_path / "results.json", "--plot", tmp_path / "figure.png"),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  progress = [line.partition(":")[0] for line in done.stderr.splitlines() if ", epoch" in line]
  ours = [f"fast, seed 0, epoch {epoch} of 2" for epoch in (1, 2)]
  keras = [f"keras-jax, seed 0, epoch {epoch} of 2" for epoch in (1, 2)]
  assert progress == [keras[0], *ours, keras[1]]
  results = json.loads((tmp_path / "results.json").read_text())
  assert {"flax", "keras"} <= set(results["machine"]["versions"])
  assert "24 IMDB training reviews" in results["machine"]["data"]
  assert {run["system"] for run in results["runs"]} == {"fast", "keras-jax"}
  for one in results["runs"]:
    assert one["is_finished"]
    assert one["compile_seconds"] > 0
    for epoch in one["epochs"]:
      assert epoch["training_seconds"] > 0
      assert epoch["evaluation_seconds"] > 0
      assert round(24 * epoch["test_accuracy"], 6) % 1 == 0, "of all 24 test reviews"
    assert one["reached"] == (max(epoch["test_accuracy"] for epoch in one["epochs"]) == 1)
  missed = sum(not one["reached"] for one in results["runs"])
  assert done.stdout.partition("Target")[0].count("≥ ") in (2 * missed, 3 * missed), "the ratio may be missing"
  assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_linear_model_is_fitted_to_texts_anew_in_every_run(
  module, time_to_accuracy, monkeypatch, cache_dir, tmp_path
):
  texts = [f"film {'good' if row % 2 else 'bad'} {row}" for row in range(24)]
  found = reviews.canonical(texts, [row % 2 for row in range(24)], list(range(24)))
  ours, asked = module("ours"), []
  source = sources.Source(
    name="texts", content=None, fingerprint=lambda: None, load=lambda say: {"train": found, "test": found}
  )
  monkeypatch.setattr(ours.sources, "find", lambda config, archive, cache_dir: asked.append(archive) or source)

  class Worker(contextlib.nullcontext):
    ask = staticmethod(lambda name, fields: getattr(ours._Handlers(ours.build), name)(fields))

  monkeypatch.setattr(time_to_accuracy, "Worker", lambda script: Worker(Worker()))
  arguments = ["--systems", "nb-svm", "--seeds", "2", "--limit", "24", "--archive", str(tmp_path / "reviews.tar")]
  options = module("measuring").parse(None, time_to_accuracy.FLAGS, arguments)
  runs = []
  assert len(list(time_to_accuracy._fit_linear(options, "nb-svm", runs))) == len(runs) == 2
  assert asked == [tmp_path / "reviews.tar"] * 2
  for run in runs:
    assert time_to_accuracy.is_finished(run)
    assert run["epochs"][0]["test_accuracy"] == 1
    assert run["epochs"][0]["training_seconds"] > 0
    assert "scikit-learn" in run["versions"]


def test_the_others_go_on_without_the_environment_of_keras(module, time_to_accuracy, cache_dir, tmp_path):
  arguments = ["--systems", "keras-jax", "keras-tensorflow", "--bench-python", str(tmp_path / "absent")]
  arguments += ["--cache-dir", str(cache_dir), *ARGUMENTS]
  saved = []
  options = module("measuring").parse(None, time_to_accuracy.FLAGS, arguments)
  options.scratch = tmp_path
  time_to_accuracy.measure(options, saved.append)
  assert [run["system"] for run in saved[-1]["runs"]] == ["keras-jax", "keras-tensorflow"]
  assert all(run["problem"] == "missing: make bench" for run in saved[-1]["runs"])
  assert all(row["problem"] == "missing: make bench" for row in saved[-1]["rows"])
