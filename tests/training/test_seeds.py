"""Several seeds at once: each is trained as if alone, and together they are one ensemble."""

import csv
import dataclasses
import json
import os
import signal
import sys

import jax
import numpy as np
import pytest
import sklearn.metrics
from training.tiny import final_state, lines, tiny, without_times

import imdb_jax
from imdb_jax import cli
from imdb_jax.config import Config
from imdb_jax.data import sample, tokens
from imdb_jax.training import report
from imdb_jax.training.recorder import Recorder
from imdb_jax.training.signals import Interrupted

SEEDS = range(5, 8)
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


def config_of(run_dir, **training) -> Config:
  """Dropout, batches by length, padding that costs nothing, and steps so large that the seeds differ much."""
  config = tiny(run_dir, bucket_by_length=True, **training)
  return dataclasses.replace(
    config,
    dataset=dataclasses.replace(config.dataset, sequence_length=64),
    model=dataclasses.replace(config.model, mask_padding=True),
    optimizer=dataclasses.replace(config.optimizer, learning_rate=0.1),
  )


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Config:
  config = config_of(tmp_path_factory.mktemp("seeds") / "together", seed=SEEDS[0], num_seeds=len(SEEDS))
  imdb_jax.fit(config)
  return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[Config]:
  configs = [config_of(tmp_path_factory.mktemp("seeds") / str(seed), seed=seed) for seed in SEEDS]
  for config in configs:
    imdb_jax.fit(config)
  return configs


def test_each_seed_ends_where_its_own_run_ends(together, alone):
  """To rounding: Adam moves each parameter by about 0.1 a step, so other masks or batches would show at that size."""
  found, singles = final_state(together.run_dir), [final_state(config.run_dir) for config in alone]
  assert all(np.all(of_run[".step"] == 8) for of_run in (found, *singles))
  for name, values in found.items():
    expected = np.stack([single[name] for single in singles])
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_an_epoch_holds_the_means_and_each_seed(together, alone):
  singles = [[line for line in lines(config.run_dir) if line["kind"] == "epoch"] for config in alone]
  found = [line for line in lines(together.run_dir) if line["kind"] == "epoch"]
  assert len(found) == 2
  for epoch, line in enumerate(found):
    expected = [
      {"seed": seed} | {name: s[epoch][name] for name in METRICS} for seed, s in zip(SEEDS, singles, strict=True)
    ]
    assert line["seeds"] == [pytest.approx(of_seed, rel=1e-4) for of_seed in expected]
    for name in METRICS:
      assert line[name] == pytest.approx(np.mean([of_seed[name] for of_seed in expected]), rel=1e-4)
  steps = [[line["loss"] for line in lines(config.run_dir) if line["kind"] == "step"] for config in (together, *alone)]
  np.testing.assert_allclose(steps[0], np.mean(steps[1:], axis=0), rtol=1e-4)


def test_the_run_predicts_and_is_evaluated_as_one_ensemble(together, alone, monkeypatch, capsys):
  def load(config):
    return imdb_jax.Classifier.load(config.run_dir, step="latest")

  texts = sample.load()["test"].texts[:32]
  expected = np.mean([load(config).predict(texts) for config in alone], axis=0)
  np.testing.assert_allclose(load(together).predict(texts), expected, atol=1e-5)
  assert load(together).predict([]).shape == (0,)

  labels = tokens.load(together.dataset, cache_dir=together.runtime.cache_dir).test.labels
  monkeypatch.setattr(sys, "argv", ["evaluate.py", str(together.run_dir), "--json", "--step", "latest"])
  cli.evaluate()
  result = json.loads(capsys.readouterr().out)
  assert result["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, expected.astype(np.float64)), rel=1e-5)
  assert result["accuracy"] == np.mean((expected > 0.5) == labels)
  last = lines(together.run_dir)[-1]
  assert result["accuracy"] == last["ensemble_accuracy"]
  assert [(of_seed["seed"], of_seed["accuracy"]) for of_seed in result["seeds"]] == [
    (of_seed["seed"], of_seed["val_accuracy"]) for of_seed in last["seeds"]
  ]


def test_the_report_tells_how_far_the_seeds_spread(tmp_path):
  def line(epoch, accuracies, ensemble):
    seeds = [
      {"seed": seed} | dict.fromkeys(METRICS, accuracy) for seed, accuracy in zip(SEEDS, accuracies, strict=True)
    ]
    means = dict.fromkeys(METRICS, np.mean(accuracies))
    times = {"seconds": 1.0, "evaluation_seconds": 1.0}
    return {"epoch": epoch, "step": 4 * epoch, **means, **times, "seeds": seeds, "ensemble_accuracy": ensemble}

  # The second epoch is the best by the mean, the first by any one seed and as an ensemble.
  history = [line(1, (0.5, 0.6, 0.9), 0.95), line(2, (0.7, 0.7, 0.8), 0.85), line(3, (0.7, 0.6, 0.65), 0.75)]
  report.write(config_of(tmp_path, seed=SEEDS[0], num_seeds=3), history)
  text = (tmp_path / "report.md").read_text()
  assert (
    "Last epoch: val_accuracy 0.6500 ± 0.0500 (sample standard deviation, n = 3; minimum 0.6000, maximum 0.7000), "
    "ensemble_accuracy 0.7500." in text
  )
  assert "Best epoch: 2, val_accuracy 0.7333 ± 0.0577 (" in text
  for row in ("| 5 | 0.7000 |", "| 6 | 0.6000 |", "| 7 | 0.6500 |"):
    assert row in text
  with (tmp_path / "history.csv").open(newline="") as file:
    *_, last = csv.DictReader(file)
  assert (last["val_accuracy_min"], last["val_accuracy_max"], last["ensemble_accuracy"]) == ("0.6", "0.7", "0.75")


def test_a_stop_within_an_epoch_changes_nothing(tmp_path, together, monkeypatch):
  record_steps = Recorder.record_steps

  def interrupted(recorder, numbers, metrics):
    if 6 in numbers:
      os.kill(os.getpid(), signal.SIGINT)
    record_steps(recorder, numbers, metrics)

  stopped = dataclasses.replace(
    together, runtime=dataclasses.replace(together.runtime, run_dir=tmp_path / "stopped", save_every_steps=1)
  )
  with monkeypatch.context() as patch:
    patch.setattr(Recorder, "record_steps", interrupted)
    with pytest.raises(Interrupted):
      imdb_jax.fit(stopped)
  imdb_jax.fit(stopped)
  assert without_times(stopped.run_dir) == without_times(together.run_dir)
  jax.tree.map(np.testing.assert_array_equal, final_state(stopped.run_dir), final_state(together.run_dir))
