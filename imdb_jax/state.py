"""What training changes: a plain pytree, and how it begins."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from imdb_jax import sharding
from imdb_jax.config import OptimizerConfig
from imdb_jax.model import SentimentLSTM


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Of one seed. Of several every array has a first axis [seeds].

  Attributes:
  step: i32[], updates made.
  params: of the model, a plain tree of dicts.
  opt_state: of the optimizer.
  key: u32[2], the raw PRNG key from which every step's dropout masks follow.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  key: jax.Array


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Adam in Keras's form, lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon), t from 1.

  optax adds its epsilon after the second moment's bias is corrected; an epsilon of epsilon / sqrt(1 - b2^t) there
  is Keras's exactly. A schedule runs over `num_steps`, all steps of the run.
  """

  def epsilon(count: jax.Array) -> jax.Array:
    t = count.astype(jnp.float32) + 1
    return config.epsilon / jnp.sqrt(1 - config.b2**t)

  adam = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "learning_rate", "eps_root"))
  learning_rate: optax.ScalarOrSchedule = config.learning_rate
  if config.schedule == "one_cycle":
    learning_rate = optax.schedules.cosine_onecycle_schedule(num_steps, config.learning_rate)
  optimizer = adam(learning_rate=learning_rate, b1=config.b1, b2=config.b2, eps=epsilon)
  if config.non_finite == "skip":
    # After so many in a row optax would apply what is not finite. The recorder stops the run long before.
    return optax.apply_if_finite(optimizer, max_consecutive_errors=2**30)
  return optimizer


def _initial_state(model: SentimentLSTM, optimizer: optax.GradientTransformation, seed: jax.Array) -> TrainState:
  params_key, dropout_key = jax.random.split(jax.random.key(seed))
  tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  params = model.init(params_key, tokens, lengths)["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=jax.random.key_data(dropout_key),
  )


def _initial_states(model: SentimentLSTM, optimizer: optax.GradientTransformation, seed: jax.Array, num_seeds: int):
  if num_seeds == 1:
    return _initial_state(model, optimizer, seed)
  # One by one: in a batch the decomposition that makes the recurrent kernel may round differently.
  seeds = seed + jnp.arange(num_seeds, dtype=jnp.uint32)
  return jax.lax.map(lambda seed: _initial_state(model, optimizer, seed), seeds)


def create(
  model: SentimentLSTM, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, num_seeds: int = 1
) -> TrainState:
  """The state before the first step, of `seed` and the `num_seeds` - 1 after it, on every device of the mesh."""
  init = jax.jit(_initial_states, static_argnums=(0, 1, 3), out_shardings=sharding.replicated(mesh))
  return init(model, optimizer, jnp.uint32(seed), num_seeds)


def abstract(
  model: SentimentLSTM, optimizer: optax.GradientTransformation, mesh: Mesh, num_seeds: int = 1
) -> TrainState:
  """Shapes, dtypes and shardings of the state, without computing it: what a checkpoint is restored into."""
  shapes = jax.eval_shape(lambda seed: _initial_states(model, optimizer, seed, num_seeds), jnp.uint32(0))
  place = sharding.replicated(mesh)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def num_skipped(state: TrainState) -> np.ndarray:
  """Non-finite steps in a row, just now, of each seed; see `make_optimizer`."""
  opt_state = state.opt_state
  return np.asarray(opt_state.notfinite_count if isinstance(opt_state, optax.ApplyIfFiniteState) else 0)


def num_parameters(state: TrainState) -> int:
  """Of one seed."""
  return sum(leaf.size for leaf in jax.tree.leaves(state.params)) // state.step.size
