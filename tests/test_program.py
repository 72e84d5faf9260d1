"""Results and compilation of a training step on one device. See also test_program_devices.py."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import programs
import pytest
from programs import (
  BATCH_SIZE,
  EPOCH,
  LENGTH,
  NO_DROPOUT,
  VOCABULARY_SIZE,
  assert_close,
  assert_equal,
  config_of,
  initial_state,
  make_split,
  program_of,
  rows_of,
  train,
)

from imdb_jax import devices, lstm, program
from imdb_jax.config import ModelConfig, OptimizerConfig, RuntimeConfig, TrainingConfig
from imdb_jax.errors import UsageError
from imdb_jax.model import TextClassifier
from imdb_jax.program import Program


def model_logits(params: dict, rows: slice) -> np.ndarray:
  """Return the logits f64[n] of some reviews without dropout, from the parameters of one seed."""
  model = TextClassifier(NO_DROPOUT, VOCABULARY_SIZE)
  split = make_split()
  logits = jax.jit(model.apply)({"params": params}, split.tokens[rows], split.lengths[rows])
  return np.asarray(logits, np.float64)[:, 0]


def first_seed(tree):
  return jax.tree.map(lambda leaf: leaf[0], tree)


@functools.cache
def gradient_descent() -> Program:
  """Return a program without dropout that moves the parameters by minus the gradient."""
  return Program(config_of(NO_DROPOUT), programs.mesh_of(1), optax.sgd(1.0))


def gradient_and_sums(rows) -> tuple[dict, dict]:
  initial = jax.device_get(gradient_descent().init())
  after, sums = train(gradient_descent(), rows_of(rows), initial)
  return jax.tree.map(np.subtract, initial.params, after.params), first_seed(sums)


def test_last_batch_is_averaged_over_its_own_reviews():
  """The gradient of 8 reviews in a batch of 32 is the mean of those of the single reviews."""
  gradient, sums = gradient_and_sums(range(96, 104))
  assert sums["weight"] == 8
  alone = [gradient_and_sums([row]) for row in range(96, 104)]
  assert_close(gradient, jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(each for each, _ in alone)), 1e-6)
  np.testing.assert_allclose(sums["loss"], sum(sums["loss"] for _, sums in alone), rtol=1e-6)
  assert sums["correct"] == sum(sums["correct"] for _, sums in alone)


def test_rows_without_a_review_change_nothing():
  """Such a row has index -1, which must not read the last review."""
  config, split = config_of(), make_split()
  changed = {"tokens": split.tokens.copy(), "lengths": split.lengths.copy(), "labels": split.labels.copy()}
  changed["tokens"][-1], changed["lengths"][-1], changed["labels"][-1] = 7, programs.LENGTH, 1 - split.labels[-1]
  rows = rows_of(range(8))
  expected, expected_sums = train(program_of(1, config), rows)
  found, sums = train(program_of(1, config), rows, split=type(split)(**changed))
  assert_equal((found, sums), (expected, expected_sums))


def test_sums_are_those_of_the_batch():
  labels, initial = make_split().labels[:32], gradient_descent().init()
  logits = model_logits(first_seed(jax.device_get(initial.params)), slice(32))
  gradient, sums = gradient_and_sums(range(32))
  np.testing.assert_allclose(sums["loss"], np.sum(np.logaddexp(0, logits) - logits * labels), rtol=1e-6)
  assert sums["correct"] == np.sum((logits > 0) == labels)
  assert sums["weight"] == 32
  assert sums["is_finite"] == 1
  squares = sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient))
  np.testing.assert_allclose(sums["grad_norm"], np.sqrt(squares), rtol=1e-4)


def test_predictions_are_those_of_the_model():
  params = gradient_descent().init().params
  logits = gradient_descent().predict(params, make_split().tokens[:9], make_split().lengths[:9])
  assert logits.shape == (1, 9, 1)
  expected = model_logits(first_seed(jax.device_get(params)), slice(9))
  np.testing.assert_allclose(logits[0, :, 0], expected, rtol=1e-5, atol=1e-6)


def test_predictions_with_prepared_parameters_are_the_same():
  """The first shard has short reviews, so each device starts at a position of its own."""
  split = make_split()
  rows = np.argsort(split.lengths, kind="stable")[:32]
  config = config_of(NO_DROPOUT, training=TrainingConfig(batch_size=BATCH_SIZE, num_seeds=2))
  two = program_of(2, config)
  params = programs.put(two, programs.initial_state(config).params)
  prepared = two.prepare(params)
  assert "lookup" in prepared
  assert two.prepare(prepared) is prepared
  arrays = devices.put((split.tokens[rows], split.lengths[rows]), devices.over_rows(two.mesh))
  for method in (two.predict, two.features):
    np.testing.assert_allclose(method(prepared, *arrays), method(params, *arrays), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  "changes", [{"mask_padding": True}, {"directions": 2}, {"pooling": "mean"}, {"cell": "gru"}], ids=str
)
def test_models_that_need_every_position_are_not_prepared(changes):
  config = config_of(dataclasses.replace(NO_DROPOUT, **changes))
  params = programs.initial_state(config).params
  assert program_of(1, config).prepare(params) is params


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7])
def test_adam_is_that_of_keras(scale):
  """lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon). With small gradients, the place of epsilon matters."""
  gradients = scale * np.array([[1.0, -2.0, 0.1, 0.0], [0.5, 2.0, -0.1, 0.0], [-3.0, 1.0, 0.4, 1.0]])
  optimizer = program.make_optimizer(OptimizerConfig(), num_steps=10)
  opt_state = optimizer.init(np.zeros(4, np.float32))
  m, v = np.zeros(4), np.zeros(4)
  for t, gradient in enumerate(gradients, start=1):
    with jax.numpy_dtype_promotion("standard"):
      update, opt_state = optimizer.update(gradient.astype(np.float32), opt_state)
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    expected = -1e-3 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)
    # optax computes 1 - b2^t in float32, which leaves four digits of 0.001.
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-12, err_msg=f"step {t}")


def test_clipping_and_weight_decay_are_those_of_the_papers():
  """Gradients are clipped by their norm over all parameters, before the moments. The decay passes Adam by."""
  config = OptimizerConfig(clip_norm=0.5, weight_decay=0.1, learning_rate=0.01)
  optimizer = program.make_optimizer(config, num_steps=10)
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
  opt_state = optimizer.init(jax.tree.map(np.float32, params))
  m, v = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
  # The norms of the second gradients are too small to be clipped.
  for t, scale in enumerate((1.0, 0.01, 10.0), start=1):
    grads = {name: scale * rng.normal(size=value.shape) for name, value in params.items()}
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(*jax.tree.map(np.float32, (grads, opt_state, params)))
    factor = min(1, 0.5 / np.sqrt(sum(np.sum(grad**2) for grad in grads.values())))
    assert (factor == 1) == (scale == 0.01)
    for name, value in params.items():
      m[name] = 0.9 * m[name] + 0.1 * factor * grads[name]
      v[name] = 0.999 * v[name] + 0.001 * (factor * grads[name]) ** 2
      adam = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m[name] / (np.sqrt(v[name]) + 1e-7)
      # As above.
      np.testing.assert_allclose(updates[name], -0.01 * (adam + 0.1 * value), rtol=1e-4, err_msg=f"{name}, step {t}")


@pytest.mark.slow
def test_one_step_with_clipping_and_weight_decay_leaves_the_linear_model_alone():
  model = dataclasses.replace(NO_DROPOUT, mask_padding=True, ngrams=2)
  # A large epsilon, because Adam's first update does not depend on the scale of the gradient otherwise.
  settings = {"clip_norm": 0.01, "weight_decay": 0.5, "epsilon": 0.1, "learning_rate": 0.1}
  trained = program_of(1, config_of(model, optimizer=OptimizerConfig(**settings)))
  descent = Program(config_of(model), programs.mesh_of(1), optax.sgd(1.0))
  before = jax.device_get(descent.init())
  # With n-grams that are not those of the reviews.
  before.params["ngrams"]["weights"] = np.ones_like(before.params["ngrams"]["weights"])
  grads = jax.tree.map(
    lambda old, new: old.astype(np.float64) - new, before.params, train(descent, rows_of(range(32)), before)[0].params
  )
  start = dataclasses.replace(jax.device_get(trained.init()), params=before.params)
  after = train(trained, rows_of(range(32)), start)[0].params
  assert_equal(after["ngrams"], before.params["ngrams"])
  factor = 0.01 / np.sqrt(
    sum(np.sum(grad**2) for layer, tree in grads.items() if layer != "ngrams" for grad in tree.values())
  )
  assert factor < 0.5
  for layer in ("embedding", "lstm", "dense"):
    for name, value in before.params[layer].items():
      grad = factor * grads[layer][name]
      decayed = value.astype(np.float64)
      adam = grad / (np.abs(grad) + 0.1 / np.sqrt(0.001))
      np.testing.assert_allclose(after[layer][name], value - 0.1 * (adam + 0.5 * decayed), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "changed",
  [
    *({"learning_rate": 1e-2}, {"b1": 0.5}, {"b2": 0.9}, {"epsilon": 0.1}, {"schedule": "one_cycle"}),
    *({"clip_norm": 0.05}, {"weight_decay": 0.1}),
  ],
  ids=str,
)
def test_each_setting_of_the_optimizer_has_an_effect(changed):
  updates = []
  for config in (OptimizerConfig(), OptimizerConfig(**changed)):
    optimizer = program.make_optimizer(config, num_steps=10)
    opt_state = optimizer.init(np.zeros(1, np.float32))
    with jax.numpy_dtype_promotion("standard"):
      for gradient in (1.0, 0.1):
        update, opt_state = optimizer.update(np.full(1, gradient, np.float32), opt_state, np.ones(1, np.float32))
    updates.append(float(update[0]))
  assert abs(updates[0] - updates[1]) > 1e-5


def test_the_word_vectors_learn_at_a_rate_of_their_own():
  slow = config_of(NO_DROPOUT, optimizer=OptimizerConfig(embedding_rate=0.25))
  start = initial_state(slow).params
  ends = [train(program_of(1, config), rows_of(EPOCH[0]))[0].params for config in (config_of(NO_DROPOUT), slow)]
  whole, quarter = (jax.tree.map(np.subtract, end, start) for end in ends)
  np.testing.assert_allclose(quarter["embedding"]["embedding"], whole["embedding"]["embedding"] / 4, atol=1e-7)
  assert np.abs(quarter["embedding"]["embedding"]).max() > 1e-5
  for name in ("lstm", "dense"):
    assert_equal(quarter[name], whole[name])


def test_all_seeds_may_start_from_given_word_vectors():
  program = program_of(2, config_of(training=TrainingConfig(batch_size=BATCH_SIZE, num_seeds=2)))
  vectors = np.arange(VOCABULARY_SIZE * 4, dtype=np.float32).reshape(VOCABULARY_SIZE, 4)
  given, drawn = jax.device_get((program.init({"embedding": {"embedding": vectors}}), program.init()))
  for seed in range(2):
    np.testing.assert_array_equal(given.params["embedding"]["embedding"][seed], vectors)
  for name in ("lstm", "dense"):
    assert_equal(given.params[name], drawn.params[name])
  assert jax.tree.map(np.shape, given) == jax.tree.map(np.shape, drawn)


def test_one_program_trains_any_batch():
  """Compiling the article's program takes longer than many steps."""
  trained = program_of(1, config_of())
  state, _ = train(trained, rows_of(*EPOCH))
  # One step instead of three, a full batch, one with empty rows, and a state that an earlier step has returned.
  with programs.compilations() as found:
    for rows in (EPOCH[:1], EPOCH[2:], [range(16, 19)]):
      state, _ = train(trained, rows_of(*rows), state)
  assert not found
  with programs.compilations() as found:
    jax.jit(lambda x: x + 1)(1.0)
  assert found, "else the check proves nothing"


