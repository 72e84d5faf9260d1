"""Small programs and reviews, shared by the tests that train or predict with them."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from imdb_jax import devices
from imdb_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RuntimeConfig, TrainingConfig
from imdb_jax.data.tokens import TokenSplit
from imdb_jax.optimizer import make_optimizer
from imdb_jax.program import Program, TrainState

VOCABULARY_SIZE, LENGTH, BATCH_SIZE = 30, 6, 32
MODEL = ModelConfig(embedding_size=4, hidden_size=5)
NO_DROPOUT = dataclasses.replace(MODEL, input_dropout_rate=0, recurrent_dropout_rate=0)
# An epoch of `make_split`: three full batches and a last one of 8 reviews.
EPOCH = [range(32), range(32, 64), range(64, 96), range(96, 104)]


def mesh_of(num_devices: int) -> Mesh:
  return Mesh(np.array(jax.devices()[:num_devices]), (devices.AXIS,))


def config_of(model: ModelConfig = MODEL, length: int = LENGTH, steps_per_dispatch: int = 3, **others: Any) -> Config:
  """Return small settings; `others` are sections of the config."""
  return Config(
    data=DataConfig(vocabulary_size=VOCABULARY_SIZE, sequence_length=length),
    model=model,
    runtime=RuntimeConfig(steps_per_dispatch=steps_per_dispatch),
    **{"training": TrainingConfig(batch_size=BATCH_SIZE), **others},
  )


@functools.cache
def program_of(num_devices: int, config: Config) -> Program:
  """Return a program, compiled once per test session."""
  return Program(config, mesh_of(num_devices), make_optimizer(config.optimizer, num_steps=10))


def initial_state(config: Config) -> TrainState:
  """Return the state before the first step, on the host. It depends neither on the devices nor on the optimizer."""
  return _initial_state(dataclasses.replace(config, optimizer=OptimizerConfig()))


@functools.cache
def _initial_state(config: Config) -> TrainState:
  return jax.device_get(program_of(1, config).init())


@functools.cache
def make_split(num_rows: int = 104, length: int = LENGTH) -> TokenSplit:
  """Return random reviews of 0 to `length` tokens."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(0, length + 1, num_rows).astype(np.int32)
  is_real = np.arange(length) >= length - lengths[:, None]
  tokens = np.where(is_real, rng.integers(1, VOCABULARY_SIZE, (num_rows, length)), 0).astype(np.int16)
  return TokenSplit(tokens=tokens, lengths=lengths, labels=rng.integers(0, 2, num_rows).astype(np.int32))


def damaged(split: TokenSplit, row: int) -> TokenSplit:
  """Return the reviews with a token beyond the vocabulary in one of them, whose logit is NaN."""
  tokens = split.tokens.copy()
  tokens[row, -1] = VOCABULARY_SIZE
  return dataclasses.replace(split, tokens=tokens)


def rows_of(*batches: Sequence[int], size: int = BATCH_SIZE) -> np.ndarray:
  """Return the rows of one seed's batches, i32[steps, 1, size]; -1 where a batch has fewer."""
  rows = np.full((len(batches), 1, size), -1, np.int32)
  for row, batch in zip(rows[:, 0], batches, strict=True):
    row[: len(batch)] = batch
  return rows


def train(
  program: Program, rows: np.ndarray, state: TrainState | None = None, split: TokenSplit | None = None
) -> tuple[TrainState, dict[str, np.ndarray]]:
  """Train over rows i32[steps, seeds, b], with as many steps per dispatch as the program allows.

  Returns:
    The final state, and the sums of each step, f32[seeds, steps] each; both on the host.
  """
  state = put(program, initial_state(program.config) if state is None else state)
  size, sums = program.config.runtime.steps_per_dispatch, []
  for start in range(0, len(rows), size):
    group = rows[start : start + size]
    state, values = program.train_steps(state, *put_batches(program, group, split))
    sums.append({name: value[:, : len(group)] for name, value in jax.device_get(values).items()})
  return jax.device_get(state), {name: np.concatenate([each[name] for each in sums], axis=1) for name in sums[0]}


def put_batches(program: Program, rows: np.ndarray, split: TokenSplit | None = None) -> tuple[Any, jax.Array]:
  """Place the reviews at rows i32[steps, seeds, b] on the devices, all with the same weight."""
  split = make_split() if split is None else split
  return program.put_batches(split, np.ones(len(split), np.float32), rows)


def put(program: Program, tree: Any) -> Any:
  """Place a state or parameters on the devices of a program."""
  return devices.put(tree, devices.replicated(program.mesh))


def assert_close(left: Any, right: Any, atol: float) -> None:
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), left, right)


def assert_equal(left: Any, right: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, left, right)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """Yield a list that grows by an item whenever XLA compiles a program."""
  found: list[str] = []

  def listen(event: str, duration: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(f"{details}: {duration:.3f} s")

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
