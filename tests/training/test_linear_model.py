"""A linear model of n-grams beside the network: fitted once, never trained, and part of every prediction."""

import dataclasses
import itertools
import signal

import jax
import numpy as np
import programs
import pytest
from programs import EPOCH, assert_close, assert_equal, config_of, make_split, mesh_of, rows_of, train
from reliability.sandbox import newest_state
from training.tiny import assert_same_end, change, lines, tiny

import imdb_jax
from imdb_jax import devices
from imdb_jax.config import Config, ModelConfig, RuntimeConfig, TrainingConfig
from imdb_jax.data import ngrams, sample, tokens
from imdb_jax.errors import UsageError
from imdb_jax.optimizer import make_optimizer
from imdb_jax.processes import Interrupted
from imdb_jax.program import Program, TrainState
from imdb_jax.training.metrics import Recorder

pytestmark = pytest.mark.slow

SEEDS = 2
WITHOUT = config_of(training=TrainingConfig(batch_size=32, num_seeds=SEEDS))
WITH = dataclasses.replace(WITHOUT, model=dataclasses.replace(WITHOUT.model, ngrams=2))
# Each seed has batches of its own.
ROWS = np.concatenate([rows_of(*EPOCH), rows_of(*EPOCH[::-1])], axis=1)


def fitted() -> dict[str, np.ndarray]:
  """Return the linear model of all reviews except those of `logits_of`, which therefore have other n-grams too."""
  split = make_split()
  return ngrams.fit(split.tokens[12:], split.labels[12:], 2)


def initial(program: Program) -> TrainState:
  return jax.device_get(program.init({"ngrams": fitted()}))


def logits_of(program: Program, params) -> np.ndarray:
  """Return the logits f32[seeds, 12] of reviews from empty to full."""
  split = make_split()
  arrays = devices.put((split.tokens[:12], split.lengths[:12]), devices.over_rows(program.mesh))
  return np.asarray(program.predict(programs.put(program, params), *arrays))[:, :, 0]


def linear_logits(reviews: np.ndarray, model: dict[str, np.ndarray]) -> np.ndarray:
  """Return the logits of the linear model in float64, review by review and phrase by phrase."""

  def key_of(phrase: tuple[int, ...]) -> int:
    # A pair's own key is the one that its words do not have.
    words, found = (set(ngrams.keys_of(np.array([phrase]), n).flat) - {0} for n in (1, 2))
    return (words if len(phrase) == 1 else found - words).pop()

  weights = dict(zip(model["keys"].tolist(), model["weights"].astype(np.float64), strict=True))
  logits = np.full(len(reviews), float(model["bias"]))
  for row, review in enumerate(reviews):
    words = review[review > 0].tolist()
    logits[row] += sum(
      weights.get(key_of(phrase), 0) for phrase in {*((word,) for word in words), *itertools.pairwise(words)}
    )
  return logits


@pytest.mark.parametrize(("num_devices", "over_seeds"), [(1, "map"), (3, "vmap")])
def test_predictions_are_the_mean_of_the_network_and_the_linear_model(num_devices, over_seeds):
  both, network = Program(WITH, mesh_of(num_devices)), Program(WITHOUT, mesh_of(1))
  if over_seeds == "vmap":
    both._over_seeds = jax.vmap
  params = initial(both).params
  alone = {name: values for name, values in params.items() if name != "ngrams"}
  expected = (logits_of(network, alone).astype(np.float64) + linear_logits(make_split().tokens[:12], fitted())) / 2
  np.testing.assert_allclose(logits_of(both, params), expected, atol=1e-6)


def test_training_goes_on_as_without_the_linear_model_and_leaves_it_as_it_is():
  """An answer that is right already would leave the network nothing to learn."""
  both, network = (
    Program(config, mesh_of(3), make_optimizer(config.optimizer, num_steps=10)) for config in (WITH, WITHOUT)
  )
  found, sums = train(both, ROWS, initial(both))
  expected, expected_sums = train(network, ROWS)
  for seed in range(SEEDS):
    assert_equal(jax.tree.map(lambda leaf, seed=seed: leaf[seed], found.params["ngrams"]), fitted())
  # Two programs may round differently; Adam moves each parameter by about 1e-3 per step.
  assert_close(sums, expected_sums, atol=1e-4)
  assert_close({**found.params, "ngrams": {}}, {**expected.params, "ngrams": {}}, atol=2e-5)
  assert jax.tree.map(np.shape, found.opt_state) == jax.tree.map(np.shape, expected.opt_state), "it has no moments"


def run(run_dir) -> Config:
  config = change(tiny(run_dir, num_seeds=SEEDS), "model", ngrams=3, embedding="svd")
  imdb_jax.fit(config)
  return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Config:
  return run(tmp_path_factory.mktemp("runs") / "ngrams")


def test_a_run_fits_its_training_reviews_and_predicts_as_it_was_evaluated(trained):
  data = tokens.encode(trained.data, sample.load())
  saved = newest_state(trained.run_dir)[1].params["ngrams"]
  expected = ngrams.fit(data.train.tokens, data.train.labels, 3)
  assert_equal(jax.tree.map(lambda leaf: leaf[1], saved), expected)
  classifier = imdb_jax.Classifier.load(
    trained.run_dir, step="latest", runtime=RuntimeConfig(platform="cpu", num_devices=1)
  )
  metrics, last = classifier.evaluate(data.validation), lines(trained.run_dir)[-1]
  assert (metrics.loss, metrics.accuracy) == (last["val_loss"], last["val_accuracy"])
  texts = sample.load()["test"].texts[:32]
  is_positive = data.validation.labels[:32] == 1
  found = classifier.predict(texts)
  assert float(np.mean((found == "positive") == is_positive)) == last["val_accuracy"]


def test_a_stopped_run_continues_with_the_same_bits_and_does_not_fit_again(trained, tmp_path, monkeypatch, capsys):
  record, calls = Recorder.record_steps, []

  def interrupted(*arguments):
    calls.append(None)
    if len(calls) == 3:
      signal.raise_signal(signal.SIGTERM)
    return record(*arguments)

  monkeypatch.setattr(Recorder, "record_steps", interrupted)
  with pytest.raises(Interrupted):
    run(tmp_path)
  assert "Fitting the linear model of n-grams" in capsys.readouterr().out
  config = run(tmp_path)
  assert "Fitting the linear model of n-grams" not in capsys.readouterr().out
  assert_same_end(trained, config)


@pytest.mark.parametrize("value", [-1, 4, 2.0, True])
def test_other_lengths_are_refused(value):
  with pytest.raises(UsageError, match=rf"--ngrams {value}: must be a whole number from 0 to 3"):
    ModelConfig(ngrams=value)