def test_each_step_draws_its_own_dropout_masks():
  """With the same parameters and reviews, the loss depends only on the number of the step."""
  trained, initial, losses = program_of(1, config_of()), programs.initial_state(config_of()), []
  for number in (0, 1, 2, 0):
    state = dataclasses.replace(initial, step=np.full(1, number, np.int32))
    _, sums = train(trained, rows_of(range(32)), state)
    losses.append(float(sums["loss"][0, 0]))
  assert len(set(losses[:3])) == 3
  assert losses[3] == losses[0]


def test_no_step_copies_the_parameters():
  """XLA would copy a state with a seed axis on every step. The embedding is the largest parameter."""
  config = config_of()
  trained = program_of(1, config)
  arguments = trained.abstract_state(), *programs.put_batches(trained, rows_of(*EPOCH[:3]))
  compiled = trained.train_steps.lower(*arguments).compile().as_text()
  embedding = rf"f32\[(1,)?{VOCABULARY_SIZE},{config.model.embedding_size}\]\S*"
  loops, _, entry = compiled.partition("\nENTRY ")
  assert re.search(embedding, loops), "else the check proves nothing"
  assert re.search(embedding, entry), "else the check proves nothing"
  assert not re.findall(rf".* = {embedding} copy\(.*", loops)


