"""Any Flax module and any optimizer of optax in place of those of the settings; docs/own_model.md."""

import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from commands.running import assert_one_clear_line, run
from flax import linen as nn
from programs import (
  BATCH_SIZE,
  EPOCH,
  VOCABULARY_SIZE,
  assert_close,
  assert_equal,
  config_of,
  make_split,
  rows_of,
  train,
)
from training.test_resume import signal_before
from training.tiny import change, tiny, without_times

import imdb_jax
from imdb_jax import devices
from imdb_jax.config import Config, TrainingConfig
from imdb_jax.errors import CheckpointError, UsageError
from imdb_jax.export import export
from imdb_jax.processes import Interrupted
from imdb_jax.program import Program
from imdb_jax.report import page as report
from imdb_jax.training.metrics import Recorder

DOCUMENT = Path(__file__).parents[2] / "docs" / "own_model.md"


class Mean(nn.Module):
  """The mean word vector, under its dropout mask in training."""

  use_bias: bool = True

  @nn.compact
  def __call__(self, tokens, lengths, dropout_masks):
    vectors = nn.Embed(1000, 4, name="embedding")(tokens)
    if dropout_masks[0] is not None:
      vectors = vectors * dropout_masks[0][:, None]
    is_real = (tokens > 0)[:, :, None]
    sums = jnp.sum(jnp.where(is_real, vectors, 0), axis=1)
    return nn.Dense(1, self.use_bias)(sums / jnp.maximum(lengths, 1)[:, None].astype(jnp.float32))


class Counts(nn.Module):
  """Logistic regression on the counts of words."""

  head_size: int = 1

  @nn.compact
  def __call__(self, tokens, lengths, dropout_masks):
    weights = self.param("weights", nn.initializers.zeros, (VOCABULARY_SIZE, self.head_size))
    bias = self.param("bias", nn.initializers.zeros, (self.head_size,))
    is_real = (tokens > 0)[:, :, None]
    return jnp.sum(jnp.where(is_real, weights[tokens.astype(jnp.int32)], 0), axis=1) + bias[None]


def softmax(x: np.ndarray) -> np.ndarray:
  exponentials = np.exp(x - x.max(axis=1, keepdims=True))
  return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("num_devices", "num_seeds", "num_classes"), [(1, 1, 2), (3, 2, 2), (2, 1, 3)])
def test_a_program_trains_any_module_with_any_optimizer(num_devices, num_seeds, num_classes):
  """Gradient descent with momentum on logistic regression, in float64."""
  split, classes = make_split(), tuple("abc"[:num_classes])
  head_size = 1 if num_classes == 2 else num_classes
  config = config_of(training=TrainingConfig(batch_size=BATCH_SIZE, num_seeds=num_seeds))
  optimizer = optax.sgd(0.5, momentum=0.9)
  program = Program(config, programs.mesh_of(num_devices), optimizer, classes, Counts(head_size))
  rows = np.repeat(rows_of(*EPOCH), num_seeds, axis=1)
  state, sums = train(program, rows, jax.device_get(program.init()))
  counts = np.stack([np.bincount(row[row > 0], minlength=VOCABULARY_SIZE) for row in split.tokens]).astype(np.float64)
  weights, bias = np.zeros((VOCABULARY_SIZE, head_size)), np.zeros(head_size)
  moments, losses = (np.zeros_like(weights), np.zeros_like(bias)), []
  for batch in EPOCH:
    x, labels = counts[batch], split.labels[batch]
    logits = x @ weights + bias
    # One logit is that of the second class against 0.
    p = softmax(np.pad(logits, ((0, 0), (1, 0))) if head_size == 1 else logits)
    losses.append(-np.log(p[np.arange(len(x)), labels]).sum())
    slopes = ((p - np.eye(num_classes)[labels]) / len(x))[:, -head_size:]
    moments = 0.9 * moments[0] + x.T @ slopes, 0.9 * moments[1] + slopes.sum(axis=0)
    weights, bias = weights - 0.5 * moments[0], bias - 0.5 * moments[1]
  for seed in range(num_seeds):
    np.testing.assert_allclose(sums["loss"][seed], losses, rtol=1e-5)
    np.testing.assert_allclose(state.params["weights"][seed], weights, atol=1e-6)
    np.testing.assert_allclose(state.params["bias"][seed], bias, atol=1e-6)
  found = program.predict(programs.put(program, state.params), *split.batch(np.arange(104), 104 + -104 % num_devices))
  np.testing.assert_allclose(jax.device_get(found)[0, :104], counts @ weights + bias, atol=1e-5)


