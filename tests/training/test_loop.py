"""Training as a whole, on the embedded sample."""

import dataclasses
import gzip
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from reliability.sandbox import checkpoints_of, newest_state
from scipy import special
from training.tiny import change, lines, tiny

import imdb_jax
from imdb_jax import evaluation
from imdb_jax.data import sample, sources, tokens, word_vectors
from imdb_jax.errors import CheckpointError, DivergenceError, UsageError
from imdb_jax.presets import PRESETS
from imdb_jax.processes import Interrupted
from imdb_jax.program import Program
from imdb_jax.store.checkpoints import Checkpoints
from imdb_jax.task import Classification
from imdb_jax.training.metrics import Recorder

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.mark.slow
def test_the_sample_is_learnt(tmp_path):
  """A bag of words stays below 75% on the same reviews; see `tests/data/test_sample.py`."""
  config = change(PRESETS["sample"], "runtime", run_dir=tmp_path / "run", platform="cpu", num_devices=2)
  # Nine of the twelve epochs are enough.
  config = change(config, "training", epochs=9)
  result = imdb_jax.fit(config)
  assert result.history[-1]["val_accuracy"] > 0.95
  classifier = imdb_jax.Classifier.load(result.run_dir)
  reviews = sample.load()["test"]
  is_right = classifier.predict(reviews.texts) == np.array(["negative", "positive"])[reviews.labels]
  assert np.mean(is_right) == max(line["val_accuracy"] for line in result.history)


def test_matmul_precision_of_the_surrounding_program_is_kept(tmp_path):
  before = jax.config.values["jax_default_matmul_precision"]
  jax.config.update("jax_default_matmul_precision", "bfloat16")
  try:
    config = tiny(tmp_path)
    imdb_jax.fit(config)
    imdb_jax.Classifier.load(tmp_path, runtime=config.runtime).predict(["good"])
    assert jax.config.values["jax_default_matmul_precision"] == "bfloat16"
  finally:
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [3, 4])
def test_a_trace_of_whole_dispatches_is_where_tensorboard_looks_for_it(tmp_path, num_steps):
  imdb_jax.fit(change(tiny(tmp_path), "runtime", profile=num_steps, steps_per_dispatch=2))
  (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
  assert list(folder.glob("*.xplane.pb"))
  events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
  # Four of the eight steps, by what the Python tracer saw.
  assert sum(event.get("name", "").endswith(" put_batches") for event in events) == 2


def test_a_batch_is_never_larger_than_the_training_set(tmp_path, monkeypatch):
  sizes = set()
  put_batches = Program.put_batches

  def recorded(program, *arrays):
    placed = put_batches(program, *arrays)
    sizes.add(placed[0]["labels"].shape[-1])
    return placed

  monkeypatch.setattr(Program, "put_batches", recorded)
  result = imdb_jax.fit(tiny(tmp_path, batch_size=5_000))
  assert sizes == {32}
  assert [line["step"] for line in result.history] == [1, 2]


def test_a_new_run_starts_from_the_word_vectors_of_its_training_reviews(tmp_path, capsys, monkeypatch):
  svd = word_vectors.svd
  monkeypatch.setattr(word_vectors, "svd", lambda *arguments: time.sleep(0.7) or svd(*arguments))
  config = change(tiny(tmp_path, epochs=1), "model", embedding="svd", directions=2, pooling="mean_max")
  config = change(config, "optimizer", embedding_rate=0)
  (line,) = imdb_jax.fit(config).history
  assert line["seconds"] >= 0.7
  assert "Computing word vectors" in capsys.readouterr().out
  data = tokens.encode(config.data, sample.load())
  vectors = svd(data.train.tokens, config.data.vocabulary_size, 4)
  found = newest_state(tmp_path)[1].params
  np.testing.assert_array_equal(found["embedding"]["embedding"][0], vectors)
  assert found["backward_lstm"]["kernel"].shape == (1, 4, 16)
  imdb_jax.fit(config)
  assert "Computing word vectors" not in capsys.readouterr().out
  assert imdb_jax.Classifier.load(tmp_path).predict_proba(["A dull film."]).sum() == pytest.approx(1)


@pytest.mark.slow
def test_a_new_run_starts_from_the_word_vectors_of_a_file(tmp_path, capsys):
  path = tmp_path / "vectors.txt"
  path.write_text("film 1 2 3 4\n", encoding="utf-8")
  config = change(tiny(tmp_path / "run", epochs=1), "model", embedding="file")
  config = change(config, "optimizer", embedding_rate=0)
  with pytest.raises(UsageError, match=r"--embedding file: requires --word-vectors FILE"):
    imdb_jax.fit(config)
  imdb_jax.fit(change(config, "runtime", word_vectors=path))
  assert "The file has 1 of" in capsys.readouterr().out
  data = tokens.encode(config.data, sample.load())
  (found,) = newest_state(config.run_dir)[1].params["embedding"]["embedding"]
  np.testing.assert_array_equal(found[1 + data.vocabulary.words.index("film")], [1, 2, 3, 4])
  assert np.count_nonzero(found.any(axis=1)) == 1
  # To resume, the run needs no file.
  imdb_jax.fit(config)


def test_metrics_are_means_over_all_reviews_since_the_last_line(tmp_path):
  result = imdb_jax.fit(tiny(tmp_path))
  steps = [line for line in lines(tmp_path) if line["kind"] == "step"]
  # Every third step, and the last of an epoch.
  assert [line["step"] for line in steps] == [3, 4, 6, 8]
  # The first two lines cover 30 and 2 reviews.
  expected = (30 * steps[0]["loss"] + 2 * steps[1]["loss"]) / 32
  assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-6)
  assert [line["step"] for line in result.history] == [4, 8]