def test_abstract_state_describes_the_initial_state():
  trained = program_of(1, config_of())
  state, abstract = trained.init(), trained.abstract_state()
  assert jax.tree.structure(state) == jax.tree.structure(abstract)
  for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
    assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)
    assert leaf.shape[0] == 1, "the first axis is that of the seeds"


def test_a_step_with_a_non_finite_loss_is_noticed():
  trained = program_of(1, config_of())
  split = programs.damaged(make_split(), row=0)
  _, sums = train(trained, rows_of(range(32)), programs.initial_state(trained.config), split)
  assert sums["is_finite"].tolist() == [[0]]


def test_parameters_that_the_last_update_overflows_are_noticed():
  """Loss and gradients of that step are finite, and no later step would show the damage."""
  trained = program_of(1, config_of())
  initial = programs.initial_state(trained.config)
  huge = jax.tree.map(lambda leaf: np.full_like(leaf, 3e37), initial.params)
  before = dataclasses.replace(initial, opt_state=optax.tree.set(initial.opt_state, mu=huge))
  _, sums = train(trained, rows_of(range(32)), before)
  assert np.isfinite(sums["loss"]).all()
  assert sums["is_finite"].tolist() == [[0]]


def test_a_named_implementation_that_cannot_compute_the_model_is_refused():
  with pytest.raises(UsageError, match=r"^--implementation mosaic_gpu: it supports hidden sizes of 64 and 128"):
    Program(dataclasses.replace(config_of(), runtime=RuntimeConfig(implementation="mosaic_gpu")), programs.mesh_of(1))


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_other_cells_run_on_scan_and_a_named_fast_implementation_is_refused(cell):
  config = config_of(ModelConfig(cell=cell))
  choice = Program(config, programs.mesh_of(1)).choice
  assert choice == ("scan", f"chunked: its cell is an LSTM; only scan computes {cell}")
  for name in ("mosaic_gpu", "chunked"):
    named = dataclasses.replace(config, runtime=RuntimeConfig(implementation=name))
    with pytest.raises(
      UsageError, match=rf"^--implementation {name}: its cell is an LSTM; only scan computes {cell}\.$"
    ):
      Program(named, programs.mesh_of(1))


