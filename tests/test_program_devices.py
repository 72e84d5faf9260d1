"""Training on several devices and in dispatches of several steps gives the result of one device, step by step."""

import dataclasses
import functools
import re

import jax
import numpy as np
import programs
import pytest
from programs import EPOCH, assert_close, assert_equal, config_of, make_split, program_of, rows_of, train

from imdb_jax import devices
from imdb_jax.config import TrainingConfig


@functools.cache
def trained_on(num_devices: int):
  """Train for two epochs with dropout; the last batch of each is smaller."""
  return train(program_of(num_devices, config_of()), rows_of(*EPOCH, *EPOCH))


@pytest.mark.parametrize("num_devices", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4))])
def test_the_number_of_devices_does_not_change_the_result(num_devices):
  """Up to rounding: Adam moves each parameter by about 1e-3 per step, and other dropout masks would show."""
  assert devices.padded_size(32, programs.mesh_of(num_devices)) == (33 if num_devices == 3 else 32)
  (state, sums), (expected_state, expected_sums) = trained_on(num_devices), trained_on(1)
  assert state.step == 8
  np.testing.assert_allclose(sums["loss"] / sums["weight"], expected_sums["loss"] / expected_sums["weight"], rtol=2e-6)
  np.testing.assert_allclose(sums["grad_norm"], expected_sums["grad_norm"], rtol=2e-6)
  rounded = {"loss": 0, "grad_norm": 0}
  assert_equal(sums | rounded, expected_sums | rounded)
  assert_close(state.params, expected_state.params, atol=2e-5)


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_where_a_dispatch_ends_changes_no_bit(num_devices):
  trained = program_of(num_devices, config_of())
  whole, whole_sums = train(trained, rows_of(*EPOCH))
  for lengths in ([1, 1, 1, 1], [2, 1, 1]):
    state, start, sums = None, 0, []
    for length in lengths:
      state, values = train(trained, rows_of(*EPOCH[start : start + length]), state)
      start += length
      sums.append(values)
    assert_equal(state, whole)
    assert_equal(jax.tree.map(lambda *each: np.concatenate(each, axis=1), *sums), whole_sums)


def test_steps_that_were_not_made_have_no_sums():
  trained = program_of(2, config_of())
  _, sums = trained.train_steps(trained.init(), *programs.put_batches(trained, rows_of(*EPOCH[:1])))
  assert {name: value.shape for name, value in sums.items()} == dict.fromkeys(sums, (1, 3))
  assert sums["weight"].tolist() == [[32, 0, 0]]
  assert not any(np.asarray(value)[:, 1:].any() for value in sums.values())


def test_the_old_state_is_donated():
  trained = program_of(2, config_of())
  before = trained.init()
  after, _ = trained.train_steps(before, *programs.put_batches(trained, rows_of(*EPOCH[:1])))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.step)))
  # A value that is computed anew is no input of the program, so its buffer stays.
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim > 1)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_a_dispatch_copies_nothing_between_host_and_devices():
  trained = program_of(2, config_of())
  state, batches = trained.init(), programs.put_batches(trained, rows_of(*EPOCH[:3]))
  # The first call compiles, which may copy constants.
  state, _ = trained.train_steps(state, *batches)
  with jax.transfer_guard("disallow"):
    jax.block_until_ready(trained.train_steps(state, *batches))
  host_batches = jax.device_get(batches)
  with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
    trained.train_steps(programs.put(trained, programs.initial_state(trained.config)), *host_batches)


def test_each_device_gets_its_reviews_of_some_steps_and_no_others():
  trained, split, weights = program_of(3, config_of()), make_split(10_000), np.arange(10_000, dtype=np.float32)
  rows = rows_of(range(9_000, 9_032), [7, 3])
  batches, num_steps = trained.put_batches(split, weights, rows)
  assert num_steps == 2
  padded = np.full((1, 3, 33), -1)
  padded[0, :2, :32] = rows[:, 0]
  expected = {"lengths": split.lengths, "labels": split.labels, "loss_weights": weights, "weights": np.ones(10_000)}
  for name, values in expected.items():
    np.testing.assert_array_equal(batches[name], np.where(padded >= 0, values[padded], 0))
  np.testing.assert_array_equal(batches["tokens"], np.where(padded[..., None] >= 0, split.tokens[padded], 0))
  assert {array.dtype for array in batches.values()} == {np.dtype(kind) for kind in ("int16", "int32", "float32")}
  for array in batches.values():
    assert [shard.data.shape[:3] for shard in array.addressable_shards] == [(1, 3, 11)] * 3


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "model", "implementation"),
  [
    (2, 1, programs.MODEL, "chunked"),
    (4, 1, programs.MODEL, "scan"),
    (3, 2, dataclasses.replace(programs.MODEL, directions=2, pooling="mean"), "chunked"),
    (4, 1, dataclasses.replace(programs.MODEL, cell="gru"), "scan"),
  ],
)
def test_devices_exchange_the_gradients_and_sums_once_per_step_and_nothing_else(
  num_devices, num_seeds, model, implementation
):
  """Not once per position of the time loop, nor once per parameter."""
  training = TrainingConfig(batch_size=programs.BATCH_SIZE, num_seeds=num_seeds)
  config = config_of(model, training=training)
  config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, implementation=implementation))
  trained = program_of(num_devices, config)
  state, rows = trained.abstract_state(), np.repeat(rows_of(*EPOCH[:3]), num_seeds, axis=1)
  arguments = state, *programs.put_batches(trained, rows)
  compiled = trained.train_steps.lower(*arguments).compile().as_text()
  # As `%name = (f32[5,1]{1,0}, f32[]) all-reduce(...)`; of an asynchronous pair, the start.
  found = re.findall(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)", compiled)
  assert [operation for _, operation, _ in found] == ["all-reduce"]
  ((shapes, _, details),) = found
  exchanged = sorted(re.findall(r"(\w+)\[([\d,]*)\]", shapes))
  gradients = [("f32", ",".join(map(str, leaf.shape[1:]))) for leaf in jax.tree.leaves(state.params)]
  # Loss, correct answers and weight of the batch.
  assert exchanged == sorted([*gradients, *[("f32", "")] * 3])
  assert details.count("while/body") == 2, "within the loops over seeds and steps, and outside that over time"
  assert f"replica_groups={{{{{','.join(map(str, range(num_devices)))}}}}}" in details, "of all devices at once"


def test_predictions_do_not_depend_on_the_number_of_devices():
  one, three, split = program_of(1, config_of()), program_of(3, config_of()), make_split()
  params = programs.initial_state(config_of()).params
  arrays = devices.put((split.tokens[:9], split.lengths[:9]), devices.over_rows(three.mesh))
  logits = three.predict(programs.put(three, params), *arrays)
  np.testing.assert_allclose(logits, one.predict(params, split.tokens[:9], split.lengths[:9]), rtol=1e-5, atol=1e-6)
