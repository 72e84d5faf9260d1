"""Several seeds at once: each is trained as if alone, and together they are one ensemble."""

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest
import sklearn.metrics
from training.tiny import assert_same_end, change, final_state, lines, tiny

import imdb_jax
from imdb_jax import cli
from imdb_jax.config import Config
from imdb_jax.data import sample, sources, tokens
from imdb_jax.processes import Interrupted
from imdb_jax.report import page
from imdb_jax.store import metrics_log
from imdb_jax.training.metrics import Recorder

pytestmark = [pytest.mark.usefixtures("shared_programs"), pytest.mark.slow]

SEEDS = range(5, 8)
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


def config_of(run_dir, **training) -> Config:
  """Return settings with dropout, masked padding, batches by length, and steps so large that the seeds differ much."""
  config = tiny(run_dir, batch_size=20, bucket_by_length=True, **training)
  config = change(config, "data", sequence_length=64, limit=64)
  return change(change(config, "model", mask_padding=True), "optimizer", learning_rate=0.1)


@pytest.fixture(scope="module")
def together(shared_programs, tmp_path_factory) -> Config:
  config = config_of(tmp_path_factory.mktemp("seeds") / "together", seed=SEEDS[0], num_seeds=len(SEEDS))
  imdb_jax.fit(config)
  return config


@pytest.fixture(scope="module")
def alone(shared_programs, tmp_path_factory) -> list[Config]:
  configs = [config_of(tmp_path_factory.mktemp("seeds") / str(seed), seed=seed) for seed in SEEDS]
  for config in configs:
    imdb_jax.fit(config)
  return configs


def epochs_of(config: Config) -> list[dict]:
  return [line for line in lines(config.run_dir) if line["kind"] == "epoch"]


def test_each_seed_ends_where_its_own_run_ends(together, alone):
  """Up to rounding: Adam moves each parameter by about 0.1 per step, so other masks or batches would show."""
  found, singles = final_state(together.run_dir), [final_state(config.run_dir) for config in alone]
  assert found[".step"].tolist() == [8] * len(SEEDS)
  for name, values in found.items():
    # A run of one seed has an axis of seeds too.
    expected = np.concatenate([single[name] for single in singles])
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def test_an_epoch_has_the_metrics_of_each_seed(together, alone):
  singles, found = [epochs_of(config) for config in alone], epochs_of(together)
  assert len(found) == 2
  for epoch, line in enumerate(found):
    expected = [
      {"seed": seed} | {name: single[epoch][name] for name in METRICS}
      for seed, single in zip(SEEDS, singles, strict=True)
    ]
    assert line["seeds"] == [pytest.approx(each, rel=1e-4) for each in expected]
    for name in ("loss", "accuracy"):
      assert line[name] == pytest.approx(np.mean([each[name] for each in expected]), rel=1e-4)
  steps = [[line["loss"] for line in lines(config.run_dir) if line["kind"] == "step"] for config in (together, *alone)]
  np.testing.assert_allclose(steps[0], np.mean(steps[1:], axis=0), rtol=1e-4)


def test_one_seed_is_an_ensemble_of_one(alone):
  for config, seed in zip(alone, SEEDS, strict=True):
    for line in epochs_of(config):
      assert line["seeds"] == [{"seed": seed} | {name: pytest.approx(line[name], rel=1e-12) for name in METRICS}]


def test_the_run_predicts_and_is_evaluated_as_one_ensemble(together, alone, monkeypatch, capsys):
  def load(config):
    return imdb_jax.Classifier.load(config.run_dir, step="latest")

  texts = sample.load()["test"].texts[:64]
  expected = np.mean([load(config).predict_proba(texts) for config in alone], axis=0, dtype=np.float64)
  np.testing.assert_allclose(load(together).predict_proba(texts), expected, atol=1e-5)
  assert load(together).predict_proba([]).shape == (0, 2)

  runtime = together.runtime
  source = sources.find(together.data, runtime.archive, runtime.cache_dir)
  labels = tokens.load(source, together.data, cache_dir=runtime.cache_dir).test.labels
  monkeypatch.setattr(sys, "argv", ["imdb-jax", "evaluate", str(together.run_dir), "--json", "--step", "latest"])
  cli.main()
  result = json.loads(capsys.readouterr().out)
  assert result["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, expected[:, 1]), rel=1e-5)
  assert result["accuracy"] == np.mean((expected[:, 1] > 0.5) == labels)
  last = epochs_of(together)[-1]
  mean = np.mean([each["val_accuracy"] for each in last["seeds"]])
  assert result["accuracy"] != pytest.approx(mean), "else the check proves nothing"
  assert (result["loss"], result["accuracy"]) == (last["val_loss"], last["val_accuracy"])
  assert [(each["seed"], each["loss"], each["accuracy"]) for each in result["seeds"]] == [
    (each["seed"], each["val_loss"], each["val_accuracy"]) for each in last["seeds"]
  ]


def test_the_report_tells_how_much_the_seeds_differ(tmp_path):
  def line(epoch, accuracies, ensemble):
    seeds = [{"seed": seed} | dict.fromkeys(METRICS, value) for seed, value in zip(SEEDS, accuracies, strict=True)]
    values = dict.fromkeys(METRICS, float(np.mean(accuracies))) | {"val_accuracy": ensemble}
    return {"epoch": epoch, "step": 4 * epoch, **values, "seconds": 1.0, "evaluation_seconds": 1.0, "seeds": seeds}

  # By the mean over the seeds, the second epoch would be the best.
  history = [line(1, (0.5, 0.6, 0.9), 0.95), line(2, (0.7, 0.7, 0.8), 0.85), line(3, (0.7, 0.6, 0.65), 0.75)]
  last, best = page.summary(config_of(tmp_path, seed=SEEDS[0], num_seeds=3), history)
  spread = "0.6500 ± 0.0500 (seeds, n = 3, from 0.6000 to 0.7000)"
  assert last == f"Last epoch: val_accuracy 0.7500 (ensemble), {spread}"
  assert best.startswith("Best epoch 1: val_accuracy 0.9500 (ensemble), 0.6667 ± 0.2082 (")
  metrics_log.write_csv(tmp_path, history)
  with (tmp_path / "history.csv").open(newline="") as file:
    *_, last = csv.DictReader(file)
  assert (last["val_accuracy"], last["val_accuracy_min"], last["val_accuracy_max"]) == ("0.75", "0.6", "0.7")


def test_a_stop_within_an_epoch_changes_nothing(tmp_path, together, monkeypatch):
  record_steps = Recorder.record_steps

  def interrupted(recorder, steps, sums):
    if 6 in steps:
      os.kill(os.getpid(), signal.SIGINT)
    record_steps(recorder, steps, sums)

  stopped = change(together, "runtime", run_dir=tmp_path / "stopped", save_every_steps=1)
  with monkeypatch.context() as patch:
    patch.setattr(Recorder, "record_steps", interrupted)
    with pytest.raises(Interrupted):
      imdb_jax.fit(stopped)
  imdb_jax.fit(stopped)
  assert_same_end(together, stopped)
