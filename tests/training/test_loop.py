"""Training as a whole, on the embedded sample."""

import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from training.tiny import lines, tiny, without_times

import imdb_jax
from imdb_jax import evaluation, sharding, steps
from imdb_jax.config import PRESETS
from imdb_jax.data import batches, sample
from imdb_jax.errors import DivergenceError
from imdb_jax.training.signals import Interrupted


def test_the_sample_is_learnt(tmp_path):
  """A bag of words stays below 75 % on the same reviews, see `tests/data/test_sample.py`."""
  config = PRESETS["sample"]
  config = dataclasses.replace(
    config, runtime=dataclasses.replace(config.runtime, run_dir=tmp_path / "run", platform="cpu", num_devices=2)
  )
  result = imdb_jax.fit(config)
  assert result.history[-1]["val_accuracy"] > 0.95
  classifier = imdb_jax.Classifier.load(result.run_dir)
  reviews = sample.load()["test"]
  is_right = (classifier.predict(reviews.texts) > 0.5) == (reviews.labels == 1)
  assert np.mean(is_right) == max(line["val_accuracy"] for line in result.history)


def test_the_precision_of_the_program_around_it_stays(tmp_path):
  before = jax.config.values["jax_default_matmul_precision"]
  jax.config.update("jax_default_matmul_precision", "bfloat16")
  try:
    result = imdb_jax.fit(tiny(tmp_path))
    imdb_jax.Classifier.load(result.run_dir).predict(["good"])
    assert jax.config.values["jax_default_matmul_precision"] == "bfloat16"
  finally:
    jax.config.update("jax_default_matmul_precision", before)


def test_a_batch_larger_than_the_reviews_is_as_large_as_they_are(tmp_path, monkeypatch):
  sizes = []
  filled = batches.filled
  monkeypatch.setattr(batches, "filled", lambda *arguments: sizes.append(arguments[2]) or filled(*arguments))
  result = imdb_jax.fit(tiny(tmp_path, batch_size=5_000))
  assert set(sizes) == {sharding.padded_batch_size(32, jax.make_mesh((jax.device_count(),), ("data",)))}
  assert [line["step"] for line in result.history] == [1, 2]


def test_metrics_are_means_over_all_reviews_of_the_window(tmp_path):
  result = imdb_jax.fit(tiny(tmp_path))
  steps = [line for line in lines(tmp_path) if line["kind"] == "step"]
  # Every third step, and the last of an epoch.
  assert [line["step"] for line in steps] == [3, 4, 6, 8]
  # The windows of the first epoch hold 30 and 2 reviews.
  expected = (30 * steps[0]["loss"] + 2 * steps[1]["loss"]) / 32
  assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-6)
  assert [line["step"] for line in result.history] == [4, 8]


def test_seconds_of_compilation_are_told_apart(tmp_path, monkeypatch):
  make_train_step = steps.make_train_step

  def slow(*arguments):
    time.sleep(1)
    return make_train_step(*arguments)

  monkeypatch.setattr(steps, "make_train_step", slow)
  result = imdb_jax.fit(tiny(tmp_path))
  assert result.compile_seconds > 1
  assert result.history[0]["seconds"] < 1


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(tmp_path):
  def losses(name, seed):
    return [line["loss"] for line in imdb_jax.fit(tiny(tmp_path / name, seed=seed)).history]

  first = losses("first", 0)
  assert losses("second", 0) == first
  assert losses("third", 1) != first


def test_validation_split_leaves_the_test_reviews_alone(tmp_path):
  config = tiny(tmp_path)
  config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, validation="split", limit=200))
  imdb_jax.fit(config)
  assert "held out of training" in (tmp_path / "report.md").read_text()


def test_two_newest_and_the_best_checkpoint_are_kept(tmp_path):
  history = imdb_jax.fit(tiny(tmp_path, epochs=6)).history
  # Of equals the last.
  best = max(reversed(history), key=lambda line: line["val_accuracy"])
  kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  assert kept == {20, 24, best["step"]}


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(tmp_path, monkeypatch):
  imdb_jax.fit(tiny(tmp_path / "good"))
  before = sorted((tmp_path / "good" / "checkpoints").iterdir())
  config = tiny(tmp_path / "bad")
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e38))
  with pytest.raises(DivergenceError, match="learning-rate"):
    imdb_jax.fit(config)
  assert not list((tmp_path / "bad" / "checkpoints").iterdir())
  assert sorted((tmp_path / "good" / "checkpoints").iterdir()) == before


def test_implementations_train_alike(tmp_path):
  def losses(implementation):
    config = tiny(tmp_path / implementation, epochs=5)
    config = dataclasses.replace(
      config, runtime=dataclasses.replace(config.runtime, implementation=implementation, log_every=1)
    )
    imdb_jax.fit(config)
    return [line["loss"] for line in lines(config.run_dir) if line["kind"] == "step"]

  scan, chunked = losses("scan"), losses("chunked")
  assert len(scan) == 20
  np.testing.assert_allclose(chunked, scan, rtol=1e-5)


def test_lines_after_the_last_checkpoint_are_dropped_and_written_again(tmp_path):
  whole = tiny(tmp_path / "run")
  imdb_jax.fit(whole)
  path = tmp_path / "run" / "metrics.jsonl"
  written = lines(tmp_path / "run")
  later = {"kind": "step", "epoch": 3, "step": 11, "loss": 1.0, "accuracy": 0.5}
  path.write_text("".join(json.dumps(line) + "\n" for line in [*written, later]) + '{"kind": "st')
  imdb_jax.fit(whole)
  assert lines(tmp_path / "run") == written


def test_a_stop_during_evaluation_evaluates_again_and_keeps_the_best(tmp_path, monkeypatch):
  imdb_jax.fit(tiny(tmp_path / "whole"))

  def best(name):
    return imdb_jax.Classifier.load(tmp_path / name, step="best").step

  # Before the patch: a module that is first imported under it would keep what it imports.
  best_step = best("whole")
  evaluate, calls = evaluation.evaluate, []

  def interrupted(*arguments):
    calls.append(None)
    if 4 * len(calls) == best_step:
      os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(Interrupted) as stop:
      imdb_jax.fit(tiny(tmp_path / "stopped"))
  assert stop.value.step == best_step == 4 * len(calls)
  assert len([line for line in lines(tmp_path / "stopped") if line["kind"] == "epoch"]) == len(calls) - 1
  imdb_jax.fit(tiny(tmp_path / "stopped"))
  assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")
  assert best("stopped") == best_step
