"""One training step means the same on any number of devices, for any padding, and as float64 computes Adam."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from imdb_jax import sharding, state, steps
from imdb_jax.config import ModelConfig, OptimizerConfig
from imdb_jax.data.batches import filled
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.model import SentimentLSTM

VOCABULARY_SIZE, LENGTH = 20, 6
CONFIG = ModelConfig(embedding_size=4, hidden_size=5)
NO_DROPOUT = dataclasses.replace(CONFIG, input_dropout_rate=0, recurrent_dropout_rate=0)


@functools.cache
def make_split() -> TokenSplit:
  """Three batches of 32 reviews and a last one of 8."""
  rng = np.random.default_rng(0)
  num_rows = 104
  lengths = rng.integers(0, LENGTH + 1, num_rows).astype(np.int32)
  is_real = np.arange(LENGTH) >= LENGTH - lengths[:, None]
  tokens = np.where(is_real, rng.integers(1, VOCABULARY_SIZE, (num_rows, LENGTH)), 0).astype(np.int16)
  return TokenSplit(tokens=tokens, lengths=lengths, labels=rng.integers(0, 2, num_rows).astype(np.int32))


def mesh_of(num_devices: int) -> Mesh:
  return Mesh(np.array(jax.devices()[:num_devices]), (sharding.AXIS,))


def gather(rows, size: int, mesh: Mesh) -> dict[str, jax.Array]:
  return sharding.put(make_split().gather(np.asarray(rows), size), sharding.over_reviews(mesh))


@functools.cache
def trainer(num_devices: int, config: ModelConfig = CONFIG, learning_rate: float | None = None):
  """A function that makes a fresh state, and the step; plain gradient descent if a learning rate is given."""
  mesh = mesh_of(num_devices)
  model = SentimentLSTM(config, VOCABULARY_SIZE)
  optimizer = (
    state.make_optimizer(OptimizerConfig(), num_steps=10) if learning_rate is None else optax.sgd(learning_rate)
  )
  return functools.partial(state.create, model, optimizer, 0, mesh), steps.make_train_step(model, optimizer, mesh)


@functools.cache
def run(num_devices: int) -> tuple[np.ndarray, dict]:
  """Two epochs of four batches, the last of 8, with dropout: the losses and the final parameters."""
  make_state, step = trainer(num_devices)
  mesh, current, losses = mesh_of(num_devices), make_state(), []
  size = sharding.padded_batch_size(32, mesh)
  for start in (0, 32, 64, 96) * 2:
    current, metrics = step(current, gather(range(start, min(start + 32, 104)), size, mesh))
    losses.append(metrics["loss"] / metrics["weight"])
  assert current.step == 8
  return np.array(jax.device_get(losses)), jax.device_get(current.params)


def assert_close(left: dict, right: dict, atol: float) -> None:
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), left, right)


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_devices_do_not_change_the_result(num_devices):
  """To rounding: Adam moves each parameter by about 1e-3 a step, another dropout mask would show at that size."""
  assert sharding.padded_batch_size(32, mesh_of(num_devices)) == (33 if num_devices == 3 else 32)
  losses, params = run(num_devices)
  expected_losses, expected_params = run(1)
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
  assert_close(params, expected_params, atol=2e-5)


def metrics_and_params(rows, size: int) -> tuple[dict, dict]:
  """One step of plain gradient descent of rate 1 without dropout: the parameters move by minus the gradient."""
  make_state, step = trainer(1, NO_DROPOUT, 1.0)
  after, metrics = step(make_state(), gather(rows, size, mesh_of(1)))
  return jax.device_get(metrics), jax.device_get(after.params)


def test_last_batch_is_averaged_over_its_own_reviews():
  """8 reviews in a batch of 32 move the parameters by the mean of what each moves them alone."""
  metrics, params = metrics_and_params(range(96, 104), 32)
  assert metrics["weight"] == 8
  alone = [metrics_and_params([row], 32) for row in range(96, 104)]
  assert_close(params, jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(after for _, after in alone)), 1e-6)
  np.testing.assert_allclose(metrics["loss"], sum(metrics["loss"] for metrics, _ in alone), rtol=1e-6)
  assert metrics["correct"] == sum(metrics["correct"] for metrics, _ in alone)


def test_reviews_of_weight_0_change_nothing():
  """Whatever stands in them, and with dropout too."""
  make_state, step = trainer(1)
  mesh = mesh_of(1)
  clean = jax.device_get(gather(range(8), 32, mesh))
  noisy = {name: array.copy() for name, array in clean.items()}
  noisy["tokens"][8:], noisy["lengths"][8:], noisy["labels"][8:] = 7, LENGTH, 1
  results = [step(make_state(), sharding.put(examples, sharding.over_reviews(mesh))) for examples in (clean, noisy)]
  (left, left_metrics), (right, right_metrics) = jax.device_get([(after.params, m) for after, m in results])
  assert left_metrics == right_metrics
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_metrics_are_sums_over_the_batch():
  model = SentimentLSTM(NO_DROPOUT, VOCABULARY_SIZE)
  make_state, _ = trainer(1, NO_DROPOUT, 1.0)
  split, rows = make_split(), slice(0, 32)
  labels = split.labels[rows]
  variables = {"params": jax.device_get(make_state().params)}
  logits = np.asarray(model.apply(variables, split.tokens[rows], split.lengths[rows]), np.float64)
  metrics, _ = metrics_and_params(range(32), 32)
  np.testing.assert_allclose(metrics["loss"], np.sum(np.logaddexp(0, logits) - logits * labels), rtol=1e-6)
  assert metrics["correct"] == np.sum((logits > 0) == labels)
  assert metrics["weight"] == 32


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7])
def test_adam_is_that_of_keras(scale):
  """lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): at small gradients the place of eps decides."""
  gradients = scale * np.array([[1.0, -2.0, 0.1, 0.0], [0.5, 2.0, -0.1, 0.0], [-3.0, 1.0, 0.4, 1.0]])
  optimizer = state.make_optimizer(OptimizerConfig(), num_steps=10)
  opt_state = optimizer.init(np.zeros(4, np.float32))
  m, v = np.zeros(4), np.zeros(4)
  for t, gradient in enumerate(gradients, start=1):
    with jax.numpy_dtype_promotion("standard"):
      update, opt_state = optimizer.update(gradient.astype(np.float32), opt_state)
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    expected = -1e-3 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)
    # optax computes 1 - b2^t in float32, of which 0.001 keeps four digits.
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-12, err_msg=f"step {t}")


def test_optimizer_settings_are_heeded():
  default = OptimizerConfig()
  for changed in ({"learning_rate": 1e-2}, {"b1": 0.5}, {"b2": 0.9}, {"epsilon": 0.1}):
    updates = []
    for config in (default, dataclasses.replace(default, **changed)):
      optimizer = state.make_optimizer(config, num_steps=10)
      opt_state = optimizer.init(np.zeros(1, np.float32))
      with jax.numpy_dtype_promotion("standard"):
        for gradient in (1.0, 0.1):
          update, opt_state = optimizer.update(np.full(1, gradient, np.float32), opt_state)
      updates.append(float(update[0]))
    assert abs(updates[0] - updates[1]) > 1e-5, changed


def test_one_trace_a_shape():
  """Compiling the article's step takes longer than many steps."""
  traces = []

  class Counting(SentimentLSTM):
    def __call__(self, *args, **kwargs):
      traces.append(args[0].shape)
      return super().__call__(*args, **kwargs)

  mesh = mesh_of(2)
  model, optimizer = Counting(NO_DROPOUT, VOCABULARY_SIZE), state.make_optimizer(OptimizerConfig(), num_steps=10)
  current = state.create(model, optimizer, 0, mesh)
  step = steps.make_train_step(model, optimizer, mesh)
  traces.clear()
  current, _ = step(current, gather(range(8), 8, mesh))
  once = len(traces)
  assert once > 0
  # A full batch, one with empty rows, and the state that a step returned: all one program.
  for rows in (range(8, 16), range(16, 19)):
    current, _ = step(current, gather(rows, 8, mesh))
  assert len(traces) == once
  step.lower(current, gather(range(6), 6, mesh))
  assert len(traces) > once