def test_a_named_kernel_is_refused_under_another_precision():
  config = config_of(training=TrainingConfig(matmul_precision="float32"))
  config = dataclasses.replace(config, runtime=RuntimeConfig(implementation="mosaic_gpu"))
  with pytest.raises(UsageError, match=r"^--implementation mosaic_gpu: it computes recurrent products in bfloat16; "):
    Program(config, programs.mesh_of(1))


@pytest.mark.parametrize(
  ("setting", "expected"),
  [("auto", "HIGHEST"), ("float32", "HIGHEST"), ("tensorfloat32", "HIGH"), ("bfloat16", "DEFAULT")],
)
def test_each_matrix_product_has_the_precision_of_the_settings(setting, expected):
  """Also where the surrounding program asks JAX for another one."""
  trained = program_of(1, config_of(training=TrainingConfig(matmul_precision=setting)))
  state, split = trained.abstract_state(), make_split()
  with jax.default_matmul_precision("tensorfloat32" if setting == "bfloat16" else "bfloat16"):
    batches = programs.put_batches(trained, rows_of(*EPOCH[:3]))
    training = trained.train_steps.lower(state, *batches).as_text()
    prediction = trained.predict.lower(state.params, split.tokens[:9], split.lengths[:9]).as_text()
  for text in (training, prediction):
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(f"precision = [{expected}, {expected}]" in line for line in products)
  assert trained.precision == ("float32" if setting == "auto" else setting)


def test_the_precision_names_that_of_the_kernel(monkeypatch):
  monkeypatch.setattr(program, "_choose", lambda config, device: lstm.Choice("mosaic_gpu", "fastest"))
  assert Program(config_of(), programs.mesh_of(1)).precision == "float32, recurrence bfloat16"


def test_a_training_step_on_a_gpu_launches_the_kernel_twice_and_has_no_loop(monkeypatch):
  """For a GPU that need not be there. A loop over positions would launch kernels in each of them."""
  monkeypatch.setattr(lstm.choice, "gpu_problem", lambda device: None)
  # The devices of the test are CPUs, on which seeds take turns.
  monkeypatch.setattr(Program, "_over_seeds", lambda self, function: jax.vmap(function))
  config = config_of(ModelConfig(embedding_size=4, hidden_size=64))
  config = dataclasses.replace(config, runtime=RuntimeConfig(implementation="mosaic_gpu", steps_per_dispatch=3))
  trained = Program(config, programs.mesh_of(1))
  arguments = trained.abstract_state(), *programs.put_batches(trained, rows_of(*EPOCH[:3]))
  text = trained.train_steps.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 2
  assert text.count("stablehlo.while") == 1, "the loop over steps"
  assert "f64" not in text
  # Inputs and outputs of the two launches: z, hidden states, their gradients and dz.
  shapes = re.findall(r"stablehlo\.transpose .*tensor<([\dx]+)x\w+>$", text, re.MULTILINE)
  sizes = [[int(size) for size in shape.split("x")] for shape in shapes]
  large = [np.prod(size) for size in sizes if LENGTH in size and 64 in size]
  assert sorted(large) == [BATCH_SIZE * LENGTH * units for units in (64, 64, 256, 256)]
