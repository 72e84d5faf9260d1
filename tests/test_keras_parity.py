"""Keras 3 with our weights computes our logits, losses and updates.

Run as a script this file is Keras's side: it wants JAX to itself, with settings of its own.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from imdb_jax import sharding, state, steps
from imdb_jax.config import ModelConfig, OptimizerConfig
from imdb_jax.model import SentimentLSTM

VOCABULARY_SIZE, LENGTH, BATCH_SIZE, NUM_STEPS = 30, 9, 8, 3
CONFIG = ModelConfig(embedding_size=6, hidden_size=7, input_dropout_rate=0, recurrent_dropout_rate=0)
# In the order of Keras's get_weights.
WEIGHTS = (
  ("embedding", "embedding"),
  ("lstm", "kernel"),
  ("lstm", "recurrent_kernel"),
  ("lstm", "bias"),
  ("dense", "kernel"),
  ("dense", "bias"),
)


def keras_side(source: Path, target: Path) -> None:
  """Reads weights and batches, writes what Keras makes of them."""
  import keras

  keras.utils.set_random_seed(0)
  given = np.load(source)
  results = {}

  def build(vocabulary_size, embedding_size, hidden_size, length, mask_zero):
    layers = [
      keras.layers.Embedding(vocabulary_size, embedding_size, mask_zero=mask_zero),
      keras.layers.LSTM(hidden_size),
      keras.layers.Dense(1, activation="sigmoid"),
    ]
    model = keras.Sequential(layers)
    model.build((None, length))
    return model

  for mask_zero in (False, True):
    model = build(VOCABULARY_SIZE, CONFIG.embedding_size, CONFIG.hidden_size, LENGTH, mask_zero)
    model.set_weights([given[f"initial_{i}"] for i in range(len(WEIGHTS))])
    model.compile(optimizer=keras.optimizers.Adam(), loss="binary_crossentropy")
    results[f"{mask_zero}_probabilities"] = model.predict_on_batch(given["tokens"][0])[:, 0]
    for i, (tokens, labels) in enumerate(zip(given["tokens"], given["labels"], strict=True)):
      results[f"{mask_zero}_loss_{i}"] = model.train_on_batch(tokens, labels[:, None])
      for j, weight in enumerate(model.get_weights()):
        results[f"{mask_zero}_weight_{i}_{j}"] = weight
  for j, weight in enumerate(build(4000, 128, 128, 400, False).get_weights()):
    results[f"article_{j}"] = weight
  np.savez(target, **results)


if __name__ == "__main__":
  keras_side(Path(sys.argv[1]), Path(sys.argv[2]))


@dataclasses.dataclass(frozen=True)
class Batches:
  tokens: np.ndarray
  lengths: np.ndarray
  labels: np.ndarray


def make_batches() -> Batches:
  rng = np.random.default_rng(5)
  lengths = rng.integers(1, LENGTH + 1, (NUM_STEPS, BATCH_SIZE)).astype(np.int32)
  lengths[:, :2] = 0, LENGTH
  tokens = rng.integers(1, VOCABULARY_SIZE, (NUM_STEPS, BATCH_SIZE, LENGTH)).astype(np.int32)
  tokens[np.arange(LENGTH) < LENGTH - lengths[..., None]] = 0
  return Batches(tokens, lengths, rng.integers(0, 2, (NUM_STEPS, BATCH_SIZE)).astype(np.float32))


def one_device() -> Mesh:
  return Mesh(np.array(jax.devices()[:1]), (sharding.AXIS,))


def make_state(config: ModelConfig, vocabulary_size: int) -> state.TrainState:
  model = SentimentLSTM(config, vocabulary_size)
  return state.create(model, state.make_optimizer(OptimizerConfig(), num_steps=10), 3, one_device())


def weights_of(params: dict) -> list[np.ndarray]:
  return [np.array(params[layer][name]) for layer, name in WEIGHTS]


@pytest.fixture(scope="module")
def keras_results(tmp_path_factory) -> dict[str, np.ndarray]:
  if importlib.util.find_spec("keras") is None:
    pytest.skip("keras is not installed")
  folder, batches = tmp_path_factory.mktemp("keras"), make_batches()
  source, target = folder / "source.npz", folder / "target.npz"
  initial = weights_of(make_state(CONFIG, VOCABULARY_SIZE).params)
  arrays = {f"initial_{i}": weight for i, weight in enumerate(initial)}
  np.savez(source, tokens=batches.tokens, labels=batches.labels, **arrays)
  environment = os.environ | {
    "KERAS_BACKEND": "jax",
    "KERAS_HOME": str(folder),
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
  }
  command = [sys.executable, __file__, str(source), str(target)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
  assert done.returncode == 0, done.stderr[-2000:]
  with np.load(target) as results:
    return dict(results)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_probabilities_are_those_of_keras(keras_results, mask_padding):
  model = SentimentLSTM(dataclasses.replace(CONFIG, mask_padding=mask_padding), VOCABULARY_SIZE)
  batches, params = make_batches(), make_state(CONFIG, VOCABULARY_SIZE).params
  predict = steps.make_predict_step(model, one_device())
  logits = np.asarray(predict(params, batches.tokens[0], batches.lengths[0]), np.float64)
  probabilities = keras_results[f"{mask_padding}_probabilities"].astype(np.float64)
  # The logits are about 0.01, and rounding of a probability of one half is 4 times as large in its logit.
  np.testing.assert_allclose(1 / (1 + np.exp(-logits)), probabilities, atol=2e-7)
  np.testing.assert_allclose(logits, np.log(probabilities / (1 - probabilities)), atol=1e-6)
  assert np.ptp(logits) > 1e-3


@pytest.mark.parametrize("mask_padding", [False, True])
def test_losses_and_updates_are_those_of_keras(keras_results, mask_padding):
  """Adam moves a weight by up to 1e-3 a step; tolerated is a thousandth of that a step."""
  model = SentimentLSTM(dataclasses.replace(CONFIG, mask_padding=mask_padding), VOCABULARY_SIZE)
  mesh, batches = one_device(), make_batches()
  step = steps.make_train_step(model, state.make_optimizer(OptimizerConfig(), num_steps=10), mesh)
  current = make_state(CONFIG, VOCABULARY_SIZE)
  for i in range(NUM_STEPS):
    examples = {
      "tokens": batches.tokens[i],
      "lengths": batches.lengths[i],
      "labels": batches.labels[i],
      "weights": np.ones(BATCH_SIZE, np.float32),
    }
    before = weights_of(current.params)
    current, metrics = step(current, sharding.put(examples, sharding.over_reviews(mesh)))
    loss = float(metrics["loss"] / metrics["weight"])
    np.testing.assert_allclose(loss, keras_results[f"{mask_padding}_loss_{i}"], rtol=1e-6)
    for j, (name, weight) in enumerate(zip(WEIGHTS, weights_of(current.params), strict=True)):
      expected = keras_results[f"{mask_padding}_weight_{i}_{j}"]
      np.testing.assert_allclose(weight, expected, rtol=0, atol=(i + 1) * 1e-6, err_msg=f"{name} after step {i + 1}")
      assert np.abs(weight - before[j]).max() > 1e-4, f"{name} did not move"


def test_initial_weights_are_spread_as_those_of_keras(keras_results):
  """The draws differ, their distribution does not: same spread and bounds, to what so many draws allow."""
  ours = weights_of(make_state(ModelConfig(), 4000).params)
  for j, (name, weight) in enumerate(zip(WEIGHTS, ours, strict=True)):
    theirs = keras_results[f"article_{j}"]
    assert weight.shape == theirs.shape
    np.testing.assert_allclose(weight.std(), theirs.std(), rtol=max(0.01, 2 / np.sqrt(weight.size)), err_msg=str(name))
    np.testing.assert_allclose(weight.mean(), theirs.mean(), atol=8 * theirs.std() / np.sqrt(weight.size) + 1e-9)