@functools.cache
def trainer_of_several(num_devices: int):
  """Makes up to 3 steps in one dispatch: the final state and the metrics, from groups of batches of `make_split`."""
  make_state, train_step = trainer(num_devices)
  mesh = mesh_of(num_devices)
  train_steps = steps.make_train_steps(train_step, mesh)
  reviews = sharding.put(vars(make_split()), sharding.replicated(mesh))
  size = sharding.padded_batch_size(32, mesh)

  def train(groups: list[list[range]]) -> tuple[state.TrainState, list[dict]]:
    current, metrics = make_state(), []
    for group in groups:
      rows = sharding.put(filled(group, 3, size), sharding.over_reviews(mesh, 1))
      number = sharding.put(np.array(len(group), np.int32), sharding.replicated(mesh))
      current, of_group = train_steps(current, reviews, rows, number)
      metrics.append(jax.device_get(of_group))
    return jax.device_get(current), metrics

  return train


EPOCH = [range(32), range(32, 64), range(64, 96), range(96, 104)]


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_steps_of_one_dispatch_are_those_of_several(num_devices):
  """To rounding, since the two are different programs; the last batch is smaller."""
  current, (first, second) = trainer_of_several(num_devices)([EPOCH[:3], EPOCH[3:]])
  losses = np.r_[first["loss"] / first["weight"], second["loss"][:1] / second["weight"][:1]]
  make_state, step = trainer(num_devices)
  expected, expected_losses = make_state(), []
  for rows in EPOCH:
    size = sharding.padded_batch_size(32, mesh_of(num_devices))
    expected, metrics = step(expected, gather(rows, size, mesh_of(num_devices)))
    expected_losses.append(metrics["loss"] / metrics["weight"])
  np.testing.assert_allclose(losses, jax.device_get(expected_losses), rtol=2e-6)
  assert_close(current.params, jax.device_get(expected.params), atol=1e-5)
  assert current.step == 4
  assert not any(value[1:].any() for value in second.values()), "steps that were not made have no metrics"