def test_compilation_is_not_part_of_an_epoch(tmp_path, monkeypatch):
  sums = Classification.sums

  def slow(*arguments):
    # Called only while JAX traces the training step.
    time.sleep(1)
    return sums(*arguments)

  monkeypatch.setattr(Classification, "sums", slow)
  # No other test shares a program of seven epochs.
  result = imdb_jax.fit(tiny(tmp_path, epochs=7))
  assert result.compile_seconds > 1
  assert result.history[0]["seconds"] < 1


@pytest.mark.slow
def test_saves_and_evaluation_are_not_part_of_the_training_time(tmp_path, monkeypatch):
  save, evaluate = Checkpoints.save, evaluation.evaluate
  monkeypatch.setattr(Checkpoints, "save", lambda *arguments, **given: time.sleep(0.7) or save(*arguments, **given))
  monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: time.sleep(0.7) or evaluate(*arguments))
  (line,) = imdb_jax.fit(change(tiny(tmp_path, epochs=1), "runtime", save_every_steps=1)).history
  assert checkpoints_of(tmp_path).steps()[:-1] == [3]
  assert line["seconds"] < 0.7 <= line["evaluation_seconds"]


@pytest.mark.slow
def test_the_training_time_of_an_epoch_includes_the_steps_before_a_stop(tmp_path, monkeypatch):
  record_steps = Recorder.record_steps

  def slow(recorder, steps, sums):
    time.sleep(0.3)
    if steps[0] == 3 and not checkpoints_of(tmp_path).steps():
      os.kill(os.getpid(), signal.SIGTERM)
    record_steps(recorder, steps, sums)

  monkeypatch.setattr(Recorder, "record_steps", slow)
  with pytest.raises(Interrupted):
    imdb_jax.fit(tiny(tmp_path, epochs=1))
  (line,) = imdb_jax.fit(tiny(tmp_path, epochs=1)).history
  # Four steps of 0.3 s: three before the stop, and one after it.
  assert 1.2 <= line["seconds"] < 2.4


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(tmp_path):
  def losses(name, seed):
    return [line["loss"] for line in imdb_jax.fit(tiny(tmp_path / name, seed=seed)).history]

  first = losses("first", 0)
  assert losses("second", 0) == first
  assert losses("third", 1) != first


