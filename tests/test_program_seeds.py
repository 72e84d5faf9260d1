"""Several seeds train and predict at once, each as if alone."""

import dataclasses
import functools

import jax
import numpy as np
import programs
import pytest
from programs import assert_close, assert_equal, config_of, program_of, train

from imdb_jax import devices
from imdb_jax.config import Config, TrainingConfig
from imdb_jax.data import batches
from imdb_jax.optimizer import make_optimizer
from imdb_jax.program import Program

# Up to three chunks of the time loop, so that the seeds' batches need different numbers of chunks.
LENGTH, BATCH_SIZE, SEEDS = 50, 8, range(4, 8)
MODEL = dataclasses.replace(programs.MODEL, mask_padding=True, pooling="max")
# The last review is damaged; only one test uses it.
SPLIT, DAMAGED = programs.damaged(programs.make_split(27, LENGTH), row=26), 26


def config(num_seeds: int, seed: int = SEEDS[0]) -> Config:
  training = TrainingConfig(batch_size=BATCH_SIZE, seed=seed, num_seeds=num_seeds, bucket_by_length=True)
  return config_of(MODEL, LENGTH, training=training)


# `vmap` is for GPUs.
OVER_SEEDS = pytest.mark.parametrize("over_seeds", ["map", pytest.param("vmap", marks=pytest.mark.slow)])


@functools.cache
def together(over_seeds: str) -> Program:
  """Return a program for all seeds on four devices, through `jax.lax.map` as on a CPU or `jax.vmap` as on a GPU."""
  program = Program(config(len(SEEDS)), programs.mesh_of(4), make_optimizer(config(len(SEEDS)).optimizer, num_steps=10))
  if over_seeds == "vmap":
    program._over_seeds = jax.vmap
  return program


def epoch_rows() -> np.ndarray:
  """Return four batches per seed, the last of 2 reviews; no two seeds have the same batches."""
  training = config(len(SEEDS)).training
  lengths = SPLIT.lengths[:DAMAGED]
  return batches.epoch_rows(lengths, seeds=training.seeds, epoch=1, batch_size=BATCH_SIZE, by_length=True)


def seed_of(tree, i: int):
  """Return the arrays of one seed, still with an axis of seeds."""
  return jax.tree.map(lambda leaf: leaf[i : i + 1], tree)


@functools.cache
def trained_alone(i: int):
  """Train one seed on one device. All seeds share a compiled program; only the initial state differs."""
  initial = seed_of(programs.initial_state(config(len(SEEDS))), i)
  return train(program_of(1, config(1)), epoch_rows()[:, i : i + 1], initial, SPLIT)


@pytest.mark.parametrize("i", [0, len(SEEDS) - 1])
def test_each_seed_starts_as_if_alone(i):
  assert_equal(seed_of(programs.initial_state(config(len(SEEDS))), i), programs.initial_state(config(1, SEEDS[i])))


def test_seeds_start_with_different_parameters_and_dropout_keys():
  state = programs.initial_state(config(len(SEEDS)))
  for values in (state.params["lstm"]["kernel"], state.params["embedding"]["embedding"], state.key):
    assert len(np.unique(values.reshape(len(SEEDS), -1), axis=0)) == len(SEEDS)


# A deadlock in XLA would not let a signal end the test.
@pytest.mark.timeout(170, method="thread")
@OVER_SEEDS
def test_each_seed_trains_as_if_alone(over_seeds):
  """Up to rounding: Adam moves each parameter by about 1e-3 per step."""
  state, sums = train(together(over_seeds), epoch_rows(), split=SPLIT)
  assert state.step.tolist() == [4] * len(SEEDS)
  for i in range(len(SEEDS)):
    expected_state, expected_sums = trained_alone(i)
    assert_close(seed_of(sums, i), expected_sums, atol=1e-5)
    assert_close(seed_of(state, i), expected_state, atol=2e-5)


@OVER_SEEDS
def test_each_seed_predicts_as_if_alone(over_seeds):
  program, params = together(over_seeds), programs.initial_state(config(len(SEEDS))).params
  arrays = devices.put((SPLIT.tokens[:8], SPLIT.lengths[:8]), devices.over_rows(program.mesh))
  logits = program.predict(programs.put(program, params), *arrays)
  assert logits.shape == (len(SEEDS), 8, 1)
  for i in range(len(SEEDS)):
    expected = program_of(1, config(1)).predict(seed_of(params, i), SPLIT.tokens[:8], SPLIT.lengths[:8])
    np.testing.assert_allclose(logits[i : i + 1], expected, rtol=1e-5, atol=1e-6)


@OVER_SEEDS
def test_a_non_finite_step_is_noticed_and_changes_no_other_seed(over_seeds):
  rows, program = epoch_rows()[:3], together(over_seeds)
  bad_rows = rows.copy()
  bad_rows[2, 1, 0] = DAMAGED
  found, sums = train(program, bad_rows, split=SPLIT)
  assert sums["is_finite"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
  expected, _ = train(program, rows, split=SPLIT)
  for i in (0, 2, 3):
    assert_equal(seed_of(found, i), seed_of(expected, i))