def test_where_a_dispatch_ends_changes_no_bit():
  train = trainer_of_several(2)
  whole, _ = train([EPOCH[:3], EPOCH[3:]])
  for groups in ([EPOCH[:1], EPOCH[1:]], [EPOCH[:2], EPOCH[2:3], EPOCH[3:]]):
    jax.tree.map(np.testing.assert_array_equal, train(groups)[0], whole)


def test_old_state_is_donated():
  make_state, step = trainer(2)
  before = make_state()
  after, _ = step(before, gather(range(32), 32, mesh_of(2)))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
  # A scalar that is computed anew is no input of the program, so its buffer stays.
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_each_step_draws_its_own_dropout_masks():
  """The loss of the same parameters and reviews depends on the number of the step, and on nothing else."""
  make_state, step = trainer(1)
  losses = []
  for number in (0, 1, 2, 0):
    current = dataclasses.replace(make_state(), step=jax.device_put(np.int32(number), sharding.replicated(mesh_of(1))))
    _, metrics = step(current, gather(range(32), 32, mesh_of(1)))
    losses.append(float(metrics["loss"]))
  assert len(set(losses[:3])) == 3
  assert losses[3] == losses[0]


def test_a_step_reads_nothing_back_and_copies_nothing_in():
  make_state, step = trainer(2)
  mesh = mesh_of(2)
  current = make_state()
  examples = gather(range(32), 32, mesh)
  current, _ = step(current, examples)  # compiles, which may copy constants
  with jax.transfer_guard("disallow"):
    current, metrics = step(current, examples)
    jax.block_until_ready((current, metrics))
  with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
    step(current, jax.device_get(examples))


@pytest.mark.parametrize("num_devices", [1, 3])
def test_predict_step_gives_the_logits_of_the_model(num_devices):
  mesh = mesh_of(num_devices)
  make_state, _ = trainer(1, CONFIG)
  params = jax.device_get(make_state().params)
  model = SentimentLSTM(CONFIG, VOCABULARY_SIZE)
  examples = gather(range(9), 9, mesh)
  placed = jax.device_put(params, sharding.replicated(mesh))
  logits = steps.make_predict_step(model, mesh)(placed, examples["tokens"], examples["lengths"])
  split = make_split()
  expected = model.apply({"params": params}, split.tokens[:9], split.lengths[:9])
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("non_finite", ["skip", "stop"])
def test_an_update_that_is_not_finite_is_skipped_only_if_asked(non_finite):
  mesh, model = mesh_of(1), SentimentLSTM(NO_DROPOUT, VOCABULARY_SIZE)
  optimizer = state.make_optimizer(OptimizerConfig(non_finite=non_finite), num_steps=10)
  step = steps.make_train_step(model, optimizer, mesh)
  before = jax.device_get(state.create(model, optimizer, 0, mesh).params)
  # One review of infinite weight: its loss and gradients are no numbers.
  examples = gather(range(32), 32, mesh) | {"weights": np.r_[np.inf, np.ones(31)].astype(np.float32)}
  after, metrics = step(state.create(model, optimizer, 0, mesh), examples)
  assert metrics["is_finite"] == 0
  assert state.num_skipped(after) == (non_finite == "skip")
  assert after.step == 1
  is_same = jax.tree.map(lambda one, other: np.array_equal(one, other), before, jax.device_get(after.params))
  assert all(jax.tree.leaves(is_same)) == (non_finite == "skip")
  if non_finite == "skip":
    # A good step after it is the first of Adam.
    moved, metrics = step(after, gather(range(32), 32, mesh))
    expected, _ = step(state.create(model, optimizer, 0, mesh), gather(range(32), 32, mesh))
    assert metrics["is_finite"] == 1
    assert state.num_skipped(moved) == 0
    assert_close(jax.device_get(moved.params), jax.device_get(expected.params), atol=0)


# Reviews of up to three chunks of time. Those of the first seed are short, so that its loop over chunks ends sooner.
SEEDS_LENGTH = 50
MASKED = dataclasses.replace(CONFIG, mask_padding=True, pooling="max")


