"""With our weights, Keras 3 computes our probabilities, losses and updates.

Run as a script, this file is the side of Keras, which needs a process with its own settings of JAX.
"""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import programs
import pytest

from imdb_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.program import Program, TrainState

# The import of Keras takes long.
pytestmark = pytest.mark.slow

VOCABULARY_SIZE, LENGTH, BATCH_SIZE, NUM_STEPS = 30, 9, 8, 3
CONFIG = ModelConfig(embedding_size=6, hidden_size=7, input_dropout_rate=0, recurrent_dropout_rate=0)
CELLS = ("lstm", "gru", "rnn")
# The cell, and whether padding is masked.
MODELS = [("lstm", False), *((cell, True) for cell in CELLS)]


def names_of(cell: str) -> list[tuple[str, str]]:
  """Return the names of the weights in the order of Keras's get_weights."""
  recurrent = [(cell, name) for name in ("kernel", "recurrent_kernel", "bias")]
  return [("embedding", "embedding"), *recurrent, ("dense", "kernel"), ("dense", "bias")]


def keras_side(source: Path, target: Path) -> None:
  """Train with Keras from the weights and batches in `source`; write probabilities, losses and weights to `target`."""
  import keras

  keras.utils.set_random_seed(0)
  given = np.load(source)
  results = {}
  cells = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}

  def build(cell, vocabulary_size, embedding_size, hidden_size, length, mask_zero):
    layers = [
      keras.layers.Embedding(vocabulary_size, embedding_size, mask_zero=mask_zero),
      cells[cell](hidden_size),
      keras.layers.Dense(1, activation="sigmoid"),
    ]
    model = keras.Sequential(layers)
    model.build((None, length))
    return model

  for cell, mask_zero in MODELS:
    model = build(cell, VOCABULARY_SIZE, CONFIG.embedding_size, CONFIG.hidden_size, LENGTH, mask_zero)
    model.set_weights([given[f"{cell}_{i}"] for i in range(len(names_of(cell)))])
    model.compile(optimizer=keras.optimizers.Adam(), loss="binary_crossentropy")
    results[f"{cell}_{mask_zero}_probabilities"] = model.predict_on_batch(given["tokens"][0])[:, 0]
    for i, (tokens, labels) in enumerate(zip(given["tokens"], given["labels"], strict=True)):
      results[f"{cell}_{mask_zero}_loss_{i}"] = model.train_on_batch(tokens, labels[:, None])
      for j, weight in enumerate(model.get_weights()):
        results[f"{cell}_{mask_zero}_weight_{i}_{j}"] = weight
  for cell in CELLS:
    for j, weight in enumerate(build(cell, 4000, 128, 128, 400, False).get_weights()):
      results[f"article_{cell}_{j}"] = weight
  np.savez(target, **results)


if __name__ == "__main__":
  keras_side(Path(sys.argv[1]), Path(sys.argv[2]))


def make_split() -> TokenSplit:
  """Return the reviews of all batches, in order; each batch has an empty and a full one."""
  rng = np.random.default_rng(5)
  lengths = rng.integers(1, LENGTH + 1, (NUM_STEPS, BATCH_SIZE)).astype(np.int32)
  lengths[:, :2] = 0, LENGTH
  tokens = rng.integers(1, VOCABULARY_SIZE, (NUM_STEPS, BATCH_SIZE, LENGTH)).astype(np.int32)
  tokens[np.arange(LENGTH) < LENGTH - lengths[..., None]] = 0
  labels = rng.integers(0, 2, NUM_STEPS * BATCH_SIZE).astype(np.int32)
  return TokenSplit(tokens=tokens.reshape(-1, LENGTH), lengths=lengths.ravel(), labels=labels)


@functools.cache
def program_of(cell: str, mask_padding: bool) -> Program:
  config = Config(
    data=DataConfig(vocabulary_size=VOCABULARY_SIZE, sequence_length=LENGTH),
    model=dataclasses.replace(CONFIG, cell=cell, mask_padding=mask_padding),
    training=TrainingConfig(seed=3, batch_size=BATCH_SIZE),
  )
  return Program(config, programs.mesh_of(1))


