"""The jitted entry points: one training step, several in one dispatch, one prediction step.

They take a global batch spread over the mesh. `shard_map` gives each device its reviews, so that the gradients are
summed across devices once a step and not once a time step.

With several seeds the same step is taken for each of them: every array of the state and of the batch has a first axis
[seeds], and so have the metrics and logits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from imdb_jax import sharding
from imdb_jax.model import SentimentLSTM, draw_dropout_masks
from imdb_jax.state import TrainState

Examples = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

_REVIEWS, _EVERYWHERE = PartitionSpec(sharding.AXIS), PartitionSpec()


def _for_each_seed(function: Callable[..., Any], mesh: Mesh, num_seeds: int) -> Callable[..., Any]:
  """A function of one seed's arrays as one of all seeds'."""
  if num_seeds == 1:
    return function
  if mesh.devices.flat[0].platform != "cpu":
    return jax.vmap(function)
  # One seed keeps the cores busy, together all would pay for the longest review of any, and a batched step stands still
  # for good on several CPU devices (jaxlib 0.10.2).
  return lambda *arrays: jax.lax.map(lambda of_seed: function(*of_seed), arrays)


def make_train_step(
  model: SentimentLSTM, optimizer: optax.GradientTransformation, mesh: Mesh, num_seeds: int = 1
) -> jax.stages.Wrapped:
  """A jitted step: state and batch -> new state and the batch's metrics. The old state's buffers are donated.

  The batch holds tokens int[b, t], lengths i32[b], labels f32[b] and weights f32[b]; b must divide over the mesh.
  A review of weight 0 changes nothing. The loss is the weighted mean of the binary cross-entropy.
  The metrics are sums over the batch, f32[] each: loss, correct, weight. They become means by dividing by weight.
  With them stands is_finite, 1 if the loss and the norm of all gradients are finite, else 0.
  """

  def gradients(params, examples, dropout_masks):
    def weighted_loss(params):
      logits = model.apply({"params": params}, examples["tokens"], examples["lengths"], dropout_masks)
      losses = optax.sigmoid_binary_cross_entropy(logits, examples["labels"])
      return jnp.sum(losses * examples["weights"]), logits

    (loss, logits), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
    is_correct = (logits > 0) == (examples["labels"] > 0.5)
    metrics = {
      "loss": loss,
      "correct": jnp.sum(jnp.where(is_correct, examples["weights"], 0)),
      "weight": jnp.sum(examples["weights"]),
    }
    return jax.lax.psum((grads, metrics), sharding.AXIS)

  # check_vma would have the gradients summed over devices where the parameters are used: inside the time loop.
  sharded_gradients = jax.shard_map(
    gradients,
    mesh=mesh,
    in_specs=(_EVERYWHERE, _REVIEWS, _REVIEWS),
    out_specs=_EVERYWHERE,
    check_vma=False,
  )

  def train_step(state: TrainState, examples: Examples) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    # Drawn for the global batch: the result does not depend on how many devices share it.
    dropout_masks = draw_dropout_masks(key, model.config, examples["labels"].shape[0])
    grads, metrics = sharded_gradients(state.params, examples, dropout_masks)
    grads = jax.tree.map(lambda grad: grad / metrics["weight"], grads)
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(grads))
    metrics["is_finite"] = is_finite.astype(jnp.float32)
    # An optimizer that skips what is not finite looks at the gradients alone.
    grads = jax.tree.map(lambda grad: jnp.where(is_finite, grad, jnp.nan), grads)
    # optax raises a float to an integer count, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key), metrics

  place = sharding.replicated(mesh)
  return jax.jit(
    _for_each_seed(train_step, mesh, num_seeds),
    donate_argnums=0,
    in_shardings=(place, sharding.over_reviews(mesh, int(num_seeds > 1))),
    out_shardings=place,
  )


def make_train_steps(train_step: jax.stages.Wrapped, mesh: Mesh, num_seeds: int = 1) -> jax.stages.Wrapped:
  """Several steps in one dispatch, jitted: state, split, rows and num_steps -> new state and metrics.

  Between two dispatches the devices wait for the host, and for each other. Within one they go from step to step, over
  reviews that lie on them. One program makes any number of steps up to k, so where a run stops changes no bit of it.

  Args:
    train_step: from `make_train_step`, for the same mesh and seeds.
    mesh: devices to use.
    num_seeds: of the state.

  Returns:
    A function of the state, whose buffers are donated; of the split, tokens int[n, t], lengths i32[n] and labels
    i32[n], whole on every device; of rows i32[k, b], or i32[k, seeds, b], the reviews of each step, where -1 is none;
    and of num_steps i32[]. The metrics of `train_step` have a first axis [k]; beyond num_steps they are 0.
  """
  place, over_reviews = sharding.replicated(mesh), sharding.over_reviews(mesh, int(num_seeds > 1))

  def gather(split, rows):
    is_review = rows >= 0
    return {
      "tokens": jnp.where(is_review[..., None], split["tokens"][rows], 0),
      "lengths": jnp.where(is_review, split["lengths"][rows], 0),
      "labels": jnp.where(is_review, split["labels"][rows], 0).astype(jnp.float32),
      "weights": is_review.astype(jnp.float32),
    }

  # Each device looks its own reviews up.
  gather = jax.shard_map(
    gather, mesh=mesh, in_specs=(_EVERYWHERE, over_reviews.spec), out_specs=over_reviews.spec, check_vma=False
  )

  def train_steps(state: TrainState, split: dict[str, jax.Array], rows: jax.Array, num_steps: jax.Array):
    def step(i, carry):
      state, metrics = carry
      state, of_step = train_step(state, gather(split, rows[i]))
      return state, jax.tree.map(lambda values, value: values.at[i].set(value), metrics, of_step)

    _, shapes = jax.eval_shape(lambda: train_step(state, gather(split, rows[0])))
    metrics = jax.tree.map(lambda leaf: jnp.zeros((len(rows), *leaf.shape), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_steps, step, (state, metrics))

  rows_place = sharding.over_reviews(mesh, 1 + int(num_seeds > 1))
  return jax.jit(train_steps, donate_argnums=0, in_shardings=(place, place, rows_place, place), out_shardings=place)


def make_predict_step(model: SentimentLSTM, mesh: Mesh, num_seeds: int = 1) -> jax.stages.Wrapped:
  """A jitted step: params, tokens int[b, t] and lengths i32[b] -> logits f32[b], the same on every device.

  Several seeds see the same reviews.
  """

  def logits(params, tokens, lengths):
    return model.apply({"params": params}, tokens, lengths)

  sharded_logits = jax.shard_map(
    logits, mesh=mesh, in_specs=(_EVERYWHERE, _REVIEWS, _REVIEWS), out_specs=_REVIEWS, check_vma=False
  )

  def predict_step(params, tokens, lengths):
    return _for_each_seed(lambda params: sharded_logits(params, tokens, lengths), mesh, num_seeds)(params)

  place, reviews = sharding.replicated(mesh), sharding.over_reviews(mesh)
  return jax.jit(predict_step, in_shardings=(place, reviews, reviews), out_shardings=place)