@pytest.mark.slow
@pytest.mark.parametrize("validation", ["split", "test"])
def test_a_run_is_calibrated_on_held_out_reviews_and_never_on_the_test_reviews(tmp_path, validation):
  config = change(tiny(tmp_path, num_seeds=2), "data", validation=validation)
  imdb_jax.fit(config)
  classifier = imdb_jax.Classifier.load(tmp_path)
  if validation == "test":
    assert classifier.temperature == 1
    return
  source = sources.find(config.data, None, config.runtime.cache_dir)
  held_out = tokens.load(source, config.data, cache_dir=config.runtime.cache_dir).validation
  logits, labels, temperature = classifier.logits(held_out), held_out.labels, classifier.temperature

  def penalised_loss(temperature: float) -> float:
    prior = (np.log(temperature) / 0.5) ** 2 / 2
    return Classification().evaluate(logits, labels, temperature).loss + prior / len(labels)

  assert penalised_loss(temperature) < min(penalised_loss(factor * temperature) for factor in (0.99, 1.01))
  uncalibrated = imdb_jax.Classifier.load(tmp_path, calibrate=False)
  assert uncalibrated.temperature == 1
  raw, scaled = (each.predict_proba(["A masterpiece."])[0, 1] for each in (uncalibrated, classifier))
  np.testing.assert_allclose(scaled, special.expit(special.logit(np.float64(raw)) / temperature), rtol=1e-5)
  manifest = tmp_path / "manifests" / f"{classifier.step}.json"
  manifest.write_text(manifest.read_text().replace(f'"temperature": {temperature}', '"temperature": "warm"'))
  with pytest.raises(CheckpointError, match="invalid temperature"):
    imdb_jax.Classifier.load(tmp_path)


def test_with_held_out_reviews_the_report_says_so(tmp_path):
  imdb_jax.fit(change(tiny(tmp_path), "data", validation="split"))
  assert "held out of training" in (tmp_path / "report.md").read_text()


def test_the_two_newest_checkpoints_and_the_best_one_are_kept(tmp_path):
  result = imdb_jax.fit(tiny(tmp_path, epochs=6))
  # The first of equals is the best.
  best = max(result.history, key=lambda line: line["val_accuracy"])
  assert result.best == best
  kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
  assert kept == {20, 24, best["step"]}


def test_the_best_epoch_is_that_of_the_ensemble_and_is_what_the_classifier_restores(tmp_path, monkeypatch):
  evaluate = evaluation.evaluate
  # The accuracy of the ensemble and the mean over its seeds, after each epoch.
  accuracies = iter([(0.6, 0.9), (0.8, 0.5), (0.7, 0.7), (0.75, 0.95)])

  def chosen(*arguments):
    of_ensemble, of_seeds = next(accuracies)
    result, logits = evaluate(*arguments)
    seeds = [dataclasses.replace(seed, accuracy=of_seeds) for seed in result.seeds]
    return dataclasses.replace(result, accuracy=of_ensemble, seeds=seeds), logits

  monkeypatch.setattr(evaluation, "evaluate", chosen)
  result = imdb_jax.fit(tiny(tmp_path, epochs=4, num_seeds=2))
  assert (result.best["epoch"], result.best["val_accuracy"]) == (2, 0.8)
  assert imdb_jax.Classifier.load(tmp_path).step == result.best["step"] == 8
  assert "Best epoch 2: val_accuracy 0.8000 (ensemble)" in (tmp_path / "report.md").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
  with pytest.raises(DivergenceError, match="learning-rate"):
    imdb_jax.fit(change(tiny(tmp_path), "optimizer", learning_rate=1e38))
  assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_implementations_train_alike(tmp_path):
  def losses(implementation):
    config = change(tiny(tmp_path / implementation, epochs=5), "runtime", implementation=implementation, log_every=1)
    imdb_jax.fit(config)
    return [line["loss"] for line in lines(config.run_dir) if line["kind"] == "step"]

  scan, chunked = losses("scan"), losses("chunked")
  assert len(scan) == 20
  np.testing.assert_allclose(chunked, scan, rtol=1e-5)


@pytest.mark.parametrize("seconds", [-1.0, 1e300, 10**400, "1", None])
def test_seconds_that_no_run_saves_are_refused(seconds, tmp_path):
  config, path = tiny(tmp_path / "run"), tmp_path / "run" / "manifests" / "8.json"
  imdb_jax.fit(config)
  value = json.loads(path.read_text())
  value["facts"]["progress"]["seconds"] = seconds
  path.write_text(json.dumps(value))
  with pytest.raises(CheckpointError, match="Step 8: the checkpoint's progress has invalid seconds"):
    imdb_jax.fit(config)


def test_lines_after_the_last_checkpoint_are_dropped_and_written_again(tmp_path):
  config = tiny(tmp_path / "run")
  imdb_jax.fit(config)
  path = tmp_path / "run" / "metrics.jsonl"
  written = lines(tmp_path / "run")
  later = {"kind": "step", "epoch": 3, "step": 11, "loss": 1.0, "accuracy": 0.5}
  path.write_text("".join(json.dumps(line) + "\n" for line in [*written, later]) + '{"kind": "st')
  imdb_jax.fit(config)
  assert lines(tmp_path / "run") == written