def probabilities(params, split) -> np.ndarray:
  """Compute the answers of `Mean` in float64."""
  embedding, dense = (jax.tree.map(lambda leaf: np.float64(leaf[0]), params[name]) for name in ("embedding", "Dense_0"))
  means = [
    embedding["embedding"][row[len(row) - length :]].sum(axis=0) / max(length, 1)
    for row, length in zip(split.tokens, split.lengths, strict=True)
  ]
  return 1 / (1 + np.exp(-(np.array(means) @ dense["kernel"] + dense["bias"])[:, 0]))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """Return the settings of a run of `Mean`."""
  config = tiny(tmp_path_factory.mktemp("own") / "run")
  imdb_jax.fit(config, model=Mean())
  return config


def test_a_run_is_restored_with_its_module(own):
  classifier = imdb_jax.Classifier.load(own.run_dir, model=Mean())
  split = classifier.read_split("test")
  np.testing.assert_allclose(classifier.predict_proba(split)[:, 1], probabilities(classifier.params, split), atol=1e-6)
  assert (own.run_dir / "report.html").exists()
  for use in (classifier.explain, classifier.features):
    with pytest.raises(UsageError, match="Mean: features and explanations require the network of the settings"):
      use(["A text."])


@pytest.mark.slow
def test_it_can_be_exported_as_a_program(own, tmp_path):
  """`export` compares what it has written with the classifier."""
  export(imdb_jax.Classifier.load(own.run_dir, model=Mean()), "stablehlo", tmp_path / "model")
  assert (tmp_path / "model" / "model.stablehlo").exists()


def test_a_run_that_was_stopped_ends_with_the_same_bits(own, tmp_path):
  config = change(own, "runtime", run_dir=tmp_path / "run")
  with signal_before(Recorder, "record_steps", signal.SIGTERM, at_call=2), pytest.raises(Interrupted):
    imdb_jax.fit(config, model=Mean())
  imdb_jax.fit(config, model=Mean())
  assert without_times(config.run_dir) == without_times(own.run_dir)
  assert_equal(last_params(config), last_params(own))


@pytest.mark.slow
def test_the_number_of_devices_changes_only_rounding(own, tmp_path):
  """The dropout masks are those of the whole batch."""
  config = change(own, "runtime", run_dir=tmp_path / "run", num_devices=2)
  imdb_jax.fit(config, model=Mean())
  assert_close(last_params(config), last_params(own), atol=1e-6)


def last_params(config: Config) -> dict:
  classifier = imdb_jax.Classifier.load(config.run_dir, step="latest", model=Mean())
  assert classifier.step == 8
  return jax.device_get(classifier.params)


class Other(Mean):
  pass


@pytest.mark.slow
def test_a_run_is_refused_with_another_module_or_none(own, tmp_path):
  before = {path: path.read_bytes() for path in own.run_dir.rglob("*") if path.is_file()}
  network = "the network of its settings"
  for model, name in ((None, network), (Other(), "Other")):
    expected = f"was trained with Mean, not with {name}; see model= of imdb_jax.fit"
    with pytest.raises(UsageError, match=expected):
      imdb_jax.Classifier.load(own.run_dir, model=model)
    with pytest.raises(UsageError, match=expected):
      imdb_jax.fit(change(own, "training", epochs=3), model=model)
  with pytest.raises(UsageError, match=f"was trained with Mean, not with {network}"):
    imdb_jax.fit(change(tiny(tmp_path / "new"), "runtime", init_from=own.run_dir))
  assert not (tmp_path / "new").exists()
  with pytest.raises(CheckpointError, match=r"Dense_0\.bias.* is not a file of this checkpoint"):
    imdb_jax.Classifier.load(own.run_dir, model=Mean(use_bias=False))
  assert {path: path.read_bytes() for path in own.run_dir.rglob("*") if path.is_file()} == before
  assert_one_clear_line(run("evaluate", own.run_dir), 2, "was trained with Mean", "model=")
  usual = tiny(tmp_path / "usual", epochs=1)
  imdb_jax.fit(usual)
  with pytest.raises(UsageError, match=f"was trained with {network}, not with Mean"):
    imdb_jax.Classifier.load(usual.run_dir, model=Mean())
  with pytest.raises(UsageError, match="--embedding random, --ngrams 0 and no --init-from"):
    imdb_jax.fit(change(tiny(tmp_path / "new"), "runtime", init_from=usual.run_dir), model=Mean())