FIRST_SEED, NUM_SEEDS = 4, 3


def batches_of_seeds() -> list[dict[str, np.ndarray]]:
  """Three batches [seeds, b, ...]; no two seeds see the same."""
  rng = np.random.default_rng(3)
  made = []
  for _ in range(3):
    longest = np.linspace(10, SEEDS_LENGTH, NUM_SEEDS).astype(int)
    lengths = rng.integers(0, longest[:, None] + 1, (NUM_SEEDS, 8)).astype(np.int32)
    is_real = np.arange(SEEDS_LENGTH) >= SEEDS_LENGTH - lengths[..., None]
    tokens = np.where(is_real, rng.integers(1, VOCABULARY_SIZE, is_real.shape), 0).astype(np.int16)
    labels = rng.integers(0, 2, lengths.shape).astype(np.float32)
    made.append({"tokens": tokens, "lengths": lengths, "labels": labels, "weights": np.ones_like(labels)})
  return made


@functools.cache
def trainer_of_seeds(num_seeds: int, num_devices: int, is_batched: bool = False):
  """A function that makes a fresh state from a seed, and the step; `is_batched` only keeps what was traced apart."""
  mesh, model = mesh_of(num_devices), SentimentLSTM(MASKED, VOCABULARY_SIZE)
  optimizer = state.make_optimizer(OptimizerConfig(non_finite="skip"), num_steps=10)
  step = steps.make_train_step(model, optimizer, mesh, num_seeds)
  return lambda seed: state.create(model, optimizer, seed, mesh, num_seeds), step


def train_seeds(batches, num_devices: int, is_batched: bool = False) -> tuple[list[dict], state.TrainState]:
  """All seeds at once: the metrics of each step, and the state after the last one."""
  make_state, step = trainer_of_seeds(NUM_SEEDS, num_devices, is_batched)
  current, metrics = make_state(FIRST_SEED), []
  for examples in batches:
    current, values = step(current, sharding.put(examples, sharding.over_reviews(mesh_of(num_devices), 1)))
    metrics.append(jax.device_get(values))
  return metrics, current


def of_seed(tree, i: int):
  return jax.tree.map(lambda leaf: leaf[i], tree)


def assert_trained_as_if_alone(batches, metrics: list[dict], together: state.TrainState) -> None:
  """To rounding; see `test_devices_do_not_change_the_result`."""
  make_state, step = trainer_of_seeds(1, 1)
  for i in range(NUM_SEEDS):
    alone = make_state(FIRST_SEED + i)
    for examples, values in zip(batches, metrics, strict=True):
      alone, expected = step(alone, sharding.put(of_seed(examples, i), sharding.over_reviews(mesh_of(1))))
      assert_close(of_seed(values, i), jax.device_get(expected), atol=1e-5)
    assert_close(of_seed(jax.device_get(together), i), jax.device_get(alone), atol=2e-5)


@pytest.mark.parametrize(
  ("num_devices", "is_batched"), [(2, False), (1, True)], ids=["two devices", "as on accelerators"]
)
def test_each_seed_is_trained_and_predicts_as_if_alone(num_devices, is_batched, monkeypatch):
  if is_batched:
    monkeypatch.setattr(jax.lax, "map", lambda function, arrays: jax.vmap(function)(arrays))
  batches, mesh, model = batches_of_seeds(), mesh_of(num_devices), SentimentLSTM(MASKED, VOCABULARY_SIZE)
  metrics, together = train_seeds(batches, num_devices, is_batched)
  assert_trained_as_if_alone(batches, metrics, together)

  examples = of_seed(batches[0], NUM_SEEDS - 1)
  placed = sharding.put(examples, sharding.over_reviews(mesh))
  logits = steps.make_predict_step(model, mesh, NUM_SEEDS)(together.params, placed["tokens"], placed["lengths"])
  for i in range(NUM_SEEDS):
    variables = {"params": of_seed(jax.device_get(together.params), i)}
    expected = model.apply(variables, examples["tokens"], examples["lengths"])
    np.testing.assert_allclose(logits[i], expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_skipped_in_its_own_seed():
  batches = batches_of_seeds()
  batches[2]["weights"][1, 0] = np.inf
  metrics, together = train_seeds(batches, 2)
  assert [values["is_finite"].tolist() for values in metrics] == [[1, 1, 1], [1, 1, 1], [1, 0, 1]]
  assert state.num_skipped(together).tolist() == [0, 1, 0]
  _, expected = train_seeds(batches_of_seeds(), 2)
  for i in (0, 2):
    assert_close(of_seed(jax.device_get(together), i), of_seed(jax.device_get(expected), i), atol=0)
  _, before = train_seeds(batches[:2], 2)
  assert_close(of_seed(jax.device_get(together.params), 1), of_seed(jax.device_get(before.params), 1), atol=0)