def initial_state(program: Program) -> TrainState:
  """Return the state before the first step, but with biases of which each matters."""
  state, cell = program.init(), program.config.model.cell
  bias = state.params[cell]["bias"]
  bias = bias + np.random.default_rng(1).uniform(-0.5, 0.5, bias.shape).astype(np.float32)
  params = state.params | {cell: state.params[cell] | {"bias": bias}}
  return programs.put(program, dataclasses.replace(state, params=params))


def weights_of(cell: str, params: dict) -> list[np.ndarray]:
  """Return the weights of the only seed, in the order of Keras."""
  return [np.array(params[layer][name])[0] for layer, name in names_of(cell)]


@pytest.fixture(scope="module")
def keras_results(tmp_path_factory) -> dict[str, np.ndarray]:
  if importlib.util.find_spec("keras") is None:
    pytest.skip("keras is not installed")
  folder, split = tmp_path_factory.mktemp("keras"), make_split()
  source, target = folder / "source.npz", folder / "target.npz"
  arrays = {}
  for cell in CELLS:
    weights = weights_of(cell, initial_state(program_of(cell, True)).params)
    arrays |= {f"{cell}_{i}": weight for i, weight in enumerate(weights)}
  arrays["tokens"] = split.tokens.reshape(NUM_STEPS, BATCH_SIZE, LENGTH)
  arrays["labels"] = split.labels.astype(np.float32).reshape(NUM_STEPS, BATCH_SIZE)
  np.savez(source, **arrays)
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


@pytest.mark.parametrize(("cell", "mask_padding"), MODELS)
def test_probabilities_are_those_of_keras(keras_results, cell, mask_padding):
  program, split = program_of(cell, mask_padding), make_split()
  logits = program.predict(initial_state(program).params, split.tokens[:BATCH_SIZE], split.lengths[:BATCH_SIZE])
  logits = np.asarray(logits, np.float64)[0, :, 0]
  probabilities = keras_results[f"{cell}_{mask_padding}_probabilities"].astype(np.float64)
  # The logits are about 0.01. Rounding errors of a probability near one half are 4 times as large in its logit.
  np.testing.assert_allclose(1 / (1 + np.exp(-logits)), probabilities, atol=2e-7)
  np.testing.assert_allclose(logits, np.log(probabilities / (1 - probabilities)), atol=1e-6)
  assert np.ptp(logits) > 1e-3


@pytest.mark.parametrize(("cell", "mask_padding"), MODELS)
def test_losses_and_updates_are_those_of_keras(keras_results, cell, mask_padding):
  """Adam moves a weight by up to 1e-3 per step; the tolerance is a thousandth of that."""
  program = program_of(cell, mask_padding)
  state = initial_state(program)
  for i in range(NUM_STEPS):
    rows = np.arange(i * BATCH_SIZE, (i + 1) * BATCH_SIZE, dtype=np.int32)[None, None, :]
    before = weights_of(cell, state.params)
    state, sums = program.train_steps(state, *programs.put_batches(program, rows, make_split()))
    loss = float(sums["loss"][0, 0] / sums["weight"][0, 0])
    np.testing.assert_allclose(loss, keras_results[f"{cell}_{mask_padding}_loss_{i}"], rtol=1e-6)
    for j, (name, weight) in enumerate(zip(names_of(cell), weights_of(cell, state.params), strict=True)):
      expected = keras_results[f"{cell}_{mask_padding}_weight_{i}_{j}"]
      np.testing.assert_allclose(weight, expected, rtol=0, atol=(i + 1) * 1e-6, err_msg=f"{name} after step {i + 1}")
      assert np.abs(weight - before[j]).max() > 1e-4, f"{name} did not move"


@pytest.mark.parametrize("cell", CELLS)
def test_initial_weights_have_the_distribution_of_those_of_keras(keras_results, cell):
  """The draws differ, but not their spread and mean, as far as so many draws tell."""
  config = Config(model=ModelConfig(cell=cell), training=TrainingConfig(seed=3))
  ours = weights_of(cell, Program(config, programs.mesh_of(1)).init().params)
  for j, (name, weight) in enumerate(zip(names_of(cell), ours, strict=True)):
    theirs = keras_results[f"article_{cell}_{j}"]
    assert weight.shape == theirs.shape
    np.testing.assert_allclose(weight.std(), theirs.std(), rtol=max(0.01, 2 / np.sqrt(weight.size)), err_msg=str(name))
    np.testing.assert_allclose(weight.mean(), theirs.mean(), atol=8 * theirs.std() / np.sqrt(weight.size) + 1e-9)