class Positions(nn.Module):
  """A weight for each word at each position, and dropout of Flax."""

  @nn.compact
  def __call__(self, tokens, lengths, dropout_masks):
    vectors = nn.Embed(1000, 4)(tokens) + self.param("positions", nn.initializers.zeros, (tokens.shape[1], 4))[None]
    vectors = nn.Dropout(0.5, deterministic=dropout_masks[0] is None)(vectors)
    return nn.Dense(1)(vectors.reshape(len(tokens), -1))


@pytest.mark.slow
def test_a_module_may_depend_on_the_length_and_use_the_dropout_of_flax(tmp_path):
  losses = []
  for number, rate in enumerate((0.2, 0.0)):
    # Without masks, the module cannot tell training from prediction.
    rates = {"input_dropout_rate": rate, "recurrent_dropout_rate": rate}
    config = change(tiny(tmp_path / str(number), epochs=1), "model", **rates)
    losses.append(imdb_jax.fit(config, model=Positions()).history[0]["loss"])
    shape = imdb_jax.Classifier.load(config.run_dir, model=Positions()).params["positions"].shape
    assert shape == (1, 16, 4)
  assert abs(losses[0] - losses[1]) > 1e-4


class Wide(nn.Module):
  size: int

  @nn.compact
  def __call__(self, tokens, lengths, dropout_masks):
    return nn.Dense(self.size)(tokens.astype(jnp.float32))


class Flat(nn.Module):
  @nn.compact
  def __call__(self, tokens, lengths, dropout_masks):
    return nn.Dense(1)(tokens.astype(jnp.float32))[:, 0]


class Normalized(nn.Module):
  @nn.compact
  def __call__(self, tokens, lengths, dropout_masks):
    return nn.BatchNorm(use_running_average=True)(nn.Dense(1)(tokens.astype(jnp.float32)))


class Short(nn.Module):
  @nn.compact
  def __call__(self, tokens, lengths):
    return nn.Dense(1)(tokens.astype(jnp.float32))


WRONG = {
  "two logits for two classes": (Wide(2), r"Wide: cannot be trained: the logits .* shape \(2, 2\), not \(2, 1\)"),
  "logits without a second axis": (Flat(), r"Flat: cannot be trained: the logits .* shape \(2,\), not \(2, 1\)"),
  "batch statistics": (Normalized(), 'Normalized: cannot be trained: .*"batch_stats"'),
  "two arguments": (Short(), "Short: cannot be trained: .* positional arguments"),
  "a class": (Mean, "model: must be an instance of a class of flax.linen.Module, not <class"),
  "a function": (lambda *_: 0, "model: must be an instance of a class of flax.linen.Module, not <function"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_module_that_cannot_be_trained_is_refused_in_one_line_and_leaves_no_trace(mistake, tmp_path):
  model, expected = WRONG[mistake]
  with pytest.raises(UsageError, match=expected) as error:
    imdb_jax.fit(tiny(tmp_path / "run"), model=model)
  assert len(str(error.value).splitlines()) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("section", "settings"),
  [("training", {"objective": "next_word"}), ("model", {"ngrams": 2}), ("model", {"embedding": "svd"})],
  ids=str,
)
def test_settings_that_compute_a_layer_of_the_network_are_refused(section, settings, tmp_path):
  config = tiny(tmp_path / "run")
  with pytest.raises(UsageError, match="Your own model requires --objective label, --embedding random, --ngrams 0"):
    imdb_jax.fit(change(config, section, **settings), model=Mean())
  assert not config.run_dir.exists()


def test_the_report_says_how_to_use_the_model(own):
  page = (own.run_dir / "report.html").read_text()
  assert "model=Mean(...))" in page
  assert "imdb-jax predict" not in page
  # From Python, it has everything that needs no explanations.
  classifier = imdb_jax.Classifier.load(own.run_dir, model=Mean())
  answers, notes = classifier.answers("test")
  report.write(classifier.config, classifier.program.task, answers, notes)
  assert "Where it is least certain" in (own.run_dir / "report.html").read_text()


@pytest.mark.slow
def test_the_program_of_the_document_learns(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  found = {}
  # As in a program of its own: this project's tests are stricter about types than JAX.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for block in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
      exec(block, found)
  assert found["result"].best["val_accuracy"] > 0.95
  assert capsys.readouterr().out.splitlines()[-2] == "['positive']"
  # Chance is log 2; the first epoch of another optimizer with a low rate.
  assert 0 < found["loss"] < np.log(2)
  assert devices.AXIS in found["mesh"].axis_names
